"""One reward for each task or user: the prompt row says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from textgym.checks import check_bool, check_text, shown
from textgym.rewards.arithmetic import Composed
from textgym.rewards.base import Reward, potentials_of, prefix_potentials_of
from textgym.rewards.columns import rows_of_columns
from textgym.rewards.combining.running_normalisation import RunningNormalized
from textgym.rewards.errors import RewardError
from textgym.rewards.function_reward import RewardLike, check_reward
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import as_list, scores_of


class Router(Composed):
    """Φ(x, y) = Φ_k(x, y), where k is what the prompt row has in a column, such as its task or its user.

    Each route scores only its own rows, so that an expensive reward is not called for the others, and has its own
    running normalisation (:class:`~textgym.rewards.combining.running_normalisation.RunningNormalized`), so that a task
    whose scores spread widely does not drown the others. This is the per-task normalisation of PopArt (Hessel et al.
    2018, https://arxiv.org/abs/1809.04474) applied to the reward.

    Range: unbounded where normalised, otherwise that of the routes.

        >>> from textgym.rewards import FunctionReward
        >>> long = FunctionReward(lambda completions: [len(text) for text in completions], name="long")
        >>> reward = Router("user", {"ann": long, "bob": -long}, normalise=False)
        >>> reward(prompts=["", ""], completions=["abc", "abc"], user=["ann", "bob"])
        [3.0, -3.0]

    :param column: the column of the prompt rows that decides
    :param routes: for each value of it a reward or a function with the signature of one
    :param default: for rows with any other value; without it such a row is an error
    :param normalise: whether each route is normalised by its own running statistics
    :raises ValueError: if there are no routes
    :raises RewardError: in scoring, if the column is missing or a row's value has no route
    """

    def __init__(
        self,
        column: str,
        routes: Mapping[Any, RewardLike],
        default: RewardLike | None = None,
        normalise: bool = True,
    ) -> None:
        check_text("column", column, empty=False)
        check_bool("normalise", normalise)
        if not isinstance(routes, Mapping):
            raise TypeError(f"routes={shown(routes)} must be a dictionary with a reward for each value of the column")
        if not routes:
            raise ValueError("routes is empty; give a reward for each value of the column: {'task': reward}")
        self.column = column
        self.keys = tuple(routes)
        known = frozenset(routes)
        selections = [
            Route(column, check_reward(f"routes[{key!r}]", reward), known, key) for key, reward in routes.items()
        ]
        if default is not None:
            selections.append(Route(column, check_reward("default", default), known))
        self.has_default = default is not None
        parts: list[Reward] = [RunningNormalized(part) if normalise else part for part in selections]
        super().__init__(parts, f"router({column}: {', '.join(map(str, self.keys))})")

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        self._check(columns, completions, np.arange(len(completions)))
        return super().__call__(prompts=prompts, completions=completions, **columns)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "keys": [repr(key) for key in self.keys]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        keys = [repr(key) for key in self.keys]
        if state.get("keys") != keys:
            raise ValueError(f"reward {self.name!r} has the routes {keys}, the given state has {state.get('keys')}")
        super().load_state_dict(state)

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        self._check(batch.columns, batch, batch.rows)
        return super()._evaluate(batch)

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._check(batch.columns, batch, batch.rows)
        return super()._evaluate_prefixes(batch, at)

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        applies = [~np.isnan(score) for score in scores]  # one route at most has a number
        total = np.sum([np.nan_to_num(score) for score in scores], axis=0)
        return np.where(np.any(applies, axis=0), total, np.nan)

    def _check(self, columns: Mapping[str, Any], texts: Any, rows: np.ndarray) -> None:
        if len(texts) == 0:
            return
        for i, value in enumerate(_column(self.name, self.column, columns)):
            if not (self.has_default or _is_among(value, self.keys)):
                raise RewardError(
                    self.name,
                    f"column {self.column!r} is {value!r}, which has no route; there are "
                    f"{', '.join(map(repr, self.keys))}; add it, or give default=",
                    row=int(rows[i]),
                    completion=(texts.completions if isinstance(texts, PrefixBatch) else texts)[i],
                )


class Route(Composed):
    """A reward for the rows that have one value in a column, or none of the values known; elsewhere None.

    :param column: the column
    :param reward: scores those rows
    :param known: all values that have a route
    :param key: the value of this one; without it, those that no route knows
    """

    def __init__(self, column: str, reward: Reward, known: frozenset[Any], *key: Any) -> None:
        super().__init__([reward], f"{reward.name} where {column}={key[0]!r}" if key else f"{reward.name} elsewhere")
        self.column = column
        self._known = known
        self._key = key

    def routed_rows(self, columns: Mapping[str, Sequence[Any]], number: int) -> np.ndarray:
        """``(B,)`` bool, which rows are this route's."""
        if number == 0:
            return np.zeros(0, dtype=bool)
        values = _column(self.name, self.column, columns)
        if self._key:
            return np.array([_is_among(value, self._key) for value in values], dtype=bool)
        return np.array([not _is_among(value, self._known) for value in values], dtype=bool)

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        rows = np.flatnonzero(self.routed_rows(columns, len(completions)))
        scores = np.full(len(completions), np.nan)
        if len(rows):
            scores[rows] = scores_of(
                self.parts[0],
                [prompts[i] for i in rows],
                [completions[i] for i in rows],
                rows_of_columns(columns, rows, len(completions)),
                rows,
            )
        return as_list(scores)

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        rows = np.flatnonzero(self.routed_rows(batch.columns, len(batch)))
        scores = np.full(len(batch), np.nan)
        if len(rows):
            scores[rows] = potentials_of(self.parts[0], batch.at(rows, batch.completion_lengths[rows]))
        return scores

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows = np.flatnonzero(self.routed_rows(batch.columns, len(batch)))
        scores = [np.full(len(lengths), np.nan) for lengths in at]
        if len(rows):
            own = batch.at(rows, batch.completion_lengths[rows])
            values = prefix_potentials_of(self.parts[0], own, [at[i] for i in rows.tolist()])
            for row, row_values in zip(rows.tolist(), values, strict=True):
                scores[row] = row_values
        return scores

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        return scores[0]


def _column(name: str, column: str, columns: Mapping[str, Any]) -> Sequence[Any]:
    if column not in columns:
        available = ", ".join(["prompts", "completions", *columns])
        raise RewardError(name, f"needs {column!r}, which the prompts have no column for; available: {available}")
    values: Sequence[Any] = columns[column]
    return values


def _is_among(value: Any, keys: Any) -> bool:
    try:
        return value in keys
    except TypeError:  # a list, say, can't be looked up in a set
        return False
