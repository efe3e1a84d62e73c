"""Group relative policy optimisation: PPO's clipped ratios with advantages from a group of completions, no critic.

Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
https://arxiv.org/abs/2402.03300. The variants of the loss: Liu et al. 2025, "Understanding R1-Zero-Like Training: A
Critical Perspective" (https://arxiv.org/abs/2503.20783), and Yu et al. 2025, "DAPO" (https://arxiv.org/abs/2503.14476).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.common.arguments import GroupArguments
from textgym.agents.common.groups import CREDITS, SCALES, by_credit, group_relative_advantages
from textgym.agents.common.losses import Loss, clipped_surrogate, ratio_figures
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.common.whole_episodes import TextEpisodeAlgorithm
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_choice, check_int, check_number
from textgym.kl import kl_estimate

LOSS_TYPES = ("grpo", "dr_grpo", "dapo")


class GRPO(TextEpisodeAlgorithm):
    """Completions of one prompt compared with their mean, over their standard deviation.

    Further arguments are those of :class:`~textgym.agents.common.whole_episodes.TextEpisodeAlgorithm`. ::

        >>> import gymnasium as gym, textgym
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4, kl_coef=0.0)
        >>> agent = textgym.agents.GRPO("LanguageModelPolicy", vec, group_size=4, kl_loss_coef=0.04, seed=0)
        >>> agent.learn(16).num_timesteps
        16

    :param group_size: completions of each prompt, K, at least 2
    :param credit: ``"completion"``, ``"turn"`` or ``"token"``: what has an advantage of its own, see
        :mod:`textgym.agents.common.groups`
    :param loss_type: how tokens are averaged. ``"grpo"``: over each completion, then over completions, so that tokens
        of long ones count less; ``"dr_grpo"``: the sum over the token budget of all completions, so that every token
        counts the same whatever its completion's length; ``"dapo"``: over all tokens of the minibatch
    :param scale: what advantages are divided by: the standard deviation of the returns of the ``"group"`` or the
        ``"batch"``, or nothing, ``"none"``, which the paper of ``dr_grpo`` has
    :param clip_range: ratios are clipped below 1 minus this
    :param clip_range_high: ratios are clipped above 1 plus this; default ``clip_range``; 0.28 in DAPO
    :param kl_loss_coef: weight of the k3 estimate of KL(π ‖ π_ref) in the loss, where the paper has it (0.04); in most
        cases with ``kl_coef=0`` in the environment, which has it in the reward instead
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        group_size: int = 4,
        credit: str = "completion",
        loss_type: str = "grpo",
        scale: str = "group",
        clip_range: float = 0.2,
        clip_range_high: float | None = None,
        kl_loss_coef: float = 0.0,
        **arguments: Unpack[GroupArguments],
    ) -> None:
        check_choice("credit", credit, CREDITS)
        check_choice("loss_type", loss_type, LOSS_TYPES)
        check_choice("scale", scale, SCALES)
        check_int("group_size", group_size, low=2)
        check_number("clip_range", clip_range, low=0.0, open_low=True)
        if clip_range_high is not None:
            check_number("clip_range_high", clip_range_high, low=0.0, open_low=True)
        check_number("kl_loss_coef", kl_loss_coef, low=0.0)
        self.credit = credit
        self.loss_type = loss_type
        self.scale = scale
        self.clip_range = clip_range
        self.clip_range_high = clip_range_high
        self.kl_loss_coef = kl_loss_coef
        super().__init__(policy, env, group_size=group_size, **arguments)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has the KL to the reference model in it."""
        return self.kl_loss_coef > 0

    def compute_advantages(self, buffer: EpisodeBuffer, last_values: Tensor) -> None:
        """Returns, or rewards-to-go, minus the mean of the group, scaled."""
        segments, to_go = self.rewards_to_go(buffer)
        values, decided = by_credit(to_go, self.turns(buffer, segments), self.credit)
        judged = self.judged(segments)
        advantages = group_relative_advantages(values, to_go[:, 0], self.group_size, self.scale, judged)
        self.fill(buffer, segments, np.take_along_axis(advantages, decided, 1), to_go)

    def loss(self, batch: SegmentSamples) -> Loss:
        """The clipped surrogate and the KL to the reference, averaged as ``loss_type`` says."""
        _, log_prob, entropy = self.policy.evaluate_segments(batch, self.ent_coef != 0.0)
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        log_ratio = log_prob - batch.old_log_prob  # (M,)
        token_loss = clipped_surrogate(log_ratio, batch.advantages, (self.clip_range, high), batch.importance)
        figures = {"policy_loss": token_loss.mean(), "entropy_loss": -entropy.mean()}
        if self.kl_loss_coef > 0:
            assert batch.ref_log_prob is not None
            kl = kl_estimate(log_prob, batch.ref_log_prob, "k3")
            token_loss = token_loss + self.kl_loss_coef * kl
            figures["kl_ref"] = kl.mean()
        loss, weight = self._averaged(token_loss, batch)
        if self.ent_coef != 0.0:
            loss = loss + self.ent_coef * figures["entropy_loss"]
        return Loss(loss, {**figures, **ratio_figures(log_ratio, (self.clip_range, high))}, weight)

    def _averaged(self, token_loss: Tensor, batch: SegmentSamples) -> tuple[Tensor, int]:
        """The loss of a minibatch from those of its tokens ``(M,)``, and its weight beside other processes'."""
        number = len(batch.episodes)
        if self.loss_type == "dapo":
            return token_loss.mean(), len(token_loss)
        if self.loss_type == "dr_grpo":
            return token_loss.sum() / (number * self._budget), number
        lengths = torch.as_tensor(batch.rows).bincount(minlength=number).to(token_loss.device)
        return (self.token_sums(token_loss, batch.rows, number) / lengths).mean(), number

    @property
    def _budget(self) -> int:
        """Most tokens of a completion."""
        return self._environment.max_actions
