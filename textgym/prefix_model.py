"""Stepping for causal models that no slot cache can serve: for every new token a forward over the whole row so far.

State-space models keep a state instead of keys and values, ALiBi models count positions from the attention mask, and
sliding windows drop keys that a slot cache would still show. All of these compute the right hidden states when they
read a row from its first token, and since they are causal, padding on the right changes nothing at real tokens. That
costs a forward of n tokens where a cache would forward one, and is exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from textgym import cached_model
from textgym.cached_model import CachedModel
from textgym.vocabulary import position_limit


class PrefixModel(CachedModel):
    """A :class:`~textgym.cached_model.CachedModel` that caches nothing but each row's last hidden state.

    :param model: a Hugging Face causal model, with any head; only its trunk is used, in evaluation mode
    :param context: most tokens a row can have; at most what the model was built for
    :raises ValueError: if ``context`` is larger than the model's positions
    """

    def _limit(self) -> int | None:
        return position_limit(self.model.config)

    def hidden_states(
        self, input_ids: Tensor, lengths: Tensor | None = None, prompt_lengths: np.ndarray | None = None
    ) -> Tensor:
        """Hidden states of whole rows in one pass; see :meth:`CachedModel.hidden_states`.

        Nothing but the tokens is passed: the model counts positions as it always does.
        """
        self._forbid_dropout()
        return self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state

    def hidden_at(
        self,
        input_ids: np.ndarray | Tensor,
        lengths: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        prompt_lengths: np.ndarray | None = None,
    ) -> Tensor:
        """See :meth:`CachedModel.hidden_at`; such models are not told positions, so nothing is packed."""
        hidden = self.hidden_states(torch.as_tensor(input_ids[:, : int(lengths.max())], device=self.device))
        return hidden[torch.as_tensor(rows, device=self.device), torch.as_tensor(positions, device=self.device)]

    def _reserve(self, slots: int) -> None:
        pass  # nothing to keep beyond the last hidden states

    def _compute(self, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> None:
        todo = np.flatnonzero(common < lengths)
        todo = todo[np.argsort(-lengths[todo], kind="stable")]  # like lengths together: little padding
        start = 0
        while start < len(todo):
            width = int(lengths[todo[start]])
            part = todo[start : start + max(1, cached_model.PREFILL_TOKENS // width)]
            start += len(part)
            real = np.arange(width) < lengths[part, None]  # (b, n)
            padded = torch.as_tensor(ids[part, :width] * real, device=self.device)
            hidden = self.hidden_states(padded)  # (b, n, H)
            last = torch.as_tensor(lengths[part] - 1, device=hidden.device)
            self._store(rows[part], hidden[torch.arange(len(part), device=hidden.device), last])
