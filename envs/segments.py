"""Segments: consecutive steps of one row within one episode, and the text that they wrote.

The environment's record of a rollout is made of them, and so is what agents learn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from textgym.chat.reply_spans import ReplySpan


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
    :param replies: where others spoke in the text; None where nobody can
    :param finish_reason: why the episode ended with the last step; None while it goes on
    :param finished: whether the text's last token ended a turn
    :param completion: its text, once it has ended
    :param turn_ends: ``(S,)`` bool, which of the steps ended a turn
    :param penalties: ``(S,)`` what they cost because a budget ran out
    :param reply_rewards: ``(S,)`` what replies paid for the turns that they ended
    :param taken_before: tokens that the policy had written before
    :param return_before: what these earned
    :param kl_before: their KL, nats
    """

    prompt: str
    columns: dict[str, Any]
    replies: list[ReplySpan] | None
    finish_reason: str | None
    finished: bool
    completion: str | None
    turn_ends: np.ndarray
    penalties: np.ndarray
    reply_rewards: np.ndarray
    taken_before: int
    return_before: float
    kl_before: float

    @property
    def states(self) -> np.ndarray:
        """``(S + 1,)`` how many tokens after the prompt the text has before the first step and after each, with what
        others said to it."""
        return np.append(self.positions, len(self.ids)) - self.prompt_length
