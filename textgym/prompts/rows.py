"""Prompts and the other columns of their rows: a fixed number of them, or a source without end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RESERVED_COLUMNS = (
    "prompts",
    "completions",
    "completion_ids",
    "transcripts",
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

    @property
    def rows(self) -> PromptRows | None:
        """All prompts, where they have a fixed number."""
        return None

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
        return (_as_row(row, self._where.format(index)) for index, row in enumerate(self._rows))

    @property
    def rows(self) -> PromptRows:
        return self

    @property
    def is_table(self) -> bool:
        """Whether the rows stay in a table, whose columns were judged when it was read."""
        rows = self._rows
        while isinstance(rows, _Chosen):
            rows = rows.rows
        return isinstance(rows, TableOfPrompts)

    def sample(self, rng: np.random.Generator) -> PromptRow:
        return self[int(rng.integers(len(self)))]

    def chosen(self, indices: Sequence[int]) -> PromptRows:
        """Some of the rows, in the order of ``indices``; they are not copied.

        :raises ValueError: if ``indices`` is empty
        """
        return PromptRows(_Chosen(self._rows, indices), self._where)

    def __repr__(self) -> str:
        return f"<{len(self)} prompts>"


class _Chosen(Sequence[Mapping[str, Any]]):
    """Rows at given places of another sequence."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int] | np.ndarray) -> None:
        self.rows = rows
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> _Chosen: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | _Chosen:
        if isinstance(index, slice):
            return _Chosen(self.rows, self._indices[index])
        return self.rows[int(self._indices[index])]


class TableOfPrompts(Sequence[Mapping[str, Any]]):
    """Rows of a table, one column of which is called ``"prompt"``."""

    def __init__(self, rows: Any, column: str) -> None:
        self._rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._named(self._rows[int(index)])

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self._named, self._rows)

    def _named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"prompt" if name == self._column else name: value for name, value in row.items()}


def filled(rows: Sequence[PromptRow]) -> list[Mapping[str, Any]]:
    """Rows with the same columns; None where one lacks it."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return [{"prompt": row.prompt, **{name: row.columns.get(name) for name in names}} for row in rows]


def _as_row(row: Any, where: str) -> PromptRow:
    if isinstance(row, PromptRow):
        row = {**row.columns, "prompt": row.prompt}
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be a text or a dict with a 'prompt', got {type(row).__name__}")
    if "prompt" not in row:
        raise ValueError(f"{where} has no 'prompt'; its columns are {', '.join(map(str, row))}")
    check_prompt(row["prompt"], where)
    columns = {name: value for name, value in row.items() if name != "prompt"}
    check_names(columns, where)
    return PromptRow(row["prompt"], columns)


def check_prompt(prompt: Any, where: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """:raises TypeError: if it is not a text
    :raises ValueError: if it is empty, can't be encoded, or the tokenizer makes no token of it
    """
    if not isinstance(prompt, str):
        raise TypeError(f"{where} must be a text, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError(f"{where} is an empty text; a prompt needs at least one character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a surrogate pair at character {error.start + 1}, which no tokenizer can read"
        ) from None
    # Tokenizers leave out spaces and control characters, and nothing else.
    letters = any(character.isalnum() for character in prompt)
    if tokenizer is not None and not letters and not tokenizer(prompt)["input_ids"]:
        raise ValueError(f"{where}: the tokenizer makes no token of the prompt {prompt[:60]!r}")


def check_names(names: Any, where: str) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{where} has the column {name!r}; column names must be texts")
        if name in RESERVED_COLUMNS:
            raise ValueError(
                f"{where} has a column {name!r}, but rewards are called with {', '.join(RESERVED_COLUMNS)} "
                f"anyway; rename it (rename_columns={{{name!r}: ...}}, --rename-column {name}=...) or drop it "
                f"(drop_columns=[{name!r}], --drop-column {name})"
            )


def as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """One list per column; None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
