"""Stepping for causal models that count positions themselves: from how many tokens the cache says it has seen.

Such models can't be told the positions of rows of different lengths, or make their attention masks themselves: decoders
of BART's kind, ALiBi as in BLOOM, GPT-Neo's local attention. But where all rows of a forward are equally long, what
they count is right. So only rows of the same length step together, and the model gets nothing but tokens and cache.
Rows whose layers all keep states, as Mamba's do, have no positions and step together whatever their lengths.
"""

from __future__ import annotations

import inspect

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from textgym.engine import cached_model
from textgym.engine.cached_model import CachedModel, groups
from textgym.engine.micro_batches import micro_batches


class GroupedModel(CachedModel):
    """A :class:`~textgym.engine.cached_model.CachedModel` that forwards rows of the same length together.

    :param model: a Hugging Face causal model, with any head; only its trunk is used, in evaluation mode
    :param context: most tokens a row can have; at most what the model was built for
    :raises ValueError: if ``context`` is larger than the model's positions
    """

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        super().__init__(model, context)
        # State-space models have another name for it.
        names = inspect.signature(self.trunk.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in names else "past_key_values"

    def hidden_states(
        self, input_ids: Tensor, lengths: Tensor | None = None, prompt_lengths: np.ndarray | None = None
    ) -> Tensor:
        """Hidden states of whole rows in one pass; see :meth:`CachedModel.hidden_states`.

        Nothing but the tokens is passed: the model counts positions as it always does.
        """
        self._forbid_dropout()
        return self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state

    @property
    def _packs(self) -> bool:
        return False  # such models are not told positions

    def _compute(self, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> None:
        assert self._cache is not None
        new = lengths - common
        todo = np.flatnonzero(new)
        first = todo[cached_model.first_alike(ids[todo], lengths[todo])]
        start = common if self._cache.attends else common > 0
        for group in groups(todo[first == todo], start, new):
            for alike in micro_batches(new[group], cached_model.PREFILL_TOKENS):
                part = group[alike]
                self._prefill(rows[part], ids[part], common[part], new[part])
        again = first != todo
        if again.any():
            self._copy(rows[first[again]], rows[todo[again]], int(lengths[todo[again]].max()))

    def _run(self, rows: Tensor | None, tokens: Tensor, positions: Tensor, write: Tensor, used: int) -> Tensor:
        assert self._cache is not None
        self._cache.announce(rows, write, used, seen=used - tokens.shape[1])
        output = self.trunk(input_ids=tokens, **{self._cache_name: self._cache}, use_cache=True)
        return output.last_hidden_state  # (B, T, H)
