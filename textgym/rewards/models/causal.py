"""A transformer with a scalar head as a reward: every prefix of a text gets a score.

It reads the policy's own tokens where its tokenizer has the same vocabulary. Then it steps along token by
token with a slot cache (:meth:`CausalRewardModel.potentials`) or scores all prefixes of an episode in one
teacher-forced pass (:meth:`CausalRewardModel.prefix_potentials`), with the same result. With another
tokenizer it reads decoded text; conversations it reads in the chat template of its own tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from textgym.chat.turns import TurnTokens
from textgym.engine.cached_model import CachedModel
from textgym.engine.exactness import SteppedModel, Stepping
from textgym.engine.micro_batches import BATCH_TOKENS
from textgym.engine.trunk import trunk_of
from textgym.model_sources import resolve_device, resolve_dtype
from textgym.rewards.base import Reward
from textgym.rewards.errors import RewardError
from textgym.rewards.models import headed_model  # noqa: F401  teaches transformers to open models with heads of their own
from textgym.rewards.models.own_template import OwnTemplate
from textgym.rewards.models.same_tokens import SameTokens
from textgym.rewards.models.text_forward import open_pretrained
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import wanted_per_row
from textgym.vocabulary import context_limit, is_encoder_decoder, position_limit

Activation = Literal["identity", "tanh", "sigmoid"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda score: score,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
Origin = Callable[[int], tuple[int, str]]  # the row and the completion that score i belongs to, for errors


class CausalRewardModel(Reward):
    """Φ = activation(head(hidden state at the prefix's last token)).

    An encoder-decoder reads the prompt, as its tokenizer encodes a text, with the encoder and the completion, after
    its start token, with the decoder, as a language model of that kind does: Φ of the empty completion is the head on
    the start token. (``T5ForSequenceClassification``'s own forward feeds one text to encoder and decoder alike: for a
    model that was trained in that way there is :class:`~textgym.rewards.ClassifierReward`.)

    :param model: a causal sequence classifier with one label and a head called ``score``, for example
        ``LlamaForSequenceClassification(config)`` with ``num_labels=1``, or an encoder-decoder with a
        ``classification_head``, such as ``T5ForSequenceClassification``; it is put in evaluation mode
    :param tokenizer: the model's tokenizer
    :param activation: ``"identity"``, ``"tanh"`` or ``"sigmoid"``; by default the ``reward_activation`` of
        the model's configuration, or the identity where it has none
    :param device: where to move the model; by default it stays where it is
    :param dtype: what to convert the weights to; by default they stay as they are
    :param append_eos: whether the model was trained on texts that end in its end-of-sequence token. It then
        also reads that token where a completion ended by itself; otherwise it never sees it.
    :raises ValueError: if the model has more than one label or no such head or is not causal, the
        activation is unknown, or ``append_eos`` is set and the tokenizer has no end-of-sequence token
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        activation: Activation | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        append_eos: bool = True,
    ) -> None:
        self._encoder_decoder = is_encoder_decoder(model.config)
        heads = ("score", "classification_head") if self._encoder_decoder else ("score",)
        head = next((h for h in (getattr(model, name, None) for name in heads) if h is not None), None)
        if not isinstance(head, torch.nn.Module):
            raise ValueError(
                f"{type(model).__name__} has no head called 'score'; a causal reward model is a causal "
                "sequence classifier such as LlamaForSequenceClassification, or an encoder-decoder with a "
                "'classification_head' such as T5ForSequenceClassification"
            )
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, this model has num_labels={model.config.num_labels}")
        activation = activation or getattr(model.config, "reward_activation", None) or "identity"
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("append_eos=True needs a tokenizer with an end-of-sequence token, this one has none")
        model.to(
            device=None if device is None else resolve_device(device),
            dtype=None if dtype is None else resolve_dtype(dtype),
        )
        self.model = model
        self.head = head
        self.tokenizer = tokenizer
        self._turns = TurnTokens(tokenizer)
        self.activation = activation
        self.append_eos = append_eos
        self._name = Path(model.name_or_path).name or type(model).__name__
        self._limit = position_limit(model.config)
        vocab_size = int(model.config.get_text_config().vocab_size)
        stepped = SteppedModel(model, f"reward={self._name}", vocab_size, head, self._own_output)
        self._stepping = Stepping(stepped)
        self._same_tokens = SameTokens(tokenizer, vocab_size, self._encoder_decoder)
        self._template = OwnTemplate(tokenizer, self._name)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        activation: Activation | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        append_eos: bool = True,
    ) -> CausalRewardModel:
        """Load a reward model that was saved with ``save_pretrained``.

        :param path: a directory, or the id of a model on the Hugging Face hub
        :param tokenizer: by default the one saved with the model
        :param device: ``"auto"`` is the GPU where there is one, otherwise the CPU
        :raises FileNotFoundError: if ``path`` is written as a path and is not a directory
        :raises ValueError: if the checkpoint has no trained reward head; see also the class
        """
        if isinstance(path, os.PathLike) or str(path).startswith((".", "~", os.sep)):
            path = str(Path(path).expanduser())
            if not os.path.isdir(path):
                raise FileNotFoundError(f"there is no reward model directory {path!r}")
        model, opened = open_pretrained(
            AutoModelForSequenceClassification, path, tokenizer, dtype, "a trained reward model"
        )
        return cls(
            model,
            opened,
            activation=activation,
            device=device,
            append_eos=append_eos,
        )

    @property
    def name(self) -> str:
        return self._name

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """Score complete texts: the end-of-sequence token is appended to each where ``append_eos`` is set.

        :raises RewardError: if a text is longer than the model's context
        """
        complete = np.ones(len(completions), dtype=bool)
        prompts = self._template.prompts(prompts, columns)
        return list(self._score_texts(prompts, completions, complete, lambda i: (i, completions[i])).tolist())

    def potentials(self, batch: PrefixBatch) -> np.ndarray:
        """Φ of each prefix; where one has grown by a token since the last call, only that token is computed.

        :return: ``(B,)`` float64
        :raises RewardError: if a prefix is empty or longer than the model's context, or its score is not
            finite
        """
        if len(batch) == 0:
            return np.zeros(0)
        if not self._reads_tokens_of(batch):
            prompts = self._template.prompts(batch.prompts, batch.columns)
            return self._score_texts(prompts, batch.completions, batch.finished, batch.origin)
        lengths = batch.lengths - self._unread(batch.finished)
        self._check_lengths(lengths, batch.origin)
        read = self._read(batch)
        if len(np.unique(batch.rows)) < len(batch):  # several prefixes of one row can't share its slot
            positions = list(lengths[:, None] - 1)
            scores = np.concatenate(self._score_positions(list(read), batch.prompt_lengths, positions))
        else:
            self.model.eval()
            machine = self._machine(int(lengths.max()))
            scores = self._head(machine.last_hidden(read, lengths, batch.rows, batch.prompt_lengths))
        return self._checked(scores, batch.origin)

    def prefix_potentials(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Φ of many prefixes of each row, from one pass over it.

        :param batch: B rows
        :param at: for each row the completion lengths, in tokens, at which Φ is wanted; 0 is the prompt alone
        :return: for each row float64 values of Φ in the order of ``at``
        :raises RewardError: as :meth:`potentials`
        :raises ValueError: if ``at`` does not fit the batch
        """
        counts = wanted_per_row(batch, at)
        if not self._reads_tokens_of(batch):
            return super().prefix_potentials(batch, at)
        if sum(counts) == 0:
            return [np.zeros(0) for _ in at]
        owner = np.repeat(np.arange(len(batch)), counts)  # (K,) the row each prefix belongs to
        wanted = np.array([length for lengths in at for length in lengths], dtype=np.int64)  # (K,)
        available = batch.completion_lengths[owner]
        wrong = np.flatnonzero((wanted < 0) | (wanted > available))
        if len(wrong):
            i = owner[wrong[0]]
            raise ValueError(f"at[{i}] is {at[i]}, but row {i} has {available[wrong[0]]} completion tokens")

        def origin(k: int) -> tuple[int, str]:
            return int(batch.rows[owner[k]]), batch.completions[owner[k]]

        lengths = batch.prompt_lengths[owner] + wanted
        lengths -= self._unread(batch.finished)[owner] * (wanted == available)
        self._check_lengths(lengths, origin)
        bounds = np.cumsum(counts)[:-1]
        positions = np.split(lengths - 1, bounds)
        scores = self._score_positions(list(self._read(batch)), batch.prompt_lengths, positions)
        return np.split(self._checked(np.concatenate(scores), origin), bounds)

    def forget(self, rows: np.ndarray) -> None:
        self._stepping.forget(rows)

    def _reads_tokens_of(self, batch: PrefixBatch) -> bool:
        """Whether the batch's token ids can be read as they are."""
        return self._same_tokens.of(batch) and self._template.is_of(batch)

    def _read(self, batch: PrefixBatch) -> np.ndarray:
        """``(B, L)`` token ids; whatever ended a completion, the model was trained on its own end-of-sequence token."""
        return batch.ended_with(self.tokenizer.eos_token_id if self.append_eos else None)

    def _unread(self, finished: np.ndarray) -> np.ndarray:
        """``(B,)`` tokens at the end of each row that the model doesn't read: an EOS it wasn't trained on."""
        return np.zeros(len(finished), dtype=np.int64) if self.append_eos else finished.astype(np.int64)

    def _score_texts(
        self, prompts: list[str], completions: list[str], finished: np.ndarray, origin: Origin
    ) -> np.ndarray:
        """Φ of texts, tokenized anew, ``(B,)``."""
        if not completions:
            return np.zeros(0)
        eos = self.tokenizer.eos_token_id
        encoded: list[list[int]] = []  # what an encoder reads
        if self._encoder_decoder:
            encoded = self._turns.encode_all(prompts, whole=True)
            ids: list[list[int]] = self.tokenizer(completions, add_special_tokens=False)["input_ids"]
        else:
            ids = self._turns.encode_all([p + c for p, c in zip(prompts, completions, strict=True)])
        for row, ended in zip(ids, finished.tolist(), strict=True):
            if ended and self.append_eos and row[-1:] != [eos]:
                row.append(eos)
        prompt_lengths = np.array([len(row) for row in encoded])
        if self._encoder_decoder:
            self._check_lengths(prompt_lengths, origin)
            ids = [prompt + row for prompt, row in zip(encoded, ids, strict=True)]
        lengths = np.array([len(row) for row in ids])
        self._check_lengths(lengths, origin)
        scores = self._score_positions([np.array(row) for row in ids], prompt_lengths, list(lengths[:, None] - 1))
        return self._checked(np.concatenate(scores), origin)

    def _score_positions(
        self, ids: list[np.ndarray], prompt_lengths: np.ndarray, positions: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Φ at given positions of each row, in teacher-forced passes over many rows.

        :param ids: B rows of token ids, of any lengths
        :param prompt_lengths: ``(B,)`` how many of these an encoder reads; unused without one
        :param positions: for each row the positions of the tokens after which Φ is wanted
        :return: for each row float64 values, one for each of its positions
        """
        self.model.eval()
        machine = self._machine(1)
        needed = np.array([p.max(initial=-1) + 1 for p in positions])  # (B,) tokens to read of each row
        if self._encoder_decoder:
            needed = np.where(needed > 0, np.maximum(needed, prompt_lengths), 0)
        scores = [np.zeros(len(p)) for p in positions]
        for part in machine.passes([row[:n] for row, n in zip(ids, needed, strict=True)], BATCH_TOKENS):
            width = int(needed[part].max())
            padded = np.zeros((len(part), width), dtype=np.int64)  # (b, L)
            for i, row in enumerate(part):
                padded[i, : needed[row]] = ids[row][: needed[row]]
            which = np.repeat(np.arange(len(part)), [len(positions[row]) for row in part])  # (K,)
            where = np.concatenate([positions[row] for row in part])  # (K,)
            with torch.inference_mode():
                prompts = prompt_lengths[part] if self._encoder_decoder else None
                values = self._head(machine.hidden_at(padded, needed[part], which, where, prompts))  # (K,)
            bounds = np.cumsum([len(positions[row]) for row in part])[:-1]
            for row, row_values in zip(part, np.split(values, bounds), strict=True):
                scores[row] = row_values
        return scores

    @torch.inference_mode()
    def _head(self, hidden: Tensor) -> np.ndarray:
        """Φ ``(N,)`` of hidden states ``(N, H)``."""
        logits: Tensor = self.head(hidden)[:, 0]
        return ACTIVATIONS[self.activation](logits.double()).cpu().numpy()

    def _machine(self, longest: int) -> CachedModel:
        """The model with a cache for rows of that length.

        The cache is allocated for as long as rows have been, in powers of two, not for the model's whole
        context.
        """
        room = max(64, 1 << (longest - 1).bit_length())
        window = context_limit(self.model.config)
        if window is not None and longest <= window:
            room = min(room, window)
        return self._stepping.machine(room if self._limit is None else min(room, self._limit))

    def _own_output(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the model itself says of one row: ``(1,)``."""
        if self._encoder_decoder:  # its own forward reads one text twice: here the head is put on its two halves
            states: Tensor = trunk_of(self.model)(**inputs, use_cache=False).last_hidden_state
            score: Tensor = self.head(states[:, -1])[0]
            return score
        mask = torch.ones_like(inputs["input_ids"])
        return self.model(**inputs, attention_mask=mask, use_cache=False).logits[0]

    def _check_lengths(self, lengths: np.ndarray, origin: Origin) -> None:
        limit = np.inf if self._limit is None else self._limit
        wrong = np.flatnonzero((lengths < 1) | (lengths > limit))
        if len(wrong) == 0:
            return
        row, completion = origin(int(wrong[0]))
        length = lengths[wrong[0]]
        if length < 1:
            problem = "there are no tokens to read; a prompt needs at least one"
        else:
            problem = (
                f"prompt and completion are {length} tokens long, more than the model's context of {limit}; "
                "use fewer prompt or completion tokens"
            )
        raise RewardError(self.name, problem, row=row, completion=completion)

    def _checked(self, scores: np.ndarray, origin: Origin) -> np.ndarray:
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            row, completion = origin(int(wrong[0]))
            problem = f"the score is {scores[wrong[0]]}; the weights may be broken, or too large for their dtype"
            raise RewardError(self.name, problem, row=row, completion=completion)
        return scores
