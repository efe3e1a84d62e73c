"""Rewards made of rewards: sums, products, numbers, clipping and normalising.

Each passes a batch on to its parts, so that a causal reward model inside a sum keeps its cache and its one
pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.checks import check_number, shown
from textgym.rewards.base import Reward, potentials_of, prefix_potentials_of
from textgym.rewards.errors import RewardError
from textgym.rewards.function_reward import check_reward
from textgym.rewards.scores import as_list, scores_of

if TYPE_CHECKING:
    from textgym.rewards.prefixes import PrefixBatch

_ATOM, _PRODUCT, _SUM = range(3)  # how loosely an expression binds: what needs parentheses inside what


class Composed(Reward):
    """A function of the scores of other rewards, row by row.

    :param parts: the rewards
    :param name: the expression's text
    :param binding: how loosely that text binds
    """

    def __init__(self, parts: Sequence[Reward], name: str, binding: int = _ATOM) -> None:
        self.parts = tuple(parts)
        self._name = name
        self._binding = binding

    @abstractmethod
    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        """Scores of the parts, ``(N,)`` each with NaN for None, to scores ``(N,)`` of the whole."""

    @property
    def name(self) -> str:
        return self._name

    def forget(self, rows: np.ndarray) -> None:
        for part in self.parts:
            part.forget(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = state.get("parts", [])
        if len(parts) != len(self.parts):
            raise ValueError(f"reward {self.name!r} has {len(self.parts)} parts, the given state {len(parts)}")
        for part, part_state in zip(self.parts, parts, strict=True):
            part.load_state_dict(part_state)

    def uncalibrated(self) -> list[Normalized]:
        found = [inner for part in self.parts for inner in part.uncalibrated()]
        return list(dict.fromkeys(found))

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        scores = [scores_of(part, prompts, completions, columns) for part in self.parts]
        return as_list(self._checked(*scores))

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        return self._checked(*(potentials_of(part, batch) for part in self.parts))

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        scores = [prefix_potentials_of(part, batch, at) for part in self.parts]
        return [self._checked(*row) for row in zip(*scores, strict=True)]

    def _checked(self, *scores: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            combined = self._combine(*scores)
        if np.isinf(combined).any():
            values = ", ".join(str(score[np.isinf(combined)][0]) for score in scores)
            raise RewardError(self.name, f"overflows float64 for parts of {values}")
        return combined


class Sum(Composed):
    """``left + sign * right``; None adds nothing, and the sum is None where both are."""

    def __init__(self, left: Reward, right: Reward, sign: int) -> None:
        text = f"{left.name} {'+' if sign > 0 else '-'} {_within(right, _SUM if sign > 0 else _PRODUCT)}"
        super().__init__([left, right], text, _SUM)
        self.sign = sign

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        left, right = scores
        total = np.nan_to_num(left) + self.sign * np.nan_to_num(right)
        return np.where(np.isnan(left) & np.isnan(right), np.nan, total)


class Shifted(Composed):
    """A reward plus a number, which counts also where the reward is None."""

    def __init__(self, reward: Reward, offset: float, name: str) -> None:
        super().__init__([reward], name, _SUM)
        self.offset = offset

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        return np.nan_to_num(scores[0]) + self.offset


class Product(Composed):
    """``left * right``; None where one of them is."""

    def __init__(self, left: Reward, right: Reward) -> None:
        super().__init__([left, right], f"{_within(left, _PRODUCT)} * {_within(right, _ATOM)}", _PRODUCT)

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        return scores[0] * scores[1]


class Scaled(Composed):
    """A reward times a number, or divided by one."""

    def __init__(self, reward: Reward, factor: float, name: str, *, divide: bool = False) -> None:
        super().__init__([reward], name, _PRODUCT)
        self.factor = factor
        self.divide = divide

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        return scores[0] / self.factor if self.divide else scores[0] * self.factor


class Clipped(Composed):
    """A reward limited to [low, high]; None stays None."""

    def __init__(self, reward: Reward, low: float, high: float) -> None:
        if check_number("low", low) >= check_number("high", high):
            raise ValueError(f"low={low} must be less than high={high}")
        super().__init__([reward], f"{_within(reward, _ATOM)}.clip({low:g}, {high:g})")
        self.low, self.high = low, high

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        return np.clip(scores[0], self.low, self.high)


class Normalized(Composed):
    """``(Φ - mean) / std`` with given numbers, or with those of complete texts of the reference model.

    Where Φ is paid in differences, token by token, the mean cancels and only the scale matters.

    :param reward: what is normalised
    :param mean: mean of its scores; None to calibrate later
    :param std: their standard deviation (biased variance); None to calibrate later
    """

    def __init__(self, reward: Reward, mean: float | None = None, std: float | None = None) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"normalized needs mean and std or neither of them, got mean={mean}, std={std}")
        if mean is not None and std is not None:
            check_number("mean", mean)
            check_number("std", std, low=0.0, open_low=True)
        given = "" if mean is None else f"{mean:g}, {std:g}"
        super().__init__([reward], f"{_within(reward, _ATOM)}.normalized({given})")
        self.mean, self.std = mean, std

    @property
    def reward(self) -> Reward:
        """What is normalised."""
        return self.parts[0]

    def uncalibrated(self) -> list[Normalized]:
        return super().uncalibrated() + ([self] if self.mean is None else [])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean, self.std = state["mean"], state["std"]

    def calibrate(self, scores: np.ndarray) -> None:
        """Set mean and standard deviation (biased variance) to those of scores.

        :param scores: ``(N,)`` scores that :attr:`reward` gives complete texts of the reference model; NaN
            where it does not apply
        :raises RewardError: if there is no finite score, one is infinite, or all are equal
        """
        scores = np.asarray(scores, dtype=np.float64)
        scores = scores[~np.isnan(scores)]
        if scores.size == 0 or not np.isfinite(scores).all():
            raise RewardError(self.name, f"calibration needs finite scores, got {scores}")
        mean, std = float(scores.mean()), float(scores.std())
        if std <= 1e-12 * max(1.0, abs(mean)):
            raise RewardError(
                self.name,
                f"all {scores.size} calibration scores are {mean:g}, so there is no standard deviation to "
                "divide by; calibrate on more or different texts, or give mean= and std=",
            )
        self.mean, self.std = mean, std

    def calibrate_on(self, *batches: PrefixBatch) -> None:
        """Calibrate on complete texts; rows to which the reward does not apply are left out.

        :param batches: complete texts sampled from the reference model
        :raises RewardError: as :meth:`calibrate`
        """
        scores = [potentials_of(self.reward, batch) for batch in batches]
        self.calibrate(np.concatenate([np.zeros(0), *scores]))

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        if self.mean is None or self.std is None:
            raise RewardError(
                self.name,
                "is not calibrated: give its numbers, .normalized(mean=..., std=...), or use it in an "
                "environment, which calibrates it on texts of the reference model",
            )
        return (scores[0] - self.mean) / self.std


def add(left: Any, right: Any) -> Reward:
    """``left + right`` of rewards, callables and numbers."""
    if isinstance(left, Real):
        number, reward = _number(left), _operand(right)
        return Shifted(reward, number, f"{number:g} + {_within(reward, _SUM)}")
    if isinstance(right, Real):
        number, reward = _number(right), _operand(left)
        return Shifted(reward, number, f"{reward.name} + {number:g}")
    return Sum(_operand(left), _operand(right), 1)


def subtract(left: Any, right: Any) -> Reward:
    """``left - right`` of rewards, callables and numbers."""
    if isinstance(left, Real):
        number, reward = _number(left), _operand(right)
        negative = Scaled(reward, -1.0, f"-{_within(reward, _ATOM)}")
        return Shifted(negative, number, f"{number:g} - {_within(reward, _PRODUCT)}")
    if isinstance(right, Real):
        number, reward = _number(right), _operand(left)
        return Shifted(reward, -number, f"{reward.name} - {number:g}")
    return Sum(_operand(left), _operand(right), -1)


def multiply(left: Any, right: Any) -> Reward:
    """``left * right`` of rewards, callables and numbers."""
    if isinstance(left, Real) or isinstance(right, Real):
        number, reward = (left, right) if isinstance(left, Real) else (right, left)
        factor, reward = _number(number), _operand(reward)
        text = "-" if factor == -1 else f"{factor:g} * "
        return Scaled(reward, factor, text + _within(reward, _ATOM))
    return Product(_operand(left), _operand(right))


def divide(left: Any, right: Any) -> Reward:
    """``left / right`` of a reward and a number."""
    if not isinstance(right, Real):
        raise TypeError(f"can't divide by the reward {_operand(right).name!r}, which may be zero; divide by a number")
    divisor = _number(right)
    if divisor == 0:
        raise ZeroDivisionError(f"reward {left.name!r} divided by zero")
    return Scaled(left, divisor, f"{_within(left, _PRODUCT)} / {divisor:g}", divide=True)


def _operand(value: Any) -> Reward:
    if isinstance(value, Reward) or callable(value):
        return check_reward("a part of a reward", value)
    raise TypeError(f"rewards combine with rewards, functions and finite numbers, not with {shown(value)}")


def _number(value: Real) -> float:
    return check_number("a number that rewards are combined with", value)


def _within(reward: Reward, binding: int) -> str:
    """The reward's name, in parentheses where it binds more loosely than ``binding``."""
    own = reward._binding if isinstance(reward, Composed) else _ATOM
    return f"({reward.name})" if own > binding else reward.name
