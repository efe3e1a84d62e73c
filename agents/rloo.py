"""REINFORCE leave-one-out: several completions of each prompt are each other's baseline, and no critic is needed.

Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
LLMs", https://arxiv.org/abs/2402.14740. The KL penalty is in the reward (``kl_coef`` of the environment), as there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.common.arguments import GroupArguments
from textgym.agents.common.groups import CREDITS, by_credit, leave_one_out_advantages
from textgym.agents.common.losses import Loss, clipped_surrogate, ratio_figures
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.common.whole_episodes import TextEpisodeAlgorithm
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_choice, check_int, check_number


class RLOO(TextEpisodeAlgorithm):
    """Completions of one prompt compared with the mean of the others.

    A completion is one action with the probability of all its tokens, so the ratio of new to old probabilities, which
    is clipped as in PPO, is that of the completion. With ``credit="turn"`` turns are actions with ratios of their own,
    and with ``credit="token"`` tokens are (:mod:`textgym.agents.common.groups`). Further arguments are those of
    :class:`~textgym.agents.common.whole_episodes.TextEpisodeAlgorithm`. ::

        >>> import gymnasium as gym, textgym
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> model = textgym.agents.RLOO("LanguageModelPolicy", vec, group_size=2, seed=0).learn(8)
        >>> len({episode["prompt"] for episode in model.finished_episodes})
        2

    :param group_size: completions of each prompt, K, at least 2
    :param credit: ``"completion"``, ``"turn"`` or ``"token"``: what has an advantage of its own
    :param clip_range: ratios are clipped to 1 ± this; it matters with ``n_epochs`` or minibatches
    :param normalize_advantage: True: per minibatch; ``"rollout"``: over the rollout; False: not at all
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        group_size: int = 4,
        credit: str = "completion",
        clip_range: float = 0.2,
        normalize_advantage: bool | str = False,
        **arguments: Unpack[GroupArguments],
    ) -> None:
        check_choice("credit", credit, CREDITS)
        check_int("group_size", group_size, low=2)
        check_number("clip_range", clip_range, low=0.0, open_low=True)
        self.credit = credit
        self.clip_range = clip_range
        super().__init__(policy, env, group_size=group_size, normalize_advantage=normalize_advantage, **arguments)

    def compute_advantages(self, buffer: EpisodeBuffer, last_values: Tensor) -> None:
        """Returns, or rewards-to-go, minus the mean of the others of the group."""
        segments, to_go = self.rewards_to_go(buffer)
        values, decided = by_credit(to_go, self.turns(buffer, segments), self.credit)
        advantages = leave_one_out_advantages(values, self.group_size, self.judged(segments))
        self.fill(buffer, segments, np.take_along_axis(advantages, decided, 1), to_go)

    def loss(self, batch: SegmentSamples) -> Loss:
        """The clipped surrogate, summed over each completion and averaged over completions."""
        _, log_prob, entropy = self.policy.evaluate_segments(batch, self.ent_coef != 0.0)
        number = len(batch.episodes)
        log_ratio = log_prob - batch.old_log_prob  # (M,)
        advantages, importance = self.normalized(batch.advantages), batch.importance
        if self.credit != "token":
            begins, of = self._decisions(batch)
            advantages = advantages[torch.as_tensor(begins, device=advantages.device)]  # (D,), all tokens have the same
            log_ratio = self.token_sums(log_ratio, of, len(begins))  # (D,)
            if importance is not None:
                importance = self.token_sums(importance.log(), of, len(begins)).exp().clamp(max=self.importance_cap)
        policy_loss = clipped_surrogate(log_ratio, advantages, self.clip_range, importance).sum() / number
        entropy_loss = -entropy.mean()
        loss = policy_loss if self.ent_coef == 0.0 else policy_loss + self.ent_coef * entropy_loss
        figures = {"policy_loss": policy_loss, "entropy_loss": entropy_loss}
        return Loss(loss, {**figures, **ratio_figures(log_ratio, self.clip_range)}, weight=number)

    def _decisions(self, batch: SegmentSamples) -> tuple[np.ndarray, np.ndarray]:
        """``(D,)`` which token each completion, or each turn, of a minibatch begins with, and ``(M,)`` which one each
        token belongs to."""
        changes = np.diff(batch.rows, prepend=-1) != 0
        if self.credit == "turn":
            assert batch.turns is not None
            changes |= np.diff(batch.turns, prepend=0) != 0
        return np.flatnonzero(changes), np.cumsum(changes) - 1
