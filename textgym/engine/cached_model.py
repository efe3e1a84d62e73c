"""A causal transformer stepped over many independent rows: the machinery that policy, reference and reward model share.

Callers are stateless. They pass whole token rows, as in an observation, and :class:`CachedModel` compares each row
with what its slot has cached: one token more is a decode step, another prefix is prefilled from the first token that
differs, the same row again costs nothing, and when the weights have changed everything cached is forgotten. A row that
begins as another slot does, such as with the same prompt, gets that slot's states and only the rest is computed.

It works on the trunk (:func:`~textgym.engine.trunk.trunk_of`) of any Hugging Face causal model, without touching its
code, by passing a :class:`~textgym.engine.slot_cache.SlotCache`, an explicit 4-D attention mask, or one for each kind
of layer where some see only a window, and explicit position ids. :mod:`textgym.engine.grouped_model` is for models that
take no such thing.

Where layers keep a state instead of keys and values, a row can only go on from where it is: another text is read from
its first token, together with those of the same length, since padding would change the state.
:mod:`textgym.engine.encoder_decoder` is the same for models that read the prompt with an encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from textgym.engine.layer_types import Reach, attention_reach
from textgym.engine.micro_batches import micro_batches
from textgym.engine.packing import PackedRows, in_order, pack, passes, shared_tokens, worth_packing
from textgym.engine.slot_cache import SlotCache, has_states
from textgym.engine.trunk import trunk_of
from textgym.vocabulary import position_limit

# A block of a transformer that is H wide has some 12 H² weights, and attention to K keys takes 2 H K products: they
# balance at 6 H keys, which is also what was measured (H = 256 and 576, two cores, forward and backward).
BALANCE = 6
SHARED_TOKENS = 4  # fewer are sooner read than copied from another slot
WORTH_WAITING = 64  # tokens from which on a second forward is less work
PREFILL_TOKENS = 16_384  # most tokens forwarded at once when many rows start together; bounds memory, not results


class CachedModel:
    """Last hidden states of growing token rows, each computed once.

    :param model: a Hugging Face causal transformer, with any head; only its trunk is used, in evaluation mode
    :param context: most tokens a row can have; at most what the model was built for
    :param compile: whether decode steps run through ``torch.compile``: the first ones take up to minutes, the others
        less time. All slots then take part in a step, whoever asks, unless rows begin in it
    :param compile_learning: whether teacher-forced passes with gradients do
    :raises ValueError: if ``context`` is larger than the model's positions
    """

    def __init__(
        self, model: PreTrainedModel, context: int, compile: bool = False, compile_learning: bool = False
    ) -> None:
        self.model = model
        self._compiled = torch.compile(self._run) if compile else None
        # Rows that begin anew bring another number of tokens each time, see _join.
        self._compiled_join = torch.compile(self._run, dynamic=True) if compile else None
        # Minibatches differ in their rows and widths; without dynamic=True each would be compiled anew.
        self._compiled_pass = torch.compile(self._pass, dynamic=True) if compile_learning else None
        self.trunk: nn.Module = trunk_of(model)
        self._weights = WeightsVersion(self.trunk)
        self._take(context)
        self._lengths = np.zeros(0, dtype=np.int64)  # (S,) how many cached tokens of each row are valid
        self.forget()

    @cached_property
    def _has_states(self) -> bool:
        return has_states(self.model.config)

    @property
    def device(self) -> torch.device:
        return next(self.trunk.parameters()).device

    def forget(self, rows: np.ndarray | None = None) -> None:
        """Drop everything cached.

        :param rows: only what is cached of these; they are computed anew from their first token
        """
        if rows is not None:
            self._lengths[rows[rows < len(self._lengths)]] = 0
            return
        self._cache: SlotCache | None = None
        self._ids = np.zeros((0, self.context), dtype=np.int64)  # (S, P) the tokens behind the cached states
        self._lengths = np.zeros(0, dtype=np.int64)
        self._hidden: Tensor | None = None  # (S, H) hidden state at each row's last token
        self._version: int | None = None

    def _take(self, context: int) -> None:
        """:raises ValueError: if the model has fewer positions"""
        limit = position_limit(self.model.config)
        if limit is not None and context > limit:
            raise ValueError(
                f"context={context} tokens is more than {type(self.model).__name__} can attend to exactly ({limit}): "
                "use fewer prompt or completion tokens, or a model with a longer context"
            )
        self.context = context
        self._reach = attention_reach(self.model.config, context)

    @torch.inference_mode(False)
    def widen(self, context: int) -> None:
        """Make room for longer rows and keep what is cached.

        :param context: most tokens of a row from now on
        :raises ValueError: if the model has fewer positions
        """
        more = context - self.context
        self._take(context)
        self._ids = np.pad(self._ids, ((0, 0), (0, more)))
        if self._cache is not None:
            self._cache.widen(context)

    @torch.inference_mode(False)  # tensors made in inference mode could not be written to outside it
    @torch.no_grad()
    def last_hidden(
        self,
        input_ids: np.ndarray | Tensor,
        lengths: np.ndarray | Tensor,
        rows: np.ndarray | None = None,
        prompt_lengths: np.ndarray | None = None,
    ) -> Tensor:
        """Hidden state at the last token of each row.

        :param input_ids: ``(B, L)`` right-padded token ids
        :param lengths: ``(B,)`` number of real tokens of each row, at least 1
        :param rows: ``(B,)`` distinct slots the rows live in; default 0 to B-1
        :param prompt_lengths: ``(B,)`` tokens of each row's prompt; decoder-only models need not know
        :return: ``(B, H)``, without gradient
        :raises ValueError: if a row is empty or longer than the context
        """
        ids, lengths = as_numpy(input_ids), as_numpy(lengths)
        rows = np.arange(len(ids)) if rows is None else np.asarray(rows)
        longest = int(lengths.max())
        if longest > self.context or int(lengths.min()) < 1:
            raise ValueError(
                f"lengths must lie between 1 and context={self.context}, got {int(lengths.min())} to {longest}"
            )
        self._prepare(int(rows.max()) + 1)

        # How many leading tokens of each row are cached already.
        known = np.minimum(self._lengths[rows], lengths)  # (B,)
        differs = ids[:, :longest] != self._ids[rows, :longest]  # (B, longest)
        differs |= np.arange(longest) >= known[:, None]
        common = np.where(differs.any(1), differs.argmax(1), longest)
        common = np.minimum(common, lengths)
        same = (common == lengths) & (self._lengths[rows] == lengths)
        # A row cut shorter needs its last hidden state again, which only the token's forward gives.
        common = np.where((common == lengths) & ~same, lengths - 1, common)
        if self._has_states:
            common = np.where(same | (common == self._lengths[rows]) & (common == lengths - 1), common, 0)
        elif self._shares:
            common = self._share(rows, ids, lengths, common)

        # Where a forward is interrupted, its rows count as empty and not as computed.
        self._lengths[rows[lengths > common]] = 0
        self._ids[rows, :longest] = ids[:, :longest]
        waits = self._can_wait(ids, lengths, common)  # (B,)
        first, second = np.flatnonzero(~waits), np.flatnonzero(waits)
        self._compute(rows[first], ids[first], lengths[first], common[first])
        self._lengths[rows[first]] = lengths[first]
        if len(second):
            common[second] = self._share(rows[second], ids[second], lengths[second], common[second])
            self._compute(rows[second], ids[second], lengths[second], common[second])
            self._lengths[rows[second]] = lengths[second]
        assert self._hidden is not None
        return self._hidden[torch.as_tensor(rows, device=self._hidden.device)]

    def _share(self, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> np.ndarray:
        """Copy what other slots have cached of how rows begin; each row's last token is left to be computed.

        :param rows: ``(B,)`` slots, like the other parameters as in :meth:`_compute`
        :return: ``(B,)`` how many tokens of the rows are cached then
        """
        assert self._cache is not None
        live = np.flatnonzero(self._lengths)
        source, cached = rows.copy(), common.copy()
        for i in np.flatnonzero(lengths - 1 - common >= SHARED_TOKENS) if len(live) else ():
            end = int(lengths[i]) - 1
            differs = (self._ids[live, :end] != ids[i, :end]) | (np.arange(end) >= self._lengths[live, None])
            alike = np.where(differs.any(1), differs.argmax(1), end)  # (S,) tokens
            best = int(alike.argmax())
            if alike[best] - common[i] >= SHARED_TOKENS:
                source[i], cached[i] = live[best], alike[best]
        taking = np.flatnonzero(source != rows)
        if len(taking):
            self._lengths[rows[taking]] = 0  # until they are computed: an interrupt may leave them half copied
            slots = torch.as_tensor(np.stack([source[taking], rows[taking]]), device=self._cache.device)
            self._cache.copy(slots[0], slots[1], int(cached[taking].max()))
        return cached

    @property
    def _shares(self) -> bool:
        """Whether what one row has cached is of use to another that begins as it does."""
        return not self._has_states and self._cache is not None  # else nothing is kept but last hidden states

    def _can_wait(self, ids: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> np.ndarray:
        """``(B,)`` bool, which rows are computed after the others, because they begin as one of those does: under the
        same system prompt, for one. None where that saves too little for a second forward.

        The parameters are as in :meth:`_compute`.
        """
        waits, saved = np.zeros(len(ids), dtype=bool), 0
        starting = np.flatnonzero(lengths - common > SHARED_TOKENS) if self._shares else np.zeros(0, dtype=np.int64)
        texts = [ids[row, : lengths[row]] for row in starting]
        first = None
        for place in in_order(texts):
            row, shared = starting[place], 0 if first is None else shared_tokens(first, texts[place])
            gained = min(shared, len(texts[place]) - 1) - common[row]
            if first is None or gained < SHARED_TOKENS:
                first = texts[place]
            elif not shared == len(first) == len(texts[place]):  # the same text is computed once anyway
                waits[row], saved = True, saved + int(gained)
        return waits if saved >= WORTH_WAITING else np.zeros_like(waits)

    def _compute(self, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> None:
        """Bring the last hidden states of rows up to date.

        :param rows: ``(B,)`` slots
        :param ids: ``(B, L)`` their tokens
        :param lengths: ``(B,)`` how many of these are real
        :param common: ``(B,)`` how many of these are cached already; where all are, there is nothing to do
        """
        new = lengths - common  # (B,) tokens to forward
        decode = np.flatnonzero((new == 1) & ((common > 0) | (not self._has_states)))
        longer = np.setdiff1d(np.flatnonzero(new), decode)
        first = longer[first_alike(ids[longer], lengths[longer])]
        prefill, again = longer[first == longer], first != longer
        if len(decode) and len(prefill) and self._worth_joining(int(new[prefill].sum())):
            self._join(np.concatenate([decode, prefill]), rows, ids, lengths, new)
            decode = prefill = prefill[:0]
        if len(decode):
            self._decode(rows[decode], ids[decode, lengths[decode] - 1], lengths[decode] - 1)
        for group in groups(prefill, new) if self._has_states else [prefill]:
            for alike in micro_batches(new[group], PREFILL_TOKENS):
                part = group[np.sort(alike)]  # all rows in their order need no gathering
                self._prefill(rows[part], ids[part], common[part], new[part])
        if again.any():
            self._copy(rows[first[again]], rows[longer[again]], int(lengths[longer[again]].max()))

    def hidden_states(
        self, input_ids: Tensor, lengths: Tensor | None = None, prompt_lengths: np.ndarray | None = None
    ) -> Tensor:
        """Hidden states of whole rows in one teacher-forced pass; gradients flow where enabled.

        Rows are padded on the right and attention is causal, so padding can't reach a real token and no mask is needed.

        :param input_ids: ``(B, L)`` right-padded token ids on the model's device
        :param lengths: unused by decoder-only models, like ``prompt_lengths``; accepted so that callers need not care
        :return: ``(B, L, H)``; what stands at padded positions is meaningless
        """
        self._forbid_dropout()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self._read(input_ids, None, positions)

    def hidden_at(
        self,
        input_ids: np.ndarray | Tensor,
        lengths: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        prompt_lengths: np.ndarray | None = None,
    ) -> Tensor:
        """Hidden states at some places of whole rows, from one teacher-forced pass; gradients flow where enabled.

        Where rows begin alike, or most of the padded rows would be padding, they are packed
        (:mod:`textgym.engine.packing`).

        :param input_ids: ``(B, L)`` right-padded token ids
        :param lengths: ``(B,)`` how many tokens of each row are to be read, at least 1
        :param rows: ``(M,)`` which rows are meant
        :param positions: ``(M,)`` and which of their tokens
        :param prompt_lengths: ``(B,)`` tokens of each row's prompt; decoder-only models need not know
        :return: ``(M, H)``
        """
        if self._can_pack(lengths):
            packed = pack(as_numpy(input_ids), lengths, self._balance)
            if worth_packing(packed, lengths, self._balance):
                return self._read_packed(packed, rows, positions)
        hidden = self.hidden_states(torch.as_tensor(input_ids[:, : int(lengths.max())], device=self.device))
        return hidden[torch.as_tensor(rows, device=self.device), torch.as_tensor(positions, device=self.device)]

    def packed_hidden_at(
        self,
        input_ids: np.ndarray | Tensor,
        lengths: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        prompt_lengths: np.ndarray | None = None,
    ) -> Tensor:
        """:meth:`hidden_at` with rows packed wherever that can be, worth it or not; for trying it out."""
        if not self._can_pack(lengths):
            return self.hidden_at(input_ids, lengths, rows, positions, prompt_lengths)
        return self._read_packed(pack(as_numpy(input_ids), lengths, balance=1e9), rows, positions)

    def _can_pack(self, lengths: np.ndarray) -> bool:
        """Whether rows of these lengths, ``(B,)``, may be packed; the masks here are for rows up to the context."""
        return self._packs and attention_reach(self.model.config, max(int(lengths.max()), self.context)) == self._reach

    def _read_packed(self, packed: PackedRows, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        """Hidden states ``(M, H)`` at some places of packed rows."""
        self._forbid_dropout()
        hidden = self._read(
            torch.as_tensor(packed.input_ids, device=self.device),
            torch.as_tensor(packed.together(), device=self.device),
            torch.as_tensor(packed.positions, device=self.device),
        )  # (R, W, H)
        into = torch.as_tensor(packed.into[rows], device=self.device)
        return hidden[into, torch.as_tensor(packed.places[rows, positions], device=self.device)]

    @property
    def _packs(self) -> bool:
        """Whether rows may stand one after the other: a state would run on from one into the next."""
        return not self._has_states

    @property
    def _balance(self) -> float:
        """See :func:`~textgym.engine.packing.cost`."""
        return BALANCE * self.model.get_input_embeddings().weight.shape[-1]

    def passes(self, texts: Sequence[np.ndarray], most_tokens: int) -> Iterator[np.ndarray]:
        """Indices of the rows that have any tokens, in groups for a :meth:`hidden_at` each: what is cheap to read
        together is.

        :param texts: B rows of token ids
        :param most_tokens: of a pass, padding included, unless a single row has more
        """
        if self._packs:
            return passes(texts, most_tokens, self._balance)
        return micro_batches([len(text) for text in texts], most_tokens)

    def _read(self, input_ids: Tensor, together: Tensor | None, positions: Tensor) -> Tensor:
        """``(B, L, H)`` from a teacher-forced pass over ``(B, L)`` tokens; see :meth:`_pass`."""
        learning = self._compiled_pass is not None and torch.is_grad_enabled()
        return (self._compiled_pass if learning else self._pass)(input_ids, together, positions)  # type: ignore[misc]

    def _pass(self, input_ids: Tensor, together: Tensor | None, positions: Tensor) -> Tensor:
        """:param together: ``(B, L, L)`` bool, which tokens are of one text; None where all of a row are"""
        hidden: Tensor = self.trunk(
            input_ids=input_ids,
            attention_mask=None if together is None else self._masks(positions, positions[:, None, :], together),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return hidden

    def _forbid_dropout(self) -> None:
        """Back to evaluation mode, should the model's owner have left it in training mode."""
        if self.trunk.training:
            self.model.eval()

    def _prepare(self, slots: int) -> None:
        """Make room for ``slots`` rows, and forget what older weights computed."""
        self._forbid_dropout()
        version = self._weights.now()
        if version != self._version:
            # The memory goes, too: its dtype and device may not fit any more, and where old weights left a NaN, masking
            # would not keep it out (0 · NaN is NaN).
            self.forget()
            self._version = version
        self._reserve(slots)
        if slots > len(self._lengths):
            more = slots - len(self._lengths)
            self._ids = np.concatenate([self._ids, np.zeros((more, self.context), dtype=np.int64)])
            self._lengths = np.concatenate([self._lengths, np.zeros(more, dtype=np.int64)])
            if self._hidden is not None:
                self._hidden = torch.cat([self._hidden, self._hidden.new_zeros(more, self._hidden.shape[1])])

    def _reserve(self, slots: int) -> None:
        """Cache memory for ``slots`` rows."""
        if self._cache is None:
            self._cache = SlotCache(slots, self.context, self.device, self.model.config)
        elif slots > self._cache.slots:
            self._cache.grow(slots)

    def _decode(self, rows: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> None:
        """Forward one token of each row. When most rows take part, all do: then the cache is read in place."""
        assert self._cache is not None
        slots = self._cache.slots
        most = 2 * len(rows) > slots or self._compiled is not None
        if most and not self._has_states and not self._are_all(rows):
            all_tokens, all_positions = np.zeros(slots, dtype=np.int64), np.zeros(slots, dtype=np.int64)
            write = np.full(slots, self.context)  # rows that sit out write to the scratch place
            all_tokens[rows], all_positions[rows], write[rows] = tokens, positions, positions
            hidden = self._forward(None, all_tokens[:, None], all_positions[:, None], write[:, None])[rows]
        else:
            hidden = self._forward(rows, tokens[:, None], positions[:, None], positions[:, None])
        self._store(rows, hidden[:, 0])

    def _prefill(self, rows: np.ndarray, ids: np.ndarray, start: np.ndarray, count: np.ndarray) -> None:
        """Forward the last ``count`` tokens of each row, which begin at ``start``, padded on the right."""
        offsets = np.arange(int(count.max()))  # (T,)
        real = offsets < count[:, None]  # (B, T)
        positions = np.where(real, start[:, None] + offsets, 0)
        tokens = np.take_along_axis(ids, positions, axis=1) * real
        hidden = self._forward(rows, tokens, positions, np.where(real, positions, self.context))  # (B, T, H)
        self._store(rows, hidden[torch.arange(len(rows)), torch.as_tensor(count - 1)])

    def _worth_joining(self, prefilled: int) -> bool:
        """Whether a few rows that begin anew, of so many tokens together, are read in the others' decode step.

        One forward instead of two; but it copies the cached keys and values of each token's row. A state needs the
        tokens one after the other.
        """
        assert self._cache is not None
        return prefilled <= self._cache.slots and not self._has_states

    def _join(self, which: np.ndarray, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray, new: np.ndarray) -> None:
        """Forward the last ``new`` tokens of some rows at once, each as a batch row of one token.

        A layer writes all keys and values before it reads any, and a token sees its slot up to its own position. So
        the tokens of one row may stand side by side.
        """
        into = np.repeat(which, new[which])  # (N,) the row of each token
        ends = np.cumsum(new[which])  # (B,)
        positions = lengths[into] - np.repeat(ends, new[which]) + np.arange(len(into))  # (N,)
        tokens = ids[into, positions]
        hidden = self._forward(rows[into], tokens[:, None], positions[:, None], positions[:, None])  # (N, 1, H)
        self._store(rows[which], hidden[ends - 1, 0])

    def _copy(self, source: np.ndarray, target: np.ndarray, used: int) -> None:
        """Give some rows what is cached of others that have the same tokens, at most ``used``."""
        assert self._cache is not None
        assert self._hidden is not None
        device = self._cache.device
        self._cache.copy(torch.as_tensor(source, device=device), torch.as_tensor(target, device=device), used)
        self._store(target, self._hidden[torch.as_tensor(source, device=self._hidden.device)])

    def _forward(self, rows: np.ndarray | None, tokens: np.ndarray, positions: np.ndarray, write: np.ndarray) -> Tensor:
        """Run the trunk on ``(B, T)`` new tokens; a token sees its own row up to and with its own position."""
        assert self._cache is not None
        if rows is not None and self._are_all(rows):
            rows = None  # then the cache is read in place
        compiled = self._compiled if rows is None else self._compiled_join
        # Prompts have all kinds of shapes, and the cache's memory must be there.
        decoding = tokens.shape[1] == 1 and self._cache.is_initialized
        run = compiled if compiled is not None and decoding else self._run
        device = self._cache.device
        slots = None if rows is None else torch.as_tensor(rows, device=device)
        self._cache.take_states(slots, begun=bool(positions[0, 0]))
        hidden = run(
            slots,
            torch.as_tensor(tokens, device=device),
            torch.as_tensor(positions, device=device),
            torch.as_tensor(write, device=device),
            int(positions.max()) + 1,
        )
        self._cache.keep_states(slots)
        return hidden

    def _are_all(self, rows: np.ndarray) -> bool:
        """Whether these are all slots, in order."""
        return len(rows) == len(self._lengths) and bool((rows == np.arange(len(rows))).all())

    def _run(self, rows: Tensor | None, tokens: Tensor, positions: Tensor, write: Tensor, used: int) -> Tensor:
        """:meth:`_forward` on tensors; no token sees a position of ``used`` or more."""
        assert self._cache is not None
        self._cache.announce(rows, write, used)
        output = self.trunk(
            input_ids=tokens,
            attention_mask=self._masks(positions, torch.arange(used, device=tokens.device)),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.last_hidden_state  # (B, T, H)

    def _masks(
        self, queries: Tensor, keys: Tensor, together: Tensor | None = None
    ) -> Tensor | dict[str, Tensor | None]:
        """What the model takes as ``attention_mask``: ``(B, 1, T, K)``, or such a mask for each kind of layer.

        :param queries: ``(B, T)`` positions of the tokens that attend
        :param keys: ``(K,)`` or ``(B, 1, K)`` positions of what they may attend to
        :param together: ``(B, T, K)`` bool, which of these are of one text; None where all are
        """
        reaches = self._reach if isinstance(self._reach, dict) else {"": self._reach}
        made: dict[Reach | None, Tensor | None] = {None: None}
        for reach in reaches.values():
            if reach is not None and reach not in made:
                visible = reach.visible(queries, keys)
                made[reach] = self._attention_mask(visible if together is None else visible & together)[:, None]
        if isinstance(self._reach, dict):
            return {kind: made[reach] for kind, reach in reaches.items()}
        mask = made[self._reach]
        assert mask is not None
        return mask

    def _attention_mask(self, visible: Tensor) -> Tensor:
        """SDPA takes the boolean mask itself; the eager implementation adds the mask to the scores."""
        if self.model.config._attn_implementation == "sdpa":
            return visible
        dtype = next(self.trunk.parameters()).dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    def _store(self, rows: np.ndarray, hidden: Tensor) -> None:
        if self._hidden is None:
            self._hidden = hidden.new_zeros(len(self._lengths), hidden.shape[-1])
        self._hidden[torch.as_tensor(rows, device=hidden.device)] = hidden


def groups(which: np.ndarray, *numbers: np.ndarray) -> list[np.ndarray]:
    """Rows that have the same numbers, together. ::

        >>> groups(np.array([0, 2, 3]), np.array([5, 7, 6, 5]))
        [array([0, 3]), array([2])]

    :param which: the rows
    :param numbers: ``(B,)`` each, of all rows
    """
    if not len(which):
        return []
    _, kind = np.unique(np.stack([n[which] for n in numbers]), axis=1, return_inverse=True)
    kind = kind.reshape(-1)  # numpy 2.0 gave it a second axis
    return [which[kind == k] for k in range(int(kind.max()) + 1)]


class WeightsVersion:
    """Tells when a parameter of a module is replaced, modified in place or trained by an optimizer.

    In-place changes behind autograd's back, such as ``parameter.data.mul_(2)``, are invisible to it: call
    :meth:`CachedModel.forget` after them. So are submodules that are exchanged later.

    The first one adds a hook to all optimizers of this process, present and to come: after each step their weights
    count as modified.

    :param module: with all the submodules it will have
    """

    def __init__(self, module: nn.Module) -> None:
        _notice_optimizer_steps()
        # Walking through the modules takes longer than looking at their parameters, and this is asked at every step.
        self._tables = [part._parameters for part in module.modules() if part._parameters]

    def now(self) -> int:
        """A number that is another one after every such change."""
        parameters = (p for table in self._tables for p in table.values() if p is not None)
        return hash(tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters))


@cache  # once in a process
def _notice_optimizer_steps() -> None:
    """Fused optimizers, and some from other packages, write to weights without counting it in ``_version``."""
    register_optimizer_step_post_hook(_count_as_modified)


def _count_as_modified(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version(parameters)


def first_alike(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``(B,)`` for each row the first one that has the same tokens, such as the same prompt. ::

        >>> first_alike(np.array([[5, 6], [5, 7], [5, 6]]), np.array([2, 2, 2]))
        array([0, 1, 0])

    :param ids: ``(B, L)`` right-padded token ids
    :param lengths: ``(B,)`` how many of these are real
    """
    first: dict[bytes, int] = {}
    texts = (ids[row, :length].tobytes() for row, length in enumerate(lengths.tolist()))
    return np.array([first.setdefault(text, row) for row, text in enumerate(texts)], dtype=np.int64)


def as_numpy(array: np.ndarray | Tensor) -> np.ndarray:
    """Token ids or lengths as an int64 array on the CPU."""
    if isinstance(array, Tensor):
        array = array.detach().cpu().numpy()
    return np.asarray(array, dtype=np.int64)
