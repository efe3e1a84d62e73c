"""A copy of a policy that stays behind: what value-based agents take their targets from.

It costs the memory of the weights a second time, without gradients or optimizer state. Of a policy with a low-rank
adapter only adapter and value head are copied, and the rest is shared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from textgym.agents.policy.language_model_policy import LanguageModelPolicy


def lagging_copy(policy: LanguageModelPolicy) -> LanguageModelPolicy:
    """A copy of a policy that does not learn.

    :param policy: the one that does
    """
    optimizer = policy.optimizer
    # The moments of the optimizer are twice the weights; a copy that learns nothing has none.
    lagging = copy.deepcopy(policy, {id(optimizer): None})
    lagging.requires_grad_(False)
    return lagging


@torch.no_grad()
def follow(lagging: LanguageModelPolicy, policy: LanguageModelPolicy, tau: float = 1.0) -> None:
    """Move a lagging copy towards its policy: θ' ← τ·θ + (1 − τ)·θ'.

    :param lagging: from :func:`lagging_copy`
    :param policy: what it was copied from
    :param tau: 1 makes them the same
    """
    own = dict(lagging.named_parameters())
    for name, parameter in _learning(policy):
        if tau == 1.0:
            own[name].copy_(parameter)
        else:
            own[name].lerp_(parameter, tau)


def weights_of(lagging: LanguageModelPolicy, policy: LanguageModelPolicy) -> dict[str, Tensor]:
    """Those of a lagging copy's weights that follow the policy's, by name."""
    own = dict(lagging.named_parameters())
    return {name: own[name].detach() for name, _ in _learning(policy)}


@torch.no_grad()
def set_weights(lagging: LanguageModelPolicy, weights: dict[str, Any]) -> None:
    """Put back what :func:`weights_of` gave."""
    own = dict(lagging.named_parameters())
    for name, value in weights.items():
        own[name].copy_(value)


def _learning(policy: LanguageModelPolicy) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
