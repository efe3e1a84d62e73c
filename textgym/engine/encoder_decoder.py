"""Encoder-decoder models (T5, BART) behind the interface of :class:`~textgym.engine.cached_model.CachedModel`.

Callers have rows of tokens, prompt then completion, and ask for hidden states at places of these rows: the state at
position p is what the token at p + 1 is predicted from. Here, and nowhere else, such a row becomes what the model
reads: the prompt goes through the encoder, and the decoder reads its start token and then the completion::

    row       x_1 ... x_n   y_1   y_2         n tokens of prompt, then the completion
    decoder          start  y_1   y_2         so position p of the row is p - n + 1 of the decoder

So the last token of the prompt stands for the decoder's start token, and places before it have no state.

A prompt is encoded once; after that, a slot keeps the keys and values that the decoder's cross-attention made of it,
and those of the decoder's own tokens.

A padding token may belong to the text: a policy samples it like any other. Some models then hide it or don't count it
as a position, but do so only when they are given neither mask nor cache. They read such texts in that way here, too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedModel

from textgym.engine import cached_model
from textgym.engine.cached_model import CachedModel, as_numpy, groups
from textgym.engine.micro_batches import micro_batches
from textgym.engine.slot_cache import PromptCache
from textgym.vocabulary import is_encoder_decoder


@dataclass(frozen=True)
class EncoderDecoderInputs:
    """What an encoder-decoder reads of B rows, padded on the right.

    - ``encoder_ids`` and ``encoder_mask``: ``(B, S)`` the prompts, and bool where they are real
    - ``decoder_ids``: ``(B, T)`` the start token and the completions
    """

    encoder_ids: np.ndarray
    encoder_mask: np.ndarray
    decoder_ids: np.ndarray


def split(ids: np.ndarray, lengths: np.ndarray, prompt_lengths: np.ndarray, start_token: int) -> EncoderDecoderInputs:
    """Prompts for the encoder and completions for the decoder.

    :param ids: ``(B, L)`` prompt and completion, right-padded
    :param lengths: ``(B,)`` how many tokens of each are to be read
    :param prompt_lengths: ``(B,)`` how many of these are prompt, at least 1
    :param start_token: what the decoder reads first
    """
    places = np.arange(int(prompt_lengths.max()))  # (S,)
    mask = places < prompt_lengths[:, None]  # (B, S)
    taken = lengths - prompt_lengths  # (B,)
    offsets = np.arange(int(taken.max()))  # (T - 1,)
    real = offsets < taken[:, None]
    at = np.where(real, prompt_lengths[:, None] + offsets, 0)
    completions = np.take_along_axis(ids, at, axis=1) * real
    start = np.full((len(ids), 1), start_token, dtype=np.int64)
    return EncoderDecoderInputs(ids[:, : len(places)] * mask, mask, np.concatenate([start, completions], axis=1))


def model_inputs(model: PreTrainedModel, ids: Tensor, prompt_length: int) -> dict[str, Tensor]:
    """Keyword arguments of a model's own forward over one row, such that its last state is that of the last token.

    :param ids: ``(1, L)`` prompt and completion
    :param prompt_length: how many of these are prompt; decoder-only models read both as one text
    """
    if not is_encoder_decoder(model.config):
        return {"input_ids": ids}
    row = ids.cpu().numpy()
    parts = split(row, np.array([row.shape[1]]), np.array([prompt_length]), start_token_id(model))
    return {
        "input_ids": torch.as_tensor(parts.encoder_ids, device=ids.device),
        "decoder_input_ids": torch.as_tensor(parts.decoder_ids, device=ids.device),
    }


def start_token_id(model: PreTrainedModel) -> int:
    """What the decoder reads before the first token of a completion.

    :raises ValueError: if neither the model's configuration nor the one for generation says
    """
    generation = getattr(model, "generation_config", None)
    for config, name in (
        (model.config, "decoder_start_token_id"),
        (generation, "decoder_start_token_id"),
        (generation, "bos_token_id"),  # as generate() has it
    ):
        start = getattr(config, name, None)
        if isinstance(start, int):
            return start
    raise ValueError(
        "the configuration of this encoder-decoder has no decoder_start_token_id, the token that completions "
        "begin after; set it in model.config (T5's is its pad_token_id)"
    )


class EncoderDecoder(CachedModel):
    """An encoder-decoder that caches nothing but each row's last hidden state: exact, whatever its architecture.

    :param model: a Hugging Face encoder-decoder, with any head; only its encoder and decoder are used, in evaluation
        mode
    :param context: most tokens a row can have, prompt and completion together
    :param compile: not available, like ``compile_learning``
    :raises ValueError: if ``context`` is larger than the model's positions, or ``compile`` is set
    """

    def __init__(
        self, model: PreTrainedModel, context: int, compile: bool = False, compile_learning: bool = False
    ) -> None:
        if compile or compile_learning:
            raise ValueError(
                f"compile=True is not available for encoder-decoder models such as {type(model).__name__}: their "
                "decode steps change shape with the prompts"
            )
        super().__init__(model, context)
        self.encoder: nn.Module = model.get_encoder()
        self.decoder: nn.Module = model.get_decoder()
        self._start_token = start_token_id(model)
        self._pad_ids = pad_ids(model)
        self._prompt_lengths = np.zeros(0, dtype=np.int64)  # (S,) of the rows behind the cached states

    @cached_property
    def _has_states(self) -> bool:
        return False  # these decoders keep keys and values

    @property
    def _packs(self) -> bool:
        return False  # rows one after the other would share what the encoder says

    @property
    def _shares(self) -> bool:
        return False  # completions that begin alike have other states after other prompts

    def widen(self, context: int) -> None:
        """See :meth:`CachedModel.widen`; of rows whose prompts grow nothing cached is of use."""
        self._take(context)
        self.forget()

    def last_hidden(
        self,
        input_ids: np.ndarray | Tensor,
        lengths: np.ndarray | Tensor,
        rows: np.ndarray | None = None,
        prompt_lengths: np.ndarray | None = None,
    ) -> Tensor:
        """Hidden state of the decoder after the last token of each row; see :meth:`CachedModel.last_hidden`.

        :param prompt_lengths: ``(B,)`` tokens of each row that the encoder reads, at least 1
        :raises ValueError: if they are missing or don't fit the rows
        """
        prompts = _checked(prompt_lengths, as_numpy(lengths))
        rows = np.arange(len(prompts)) if rows is None else np.asarray(rows)
        more = int(rows.max()) + 1 - len(self._prompt_lengths)
        if more > 0:
            self._prompt_lengths = np.concatenate([self._prompt_lengths, np.zeros(more, dtype=np.int64)])
        # The same tokens, but another part of them encoded: nothing cached is of use.
        self.forget(rows[self._prompt_lengths[rows] != prompts])
        self._prompt_lengths[rows] = prompts
        return super().last_hidden(input_ids, lengths, rows)

    def hidden_states(
        self, input_ids: Tensor, lengths: Tensor | None = None, prompt_lengths: np.ndarray | None = None
    ) -> Tensor:
        """Hidden states of whole rows in one teacher-forced pass; gradients flow where enabled.

        :param input_ids: ``(B, L)`` right-padded token ids
        :param lengths: ``(B,)`` how many are real; default all
        :param prompt_lengths: ``(B,)`` tokens of each row that the encoder reads
        :return: ``(B, L, H)``; what stands before a prompt's last token, and at padded positions, is meaningless
        """
        count, width = input_ids.shape
        ends = np.full(count, width) if lengths is None else as_numpy(lengths)
        prompts = _checked(prompt_lengths, ends)
        states = self._teacher_forced(as_numpy(input_ids), ends, prompts)  # (B, T, H)
        at = (np.arange(width) - prompts[:, None] + 1).clip(0, states.shape[1] - 1)  # (B, L)
        every = torch.arange(count, device=states.device)[:, None]
        return states[every, torch.as_tensor(at, device=states.device)]

    def hidden_at(
        self,
        input_ids: np.ndarray | Tensor,
        lengths: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        prompt_lengths: np.ndarray | None = None,
    ) -> Tensor:
        """Hidden states at some places of whole rows, from one teacher-forced pass; see :meth:`CachedModel.hidden_at`.

        Rows are padded and never packed.

        :param prompt_lengths: ``(B,)`` tokens of each row that the encoder reads
        :raises ValueError: if they are missing or don't fit, or a place before a prompt's last token is asked for
        """
        prompts = _checked(prompt_lengths, lengths)
        at = positions - prompts[rows] + 1
        if len(at) and int(at.min()) < 0:
            wrong = int(at.argmin())
            raise ValueError(
                f"positions[{wrong}]={positions[wrong]} lies within the {prompts[rows[wrong]]} tokens of its prompt: "
                "the decoder of an encoder-decoder has states from the prompt's last token on"
            )
        states = self._teacher_forced(as_numpy(input_ids), lengths, prompts)  # (B, T, H)
        return states[torch.as_tensor(rows, device=states.device), torch.as_tensor(at, device=states.device)]

    def _teacher_forced(self, ids: np.ndarray, lengths: np.ndarray, prompt_lengths: np.ndarray) -> Tensor:
        """States ``(B, T, H)`` of the decoder over start tokens and completions."""
        self._forbid_dropout()
        parts = split(ids, lengths, prompt_lengths, self._start_token)
        mask = torch.as_tensor(parts.encoder_mask, device=self.device)
        output = self.decoder(
            input_ids=torch.as_tensor(parts.decoder_ids, device=self.device),
            encoder_hidden_states=self._encode(parts, mask),
            encoder_attention_mask=mask.long(),
            use_cache=False,
        )
        states: Tensor = output.last_hidden_state
        return states

    def _encode(self, parts: EncoderDecoderInputs, mask: Tensor) -> Tensor:
        """The encoder's states ``(B, S, H)``."""
        ids = torch.as_tensor(parts.encoder_ids, device=self.device)
        states: Tensor = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        padded = np.flatnonzero((np.isin(parts.encoder_ids, self._pad_ids) & parts.encoder_mask).any(1))
        if len(padded) and self._masks_change_prompts:
            lengths = parts.encoder_mask.sum(1)
            for group in groups(padded, lengths):
                at = torch.as_tensor(group, device=self.device)
                alone = self.encoder(input_ids=ids[at, : lengths[group[0]]]).last_hidden_state
                states = states.index_copy(0, at, F.pad(alone, (0, 0, 0, states.shape[1] - alone.shape[1])))
        return states

    @cached_property
    def _masks_change_prompts(self) -> bool:
        """Whether the encoder reads a prompt with a padding token otherwise where a mask says that all is text."""
        size = int(self.model.config.get_text_config().vocab_size)
        ids = torch.tensor([[size - 1, pad, size - 2] for pad in self._pad_ids], device=self.device) % size
        with torch.no_grad():
            told = self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            untold = self.encoder(input_ids=ids).last_hidden_state
        return not torch.allclose(told, untold, rtol=0, atol=1e-3 * float(told.abs().max()))

    def _reserve(self, slots: int) -> None:
        pass  # nothing to keep beyond the last hidden states

    def _compute(self, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> None:
        for part in micro_batches(np.where(common < lengths, lengths, 0), cached_model.PREFILL_TOKENS):
            prompts = self._prompt_lengths[rows[part]]
            states = self._teacher_forced(ids[part], lengths[part], prompts)
            last = torch.as_tensor(lengths[part] - prompts, device=states.device)
            self._store(rows[part], states[torch.arange(len(part), device=states.device), last])


class CachedEncoderDecoder(EncoderDecoder):
    """An encoder-decoder stepped with slot caches: a prompt is encoded once, then each token costs one token.

    Most of these decoders can't be told positions; they count them from what the cache says it has seen, one number
    for all rows. Rows of different lengths are served nevertheless: each row's keys are read such that its newest is
    the last, and the row looks as if it began later. Where only distances between tokens matter, as in T5, that changes
    nothing. T5Gemma's decoder is told positions.

    :param model: see :class:`EncoderDecoder`, like the other parameters
    """

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.decoder.forward).parameters

    def forget(self, rows: np.ndarray | None = None) -> None:
        """See :meth:`CachedModel.forget`."""
        super().forget(rows)
        if rows is None:
            self._prompts: PromptCache | None = None

    def _reserve(self, slots: int) -> None:
        CachedModel._reserve(self, slots)  # for the decoder's own tokens
        if self._prompts is None:
            self._prompts = PromptCache(slots, self.context)
        elif slots > self._prompts.slots:
            self._prompts.grow(slots)

    def _compute(self, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> None:
        prompts = self._prompt_lengths[rows]
        begun = common >= prompts  # rows whose prompt is encoded
        # What the decoder has read, and is to read: the start token and the completion.
        start, end = np.where(begun, common - prompts + 1, 0), lengths - prompts + 1
        parts = split(ids, lengths, prompts, self._start_token)
        for sizes in (np.where(begun, 0, lengths), np.where(begun & (common < lengths), end - start, 0)):
            for part in micro_batches(sizes, cached_model.PREFILL_TOKENS):
                for group in self._together(part, start, end):
                    self._step(rows[group], _rows_of(parts, group), start[group], end[group], not begun[group[0]])

    def _together(self, rows: np.ndarray, start: np.ndarray, end: np.ndarray) -> list[np.ndarray]:
        """What of some rows goes through the decoder at once."""
        return [rows]

    def _step(
        self, rows: np.ndarray, parts: EncoderDecoderInputs, start: np.ndarray, end: np.ndarray, encode: bool
    ) -> None:
        """Forward the decoder's tokens ``start`` to ``end`` of each row, and keep the states at the last.

        :param rows: ``(B,)`` slots
        :param parts: what they read
        :param start: ``(B,)`` tokens that the decoder has read before
        :param end: ``(B,)`` tokens that it has read afterwards
        :param encode: whether the prompts are still to be encoded
        """
        assert self._cache is not None
        assert self._prompts is not None
        count = end - start
        new, used = int(count.max()), int(end.max())  # T, K
        # Everything is padded on the left, so that the newest tokens of all rows stand in one column.
        positions = end[:, None] - new + np.arange(new)  # (B, T) where each new token belongs
        real = positions >= start[:, None]
        read = end[:, None] - used + np.arange(used)  # (B, K) what stands in the columns to attend to
        tokens = np.take_along_axis(parts.decoder_ids, positions.clip(0), axis=1)
        everyone = len(rows) == self._cache.slots and (rows == np.arange(len(rows))).all()

        def tensor(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array, device=self.device)

        slots = None if everyone else tensor(rows)
        equally_long = (end == used).all()
        self._cache.announce(
            slots,
            tensor(np.where(real, positions, self.context)),
            used,
            seen=used - new,
            read_positions=None if equally_long else tensor(read.clip(0)),
        )
        mask = tensor(parts.encoder_mask)
        self._prompts.announce(slots, mask.shape[1], known=not encode)
        caches = EncoderDecoderCache(self._cache, self._prompts)
        # How decoders tell whether keys and values of the prompt are kept, or still to be made.
        caches.is_updated = dict.fromkeys(range(len(self._prompts)), not encode)
        if encode:
            states = self._encode(parts, mask)  # (B, S, H)
            self._unread = states.new_zeros(1, 1, states.shape[-1])
        else:
            states = self._unread.expand(*mask.shape, -1)  # their shape is looked at, no more
        # What is not a token attends to something, too, if only to the first: no state is NaN, and nobody reads it.
        queries = tensor(positions.clip(0))
        hidden = self.decoder(
            input_ids=tensor(tokens),
            attention_mask=self._masks(queries, tensor(read[:, None]), tensor(read[:, None] >= 0)),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            past_key_values=caches,
            use_cache=True,
            **({"position_ids": queries} if self._takes_positions else {}),
        ).last_hidden_state  # (B, T, H)
        self._store(rows, hidden[:, -1])


class GroupedEncoderDecoder(CachedEncoderDecoder):
    """For decoders that count positions from the beginning, as BART's do: only rows of the same length step together.

    :param model: see :class:`EncoderDecoder`, like the other parameters
    """

    def _together(self, rows: np.ndarray, start: np.ndarray, end: np.ndarray) -> list[np.ndarray]:
        return groups(rows, start, end)


class PadTokensApart(CachedEncoderDecoder):
    """For decoders that read padding tokens otherwise than with a cache when they have none, as M2M100's do.

    Rows that have one in their completion are read as a whole at each step, and the others step with the cache.

    :param model: see :class:`EncoderDecoder`, like the other parameters
    """

    def last_hidden(
        self,
        input_ids: np.ndarray | Tensor,
        lengths: np.ndarray | Tensor,
        rows: np.ndarray | None = None,
        prompt_lengths: np.ndarray | None = None,
    ) -> Tensor:
        """See :meth:`EncoderDecoder.last_hidden`."""
        hidden = super().last_hidden(input_ids, lengths, rows, prompt_lengths)
        rows = np.arange(len(hidden)) if rows is None else np.asarray(rows)
        self.forget(rows[self._padded(rows, as_numpy(input_ids), as_numpy(lengths))])  # it is not in the cache
        return hidden

    def _padded(self, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """``(B,)`` bool, the rows that have a padding token in their completion."""
        places = np.arange(ids.shape[1])
        written = (places >= self._prompt_lengths[rows, None]) & (places < lengths[:, None])
        padded: np.ndarray = np.any(np.isin(ids, self._pad_ids) & written, axis=1)
        return padded

    def _compute(self, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> None:
        padded = self._padded(rows, ids, lengths)
        if padded.any():
            EncoderDecoder._compute(self, rows[padded], ids[padded], lengths[padded], common[padded])
        if not padded.all():
            super()._compute(rows[~padded], ids[~padded], lengths[~padded], common[~padded])


class GroupedPadTokensApart(PadTokensApart, GroupedEncoderDecoder):
    """The same for decoders that count positions from the beginning.

    :param model: see :class:`EncoderDecoder`, like the other parameters
    """


def pad_ids(model: PreTrainedModel) -> list[int]:
    """What an encoder-decoder and its parts take for padding where nothing tells them."""
    configs = (model.config, *(getattr(part, "config", None) for part in (model.get_encoder(), model.get_decoder())))
    found = {getattr(config.get_text_config(), "pad_token_id", None) for config in configs if config is not None}
    return sorted(i for i in found if i is not None)


def _rows_of(parts: EncoderDecoderInputs, rows: np.ndarray) -> EncoderDecoderInputs:
    """Some of the rows, with as few prompt tokens as the longest of them has."""
    mask = parts.encoder_mask[rows]
    width = int(mask.sum(1).max())
    return EncoderDecoderInputs(parts.encoder_ids[rows, :width], mask[:, :width], parts.decoder_ids[rows])


def _checked(prompt_lengths: Any, lengths: np.ndarray) -> np.ndarray:
    """:raises ValueError: unless each row has a prompt of 1 token to all"""
    if prompt_lengths is None:
        raise ValueError("an encoder-decoder needs prompt_lengths: the encoder reads the prompt, the decoder the rest")
    prompts = as_numpy(prompt_lengths)
    wrong = np.flatnonzero((prompts < 1) | (prompts > lengths)) if prompts.shape == lengths.shape else None
    if wrong is None:
        raise ValueError(f"prompt_lengths has shape {prompts.shape}, expected {lengths.shape}, one for each row")
    if len(wrong):
        raise ValueError(
            f"prompt_lengths[{wrong[0]}]={prompts[wrong[0]]} must lie between 1 and its row's {lengths[wrong[0]]} "
            "tokens"
        )
    return prompts
