"""Tokens to the outputs of the model that is trained; what a frozen backbone makes of them is computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textgym.engine.micro_batches import BATCH_TOKENS, micro_batches
from textgym.engine.trunk import trunk_of
from textgym.rewards.models.causality import is_causal
from textgym.rewards.models.headed_model import HeadedRewardModel
from textgym.rewards.models.text_forward import readable_tokens

from .encoding import EncodedText, encode, encode_pairs


class TextScorer:
    """Texts to tokens, tokens to the outputs of the model.

    :param max_length: most tokens of a text; longer ones lose tokens at their beginning. By default what the model can
        read, and at most 512
    :param frozen: whether no gradient is to go into the backbone
    :param bf16: whether the backbone computes in bfloat16 where there are gradients; without, always in its own dtype
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        *,
        frozen: bool = False,
        bf16: bool = False,
    ) -> None:
        readable = readable_tokens(model, tokenizer)
        if max_length is None:
            max_length = min(512, readable or 512)
        if max_length < 4 or (readable is not None and max_length > readable):
            raise ValueError(f"max_length={max_length} must be from 4 to {readable}, which is what the model can read")
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.frozen, self.bf16 = frozen, bf16
        self.headed = isinstance(model, HeadedRewardModel)
        self.convolutional = self.headed and model.config.head == "cnn"
        self._one_state = not self.headed or model.config.reads_one_state
        has_score = self.headed or isinstance(getattr(model, "score", None), nn.Linear)
        self.causal = has_score and is_causal(trunk_of(model))
        # PAD is never read: neither the attention mask nor the position of the end depends on it.
        self._pad = tokenizer.pad_token_id or 0
        self._remembered: dict[tuple[int, ...], Tensor] = {}

    @property
    def ends_in_eos(self) -> bool:
        """Whether complete texts are read with an end-of-sequence token after them.

        They are where :class:`~textgym.rewards.CausalRewardModel` will read them. A head that reads more than one state
        is none for it; :class:`~textgym.rewards.ClassifierReward` reads them, as the tokenizer gives them.
        """
        return self.causal and self._one_state

    @property
    def state_size(self) -> int:
        """Numbers that a head reads of a token."""
        config = self.model.config
        return int(config.state_size if self.headed else config.get_text_config().hidden_size)

    @property
    def scores_everywhere(self) -> bool:
        """Whether one pass gives the scores of all prefixes."""
        return self.causal and (self.ends_in_eos or self.encode(["a"], [""])[0][0].tail == [])

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> tuple[list[EncodedText], int]:
        """Tokens of texts, and how many were too long; see :func:`~textgym.reward_training.encoding.encode`."""
        return encode(self.tokenizer, prompts, completions, self.max_length, self.ends_in_eos)

    def encode_pairs(
        self, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
    ) -> tuple[list[tuple[EncodedText, EncodedText]], int]:
        """Tokens of pairs, and how many were cut; see :func:`~textgym.reward_training.encoding.encode_pairs`."""
        return encode_pairs(self.tokenizer, prompts, chosen, rejected, self.max_length, self.ends_in_eos)

    def tensors(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, each ``(B, L)``, padded on the right."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self.model.device
        return ids.to(device), mask.to(device)

    def at_end(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits ``(B, C)`` of rows of token ids."""
        if not (self.causal or self.headed):
            return self._of_classifier(rows)
        states, mask = self._states(rows)
        if self.convolutional:
            return self.model.score(states, mask).float()
        if self.headed:
            return self.model.score(self.model.pooled(states, mask)).float()
        last = mask.sum(1) - 1
        return self.model.score(states[torch.arange(len(rows), device=last.device), last]).float()

    def everywhere(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Logits ``(B, L, C)`` of a causal model at every token, and the mask ``(B, L)`` of those there are."""
        states, mask = self._states(rows)
        head = self.model.score
        return (head.everywhere(states, mask) if self.convolutional else head(states)).float(), mask

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits ``(N, C)`` of any number of rows, in evaluation mode, on the CPU."""
        training = self.model.training
        self.model.eval()
        result = torch.zeros(len(rows), self.model.config.num_labels)
        for part in micro_batches(list(map(len, rows)), BATCH_TOKENS):
            result[part] = self.at_end([rows[i] for i in part]).cpu()
        self.model.train(training)
        return result

    def train(self) -> None:
        """Training mode; of a frozen backbone, dropout would be noise and nothing else."""
        self.model.train()
        if self.frozen:
            trunk_of(self.model).eval()

    @torch.no_grad()
    def remember(self, rows: Sequence[Sequence[int]], everywhere: bool = False) -> None:
        """Compute what the head reads of rows once, and keep it.

        For a backbone that does not change, in evaluation mode. Classifiers with more than one module after the
        backbone are forwarded anew each time: nothing is kept.

        :param rows: rows of token ids
        :param everywhere: keep the states of all tokens, for :meth:`everywhere`; where the score at the end is all that
            is wanted and one state is enough for it, that alone is kept
        """
        self.model.eval()
        new = [list(row) for row in dict.fromkeys(map(tuple, rows)) if row not in self._remembered]
        for part in micro_batches(list(map(len, new)), BATCH_TOKENS):
            batch = [new[i] for i in part]
            if not (self.causal or self.headed):
                read = self._read_by_classifier(batch)
                if read is None:
                    return
                kept = list(read.cpu())
            else:
                states, mask = self._states(batch)
                if everywhere or self.convolutional:
                    kept = [row[: len(ids)].cpu().clone() for row, ids in zip(states, batch, strict=True)]
                else:  # the state of the whole text stands in for a text of one token
                    last = mask.sum(1) - 1
                    whole = self.model.pooled(states, mask) if self.headed else states[range(len(batch)), last]
                    kept = list(whole[:, None].cpu())
            for ids, state in zip(batch, kept, strict=True):
                self._remembered[tuple(ids)] = state

    def _states(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Last hidden states ``(B, L, H)``, and the mask ``(B, L)`` of those there are."""
        known = self._recalled(rows)
        if known is not None:
            lengths = torch.tensor([len(state) for state in known], device=self.model.device)
            states = pad_sequence(known, batch_first=True).to(self.model.device)
            return states, (torch.arange(states.shape[1], device=lengths.device) < lengths[:, None]).long()
        ids, mask = self.tensors(rows)
        options: dict[str, Any] = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        with torch.no_grad() if self.frozen else contextlib.nullcontext(), self._autocast():
            if self.headed:
                states = self.model.states(ids, mask, **options)
            else:
                states = trunk_of(self.model)(input_ids=ids, attention_mask=mask, **options).last_hidden_state
        return states.to(self.model.dtype), mask

    def _of_classifier(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits ``(B, C)`` of a model whose own forward is the only way to them."""
        known = self._recalled(rows)
        if known is not None:
            [head] = _heads(self.model)
            return head(pad_sequence(known, batch_first=True).to(self.model.device)).float()
        ids, mask = self.tensors(rows)
        with self._autocast():
            return self.model(input_ids=ids, attention_mask=mask).logits.float()

    def _read_by_classifier(self, rows: Sequence[Sequence[int]]) -> Tensor | None:
        """What the head of a classifier is given, ``(B, ...)``; None where it isn't the one head, or not all of it."""
        heads = _heads(self.model)
        if len(heads) != 1:
            return None
        read: list[tuple[Any, ...]] = []
        hook = heads[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs))
        ids, mask = self.tensors(rows)
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        hook.remove()
        if len(read) != 1 or len(read[0]) != 1 or not torch.allclose(heads[0](read[0][0]), logits, atol=1e-4):
            return None
        return read[0][0]

    def _recalled(self, rows: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """What is remembered of rows, where all of them are."""
        if not self._remembered:
            return None
        known = [self._remembered.get(tuple(row)) for row in rows]
        return None if any(state is None for state in known) else [state for state in known if state is not None]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not (self.bf16 and self.model.training):
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    """The modules after the backbone that have weights."""
    trunk = trunk_of(model)
    return [child for child in model.children() if child is not trunk and next(child.parameters(), None) is not None]
