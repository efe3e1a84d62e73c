"""Where prompts come from: lists, rows with extra columns, data sets and functions behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESERVED_COLUMNS = (
    "prompts",
    "completions",
    "completion_ids",
)  # what rewards are called with besides the columns


@dataclass(frozen=True)
class PromptRow:
    """A prompt and what else its row holds.

    :param prompt: the prompt text, not empty
    :param columns: the row's other columns; rewards get them as keyword arguments
    """

    prompt: str
    columns: dict[str, Any] = field(default_factory=dict)


class PromptSource(ABC):
    """Something to draw prompts from."""

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> PromptRow:
        """A prompt drawn at random, with replacement."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptSource:
        return self  # Gymnasium deep-copies the kwargs of a spec; a data set must be shared


class PromptRows(PromptSource):
    """A fixed, finite number of prompts, each as likely as the others.

    :param rows: what has a length and gives row i, a mapping, at index i
    :param where: what errors call row i
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], where: str = "prompts[{}]") -> None:
        if len(rows) == 0:
            raise ValueError("prompts is empty; at least one prompt is needed")
        self._rows = rows
        self._where = where

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PromptRow:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        return _as_row(self._rows[index], self._where.format(index))

    def __iter__(self) -> Iterator[PromptRow]:
        return (self[index] for index in range(len(self)))

    def sample(self, rng: np.random.Generator) -> PromptRow:
        return self[int(rng.integers(len(self)))]

    def __repr__(self) -> str:
        return f"<{len(self)} prompts>"


class PromptFunction(PromptSource):
    """Prompts made by a function, without end.

    :param fn: given a random generator, returns a prompt or a row with a ``"prompt"``; all rows with the same
        columns
    """

    def __init__(self, fn: Callable[[np.random.Generator], str | Mapping[str, Any]]) -> None:
        self.fn = fn
        self._columns: frozenset[str] | None = None

    def sample(self, rng: np.random.Generator) -> PromptRow:
        """Call the function.

        :raises TypeError: if it returns neither text nor a row, or its prompt is not text
        :raises ValueError: if the prompt is empty, or the columns are not those of its first row
        """
        made = self.fn(rng)
        where = f"what the prompt function {getattr(self.fn, '__name__', type(self.fn).__name__)!r} returned"
        row = _as_row({"prompt": made} if isinstance(made, str) else made, where)
        if self._columns is None:
            self._columns = frozenset(row.columns)
        _check_columns(row.columns, self._columns, where)
        return row


def as_prompt_source(obj: Any) -> PromptSource:
    """Turn what a user may pass as ``prompts=`` into a :class:`PromptSource`.

    :param obj: a list or tuple of texts; a list of rows, dicts with a ``"prompt"`` and all with the same
        further columns; a ``datasets.Dataset`` with a ``prompt`` column; a function ``f(rng) -> str | dict``;
        ``"train"`` or ``"test"`` for the embedded prompts; or None for the embedded training prompts
    :raises TypeError: for anything else, or a prompt that is not text
    :raises ValueError: if there are no prompts, one is empty, rows differ in their columns, or a column has a
        name that rewards are called with anyway
    """
    if isinstance(obj, PromptSource):
        return obj
    if obj is None or (isinstance(obj, str) and obj in ("train", "test")):
        from textgym import embedded

        texts = embedded.load_prompts("test" if obj == "test" else "train")
        return PromptRows([{"prompt": text} for text in texts])
    if isinstance(obj, str):
        raise TypeError(
            f"prompts={obj!r} is a single text; pass a list, [{obj!r}], or 'train' or 'test' for the embedded prompts"
        )
    if hasattr(obj, "column_names") and hasattr(obj, "__getitem__"):
        return _from_dataset(obj)
    if isinstance(obj, Sequence) and not isinstance(obj, (bytes, bytearray)):
        return _from_sequence(obj)
    if callable(obj) and not isinstance(obj, type):
        return PromptFunction(obj)
    raise TypeError(
        "prompts must be a list of texts, a list of dicts with a 'prompt', a datasets.Dataset with a column "
        f"'prompt', a function f(rng) -> str | dict, 'train', 'test' or None; got {type(obj).__name__}"
    )


def _from_sequence(obj: Sequence[Any]) -> PromptSource:
    texts = len(obj) > 0 and isinstance(obj[0], str)
    rows: list[Mapping[str, Any]] = []
    for i, item in enumerate(obj):
        where = f"prompts[{i}]"
        if texts and not isinstance(item, str):
            raise TypeError(f"{where} must be a text, as prompts[0] is, got {type(item).__name__}")
        row = _as_row({"prompt": item} if texts else item, where)
        if rows:
            _check_columns(row.columns, rows[0].keys() - {"prompt"}, where)
        rows.append({"prompt": row.prompt, **row.columns})
    return PromptRows(rows)


def _from_dataset(dataset: Any) -> PromptSource:
    """Rows of a ``datasets.Dataset`` stay where they are; only the prompts are looked at now."""
    names = dataset.column_names
    if isinstance(names, Mapping):
        raise TypeError(
            f"prompts is a set of splits ({', '.join(names)}); pass one, e.g. dataset[{next(iter(names))!r}]"
        )
    _check_names(names, "prompts")
    if "prompt" not in names:
        raise ValueError(f"prompts has no column 'prompt'; its columns are {', '.join(names)}")
    for i, prompt in enumerate(dataset["prompt"]):
        _check_prompt(prompt, f"prompts[{i}]['prompt']")
    return PromptRows(dataset)


def _as_row(row: Any, where: str) -> PromptRow:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be a text or a dict with a 'prompt', got {type(row).__name__}")
    if "prompt" not in row:
        raise ValueError(f"{where} has no 'prompt'; its columns are {', '.join(map(str, row))}")
    _check_prompt(row["prompt"], where)
    columns = {name: value for name, value in row.items() if name != "prompt"}
    _check_names(columns, where)
    return PromptRow(row["prompt"], columns)


def _check_prompt(prompt: Any, where: str) -> None:
    if not isinstance(prompt, str):
        raise TypeError(f"{where} must be a text, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError(f"{where} is an empty text; a prompt needs at least one character")


def _check_names(names: Any, where: str) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{where} has the column {name!r}; column names must be texts")
        if name in RESERVED_COLUMNS:
            raise ValueError(
                f"{where} has a column {name!r}, but rewards are called with {', '.join(RESERVED_COLUMNS)} "
                "anyway; rename it"
            )


def _check_columns(columns: Mapping[str, Any], expected: Any, where: str) -> None:
    if columns.keys() != expected:
        raise ValueError(
            f"{where} has the columns {sorted(columns)}, the first row has {sorted(expected)}; "
            "all rows need the same columns"
        )


def as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """One list per column; None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
