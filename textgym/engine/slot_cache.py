"""A preallocated KV cache in which every row has its own length, and a state where layers keep that instead.

``transformers``' own caches assume that all rows of a batch are equally long, or padded to look so. In reinforcement
learning rows finish at different times and start again with another prompt, so this cache gives each row (a *slot*) a
fixed strip of memory and writes new keys and values at ``[slot, position]``. What a row may look at is decided by the
attention mask alone; stale entries after a row's current length are never read, so starting a row anew costs nothing.

It knows nothing about tokens, text or models: :mod:`textgym.engine.cached_model` decides what is written where.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

# transformers' layers of which a model needs no more than keys and values. Dummies stand for layers without any.
KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


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

    def widen(self, more: int) -> None:
        """Make room for ``more`` positions and keep what is there; the place that was scratch becomes one."""
        if self.is_initialized and self.keys is not None and self.values is not None:
            self.keys, self.values = (F.pad(strip, (0, 0, 0, more)) for strip in (self.keys, self.values))

    def copy(self, source: Tensor, target: Tensor, used: int) -> None:
        """Give the slots ``target`` the first ``used`` places of the slots ``source``, ``(B,)`` both."""
        for strip in (self.keys, self.values):
            if strip is not None:  # a layer that takes those of an earlier one has none
                strip[target, :, :used] = strip[source, :, :used]

    def get_seq_length(self) -> int:
        return self.cache.seen

    # Masks always come from the caller, so what follows is only asked for, never used.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.used, 0

    def get_max_length(self) -> int:
        return self.cache.positions

    get_max_cache_shape = get_max_length  # what older versions of transformers call it


class StateLayer(LinearAttentionLayer):
    """States of one layer that keeps no keys and values but a state of the text so far, as Mamba's do.

    Models read and overwrite such states in their own ways. So a forward gets those of its rows
    (:meth:`take`), does with them what it does, and the result goes back to their slots (:meth:`keep`).

    ``strips`` is the memory of all slots, ``(S, ...)`` for each state: the inputs of a convolution, and what recurs.
    """

    def __init__(self, cache: SlotCache, number_of_states: int) -> None:
        super().__init__(number_of_states)
        self.cache = cache
        self.strips: dict[tuple[str, int], Tensor] = {}

    def take(self, rows: Tensor, begun: bool) -> None:
        """Give the coming forward the states of some rows, or none yet.

        :param rows: ``(B,)`` slots
        :param begun: whether their states are of texts that have begun
        """
        for index in range(self.number_of_states):
            self.has_previous_state[index] = begun
            self.is_conv_states_initialized[index] = begun and ("conv", index) in self.strips
            self.is_recurrent_states_initialized[index] = begun and ("recurrent", index) in self.strips
            self.conv_states[index] = self._strip("conv", index, rows) if begun else None
            self.recurrent_states[index] = self._strip("recurrent", index, rows) if begun else None

    def _strip(self, kind: str, index: int, rows: Tensor) -> Tensor | None:
        strip = self.strips.get((kind, index))
        return None if strip is None else strip[rows]

    def keep(self, rows: Tensor) -> None:
        """Put what a forward made of the states into their slots."""
        for kind, states in (("conv", self.conv_states), ("recurrent", self.recurrent_states)):
            for index, state in states.items():
                if state is not None:
                    if (kind, index) not in self.strips:
                        self.strips[kind, index] = state.new_zeros(self.cache.slots, *state.shape[1:])
                    self.strips[kind, index][rows] = state
                states[index] = None

    def grow(self, slots: int) -> None:
        """Make room for more slots and keep what is there."""
        for name, strip in self.strips.items():
            self.strips[name] = torch.cat([strip, strip.new_zeros(slots - len(strip), *strip.shape[1:])])

    def copy(self, source: Tensor, target: Tensor, used: int) -> None:
        """Give the slots ``target`` the states of the slots ``source``, ``(B,)`` both."""
        for strip in self.strips.values():
            strip[target] = strip[source]


class StateAndSlotLayer(StateLayer, SlotLayer):
    """A layer that keeps a state and attends, too."""

    def __init__(self, cache: SlotCache, number_of_states: int) -> None:
        SlotLayer.__init__(self, cache)
        StateLayer.__init__(self, cache, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, which come by position, or of states, which come by name."""
        (SlotLayer if args else StateLayer).lazy_initialization(self, *args, **kwargs)

    def grow(self, slots: int) -> None:
        """See both."""
        StateLayer.grow(self, slots)
        SlotLayer.grow(self, slots)

    def copy(self, source: Tensor, target: Tensor, used: int) -> None:
        """See both."""
        StateLayer.copy(self, source, target, used)
        SlotLayer.copy(self, source, target, used)

    def get_max_length(self) -> int:
        return SlotLayer.get_max_length(self)


class IndexedSlotLayer(SlotLayer):
    """A layer that also keeps a small key of each token, by which it picks the tokens that it attends to."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__(cache)
        self.index_keys: Tensor | None = None  # (S, P + 1, D)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Write such keys of the new tokens ``(B, T, D)``; return those of all that their rows may attend to.

        :return: ``(B, used, D)``
        """
        if self.index_keys is None:
            width = indexer_key_states.shape[-1]
            self.index_keys = indexer_key_states.new_zeros(self.cache.slots, self.cache.positions + 1, width)
        rows = self.cache.all_rows if self.cache.rows is None else self.cache.rows
        self.index_keys[rows[:, None], self.cache.write_positions] = indexer_key_states
        return self.index_keys[rows, : self.cache.used]

    def grow(self, slots: int) -> None:
        """See :class:`SlotLayer`."""
        super().grow(slots)
        if self.index_keys is not None:
            more = slots - len(self.index_keys)
            self.index_keys = torch.cat([self.index_keys, self.index_keys.new_zeros(more, *self.index_keys.shape[1:])])

    def widen(self, more: int) -> None:
        """See :class:`SlotLayer`."""
        super().widen(more)
        if self.index_keys is not None:
            self.index_keys = F.pad(self.index_keys, (0, 0, 0, more))

    def copy(self, source: Tensor, target: Tensor, used: int) -> None:
        """See :class:`SlotLayer`."""
        super().copy(source, target, used)
        if self.index_keys is not None:  # some layers take what an earlier one picked
            self.index_keys[target, :used] = self.index_keys[source, :used]


class SlotCache(Cache):
    """One layer for each of the model's, and the places the next forward writes to.

    :param slots: number of independent rows S
    :param positions: most tokens a row can hold, P
    :param device: where it is
    :param config: the model's; without, it is for a model whose layers all keep keys and values
    """

    def __init__(
        self, slots: int, positions: int, device: torch.device, config: PreTrainedConfig | None = None
    ) -> None:
        kinds = [] if config is None else DynamicCache(config=config).layers
        if any(type(kind) not in KEYS_AND_VALUES for kind in kinds):
            super().__init__(layers=[self._layer(kind) for kind in kinds])
        else:  # models create their layers one by one on first use
            super().__init__(layer_class_to_replicate=partial(SlotLayer, self))
        self.attends = not self.layers or any(isinstance(layer, SlotLayer) for layer in self.layers)
        self.slots = slots
        self.positions = positions
        self.device = device
        self.all_rows = torch.arange(slots, device=device)
        self.rows: Tensor | None = None
        self.write_positions = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.used = 0
        self.seen = 0
        self.read_positions: Tensor | None = None

    def _layer(self, kind: Any) -> Any:
        """What keeps for slots what ``kind``, a layer of transformers' own cache, keeps for a batch."""
        if isinstance(kind, DummyLayer):  # of a layer with nothing to keep
            return kind
        if isinstance(kind, LinearAttentionLayer):
            both = isinstance(kind, CacheLayerMixin)
            return (StateAndSlotLayer if both else StateLayer)(self, kind.number_of_states)
        if type(kind) is DynamicIndexedLayer:
            return IndexedSlotLayer(self)
        return SlotLayer(self)  # a model that asks it for something else is found out when it is opened

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

    def take_states(self, rows: Tensor | None, begun: bool) -> None:
        """Give the coming forward the states of its rows, where layers keep any; see :meth:`StateLayer.take`."""
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.take(self.all_rows if rows is None else rows, begun)

    def keep_states(self, rows: Tensor | None) -> None:
        """Put what the forward made of the states into their slots."""
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.keep(self.all_rows if rows is None else rows)

    def grow(self, slots: int) -> None:
        """Enlarge to ``slots`` rows and keep what is cached."""
        for layer in self._filled():
            layer.grow(slots)
        self.slots = slots
        self.all_rows = torch.arange(slots, device=self.device)

    def widen(self, positions: int) -> None:
        """Enlarge to ``positions`` tokens a row and keep what is cached."""
        for layer in self._filled():
            if isinstance(layer, SlotLayer):
                layer.widen(positions - self.positions)
        self.positions = positions

    def copy(self, source: Tensor, target: Tensor, used: int) -> None:
        """Give the slots ``target`` what the slots ``source`` hold, ``(B,)`` both.

        :param used: how many places of keys and values that is
        """
        for layer in self._filled():
            layer.copy(source, target, used)

    def _filled(self) -> list[SlotLayer | StateLayer]:
        """The layers that keep something."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer | StateLayer)]


def has_states(config: PreTrainedConfig) -> bool:
    """Whether some layers keep a state of the text so far, rather than keys and values of its tokens."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


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
        super().__init__(layer_class_to_replicate=partial(PromptLayer, self))
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
