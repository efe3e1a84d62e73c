"""Where others spoke in a text: the tokens of replies, which are nobody's actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class ReplySpan(NamedTuple):
    """What somebody else said in a text, with what stands around it between two turns.

    :param start: its first token's place in the text
    :param end: the place after its last token
    :param role: who spoke, as messages name them: ``"user"``, ``"tool"``
    :param content: what they said
    :param turn: the text of the policy's turn before it
    """

    start: int
    end: int
    role: str
    content: str
    turn: str


def turns_between(spans: Sequence[ReplySpan], start: int, end: int) -> list[tuple[int, int]]:
    """Where the policy's turns begin and end: what replies leave of a text.

    :param spans: of the text, in order
    :param start: tokens of the prompt
    :param end: tokens of the text
    :return: a turn more than there are spans; the last one may be empty
    """
    begins = [start, *(span.end for span in spans)]
    return list(zip(begins, [*(span.start for span in spans), end], strict=True))


def action_positions(spans: Sequence[ReplySpan], start: int, end: int) -> np.ndarray:
    """``(S,)`` the places of a text's tokens that the policy wrote."""
    return np.concatenate([np.arange(*turn) for turn in turns_between(spans, start, end)]).astype(np.int64)


def tokens_before_in_turn(spans: Sequence[ReplySpan], start: int, end: int) -> np.ndarray:
    """``(S,)`` how many tokens its turn has before each of those that :func:`action_positions` names."""
    turns = turns_between(spans, start, end)
    return np.concatenate([np.arange(last - first) for first, last in turns]).astype(np.int64)


def before(spans: Sequence[ReplySpan], length: int) -> list[ReplySpan]:
    """The spans in the first ``length`` tokens of a text."""
    return [span for span in spans if span.start < length]


def as_data(spans: Sequence[ReplySpan]) -> list[list[Any]]:
    """Plain data, for checkpoints."""
    return [list(span) for span in spans]


def from_data(data: Sequence[Sequence[Any]]) -> list[ReplySpan]:
    """What :func:`as_data` gave."""
    return [ReplySpan(int(start), int(end), *map(str, texts)) for start, end, *texts in data]
