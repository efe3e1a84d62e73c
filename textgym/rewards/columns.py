"""Columns of the prompt rows that a reward compares a completion with: references, targets, keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from textgym.rewards.errors import RewardError


def column_of(reward: str, column: str, columns: dict[str, Any], completions: list[str]) -> list[Any]:
    """The entries of a column, one for each completion.

    :param reward: the reward's name, for messages
    :param column: the column's name
    :param columns: what the reward was called with beside prompts and completions
    :param completions: B completions
    :raises RewardError: if there is no such column, with those there are, or it has another length
    """
    if column not in columns:
        available = ", ".join(["prompts", "completions", *columns])
        raise RewardError(reward, f"needs {column!r}, which the prompts have no column for; available: {available}")
    entries = list(columns[column])
    if len(entries) != len(completions):
        raise RewardError(reward, f"column {column!r} has {len(entries)} entries for {len(completions)} completions")
    return entries


def rows_of_columns(columns: dict[str, Any], rows: Sequence[int] | np.ndarray, number: int) -> dict[str, Any]:
    """The columns with some of their rows. What is not a column stays whole, such as the state of TRL's trainer.

    :param columns: what a reward was called with beside prompts and completions
    :param rows: which rows
    :param number: B, of all rows
    """
    whole = {name: not isinstance(column, Sequence) or len(column) != number for name, column in columns.items()}
    return {name: col if whole[name] else [col[i] for i in rows] for name, col in columns.items()}


def texts_of(reward: str, column: str, columns: dict[str, Any], completions: list[str]) -> list[tuple[str, ...] | None]:
    """The texts of a column: for each completion one or several, or None where it has none.

    :raises RewardError: as :func:`column_of`, and if an entry is neither a text nor a list of texts nor None
    """
    found: list[tuple[str, ...] | None] = []
    for row, entry in enumerate(column_of(reward, column, columns, completions)):
        if entry is None:
            found.append(None)
            continue
        texts = (entry,) if isinstance(entry, str) else entry
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise RewardError(
                reward,
                f"column {column!r} holds {entry!r}; expected a text, a list of at least one text, or None",
                row=row,
                completion=completions[row],
            )
        found.append(tuple(texts))
    return found
