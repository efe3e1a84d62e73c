"""Which tokens may be chosen: no special ones, no early end, on request the reference model's top-k or top-p."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from textgym.language_model import LanguageModel
from textgym.sampling import SamplingSettings
from textgym.vocabulary import Vocabulary


class ActionMasks:
    """Masks of states; see ``action_masking``, ``min_new_tokens``, ``top_k`` and ``top_p`` of the environment.

    :param sampling: the settings
    :param vocabulary: of the language model that is sampled from
    :param model: the reference model, for top-k and top-p; None where neither is set
    :raises ValueError: if the two have different vocabularies
    """

    def __init__(self, sampling: SamplingSettings, vocabulary: Vocabulary, model: LanguageModel | None) -> None:
        self.sampling = sampling
        self._ends = np.array(vocabulary.end_ids)
        self._ordinary = np.ones(vocabulary.size, dtype=bool)
        self._ordinary[vocabulary.special_token_ids] = False
        self.model = model if sampling.restricted else None
        if sampling.restricted:
            if model is None:
                raise ValueError(
                    f"top_k={sampling.top_k}, top_p={sampling.top_p} are those of the reference model: give it"
                )
            if model.vocab_size != vocabulary.size:
                raise ValueError(
                    f"the reference {model.name} has {model.vocab_size} tokens and the model {vocabulary.size}: its "
                    "likeliest tokens can't restrict this model's"
                )

    def of(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        prompt_lengths: np.ndarray,
        rows: np.ndarray,
        written: np.ndarray | None = None,
        done: np.ndarray | None = None,
    ) -> np.ndarray:
        """Allowed actions.

        :param ids: ``(B, L)`` token ids
        :param lengths: ``(B,)`` tokens of each row
        :param prompt_lengths: ``(B,)`` how many of these are the prompt's
        :param rows: ``(B,)`` slots in the reference model's cache
        :param written: ``(B,)`` tokens of each row's newest turn; by default all after the prompt
        :param done: ``(B,)`` bool, rows whose episode is over: no model is asked what could follow
        :return: ``(B, V)`` bool, a fresh array; at least one action is allowed
        """
        allowed = self._without_reference(lengths - prompt_lengths if written is None else written)
        running = np.arange(len(ids)) if done is None else np.flatnonzero(~done)
        if self.model is not None and len(running):
            with torch.no_grad():
                machine = self.model.cached(ids.shape[1])
                hidden = machine.last_hidden(ids[running], lengths[running], rows[running], prompt_lengths[running])
                allowed[running] &= self._likely(hidden, allowed[running]).cpu().numpy()
        return allowed

    @torch.no_grad()
    def at(self, written: np.ndarray, hidden: Tensor | None) -> np.ndarray:
        """The masks of M places of whole texts.

        :param written: ``(M,)`` tokens of its turn before each
        :param hidden: ``(M, H)`` of the reference model there; None where it restricts nothing
        :return: ``(M, V)`` bool, a fresh array
        """
        allowed = self._without_reference(written)
        if hidden is not None:
            allowed &= self._likely(hidden, allowed).cpu().numpy()
        return allowed

    def forget(self, rows: np.ndarray, context: int) -> None:
        """Drop what the reference model has cached of rows of at most ``context`` tokens."""
        if self.model is not None:
            self.model.cached(context).forget(rows)

    def _without_reference(self, written: np.ndarray) -> np.ndarray:
        """``(B, V)`` bool, by the number of tokens that each turn has."""
        allowed = np.repeat(self._ordinary[None], len(written), axis=0)
        early = np.flatnonzero(written < self.sampling.min_new_tokens)
        allowed[np.ix_(early, self._ends)] = False
        return allowed

    def _likely(self, hidden: Tensor, allowed: np.ndarray) -> Tensor:
        """``(B, V)`` bool: tokens among the k most likely allowed ones and among those that make up top-p."""
        assert self.model is not None
        logits = self.model.head(hidden)
        forbidden = torch.as_tensor(~allowed, device=logits.device)
        logits = (logits / self.sampling.temperature).masked_fill(forbidden, -torch.inf)
        keep = torch.ones_like(logits, dtype=torch.bool)
        if self.sampling.top_k > 0:
            likeliest = logits.topk(min(self.sampling.top_k, logits.shape[1])).indices
            keep = torch.zeros_like(keep).scatter(1, likeliest, True)
        if self.sampling.top_p < 1.0:
            keep &= nucleus(logits.log_softmax(-1), self.sampling.top_p)
        return keep


def masks_of(sampling: SamplingSettings, model: LanguageModel, reference: LanguageModel | None) -> ActionMasks | None:
    """The masks under which texts are sampled from a model, or None without masking.

    :param reference: whose likeliest tokens top-k and top-p are
    :raises ValueError: if they are wanted and there is no reference, or it has another vocabulary
    """
    if not sampling.action_masking:
        return None
    if reference is not None and sampling.restricted:
        # The texts are others than those that its owner steps through: they need a cache of their own.
        reference = reference.with_model(reference.model)
    return ActionMasks(sampling, model.vocabulary, reference)


def nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """``(B, V)`` bool: the smallest set of most likely tokens whose probability reaches ``top_p``, at least one.

    Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration", https://arxiv.org/abs/1904.09751. ::

        >>> nucleus(torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.0, 0.8]]).log(), 0.7)
        tensor([[False,  True,  True],
                [False, False,  True]])

    :param log_probs: ``(B, V)`` in nats; minus infinity where a token can't follow
    """
    ordered, order = log_probs.sort(dim=-1, descending=True)
    probs = ordered.exp()
    keep = probs.cumsum(-1) - probs < top_p  # a token stays if those before it don't reach top_p yet
    keep &= probs > 0  # what can't follow is in no nucleus, however near to 1 rounding lets the sum come
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter(1, order, keep)
