"""Distributions over the next token that agents look at besides their policy's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from textgym.agents.policy import LanguageModelPolicy
from textgym.language_model import LanguageModel


@torch.no_grad()
def next_token_log_probs(
    policy: LanguageModelPolicy,
    language_model: LanguageModel,
    obs: Any,
    masks: np.ndarray | None,
    rows: np.ndarray | None = None,
) -> Tensor:
    """``(B, V)`` log-probabilities of a model that reads what the policy does, from its own cache, in nats.

    :param policy: whose temperature and context are meant
    :param language_model: with the policy's tokens
    :param obs: observations of B rows
    :param masks: ``(B, V)`` bool, tokens that may follow; None for all
    :param rows: ``(B,)`` cache slots the rows live in; default 0 to B-1
    """
    ids, lengths, prompt_lengths = policy._tokens(obs)
    hidden = language_model.cached(policy.context).last_hidden(ids, lengths, rows, prompt_lengths)
    return policy._log_distribution(language_model, hidden, masks)


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
