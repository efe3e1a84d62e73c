"""REINFORCE with a baseline: the policy gradient from whole episodes, and nothing else.

Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning"; Sutton and
Barto, "Reinforcement Learning: An Introduction", section 13.4.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.common.arguments import RoundGradientArguments
from textgym.agents.common.groups import leave_one_out_advantages
from textgym.agents.common.losses import Loss, policy_gradient, value_loss
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.common.whole_episodes import TextEpisodeAlgorithm
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_choice

BASELINES = ("value", "mean", "none")


class REINFORCE(TextEpisodeAlgorithm):
    """Log-probabilities weighted by the rewards that follow, minus a baseline.

    Further arguments are those of :class:`~textgym.agents.common.whole_episodes.TextEpisodeAlgorithm`. ::

        >>> import gymnasium as gym, textgym
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> model = textgym.agents.REINFORCE("LanguageModelPolicy", vec, baseline="mean", seed=0).learn(8)
        >>> len(model.finished_episodes)
        4

    :param baseline: ``"value"``: the value head, which learns the rewards-to-go; ``"mean"``: at each place the mean
        over the other episodes of the rollout of their rewards from there on (0 where they have ended); ``"none"``
    :param gamma: discount per token
    :param vf_coef: weight of the value loss, with ``baseline="value"``
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        baseline: str = "value",
        normalize_advantage: bool | str = False,
        vf_coef: float = 0.1,
        **arguments: Unpack[RoundGradientArguments],
    ) -> None:
        check_choice("baseline", baseline, BASELINES)
        self.baseline = baseline
        super().__init__(policy, env, normalize_advantage=normalize_advantage, vf_coef=vf_coef, **arguments)

    def compute_advantages(self, buffer: EpisodeBuffer, last_values: Tensor) -> None:
        """Rewards-to-go minus the baseline."""
        if self.baseline == "value":
            super().compute_advantages(buffer, last_values)  # with λ = 1 that is it
            return
        segments, to_go = self.rewards_to_go(buffer)
        if self.baseline == "mean" and len(segments) < 2:
            raise ValueError("baseline='mean' compares episodes with each other; the rollout has one: take more rows")
        judged = self.judged(segments)
        if self.baseline == "none":
            advantages = np.where(judged[:, None], to_go, 0.0)
        else:
            advantages = leave_one_out_advantages(to_go, len(segments), judged)
        self.fill(buffer, segments, advantages, to_go)

    def loss(self, batch: SegmentSamples) -> Loss:
        """The policy gradient, and the value loss where the value head is the baseline."""
        values, log_prob, entropy = self.policy.evaluate_segments(batch, self.ent_coef != 0.0)
        policy_loss = policy_gradient(log_prob, self.normalized(batch.advantages), batch.importance).mean()
        loss, figures = policy_loss, {"policy_loss": policy_loss, "entropy_loss": -entropy.mean()}
        if self.baseline == "value":
            figures["value_loss"] = value_loss(batch.returns, values.flatten())
            loss = loss + self.vf_coef * figures["value_loss"]
        if self.ent_coef != 0.0:
            loss = loss + self.ent_coef * figures["entropy_loss"]
        return Loss(loss, figures)
