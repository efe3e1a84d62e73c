"""The policy's weights in another floating-point type, for acting.

Decoding reads every weight for each token, so half the bytes may be up to twice the speed, while the optimizer needs
float32. What such a copy holds likely is not quite what the trained weights do: agents compute the log-probabilities
that they learn from anew, with the trained weights, and weigh each token by the ratio of the two.
"""

from __future__ import annotations

import copy

import torch

from textgym.engine.cached_model import WeightsVersion
from textgym.language_model import LanguageModel


class ActingCopy:
    """A copy of a language model in another type, brought up to date when the original's weights have changed.

    :param trained: the original
    :param dtype: type of the copy's weights
    """

    def __init__(self, trained: LanguageModel, dtype: torch.dtype) -> None:
        self._trained = trained
        self._weights = WeightsVersion(trained.model)
        self._version = self._weights.now()
        model = copy.deepcopy(trained.model, trained.shared_in_copies()).to(dtype)
        self._copy = trained.with_model(model.requires_grad_(False))

    @torch.no_grad()
    def current(self) -> LanguageModel:
        """The copy, with the weights that the original has now."""
        version = self._weights.now()
        if version != self._version:
            into = [*self._copy.model.parameters(), *self._copy.model.buffers()]
            given = [*self._trained.model.parameters(), *self._trained.model.buffers()]
            for mine, theirs in zip(into, given, strict=True):
                mine.copy_(theirs)
            self._version = version
        return self._copy
