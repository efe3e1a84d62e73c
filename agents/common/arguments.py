"""Constructor arguments of agents: which there are, by what an agent learns from.

What an argument means, and its default, stands at the base class that has it
(:class:`~textgym.agents.common.on_policy.TextOnPolicyAlgorithm`,
:class:`~textgym.agents.common.whole_episodes.TextEpisodeAlgorithm`,
:class:`~textgym.agents.common.off_policy.TextOffPolicyAlgorithm`). An agent names its own, and says with
``**arguments: Unpack[...]`` which others it hands on; no other is taken. Its signature lists them all.
"""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule
from typing_extensions import TypedDict

from textgym.agents.common.exploration import Exploration


class RunArguments(TypedDict, total=False):
    """What every agent takes besides ``policy``, ``env`` and ``learning_rate``."""

    scoring: str
    stats_window_size: int
    tensorboard_log: str | None
    policy_kwargs: dict[str, Any] | None
    verbose: int
    seed: int | None
    device: torch.device | str
    _init_setup_model: bool


class CriticArguments(RunArguments, total=False):
    """Of rollouts that end after so many tokens, with a critic that knows what is left of an episode."""

    n_steps: int
    batch_size: int | None
    gamma: float
    gae_lambda: float
    whiten_rewards: bool
    bootstrap_truncated: bool


class SharedArguments(RunArguments, total=False):
    """Of agents with one optimizer for policy and critic, whose gradients are scaled down where they are large."""

    learning_rate: float | Schedule
    max_grad_norm: float


class PolicyGradientArguments(TypedDict, total=False):
    """What agents take that raise and lower the probabilities of their own tokens."""

    gamma: float
    ent_coef: float
    whiten_rewards: bool
    exploration: Exploration | None
    importance_cap: float | None


class RatioArguments(TypedDict, total=False):
    """What agents take whose loss has ratios of new to old probabilities, so that a rollout serves several steps."""

    batch_size: int | None
    n_epochs: int
    target_kl: float | None


class LearningArguments(SharedArguments, PolicyGradientArguments, RatioArguments, total=False):
    """Of clipped policy gradients, whatever a rollout is."""


class RoundArguments(SharedArguments, total=False):
    """What every agent takes that learns from rounds of whole episodes."""

    episodes: int | None


class ChosenArguments(RoundArguments, total=False):
    """Of agents that learn from completions chosen among those of a round, whoever wrote them."""

    batch_size: int | None
    exploration: Exploration | None


class RoundGradientArguments(RoundArguments, PolicyGradientArguments, total=False):
    """Of policy gradients from whole episodes."""


class GroupArguments(LearningArguments, total=False):
    """Of clipped policy gradients from whole episodes, in groups that are compared."""

    episodes: int | None


class ReplayArguments(RoundArguments, total=False):
    """What every agent takes that learns from a replay of episodes."""

    replay_episodes: int
    batch_episodes: int | None
    gradient_steps: int
    gamma: float
    tau: float
    target_update_interval: int
