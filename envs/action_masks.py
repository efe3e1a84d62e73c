"""Which tokens an agent may choose: no special ones, no early end, on request the reference model's top-k or top-p."""

from __future__ import annotations

import numpy as np
import torch

from textgym.envs.options import TextGenOptions
from textgym.generation import nucleus
from textgym.language_model import LanguageModel
from textgym.vocabulary import Vocabulary


class ActionMasks:
    """Masks of the current states; see ``action_masking``, ``min_new_tokens``, ``top_k`` and ``top_p``.

    :param options: of the environment
    :param vocabulary: of its language model
    :param model: the language model, for top-k and top-p
    :param context: most tokens of a row
    """

    def __init__(
        self, options: TextGenOptions, vocabulary: Vocabulary, model: LanguageModel | None, context: int
    ) -> None:
        self.options = options
        self._ends = np.array(vocabulary.end_ids)
        self._ordinary = np.ones(vocabulary.size, dtype=bool)
        self._ordinary[vocabulary.special_token_ids] = False
        self._restricts = options.top_k > 0 or options.top_p < 1.0  # beyond what is ordinary
        self._model = model
        self._context = context

    def of(
        self, ids: np.ndarray, lengths: np.ndarray, prompt_lengths: np.ndarray, done: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Allowed actions.

        :param ids: ``(B, L)`` token ids
        :param lengths: ``(B,)`` tokens of each row
        :param prompt_lengths: ``(B,)`` how many of these are the prompt's
        :param done: ``(B,)`` bool, rows whose episode is over: no model is asked what could follow
        :param rows: ``(B,)`` the environment rows, which are slots in the model's cache
        :return: ``(B, V)`` bool, a fresh array; at least one action is allowed
        """
        allowed = np.repeat(self._ordinary[None], len(ids), axis=0)
        early = np.flatnonzero(lengths - prompt_lengths < self.options.min_new_tokens)
        allowed[np.ix_(early, self._ends)] = False
        running = np.flatnonzero(~done)
        if self._restricts and len(running):
            allowed[running] &= self._likely(
                ids[running], lengths[running], prompt_lengths[running], allowed[running], rows[running]
            )
        return allowed

    @torch.no_grad()
    def _likely(
        self, ids: np.ndarray, lengths: np.ndarray, prompt_lengths: np.ndarray, allowed: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """``(B, V)`` bool: tokens among the k most likely allowed ones and among those that make up top-p."""
        assert self._model is not None
        hidden = self._model.cached(self._context).last_hidden(ids, lengths, rows, prompt_lengths)
        logits = self._model.head(hidden)
        forbidden = torch.as_tensor(~allowed, device=logits.device)
        logits = (logits / self.options.temperature).masked_fill(forbidden, -torch.inf)
        keep = torch.ones_like(logits, dtype=torch.bool)
        if self.options.top_k > 0:
            likeliest = logits.topk(min(self.options.top_k, logits.shape[1])).indices
            keep = torch.zeros_like(keep).scatter(1, likeliest, True)
        if self.options.top_p < 1.0:
            keep &= nucleus(logits.log_softmax(-1), self.options.top_p)
        return keep.cpu().numpy()
