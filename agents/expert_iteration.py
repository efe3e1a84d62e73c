"""Expert iteration by best-of-n: several completions of each prompt, and supervised learning on the best of them.

Anthony et al. 2017, "Thinking Fast and Slow with Deep Learning and Tree Search" (https://arxiv.org/abs/1705.08439);
with the best of n samples as the expert, Dong et al. 2023, "RAFT" (https://arxiv.org/abs/2304.06767); with a threshold,
Gulcehre et al. 2023, "Reinforced Self-Training (ReST)" (https://arxiv.org/abs/2308.08998). There is no KL in the loss:
the environment's reward has it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.common.arguments import ChosenArguments
from textgym.agents.common.losses import Loss
from textgym.agents.common.ranking import best_of_groups
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.common.whole_episodes import TextEpisodeAlgorithm
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_int, check_number
from textgym.envs.segments import Segment


class ExpertIteration(TextEpisodeAlgorithm):
    """The best completions of each prompt become targets of supervised learning.

    What counts as the best is the return that the environment pays, KL penalty included. A rollout none of whose
    completions is good enough for ``threshold`` changes nothing. Further arguments are those of
    :class:`~textgym.agents.common.whole_episodes.TextEpisodeAlgorithm`. ::

        >>> import gymnasium as gym, textgym
        >>> from textgym.agents.expert_iteration import ExpertIteration
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> model = ExpertIteration("LanguageModelPolicy", vec, group_size=2, seed=0).learn(8)
        >>> len(model.finished_episodes), int(model.targets(model.rollout_buffer).sum())
        (4, 2)

    :param group_size: completions of each prompt, K
    :param keep: how many of them become targets
    :param threshold: only completions with at least this return
    :param quantile: only completions whose return is at least this quantile of all returns of the rollout, 0 to 1
    :param n_epochs: passes over the targets of a rollout
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        group_size: int = 4,
        keep: int = 1,
        threshold: float | None = None,
        quantile: float | None = None,
        n_epochs: int = 4,
        **arguments: Unpack[ChosenArguments],
    ) -> None:
        check_int("group_size", group_size, low=1)
        check_int("keep", keep, low=1)
        if keep > group_size:
            raise ValueError(f"keep={keep} of group_size={group_size} completions: it must be at most that many")
        if threshold is not None:
            check_number("threshold", threshold)
        if quantile is not None:
            check_number("quantile", quantile, low=0.0, high=1.0)
        self.keep = keep
        self.threshold = threshold
        self.quantile = quantile
        super().__init__(
            policy,
            env,
            group_size=group_size,
            n_epochs=n_epochs,
            importance_cap=None,  # targets are targets, whoever wrote them
            **arguments,
        )

    def compute_advantages(self, buffer: EpisodeBuffer, last_values: Tensor) -> None:
        """1 for the tokens of targets and 0 for the others."""
        segments, to_go = self.rewards_to_go(buffer)
        returns = to_go[:, 0]
        judged = self.judged(segments)
        chosen = best_of_groups(returns, self.group_size, self.keep, judged)
        if self.threshold is not None:
            chosen &= returns >= self.threshold
        if self.quantile is not None:
            all_judged = np.concatenate(self.processes.gather(returns[judged]))
            chosen &= returns >= (np.quantile(all_judged, self.quantile) if len(all_judged) else np.inf)
        self.fill(buffer, segments, np.broadcast_to(chosen[:, None], to_go.shape), to_go)
        number, total, best = self.processes.total([chosen.sum(), len(chosen), returns[chosen].sum()])
        self.logger.record("rollout/target_share", number / total)
        if number:
            self.logger.record("rollout/target_return", best / number)

    def targets(self, buffer: EpisodeBuffer) -> np.ndarray:
        """``(E,)`` bool, which of the buffer's segments, in their order, are targets."""
        return np.array([buffer.advantages[segment.start, segment.row] > 0 for segment in buffer.segments])

    def units(self, buffer: EpisodeBuffer) -> list[list[Segment]]:
        """The targets, each by itself."""
        return [
            [segment] for segment, is_target in zip(buffer.segments, self.targets(buffer), strict=True) if is_target
        ]

    def _minibatches(self, buffer: EpisodeBuffer) -> Iterator[SegmentSamples]:
        """None at all where a process has no target, because all learn in the same minibatches."""
        if self.processes.smallest(int(self.targets(buffer).sum())):
            yield from super()._minibatches(buffer)

    def loss(self, batch: SegmentSamples) -> Loss:
        """Cross-entropy: −log π of the targets' tokens, averaged over tokens."""
        _, log_prob, entropy = self.policy.evaluate_segments(batch, entropy_gradient=False)
        loss = -log_prob.mean()
        return Loss(loss, {"cross_entropy": loss, "entropy_loss": -entropy.mean()})
