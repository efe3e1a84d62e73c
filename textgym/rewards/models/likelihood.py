"""Log-probabilities of texts under a causal language model: what the rewards that are made of them share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import TypedDict

from textgym.encodable_text import well_formed
from textgym.engine.cached_model import CachedModel
from textgym.engine.micro_batches import BATCH_TOKENS, check_batch_tokens
from textgym.language_model import HEAD_ELEMENTS, LanguageModel, load_language_model
from textgym.rewards.errors import RewardError
from textgym.vocabulary import context_limit, is_encoder_decoder

Origin = Callable[[int], tuple[int, str]]  # the row and the completion that text i belongs to, for errors
ModelSpec: TypeAlias = str | Path | PreTrainedModel | LanguageModel


class LikelihoodArguments(TypedDict, total=False):
    """What a :class:`TextLikelihood` takes besides the model."""

    tokenizer: PreTrainedTokenizerBase | None
    device: str | torch.device
    dtype: str | torch.dtype
    max_batch_tokens: int


class TextLikelihood:
    """Reads texts with a causal language model and says how likely their tokens are.

    :param model: a causal language model, as in :func:`~textgym.language_model.load_language_model`
    :param tokenizer: needed where ``model`` is a ``PreTrainedModel``
    :param device: for a model that is opened here; ``"auto"`` is the GPU where there is one
    :param dtype: for a model that is opened here
    :param max_batch_tokens: most tokens, padding included, that are forwarded at once
    """

    def __init__(
        self,
        model: ModelSpec = "embedded",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        max_batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        check_batch_tokens(max_batch_tokens)
        self.language_model = load_language_model(model, tokenizer=tokenizer, device=device, dtype=dtype)
        if is_encoder_decoder(self.language_model.model.config):
            raise ValueError(
                f"model={self.language_model.name} is an encoder-decoder; rewards that measure how likely a text is "
                "read it as one, and need a decoder-only language model"
            )
        self.max_batch_tokens = max_batch_tokens

    @property
    def start_token_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, or EOS where the tokenizer has no BOS."""
        bos = self.language_model.tokenizer.bos_token_id
        return self.language_model.eos_token_id if bos is None else int(bos)

    def ids_of(self, context: str, text: str, ended: bool = False) -> tuple[np.ndarray, int]:
        """Token ids of context and text, and where those of the text begin.

        Both are tokenized together; the text's tokens are those after the longest common beginning with the tokens
        of the context alone. Lone surrogates are read as U+FFFD.

        :param ended: whether an end-of-sequence token follows
        """
        encode = self.language_model.encode
        context, text = well_formed(context), well_formed(text)
        before = encode(context) if context else []
        ids = encode(context + text) if text else before
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False))
        start = sum(1 for _ in shared)
        if start == 0 and self.language_model.tokenizer.bos_token_id in ids[:1]:
            start = 1
        if start == 0:
            ids, start = [self.start_token_id, *ids], 1
        return np.array(ids + [self.language_model.eos_token_id] * ended, dtype=np.int64), start

    def log_probs(self, reward: str, ids: list[np.ndarray], starts: list[int], origin: Origin) -> list[np.ndarray]:
        """Log-probability, in nats, of each token from ``starts`` on, given all those before it in its row.

        :param reward: the reward's name, for messages
        :param ids: B rows of token ids
        :param starts: for each row the first token that is scored, at least 1
        :return: for each row float64 values, one for each of those tokens
        :raises RewardError: if a row is longer than the model's context or a value is not finite
        """

        def measure(hidden: Tensor, tokens: Tensor) -> Tensor:
            return self.language_model.token_log_probs(hidden, tokens, with_entropy=False)[0]

        return self._measured(reward, ids, starts, origin, measure)

    def matches(self, reward: str, ids: list[np.ndarray], starts: list[int], origin: Origin) -> list[np.ndarray]:
        """1.0 where a token is the one the model holds most likely at its place, else 0.0; as :meth:`log_probs`."""

        def measure(hidden: Tensor, tokens: Tensor) -> Tensor:
            parts = hidden.split(max(1, HEAD_ELEMENTS // self.language_model.vocab_size))
            return (torch.cat([self.language_model.head(part).argmax(-1) for part in parts]) == tokens).double()

        return self._measured(reward, ids, starts, origin, measure)

    def machine(self, longest: int) -> CachedModel:
        """The model with a cache for rows of that length, allocated in powers of two, not for its whole context."""
        room = max(64, 1 << (longest - 1).bit_length())
        window = context_limit(self.language_model.model.config)
        if window is not None and longest <= window:
            room = min(room, window)
        limit = self.language_model.vocabulary.context_limit
        return self.language_model.cached(room if limit is None else min(room, limit))

    def check_lengths(self, reward: str, lengths: np.ndarray, origin: Origin) -> None:
        """:raises RewardError: if a row has more tokens than the model's context"""
        limit = self.language_model.vocabulary.context_limit
        wrong = np.flatnonzero(lengths > (np.inf if limit is None else limit))
        if len(wrong):
            row, completion = origin(int(wrong[0]))
            raise RewardError(
                reward,
                f"the text is {lengths[wrong[0]]} tokens long, more than the context of {limit} of "
                f"{self.language_model.name}; use fewer prompt or completion tokens",
                row=row,
                completion=completion,
            )

    @torch.no_grad()
    def _measured(
        self,
        reward: str,
        ids: list[np.ndarray],
        starts: list[int],
        origin: Origin,
        measure: Callable[[Tensor, Tensor], Tensor],
    ) -> list[np.ndarray]:
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self.check_lengths(reward, lengths, origin)
        counts = lengths - np.array(starts, dtype=np.int64)  # (B,) tokens that are scored
        values = [np.zeros(count) for count in counts]
        # The last token of a row is scored, never read.
        read = np.where(counts > 0, lengths - 1, 0)
        machine = self.machine(1)
        for part in machine.passes([row[:n] for row, n in zip(ids, read, strict=True)], self.max_batch_tokens):
            padded = np.zeros((len(part), int(read[part].max())), dtype=np.int64)  # (b, L)
            for i, row in enumerate(part):
                padded[i, : read[row]] = ids[row][: read[row]]
            rows = np.repeat(np.arange(len(part)), counts[part])  # (K,)
            at = np.concatenate([np.arange(starts[row], lengths[row]) for row in part])  # (K,)
            tokens = np.concatenate([ids[row][starts[row] :] for row in part])  # (K,)
            hidden = machine.hidden_at(padded, read[part], rows, at - 1)  # (K, H)
            measured = measure(hidden, torch.as_tensor(tokens, device=hidden.device)).double().cpu().numpy()
            for row, some in zip(part, np.split(measured, np.cumsum(counts[part])[:-1]), strict=True):
                values[row] = some
        for i, some in enumerate(values):
            check_finite(reward, some, *origin(i))
        return values


def check_finite(reward: str, values: np.ndarray, row: int, completion: str) -> None:
    """:raises RewardError: if a log-probability is not finite"""
    if not np.isfinite(values).all():
        raise RewardError(
            reward,
            f"a log-probability is {values[~np.isfinite(values)][0]}; the weights may be broken, or too large for "
            "their dtype",
            row=row,
            completion=completion,
        )
