"""Where prompts come from: lists, rows with extra columns, data sets, files and functions behind one interface."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from textgym.checks import check_int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    def chosen(self, indices: Sequence[int]) -> PromptRows:
        """Some of the rows, in the order of ``indices``; they are not copied.

        :raises ValueError: if ``indices`` is empty
        """
        return PromptRows(_Chosen(self._rows, indices), self._where)

    def __repr__(self) -> str:
        return f"<{len(self)} prompts>"


class PromptFunction(PromptSource):
    """Prompts made by a function, without end.

    :param fn: given a random generator, returns a prompt or a row with a ``"prompt"``; all rows with the same
        columns
    """

    def __init__(self, fn: Callable[[np.random.Generator], str | PromptRow | Mapping[str, Any]]) -> None:
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
        check_columns(row.columns, self._columns, where)
        return row


class _Chosen(Sequence[Mapping[str, Any]]):
    """Rows at given places of another sequence."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int] | np.ndarray) -> None:
        self._rows = rows
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> _Chosen: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | _Chosen:
        if isinstance(index, slice):
            return _Chosen(self._rows, self._indices[index])
        return self._rows[int(self._indices[index])]


def as_prompt_source(obj: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> PromptSource:
    """Turn what a user may pass as ``prompts=`` into a :class:`PromptSource`.

    :param obj: a list or tuple of texts; a list of rows, dicts with a ``"prompt"`` (or :class:`PromptRow`) and all with
        the same further columns; a ``datasets.Dataset`` with a ``prompt`` column; a function ``f(rng)`` that makes one;
        the path of a file or folder that :func:`~textgym.prompt_files.load_prompt_file` reads, as a ``Path`` or a
        string; ``"train"`` or ``"test"`` for the embedded prompts; or None for the embedded training prompts
    :param tokenizer: of the language model; its chat template turns conversations in files into prompts
    :raises TypeError: for anything else, or a prompt that is not text
    :raises ValueError: if there are no prompts, one is empty, rows differ in their columns, or a column has a
        name that rewards are called with anyway
    :raises FileNotFoundError: if there is no such file
    """
    if isinstance(obj, PromptSource):
        return obj
    if obj is None or (isinstance(obj, str) and obj in ("train", "test")):
        from textgym import embedded

        texts = embedded.load_prompts("test" if obj == "test" else "train")
        return PromptRows([{"prompt": text} for text in texts])
    if isinstance(obj, (str, os.PathLike)):
        from textgym.prompt_files import load_prompt_file, names_prompt_file

        if isinstance(obj, os.PathLike) or names_prompt_file(obj):
            return load_prompt_file(obj, tokenizer=tokenizer)
        raise TypeError(
            f"prompts={obj!r} is a single text; pass a list, [{obj!r}], the path of a file, 'train' or 'test' for the "
            "embedded prompts, or textgym.prompt_files.load_prompt_file(...) for a data set on the hub"
        )
    if hasattr(obj, "column_names") and hasattr(obj, "__getitem__"):
        return _from_dataset(obj)
    if isinstance(obj, Sequence) and not isinstance(obj, (bytes, bytearray)):
        return _from_sequence(obj)
    if callable(obj) and not isinstance(obj, type):
        return PromptFunction(obj)
    raise TypeError(
        "prompts must be a list of texts, a list of dicts with a 'prompt', a datasets.Dataset with a column "
        "'prompt', a function f(rng) -> str | dict, the path of a file, 'train', 'test' or None; "
        f"got {type(obj).__name__}"
    )


def split_prompts(source: Any, held_out: float | int = 0.1, seed: int = 0) -> tuple[PromptRows, PromptRows]:
    """Divide prompts into those to train on and those to evaluate on, so that no prompt is in both.

    What counts is the prompt's text: rows with the same text stay together, whatever their other columns. Texts are
    ordered by a hash of the text and the seed and the first are held out, so the same texts are held out on every
    machine, whatever the order of the rows.

    :param source: whatever :func:`as_prompt_source` takes, but no function
    :param held_out: the share of the different texts to hold out, rounded to a whole number of texts; or, as a whole
        number, how many
    :param seed: another one holds out other texts
    :return: training rows and held-out rows, each in the order of the source
    :raises TypeError: if the source is a function, whose prompts can't be counted, or an argument is no number
    :raises ValueError: if either part would be empty

    >>> train, held_out = split_prompts(["a", "b", "c", "a"], held_out=1)
    >>> sorted(row.prompt for row in train), sorted(row.prompt for row in held_out)
    (['b', 'c'], ['a', 'a'])
    """
    rows = as_prompt_source(source)
    if not isinstance(rows, PromptRows):
        raise TypeError(f"a {type(rows).__name__} has no fixed prompts to divide; give two functions, or a list")
    check_int("seed", seed, low=0)
    if isinstance(held_out, bool) or not isinstance(held_out, int | float | np.integer):
        raise TypeError(f"held_out={held_out!r} must be a share between 0 and 1 or a whole number of prompts")
    texts = [row.prompt for row in rows]
    different = set(texts)
    whole = isinstance(held_out, int | np.integer)
    if not (held_out >= 1 if whole else 0 < held_out < 1):
        raise ValueError(
            f"held_out={held_out!r} must be a share greater than 0 and less than 1, or a whole number of prompts, "
            "at least 1"
        )
    count = int(held_out) if whole else round(held_out * len(different))
    if not 0 < count < len(different):
        part = "held-out" if count == 0 else "training"
        raise ValueError(
            f"held_out={held_out!r} of {len(different)} different prompts leaves none in the {part} part; "
            f"give a whole number from 1 to {len(different) - 1}"
            if len(different) > 1
            else f"held_out={held_out!r}: there is only one prompt, {texts[0][:60]!r}, which can't be in both parts"
        )

    def rank(text: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest(), text

    chosen = set(sorted(different, key=rank)[:count])
    train = [i for i, text in enumerate(texts) if text not in chosen]
    kept = [i for i, text in enumerate(texts) if text in chosen]
    return rows.chosen(train), rows.chosen(kept)


def _from_sequence(obj: Sequence[Any]) -> PromptSource:
    texts = len(obj) > 0 and isinstance(obj[0], str)
    rows: list[Mapping[str, Any]] = []
    for i, item in enumerate(obj):
        where = f"prompts[{i}]"
        if texts and not isinstance(item, str):
            raise TypeError(f"{where} must be a text, as prompts[0] is, got {type(item).__name__}")
        row = _as_row({"prompt": item} if texts else item, where)
        if rows:
            check_columns(row.columns, rows[0].keys() - {"prompt"}, where)
        rows.append({"prompt": row.prompt, **row.columns})
    return PromptRows(rows)


def _from_dataset(dataset: Any) -> PromptSource:
    """Rows of a ``datasets.Dataset`` stay where they are; only the prompts are looked at now."""
    names = dataset.column_names
    if isinstance(names, Mapping):
        raise TypeError(
            f"prompts is a set of splits ({', '.join(names)}); pass one, e.g. dataset[{next(iter(names))!r}]"
        )
    check_names(names, "prompts")
    if "prompt" not in names:
        raise ValueError(f"prompts has no column 'prompt'; its columns are {', '.join(names)}")
    for i, prompt in enumerate(dataset["prompt"]):
        check_prompt(prompt, f"prompts[{i}]['prompt']")
    return PromptRows(dataset)


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


def check_prompt(prompt: Any, where: str) -> None:
    if not isinstance(prompt, str):
        raise TypeError(f"{where} must be a text, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError(f"{where} is an empty text; a prompt needs at least one character")


def check_names(names: Any, where: str) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{where} has the column {name!r}; column names must be texts")
        if name in RESERVED_COLUMNS:
            raise ValueError(
                f"{where} has a column {name!r}, but rewards are called with {', '.join(RESERVED_COLUMNS)} "
                "anyway; rename it"
            )


def check_columns(columns: Iterable[str], expected: Iterable[str], where: str) -> None:
    if set(columns) != set(expected):
        raise ValueError(
            f"{where} has the columns {sorted(columns)}, the first row has {sorted(expected)}; "
            "all rows need the same columns"
        )


def as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """One list per column; None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
