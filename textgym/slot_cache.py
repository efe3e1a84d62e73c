"""A preallocated KV cache in which every row has its own length.

``transformers``' own caches assume that all rows of a batch are equally long, or padded to look so. In reinforcement
learning rows finish at different times and start again with another prompt, so this cache gives each row (a *slot*) a
fixed strip of memory and writes new keys and values at ``[slot, position]``. What a row may look at is decided by the
attention mask alone; stale entries behind a row's current length are never read, so starting a row anew costs nothing.

It knows nothing about tokens, text or models: :mod:`textgym.cached_model` decides what is written where.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values of one transformer layer, ``(S, H, P + 1, D)`` each, for S slots of P positions.

    The extra position at the end is scratch: padding tokens write there and nobody reads it.
    """

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def strip(states: Tensor) -> Tensor:
            _, heads, _, width = states.shape
            return states.new_zeros(self.cache.slots, heads, self.cache.positions + 1, width)

        self.keys, self.values = strip(key_states), strip(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states at the announced places; return what those rows may attend to.

        :param key_states: ``(B, H, T, D)`` keys of the new tokens
        :param value_states: ``(B, H, T, D)`` values of the new tokens
        :return: keys and values ``(B, H, used, D)``; a view, not a copy, when all slots take part and read the same
            places
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows, positions, used = self.cache.rows, self.cache.write_positions, self.cache.used
        at = self.cache.all_rows[:, None] if rows is None else rows[:, None]  # (B, 1)
        # Indexing with two tensors around a slice puts the indexed axes first: (B, T, H, D).
        self.keys[at, :, positions] = key_states.transpose(1, 2)
        self.values[at, :, positions] = value_states.transpose(1, 2)
        if self.cache.read_positions is not None:
            read = self.cache.read_positions
            return self.keys[at, :, read].transpose(1, 2), self.values[at, :, read].transpose(1, 2)
        keys, values = self.keys[:, :, :used], self.values[:, :, :used]
        if rows is None:
            return keys, values
        return keys.index_select(0, rows), values.index_select(0, rows)

    def grow(self, slots: int) -> None:
        """Make room for more slots and keep what is there."""
        if self.is_initialized and self.keys is not None and self.values is not None:
            more = slots - self.keys.shape[0]
            self.keys = torch.cat([self.keys, self.keys.new_zeros(more, *self.keys.shape[1:])])
            self.values = torch.cat([self.values, self.values.new_zeros(more, *self.values.shape[1:])])

    def copy(self, source: Tensor, target: Tensor, used: int) -> None:
        """Give the slots ``target`` the first ``used`` places of the slots ``source``, ``(B,)`` both."""
        for strip in (self.keys, self.values):
            assert strip is not None
            strip[target, :, :used] = strip[source, :, :used]

    def get_seq_length(self) -> int:
        return self.cache.seen

    # Masks always come from the caller, so what follows is only asked for, never used.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.used, 0

    def get_max_length(self) -> int:
        return self.cache.positions

    get_max_cache_shape = get_max_length  # what older versions of transformers call it


class SlotCache(Cache):
    """One :class:`SlotLayer` per transformer layer, and the places the next forward writes to.

    :param slots: number of independent rows S
    :param positions: most tokens a row can hold, P
    """

    def __init__(self, slots: int, positions: int, device: torch.device) -> None:
        # Models create their layers one by one on first use; each gets told which cache it belongs to.
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self))
        self.slots = slots
        self.positions = positions
        self.device = device
        self.all_rows = torch.arange(slots, device=device)
        self.rows: Tensor | None = None
        self.write_positions = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.used = 0
        self.seen = 0
        self.read_positions: Tensor | None = None

    def announce(
        self,
        rows: Tensor | None,
        write_positions: Tensor,
        used: int,
        seen: int = 0,
        read_positions: Tensor | None = None,
    ) -> None:
        """Say where the coming forward writes and what it reads.

        :param rows: ``(B,)`` slots of the batch's rows; None when the batch is all slots in order
        :param write_positions: ``(B, T)`` position of each new token; ``positions`` is the scratch place
        :param used: how many places the forward may attend to
        :param seen: how many of these the model is told that it has seen before; what can't be told positions counts
            them from there
        :param read_positions: ``(B, used)`` what these places are; by default positions 0 to ``used`` − 1 of each row
        """
        self.rows, self.write_positions, self.used = rows, write_positions, used
        self.seen, self.read_positions = seen, read_positions

    def grow(self, slots: int) -> None:
        """Enlarge to ``slots`` rows and keep what is cached."""
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.grow(slots)
        self.slots = slots
        self.all_rows = torch.arange(slots, device=self.device)

    def copy(self, source: Tensor, target: Tensor, used: int) -> None:
        """Give the slots ``target`` the first ``used`` places of the slots ``source``, ``(B,)`` both."""
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.copy(source, target, used)


class PromptLayer(CacheLayerMixin):
    """Cross-attention keys and values of one decoder layer: written once per prompt, then only read.

    ``keys`` and ``values``, which models read, are those of the announced rows; ``strips`` is the memory of all slots,
    keys and values, ``(S, H, P, D)`` each.
    """

    is_sliding = False

    def __init__(self, cache: PromptCache) -> None:
        super().__init__()
        self.cache = cache
        self.strips: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def strip(states: Tensor) -> Tensor:
            _, heads, _, width = states.shape
            return states.new_zeros(self.cache.slots, heads, self.cache.positions, width)

        self.strips = strip(key_states), strip(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep what a forward made of the encoder's states, ``(B, H, used, D)``; it reads them as they come."""
        if self.strips is None:
            self.lazy_initialization(key_states, value_states)
        assert self.strips is not None
        rows = slice(None) if self.cache.rows is None else self.cache.rows
        for strip, states in zip(self.strips, (key_states, value_states), strict=True):
            strip[rows, :, : states.shape[2]] = states
        return key_states, value_states

    def select(self) -> None:
        """Show the announced rows to the model."""
        assert self.strips is not None
        rows, used = self.cache.rows, self.cache.used
        parts = (strip[:, :, :used] for strip in self.strips)
        self.keys, self.values = (part if rows is None else part.index_select(0, rows) for part in parts)

    def grow(self, slots: int) -> None:
        """Make room for more slots and keep what is there."""
        if self.strips is not None:
            keys, values = (
                torch.cat([strip, strip.new_zeros(slots - len(strip), *strip.shape[1:])]) for strip in self.strips
            )
            self.strips = keys, values

    # Masks always come from the caller, so what follows is only asked for, never used.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.used, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.cache.positions

    get_max_cache_shape = get_max_length


class PromptCache(Cache):
    """What a decoder's cross-attention keeps of each row's prompt; see :class:`SlotCache`.

    :param slots: number of independent rows S
    :param positions: most tokens of a prompt, P
    """

    def __init__(self, slots: int, positions: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: PromptLayer(self))
        self.slots = slots
        self.positions = positions
        self.rows: Tensor | None = None
        self.used = 0

    def announce(self, rows: Tensor | None, used: int, known: bool) -> None:
        """Say what the coming forward is about.

        :param rows: ``(B,)`` slots of the batch's rows; None when the batch is all slots in order
        :param used: tokens of the longest of these prompts
        :param known: whether the forward reads what is kept, rather than writing it
        """
        self.rows, self.used = rows, used
        for layer in self.layers if known else ():
            assert isinstance(layer, PromptLayer)
            layer.select()

    def grow(self, slots: int) -> None:
        """Enlarge to ``slots`` rows and keep what is there."""
        for layer in self.layers:
            assert isinstance(layer, PromptLayer)
            layer.grow(slots)
        self.slots = slots
