"""Segments: consecutive steps of one row within one episode, and the text that they wrote.

The environment's record of a rollout is made of them, and so is what agents learn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive steps of one row within one episode.

    :param row: which of the N rows
    :param start: the first of its steps in the rollout
    :param ids: ``(L,)`` token ids of the text, from the prompt on
    :param positions: ``(S,)`` where in the text the tokens stand that the S steps wrote, at least one
    :param prompt_length: how many tokens of the text are the prompt
    :param episode: its episode's number in a round of episodes; -1 without a round
    """

    row: int
    start: int
    ids: np.ndarray
    positions: np.ndarray
    prompt_length: int
    episode: int = -1

    @property
    def steps(self) -> int:
        """How many steps it has, S."""
        return len(self.positions)

    @property
    def steps_in_rollout(self) -> np.ndarray:
        """``(S,)`` which steps of the rollout they are."""
        return np.arange(self.start, self.start + self.steps)

    @property
    def prefix(self) -> np.ndarray:
        """``(P,)`` token ids before its first step: the prompt, and what earlier rollouts wrote."""
        return self.ids[: self.positions[0]]

    @property
    def length(self) -> int:
        """Tokens that a forward over the segment reads: the last one is predicted, and nothing follows it."""
        return int(self.positions[-1])


@dataclass(frozen=True, kw_only=True)
class RecordedSegment(Segment):
    """A segment with what its environment knows of the episode.

    :param prompt: the prompt's text
    :param columns: the other columns of its row
    :param finish_reason: why the episode ended with the last step; None while it goes on
    :param completion: its text, once it has ended
    :param penalty: what the last step costs because the budget ran out
    :param return_before: what the episode's earlier steps earned
    :param kl_before: their KL, nats
    """

    prompt: str
    columns: dict[str, Any]
    finish_reason: str | None
    completion: str | None
    penalty: float
    return_before: float
    kl_before: float

    @property
    def states(self) -> np.ndarray:
        """``(S + 1,)`` how many tokens behind the prompt the text has before the first step and after each."""
        return np.append(self.positions, len(self.ids)) - self.prompt_length
