"""Rows in any of the usual layouts, read as prompts: what is wrong with one is said, with where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.chat.chat_prompts import MESSAGES, has_template
from textgym.chat.messages import is_conversation, stored_messages
from textgym.prompts.layouts import COMPLETION, read_row
from textgym.prompts.row_files import LocatedRows
from textgym.prompts.tables import TableRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from textgym.prompts.rows import PromptRow, PromptRows, PromptSource, TableOfPrompts, check_names, check_prompt, filled


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
        return PromptRows(filled(read), rows.where if isinstance(rows.where, str) else "prompts[{}]")
    table: Any = rows.rows
    column = prompt_column or "prompt"
    check_names((name for name in table.column_names if name != column), repr(rows.name))
    of_column = f"[{column!r}]" if prompt_column is None else f": {column!r}"
    for i, prompt in enumerate(prompts):
        check_prompt(prompt, rows.place(i) + of_column, tokenizer)
    return PromptRows(TableOfPrompts(table, column), str(rows.where))


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


def read_prompt(
    row: Any, where: str, tokenizer: PreTrainedTokenizerBase | None = None, prompt_column: str | None = None
) -> PromptRow:
    """A prompt out of a conversation or of a row in one of the layouts of :mod:`textgym.prompts.layouts`.

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
