"""Normalising with the mean and standard deviation of what the policy has written so far."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from textgym.checks import check_bool
from textgym.rewards.arithmetic import Normalized
from textgym.rewards.errors import RewardError
from textgym.rewards.function_reward import RewardLike, check_reward
from textgym.rewards.learning import LearningReward
from textgym.rewards.scores import scores_of


class RunningNormalized(Normalized, LearningReward):
    """``(Φ - mean) / std`` with the statistics of all complete texts observed so far.

    Mean and variance (biased) are kept by Welford's algorithm in the form of Chan, Golub and LeVeque (1979), which
    merges a batch at once. They begin with those of 256 texts of the reference model, as ``.normalized()`` does, and
    take in the policy's complete texts between rollouts (:class:`~textgym.rewards.learning.LearningReward`). Where
    fewer than two texts were observed, or all scores are equal, there is nothing to divide by: std counts as 1.

    Observing scores each complete text once more. Rows to which the reward does not apply are left out. Where Φ is paid
    in differences the mean cancels, and only the scale matters.

    Range: unbounded; most values lie in (-3, 3).

        >>> from textgym.rewards import FunctionReward
        >>> length = FunctionReward(lambda completions: [len(text) for text in completions], name="length")
        >>> reward = RunningNormalized(length, warm_up=False)
        >>> reward.observe(prompts=["", ""], completions=["a", "abc"])  # lengths 1 and 3: mean 2, std 1
        >>> reward(prompts=[""], completions=["abcd"])
        [2.0]

    :param reward: what is normalised, a reward or a function with the signature of one
    :param warm_up: whether the environment begins the statistics with texts of the reference model; without it the
        first rollout is not normalised at all (mean 0, std 1)
    """

    def __init__(self, reward: RewardLike, warm_up: bool = True) -> None:
        check_bool("warm_up", warm_up)
        super().__init__(check_reward("reward", reward))
        self._name = f"running_normalized({self.reward.name})"
        self.count = 0
        self._squares = 0.0  # sum of squared distances from the mean
        if not warm_up:
            self.mean, self.std = 0.0, 1.0

    def observe(self, *, prompts: list[str], completions: list[str], **columns: Any) -> None:
        """Take the scores of complete texts into the statistics."""
        self._merge(scores_of(self.reward, prompts, completions, columns))

    def calibrate(self, scores: np.ndarray) -> None:
        """Begin anew with these scores.

        :param scores: ``(N,)``; NaN where the reward does not apply
        :raises RewardError: if one is infinite
        """
        self.count, self._squares, self.mean = 0, 0.0, 0.0
        self._merge(np.asarray(scores, dtype=np.float64))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "squares" not in state:
            raise ValueError(f"reward {self.name!r} has running statistics, the given state is another reward's")
        super().load_state_dict(state)
        self.count, self._squares = int(state["count"]), float(state["squares"])

    def _merge(self, scores: np.ndarray) -> None:
        scores = scores[~np.isnan(scores)]
        if not np.isfinite(scores).all():
            raise RewardError(self.name, f"normalising needs finite scores, got {scores}")
        mean = 0.0 if self.mean is None else self.mean
        if len(scores):
            total, batch_mean = self.count + len(scores), float(scores.mean())
            delta = batch_mean - mean
            self._squares += float(((scores - batch_mean) ** 2).sum()) + delta**2 * self.count * len(scores) / total
            mean += delta * len(scores) / total
            self.count = total
        self.mean = mean
        std = math.sqrt(self._squares / self.count) if self.count > 1 else 0.0
        self.std = std if std > 1e-12 * max(1.0, abs(mean)) else 1.0
