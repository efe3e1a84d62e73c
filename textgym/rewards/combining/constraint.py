"""A reward's value as a constraint: within limits or not."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from textgym.checks import check_choice, check_number
from textgym.rewards.arithmetic import Composed
from textgym.rewards.function_reward import RewardLike, check_reward


class Constraint(Composed):
    """Turns any reward into a demand on its value, with a positive or a negative form.

    Within ``at_least`` ≤ Φ ≤ ``at_most``, ``form="bonus"`` (the positive form) gives 1.0 and else 0.0;
    ``form="penalty"`` (the negative form) gives 0.0 and else −1.0; ``form="distance"`` gives 0.0 and else minus how far
    Φ lies outside, without a lower limit. None stays None.

    :param reward: a reward or a function with the signature of one
    :param at_least: least value that is allowed
    :param at_most: largest value that is allowed
    :param form: ``"bonus"``, ``"penalty"`` or ``"distance"``
    :raises ValueError: if no limit is given, one is not finite, or the lower lies above the upper

    >>> def words(completions):
    ...     return [len(completion.split()) for completion in completions]
    >>> texts = {"prompts": ["p"] * 3, "completions": ["a b c", "a b c d e f", "a"]}
    >>> for form in ("bonus", "penalty", "distance"):
    ...     print(*Constraint(words, at_least=2, at_most=4, form=form)(**texts))
    1.0 0.0 0.0
    0.0 -1.0 -1.0
    0.0 -2.0 -1.0
    """

    def __init__(
        self,
        reward: RewardLike,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        form: Literal["bonus", "penalty", "distance"] = "penalty",
    ) -> None:
        self.form = check_choice("form", form, ("bonus", "penalty", "distance"))
        given = {"at_least": at_least, "at_most": at_most}
        if at_least is None and at_most is None:
            raise ValueError("give at_least=, at_most= or both")
        for name, value in given.items():
            if value is not None:
                check_number(name, value)
        self.low = -math.inf if at_least is None else float(at_least)
        self.high = math.inf if at_most is None else float(at_most)
        if self.low > self.high:
            raise ValueError(f"at_least={at_least} lies above at_most={at_most}: nothing could be allowed")
        part = check_reward("reward", reward)
        limits = "".join(f", {name}={value:g}" for name, value in given.items() if value is not None)
        super().__init__([part], f"Constraint({part.name}{limits})")

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        distance = np.maximum(np.maximum(self.low - scores[0], scores[0] - self.high), 0.0)
        if self.form == "distance":
            return 0.0 - distance
        outside = np.where(np.isnan(distance), np.nan, distance > 0)
        return 1.0 - outside if self.form == "bonus" else 0.0 - outside
