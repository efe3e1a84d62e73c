"""What a reward model learns from: preference pairs, scores, labels or several tasks, from files or ``datasets``.

| kind | columns | a row says |
|---|---|---|
| ``"preferences"`` | ``chosen``, ``rejected``, optional ``prompt``, ``margin`` | one completion beats another |
| ``"scores"`` | ``text``, or ``prompt`` and ``completion``; ``score`` | how good a text is, a number |
| ``"labels"`` | ``text``, or ``prompt`` and ``completion``; ``label`` | which class a text belongs to |
| ``"tasks"`` | as for scores or labels, and ``task`` | one of several things about a text |

Prompts and completions may be messages, and are found in the layouts of :mod:`textgym.prompts.layouts`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.chat.chat_prompts import has_template
from textgym.chat.messages import is_conversation
from textgym.prompts.layouts import ReadRow, read_row
from textgym.prompts.row_files import LocatedRows, kind_of, plain_dataset, read_rows, streamed

from .data import KINDS, Kind, RewardData, RewardRow, Task, TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_NAMES = ("prompt", "completion", "text", "chosen", "rejected", "margin", "score", "label", "task")
_TELLING: dict[str, TaskKind] = {"chosen": "preferences", "score": "scores", "label": "labels"}


def load_reward_data(
    source: str | os.PathLike[str] | RewardData | Iterable[Mapping[str, Any]],
    *,
    kind: Kind | None = None,
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    tasks: Sequence[Task] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str | None = None,
    name: str = "data",
) -> RewardData:
    """Read preference pairs, scores, labels or several tasks.

    A conversation becomes a text through the chat template of ``tokenizer``; without one it is written as
    ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``. Pairs of equal texts say nothing: they are left out, with a warning that
    counts them.

    :param source: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a folder of them or one that
        ``datasets`` saved, a ``datasets.Dataset``, or any iterable of rows that are mappings; :class:`RewardData` is
        returned as it is
    :param kind: by default what the columns say; ``"tasks"`` has to be said
    :param columns: what the data calls a column, such as ``{"score": "rating"}``; others keep their name
    :param classes: the names of the classes in their order; by default those there are, sorted (numbers by size). Of
        two classes the second is the positive one
    :param tasks: of ``"tasks"`` which there are, in their order; by default those there are, sorted
    :param tokenizer: of the reward model, for conversations
    :param split: which part of a data set that has several
    :param name: what errors call rows that come from no file
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if a file is broken, a column is missing, a number isn't finite, or there are no rows
    :raises TypeError: if what should be a text or a number isn't one
    """
    if isinstance(source, RewardData):
        if kind not in (None, source.kind):
            raise ValueError(f"kind={kind!r}, but the data has {source.kind}")
        return source
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    columns = dict(columns or {})
    unknown = sorted(columns.keys() - set(_NAMES))
    if unknown:
        raise ValueError(f"columns names {unknown[0]!r}; it may name {', '.join(_NAMES)}")
    if classes is not None and kind not in (None, "labels"):
        raise ValueError(f"classes={list(classes)!r} is for labels; the data has {kind}")
    judged: list[_Judged] = []
    ties, tied = 0, ""
    for where, row in _located_rows(source, name, split):
        if not isinstance(row, Mapping):
            raise TypeError(f"{where} must be an object with named columns, got {type(row).__name__}")
        kind = kind or _kind_of(row, columns, where)
        row_read = _read_row(_Reader(row, columns, where, tokenizer), kind)
        if kind == "preferences" and row_read.row.completion == row_read.row.rejected:
            ties += 1
            tied = row_read.row.completion
        else:
            judged.append(row_read)
    conversations = sum(row.conversation for row in judged)
    if conversations and tokenizer is not None and not has_template(tokenizer):
        warnings.warn(
            f"{_described(source, name)} has {conversations} conversations, and the tokenizer "
            f"{tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template: they are read as texts, "
            "'Human: ...', 'Assistant: ...'",
            UserWarning,
            stacklevel=2,
        )
    if ties and not judged:
        raise ValueError(
            f"{_described(source, name)}: 'chosen' and 'rejected' are the same text {tied!r:.60}, and so in every pair"
        )
    if ties:
        warnings.warn(
            f"{_described(source, name)}: in {ties} of {ties + len(judged)} pairs 'chosen' and 'rejected' are the same "
            "text; they are left out",
            UserWarning,
            stacklevel=2,
        )
    if not judged or kind is None:
        raise ValueError(f"{_described(source, name)} has no rows; at least one is needed")
    if classes is not None and kind != "labels":
        raise ValueError(f"classes={list(classes)!r} is for labels; the data has {kind}")
    if kind == "tasks":
        found = _tasks_of(judged) if tasks is None else tuple(tasks)
        return RewardData(kind, _numbered(judged, found), several=found)
    only = Task("", kind, _classes_of(judged, classes, _described(source, name)) if kind == "labels" else ())
    return RewardData(kind, _numbered(judged, (only,)), only.classes)


@dataclass(frozen=True)
class _Judged:
    """A row whose class and task have no number yet."""

    row: RewardRow
    where: str
    task: str
    label: str | None  # of rows with a score or a margin None
    conversation: bool = False


def _read_row(read: _Reader, kind: Kind) -> _Judged:
    if kind == "preferences":
        return _Judged(_pair(read), read.where, "", None, read.conversation)
    prompt, completion = _judged_text(read)
    task = ""
    if kind == "tasks":
        task = read.label("task")
        given: list[TaskKind] = [_TELLING[name] for name in ("score", "label") if read.filled(name)]
        if len(given) != 1:
            raise ValueError(
                f"{read.where} must have either a score or a label, as its task {task!r} has it; it has "
                f"{'both' if given else 'neither'}"
            )
        kind = given[0]
    if kind == "scores":
        row = RewardRow(prompt, completion, None, read.number("score"))
        return _Judged(row, read.where, task, None, read.conversation)
    row = RewardRow(prompt, completion, None, math.nan)
    return _Judged(row, read.where, task, read.label("label"), read.conversation)


def _tasks_of(judged: Sequence[_Judged]) -> tuple[Task, ...]:
    tasks = []
    for name in sorted({row.task for row in judged}, key=_class_order):
        own = [row for row in judged if row.task == name]
        labelled = own[0].label is not None
        tasks.append(
            Task(name, "labels", _classes_of([row for row in own if row.label is not None], None, f"task {name!r}"))
            if labelled
            else Task(name, "scores")
        )
    return tuple(tasks)


def _classes_of(judged: Sequence[_Judged], classes: Sequence[str] | None, place: str) -> tuple[str, ...]:
    """Names of classes in their order, by default those there are."""
    labels = {row.label for row in judged if row.label is not None}
    names = tuple(sorted(labels, key=_class_order)) if classes is None else tuple(map(str, classes))
    if len(names) < 2:
        raise ValueError(f"{place} has the one class {names[0]!r}; at least two are needed")
    if len(set(names)) < len(names):
        raise ValueError(f"classes={list(names)!r} names a class twice")
    return names


def _numbered(judged: Sequence[_Judged], tasks: Sequence[Task]) -> tuple[RewardRow, ...]:
    """The rows, with the indices of their tasks and classes.

    :raises ValueError: if a row has a task or a class that there is none, or is of another kind than its task
    """
    numbers = {task.name: i for i, task in enumerate(tasks)}
    indices = [{name: float(i) for i, name in enumerate(task.classes)} for task in tasks]
    rows = []
    for given in judged:
        if given.task not in numbers:
            raise ValueError(
                f"{given.where}: the task {given.task!r} is none of the tasks {', '.join(map(repr, numbers))}"
            )
        number = numbers[given.task]
        task = tasks[number]
        if task.name and (given.label is None) != (task.kind == "scores"):
            raise ValueError(
                f"{given.where} has a {'score' if given.label is None else 'label'}, but other rows of its task "
                f"{task.name!r} have {task.kind}"
            )
        target = given.row.target
        if given.label is not None:
            if given.label not in indices[number]:
                known = ", ".join(map(repr, task.classes))
                raise ValueError(f"{given.where}: the label {given.label!r} is none of the classes {known}")
            target = indices[number][given.label]
        rows.append(replace(given.row, target=target, task=number))
    return tuple(rows)


class _Reader:
    """The values of one row, checked as they are read."""

    def __init__(
        self,
        row: Mapping[str, Any],
        columns: Mapping[str, str],
        where: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.row, self.columns, self.where, self.tokenizer = row, columns, where, tokenizer
        self.conversation = False  # whether the prompt is one, once it is read

    def layout(self) -> ReadRow:
        """Prompt and answers, in whichever layout they are."""
        found = read_row(self.row, self.where, self.columns)
        self.conversation = isinstance(found.prompt, list) and found.written is None
        return found

    def checked(self, text: str, name: str) -> str:
        """:raises ValueError: if no tokenizer can read a text"""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self.where}: {self.columns.get(name, name)!r} has half of a surrogate pair at character "
                f"{error.start + 1}, which no tokenizer can read"
            ) from None
        return text

    def has(self, name: str) -> bool:
        return self.columns.get(name, name) in self.row

    def filled(self, name: str) -> bool:
        """Whether there is a value: a data set fills the gaps of a column with None, a CSV file with nothing."""
        return self.has(name) and self.value(name) not in (None, "")

    def value(self, name: str) -> Any:
        column = self.columns.get(name, name)
        if column not in self.row:
            raise ValueError(
                f"{self.where} has no column {column!r}; its columns are {', '.join(map(repr, self.row)) or 'none'}. "
                f'columns={{"{name}": ...}} says which one it is'
            )
        return self.row[column]

    def text(self, name: str) -> str:
        value = self.value(name)
        place = f"{self.where}: {self.columns.get(name, name)!r}"
        if not isinstance(value, str):
            raise TypeError(f"{place} must be a text, got {type(value).__name__} {value!r:.60}")
        return self.checked(value, name)

    def number(self, name: str) -> float:
        value = self.value(name)
        place = f"{self.where}: {self.columns.get(name, name)!r}"
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError(f"{place} must be a number, got {type(value).__name__} {value!r:.60}")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{place} must be a number, got {value!r:.60}") from None
        if not math.isfinite(number):
            raise ValueError(f"{place} must be a finite number, got {value!r:.60}")
        return number

    def label(self, name: str) -> str:
        value = self.value(name)
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a table with gaps has no whole numbers
        if isinstance(value, (str, int)) and str(value).strip():
            return str(value)
        place = f"{self.where}: {self.columns.get(name, name)!r}"
        raise TypeError(f"{place} must be a class, a text or a whole number, got {type(value).__name__} {value!r:.60}")


def _pair(read: _Reader) -> RewardRow:
    for name in ("chosen", "rejected"):
        read.value(name)  # an error that names the columns
    found = read.layout()
    for name, value in (("chosen", found.chosen), ("rejected", found.rejected)):
        if value is None:
            read.text(name)
    _check_prompt(read)
    prompt, (chosen, rejected) = _texts(read, found, ("chosen", "rejected"))
    margin = 0.0
    if read.filled("margin"):
        margin = read.number("margin")
    if margin < 0:
        raise ValueError(f"{read.where}: the margin is {margin}; a margin by which chosen is better can't be negative")
    _check_readable(prompt + chosen, read.where)
    _check_readable(prompt + rejected, read.where)
    return RewardRow(prompt, chosen, rejected, margin)


def _check_prompt(read: _Reader) -> None:
    """:raises TypeError: if there is a prompt that is neither a text nor messages"""
    if read.filled("prompt") and not is_conversation(read.value("prompt")):
        read.text("prompt")


def _texts(read: _Reader, found: ReadRow, names: Sequence[str]) -> tuple[str, list[str]]:
    """The prompt and the answers with these names as texts, of which the second goes on where the first ends."""
    place = f"{read.where}: {found.source!r}"
    prompt = read.checked(found.prompt_text(read.tokenizer, place, plain=True), found.source)
    answers = [(name, found.answer_text(getattr(found, name), read.tokenizer, read.where)) for name in names]
    return prompt, [read.checked(text, name) for name, text in answers]


def _judged_text(read: _Reader) -> tuple[str, str]:
    if read.has("text") and not read.has("completion"):
        if read.has("prompt"):
            raise ValueError(
                f"{read.where} has a prompt and a text, but no completion; if the text is what follows the prompt, say "
                'columns={"completion": "text"}, otherwise remove the prompt'
            )
        prompt, completion = "", read.text("text")
    else:
        found = read.layout()
        if found.completion is None:
            read.text("completion" if read.has("completion") else "text")  # an error that names the columns
        if found.prompt is None:
            read.text("prompt")
        _check_prompt(read)
        prompt, [completion] = _texts(read, found, ("completion",))
    _check_readable(prompt + completion, read.where)
    return prompt, completion


def _check_readable(text: str, where: str) -> None:
    if not text.strip():
        raise ValueError(f"{where} has no text; prompt and completion are both empty")


def _kind_of(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> TaskKind:
    found = [kind for name, kind in _TELLING.items() if columns.get(name, name) in row]
    if len(found) == 1:
        return found[0]
    names = ", ".join(map(repr, row)) or "none"
    if found:
        raise ValueError(f"{where} could be {' or '.join(found)} by its columns {names}; kind= says which")
    raise ValueError(
        f"{where} has neither a column 'chosen' (preferences), 'score' (scores) nor 'label' (labels); its columns are "
        f'{names}. columns={{"score": ...}} says what one of them is called'
    )


def _class_order(label: str) -> tuple[int, float, str]:
    try:
        return 0, int(label), label
    except ValueError:
        return 1, 0.0, label


def _located_rows(source: Any, name: str, split: str | None) -> Iterable[tuple[str, Any]]:
    """Where each row stands, for errors, and the row."""
    if not isinstance(source, (str, os.PathLike)):
        if split is not None:
            raise ValueError(f"split={split!r} is for files and folders; give that part of {name} itself")
        rows: Any = source
        if hasattr(source, "column_names"):
            rows = plain_dataset(source, name)
        elif isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise TypeError(f"{name} must be a file, a datasets.Dataset or rows, got {type(source).__name__}")
        return LocatedRows(rows if hasattr(rows, "__len__") else streamed(rows, name), f"{name}, row {{}}", name)
    path = Path(source).expanduser()
    kind = kind_of(path)
    if path.is_file() and kind not in FILE_KINDS:
        raise ValueError(
            f"{name}: {str(path)!r} ends in {path.suffix!r}; it must end in one of {', '.join(FILE_KINDS)}"
        )
    return read_rows(path, split=split, column="text", name=name)


def _described(source: Any, name: str) -> str:
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else name
