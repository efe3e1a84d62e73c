"""A reward without its preference for long texts, or for short ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from textgym.checks import check_choice, check_number
from textgym.rewards.arithmetic import Composed, Normalized
from textgym.rewards.base import potentials_of, prefix_potentials_of
from textgym.rewards.errors import RewardError
from textgym.rewards.function_reward import RewardLike, check_reward
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import as_list, scores_of
from textgym.text_units import units_of

LengthUnit = Literal["words", "characters", "tokens"]


class LengthDebiased(Composed):
    """Φ − a · length, with a given slope a or the one that a regression finds.

    Reward models like long texts for being long (Singhal et al. 2023, https://arxiv.org/abs/2310.03716). The slope is
    that of an ordinary least-squares line of Φ on the completion's length over complete texts of the reference model:
    the environment measures it on 256 of them, as for ``.normalized()``, or :meth:`calibrate_on` does. What is left is
    the residual of that line, up to a constant; on those texts it is uncorrelated with length. Paid token by token, it
    is a charge of a for each word, character or token.

    Range: unbounded, as length is; None stays None.

        >>> from textgym.rewards import FunctionReward
        >>> wordy = FunctionReward(lambda completions: [1 + 0.5 * len(text.split()) for text in completions])
        >>> LengthDebiased(wordy, slope=0.5)(prompts=["", ""], completions=["good", "a very good film"])
        [1.0, 1.0]

    :param reward: what is debiased, a reward or a function with the signature of one
    :param slope: a, in Φ per unit of length; None to measure it
    :param unit: ``"words"`` (between white space; characters in scripts without spaces), ``"characters"``, or
        ``"tokens"`` of the policy, which costs nothing on prefixes, and needs ``completion_ids`` where the reward is
        called on texts
    :raises ValueError: if the slope is not finite or the unit unknown
    """

    def __init__(self, reward: RewardLike, slope: float | None = None, unit: LengthUnit = "words") -> None:
        check_choice("unit", unit, get_args(LengthUnit))
        inner = check_reward("reward", reward)
        super().__init__([inner], f"length_debiased({inner.name})")
        self.slope = None if slope is None else check_number("slope", slope)
        self.unit = unit

    def uncalibrated(self) -> list[Normalized]:
        waiting: list[Any] = [*super().uncalibrated(), *([self] if self.slope is None else [])]
        return waiting  # the environment asks each of them for calibrate_on, and no more

    def calibrate_on(self, *batches: PrefixBatch) -> None:
        """Measure the slope on complete texts; rows to which the reward does not apply are left out.

        :raises RewardError: if all texts have one length
        """
        scores = np.concatenate([np.zeros(0), *(potentials_of(self.parts[0], batch) for batch in batches)])
        lengths = np.concatenate([np.zeros(0), *(self._lengths(batch) for batch in batches)])
        applies = ~np.isnan(scores)
        self.calibrate(scores[applies], lengths[applies])

    def calibrate(self, scores: np.ndarray, lengths: np.ndarray) -> None:
        """Set the slope to that of the least-squares line.

        :param scores: ``(N,)`` Φ of complete texts
        :param lengths: ``(N,)`` their lengths
        :raises RewardError: if all texts have one length
        """
        distance = lengths - lengths.mean() if len(lengths) else lengths
        squares = float((distance**2).sum())
        if squares == 0:
            raise RewardError(
                self.name,
                f"the {len(lengths)} texts to measure the slope on have one length in {self.unit}; give slope=, or "
                "texts of different lengths",
            )
        self.slope = float((distance * (scores - scores.mean())).sum()) / squares

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slope": self.slope}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.slope = state["slope"]

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        scores = scores_of(self.parts[0], prompts, completions, columns)
        units: Sequence[Any] = completions
        if self.unit == "tokens":
            if "completion_ids" not in columns:
                raise RewardError(self.name, "unit='tokens' needs completion_ids=, or unit='words'")
            units = columns["completion_ids"]
        return as_list(self._checked(scores, np.array([self._length(text) for text in units], dtype=np.float64)))

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        return self._checked(potentials_of(self.parts[0], batch), self._lengths(batch))

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        scores = prefix_potentials_of(self.parts[0], batch, at)
        if self.unit == "tokens":
            return [self._checked(row, np.asarray(n, dtype=np.float64)) for row, n in zip(scores, at, strict=True)]
        debiased = []
        for i, (row, lengths) in enumerate(zip(scores, at, strict=True)):
            prefixes = batch.at(np.full(len(lengths), i), np.asarray(lengths, dtype=np.int64))
            debiased.append(self._checked(row, self._lengths(prefixes)))
        return debiased

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        if self.slope is None:
            raise RewardError(
                self.name,
                "has no slope yet: give slope=, or use it in an environment, which measures it on texts of the "
                "reference model",
            )
        return scores[0] - self.slope * scores[1]

    def _lengths(self, batch: PrefixBatch) -> np.ndarray:
        """``(B,)`` lengths of the completions."""
        if self.unit == "tokens":
            return batch.completion_lengths.astype(np.float64)
        return np.array([self._length(text) for text in batch.completions], dtype=np.float64)

    def _length(self, text: Any) -> int:
        return len(units_of(text)) if self.unit == "words" else len(text)
