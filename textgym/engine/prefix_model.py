"""Stepping for causal models that no slot cache can serve: for every new token a forward over the whole row so far.

Some models have no cache, and some do with it what no cache of ours can follow. All of them compute the right hidden
states when they read a row from its first token, and since they are causal, padding on the right changes nothing at
real tokens. That costs a forward of n tokens where a cache would forward one, and is exact.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from textgym.engine import cached_model
from textgym.engine.grouped_model import GroupedModel
from textgym.engine.micro_batches import micro_batches


class PrefixModel(GroupedModel):
    """A :class:`~textgym.engine.grouped_model.GroupedModel` that caches nothing but each row's last hidden state.

    :param model: a Hugging Face causal model, with any head; only its trunk is used, in evaluation mode
    :param context: most tokens a row can have; at most what the model was built for
    :raises ValueError: if ``context`` is larger than the model's positions
    """

    @cached_property
    def _has_states(self) -> bool:
        return False  # kept between forwards

    def _reserve(self, slots: int) -> None:
        pass  # nothing to keep beyond the last hidden states

    def _compute(self, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> None:
        for part in micro_batches(np.where(common < lengths, lengths, 0), cached_model.PREFILL_TOKENS):
            width = int(lengths[part[0]])
            real = np.arange(width) < lengths[part, None]  # (b, n)
            padded = torch.as_tensor(ids[part, :width] * real, device=self.device)
            hidden = self.hidden_states(padded)  # (b, n, H)
            last = torch.as_tensor(lengths[part] - 1, device=hidden.device)
            self._store(rows[part], hidden[torch.arange(len(part), device=hidden.device), last])
