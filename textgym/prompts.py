"""Where prompts come from: lists, rows with extra columns, data sets, files and functions behind one interface."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from textgym.chat import MESSAGES, has_template
from textgym.checks import check_int
from textgym.layouts import COMPLETION, read_row
from textgym.messages import is_conversation, stored_messages
from textgym.row_files import LocatedRows, names_rows, plain_dataset
from textgym.tables import TableRows

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
        return isinstance(rows, _Called)

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

    :param fn: given a random generator, returns a prompt, a text or messages, or a row with a ``"prompt"``; all rows
        with the same columns
    :param tokenizer: whose chat template makes texts of messages
    """

    def __init__(
        self,
        fn: Callable[[np.random.Generator], str | Sequence[Any] | PromptRow | Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.fn = fn
        self._tokenizer = tokenizer
        self._columns: frozenset[str] | None = None

    def sample(self, rng: np.random.Generator) -> PromptRow:
        """Call the function.

        :raises TypeError: if it returns neither a prompt nor a row, or its prompt is of a wrong type
        :raises ValueError: if the prompt is empty, or the columns are not those of its first row
        """
        made = self.fn(rng)
        where = f"what the prompt function {getattr(self.fn, '__name__', type(self.fn).__name__)!r} returned"
        row = read_prompt(PromptRow(made) if isinstance(made, str) else made, where, self._tokenizer)
        if self._columns is None:
            self._columns = frozenset(row.columns)
        if row.columns.keys() != self._columns:
            raise ValueError(
                f"{where} has the columns {sorted(row.columns)}, the first row has {sorted(self._columns)}; "
                "all rows need the same columns"
            )
        return row


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


def as_prompt_source(obj: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> PromptSource:
    """Turn what a user may pass as ``prompts=`` into a :class:`PromptSource`.

    :param obj: a list or tuple of prompts, each a text or a conversation; a list of rows, dicts with a ``"prompt"`` or
        in another layout of :mod:`textgym.layouts` (or :class:`PromptRow`); a ``datasets.Dataset`` of such rows, or a
        stream of at most 100,000; a function ``f(rng)`` that makes one; the path of a file or folder that
        :func:`~textgym.prompt_files.load_prompt_file` reads, as a ``Path`` or a string; ``"train"`` or ``"test"`` for
        the embedded prompts; or None for the embedded training prompts
    :param tokenizer: of the language model; its chat template turns conversations into prompts
    :raises TypeError: for anything else, or a prompt that is neither text nor messages
    :raises ValueError: if there are no prompts, one is empty or has no tokens, or a column has a name that rewards are
        called with anyway
    :raises FileNotFoundError: if there is no such file
    """
    if isinstance(obj, PromptSource):
        return obj
    if obj is None or (isinstance(obj, str) and obj in ("train", "test")):
        from textgym import embedded

        texts = embedded.load_prompts("test" if obj == "test" else "train")
        return PromptRows([{"prompt": text} for text in texts])
    if isinstance(obj, (str, os.PathLike)):
        from textgym.prompt_files import load_prompt_file

        if isinstance(obj, os.PathLike) or names_rows(obj):
            return load_prompt_file(obj, tokenizer=tokenizer)
        raise TypeError(
            f"prompts={obj!r} is a single text; pass a list, [{obj!r}], the path of a file, 'train' or 'test' for the "
            "embedded prompts, or textgym.prompt_files.load_prompt_file(...) for a data set on the hub"
        )
    if hasattr(obj, "column_names") and hasattr(obj, "__iter__"):
        return rows_of_prompts(
            LocatedRows(plain_dataset(obj, "prompts"), "prompts[{}]", "prompts"), tokenizer=tokenizer
        )
    if isinstance(obj, Sequence) and not isinstance(obj, (bytes, bytearray)):
        return _from_sequence(obj, tokenizer)
    if callable(obj) and not isinstance(obj, type):
        return PromptFunction(obj, tokenizer)
    raise TypeError(
        "prompts must be a list of texts, a list of conversations, a list of dicts with a 'prompt', a datasets.Dataset "
        "with a column 'prompt', a function f(rng) -> str | dict, the path of a file, 'train', 'test' or None; "
        f"got {type(obj).__name__}"
    )


def split_prompts(
    source: Any, held_out: float | int = 0.1, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PromptRows, PromptRows]:
    """Divide prompts into those to train on and those to evaluate on, so that no prompt is in both.

    What counts is the prompt's text: rows with the same text stay together, whatever their other columns. Texts are
    ordered by a hash of the text and the seed and the first are held out, so the same texts are held out on every
    machine, whatever the order of the rows.

    :param source: whatever :func:`as_prompt_source` takes, except functions
    :param held_out: the share of the different texts to hold out, rounded to a whole number of texts; or, as a whole
        number, how many
    :param seed: another one holds out other texts
    :param tokenizer: of the language model; needed for conversations that aren't texts yet
    :return: training rows and held-out rows, each in the order of the source
    :raises TypeError: if the source is a function, whose prompts can't be counted, or an argument is not a number
    :raises ValueError: if either part would be empty

    >>> train, held_out = split_prompts(["a", "b", "c", "a"], held_out=1)
    >>> sorted(row.prompt for row in train), sorted(row.prompt for row in held_out)
    (['b', 'c'], ['a', 'a'])
    """
    rows = as_prompt_source(source, tokenizer)
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


def rows_of_prompts(
    rows: LocatedRows, prompt_column: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PromptRows:
    """Rows in any layout as prompts; what is wrong with one is said now.

    Rows of a table whose prompts are texts stay in it, and are read when they are drawn.

    :param rows: and where they stand, for errors
    :param prompt_column: the column with the prompts, by default ``"prompt"``
    :param tokenizer: whose chat template makes texts of conversations
    :raises ValueError: if there are none, or one can't be read
    :raises TypeError: if a row or a prompt is of the wrong type
    """
    if len(rows) == 0:
        name = "prompts is empty" if prompt_column is None else f"prompts: {rows.name!r} has no prompts"
        raise ValueError(f"{name}; at least one is needed")
    prompts = _plain_prompts(rows, prompt_column or "prompt")
    if prompts is None:
        read = [_read_located(row, where, tokenizer, prompt_column) for where, row in rows]
        return PromptRows(_filled(read), rows.where if isinstance(rows.where, str) else "prompts[{}]")
    table: Any = rows.rows
    column = prompt_column or "prompt"
    check_names((name for name in table.column_names if name != column), repr(rows.name))
    of_column = f"[{column!r}]" if prompt_column is None else f": {column!r}"
    for i, prompt in enumerate(prompts):
        check_prompt(prompt, rows.place(i) + of_column, tokenizer)
    return PromptRows(_Called(table, column), str(rows.where))


def _plain_prompts(rows: LocatedRows, column: str) -> list[str] | None:
    """The prompts of a table, where all are texts and nothing else in it has to be read; otherwise None."""
    table: Any = rows.rows
    if isinstance(table, list) or column not in table.column_names:
        return None
    others = set(table.column_names) - {column}
    if others & {"prompt", COMPLETION, "chosen", "rejected", MESSAGES}:
        return None
    prompts = table.column(column) if isinstance(table, TableRows) else list(table[column])
    if all(isinstance(prompt, str) and stored_messages(prompt, rows.name) is prompt for prompt in prompts):
        return prompts
    return None


def _read_located(
    row: Any, where: str, tokenizer: PreTrainedTokenizerBase | None, prompt_column: str | None
) -> PromptRow:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be an object with {prompt_column or 'prompt'!r}, got {type(row).__name__}")
    return read_prompt(row, where, tokenizer, prompt_column)


class _Called(Sequence[Mapping[str, Any]]):
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


def _filled(rows: Sequence[PromptRow]) -> list[Mapping[str, Any]]:
    """Rows with the same columns; None where one lacks it."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return [{"prompt": row.prompt, **{name: row.columns.get(name) for name in names}} for row in rows]


def read_prompt(
    row: Any, where: str, tokenizer: PreTrainedTokenizerBase | None = None, prompt_column: str | None = None
) -> PromptRow:
    """A prompt out of a conversation or of a row in one of the layouts of :mod:`textgym.layouts`.

    :param where: what errors call it
    :param prompt_column: the column with the prompts, by default ``"prompt"``
    :raises TypeError: if it is something else
    :raises ValueError: if it has no prompt, or an empty one
    """
    if isinstance(row, PromptRow):
        check_names(row.columns, where)
        check_prompt(row.prompt, where, tokenizer)
        return row
    column = prompt_column or "prompt"
    if is_conversation(row):
        row = {column: row}
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be a text or a dict with a {column!r}, got {type(row).__name__}")
    if column != "prompt" and column in row and "prompt" in row:
        raise ValueError(f"{where} has a column 'prompt' beside prompt_column={column!r}; rename or remove it")
    read = read_row(row, where, {"prompt": column})
    given = row.get(column)
    if read.prompt is None and column not in row:
        if {"role", "content"} <= set(row):
            raise ValueError(
                f"{where} is a message; conversations are given as a list of them, each a list of messages: "
                "prompts=[[message, ...], ...]"
            )
        if prompt_column is None:
            raise ValueError(f"{where} has no 'prompt'; its columns are {', '.join(map(str, row))}")
        raise ValueError(
            f"{where} has no column {column!r}; its columns are {', '.join(map(repr, row)) or 'none'}. prompt_column "
            "says which one has the prompts"
        )
    place = where if prompt_column is None else f"{where}: {read.source!r}"
    columns = dict(read.columns)
    prompt: Any = given if read.prompt is None else read.prompt
    if isinstance(messages := read.prompt, list):
        if isinstance(given, str) and stored_messages(given, place) is given:
            read = replace(read, written=given)
            if not has_template(tokenizer) and sum(message["role"] != "system" for message in messages) > 1:
                read = replace(read, completion=None)  # it answers a later turn
        prompt = read.prompt_text(tokenizer, place)
        if has_template(tokenizer):
            columns.setdefault(MESSAGES, messages)
    check_prompt(prompt, place, tokenizer)
    for name, answer in ((COMPLETION, read.completion), ("chosen", read.chosen), ("rejected", read.rejected)):
        if answer is not None:
            columns[name] = read.answer_text(answer, tokenizer, f"{where}: {name!r}")
    check_names(columns, where)
    return PromptRow(prompt, columns)


def _from_sequence(obj: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None) -> PromptSource:
    texts = len(obj) > 0 and isinstance(obj[0], str)
    rows = []
    for i, item in enumerate(obj):
        where = f"prompts[{i}]"
        if texts and not isinstance(item, str):
            raise TypeError(f"{where} must be a text, as prompts[0] is, got {type(item).__name__}")
        rows.append(read_prompt(PromptRow(item) if texts else item, where, tokenizer))
    return PromptRows(_filled(rows))


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
