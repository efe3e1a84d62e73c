"""What is raised when a reward cannot be trusted."""

from __future__ import annotations

import reprlib

_short = reprlib.Repr()
_short.maxstring = 60


class RewardError(Exception):
    """A reward raised an exception or returned something that is not one number per completion.

    :param reward: the reward's name
    :param problem: what was wrong, and what would be right
    :param row: the row it happened in; None when it concerns the whole batch
    :param completion: the completion of that row, of which a short piece is shown
    """

    def __init__(self, reward: str, problem: str, *, row: int | None = None, completion: str | None = None) -> None:
        super().__init__(reward, problem)
        self.reward = reward
        self.problem = problem
        self.row = row
        self.completion = completion

    def __str__(self) -> str:
        where = "" if self.row is None else f", row {self.row}"
        text = "" if self.completion is None else f" (completion {_short.repr(self.completion)})"
        return f"reward {self.reward!r}{where}{text}: {self.problem}"


class RewardValueError(RewardError):
    """A reward gave a number that nothing can be learned from: not finite, or too large."""
