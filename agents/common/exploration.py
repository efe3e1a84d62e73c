"""Drawing tokens from another distribution than the policy's own while it learns, and counting them for what they are.

An agent draws from its policy π, and what it explores is what π finds likely. With :class:`Exploration` it draws from

    b(a|s) = (1 − ε) · π(a|s)^(1/τ) / Σ + ε · π_ref(a|s)

instead, with a temperature τ and a share ε of the reference model, each a number or a schedule. What that means:

- The log-probability that is stored and reported to the environment stays log π(a|s), of the policy that is trained; so
  the ratio before the first optimizer step is 1, and the KL penalty is that of π at the token drawn.
- Each token counts in the loss by its importance weight π(a|s) / b(a|s), at most ``importance_cap`` (truncated
  importance sampling), as tokens drawn with a copy of the weights do. With τ = 1 the weight is at most 1 / (1 − ε). It
  corrects the token at hand, not the states that b led to. ``importance_cap=None`` leaves the weights out.
- ``predict``, ``generate`` and evaluations draw from π as ever.

Two other ways to explore need nothing from here. ``ent_coef`` adds the entropy to the objective and leaves the drawing
as it is. :class:`~textgym.rewards.NoveltyReward` pays for texts unlike those of before: a bonus in the reward, which
changes what is optimal but no log-probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from textgym.checks import check_number, check_schedule, check_temperature, shown


@dataclass(frozen=True)
class Mixture:
    """What the tokens of a rollout are drawn from: a flatter policy, and the reference model.

    :param temperature: τ, by which the policy's log-probabilities are divided; 1 leaves them as they are
    :param reference_share: ε, the share of tokens that the reference model draws, below 1
    """

    temperature: float = 1.0
    reference_share: float = 0.0

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)
        check_number("reference_share", self.reference_share, low=0.0)
        if self.reference_share >= 1:
            raise ValueError(f"reference_share={self.reference_share} must be below 1, or nothing is the policy's own")

    def log_probs(self, policy: Tensor, reference: Tensor | None) -> Tensor:
        """``(B, V)`` log b.

        :param policy: ``(B, V)`` log π, −∞ where masked
        :param reference: ``(B, V)`` log π_ref, likewise; needed where it has a share
        """
        drawn = (policy / self.temperature).log_softmax(-1) if self.temperature != 1 else policy
        if self.reference_share == 0:
            return drawn
        assert reference is not None
        share = torch.tensor(self.reference_share, dtype=drawn.dtype, device=drawn.device)
        return torch.logaddexp(torch.log1p(-share) + drawn, share.log() + reference.to(drawn.dtype))


@dataclass(frozen=True)
class Exploration:
    """Lets an agent draw its tokens from a flatter policy, or partly from the reference model. ::

        >>> import gymnasium as gym, textgym
        >>> from stable_baselines3.common.utils import LinearSchedule
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> hot_at_first = textgym.agents.Exploration(temperature=LinearSchedule(1.5, 1.0, 1.0), reference_share=0.1)
        >>> model = textgym.agents.PPO("LanguageModelPolicy", vec, n_steps=4, seed=0, exploration=hot_at_first)
        >>> model.learn(16).num_timesteps
        16

    ``rollout/exploration_temperature`` and ``rollout/exploration_reference_share`` are what holds in a rollout.

    :param temperature: τ, a number or a function of the remaining progress (1 to 0)
    :param reference_share: ε, likewise
    :raises ValueError: if one is impossible
    """

    temperature: float | Schedule = 1.0
    reference_share: float | Schedule = 0.0

    def __post_init__(self) -> None:
        check_schedule("temperature", self.temperature, open_low=True)
        check_schedule("reference_share", self.reference_share)
        for progress in (1.0, 0.0):
            self.at(progress)

    def at(self, progress: float) -> Mixture:
        """What is drawn from.

        :param progress: remaining, 1 to 0
        :raises ValueError: if a schedule gives what is impossible
        """
        return Mixture(FloatSchedule(self.temperature)(progress), FloatSchedule(self.reference_share)(progress))


def check_exploration(exploration: Exploration | None) -> None:
    """:raises TypeError: if it is something else"""
    if exploration is not None and not isinstance(exploration, Exploration):
        raise TypeError(
            f"exploration={shown(exploration)} must be an Exploration, such as Exploration(temperature=1.5), or None"
        )
