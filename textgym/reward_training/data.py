"""What a reward model learns from: preference pairs, scores or labels, from files or ``datasets``.

| kind | columns | a row says |
|---|---|---|
| ``"preferences"`` | ``prompt``, ``chosen``, ``rejected``, optional ``margin`` | one completion beats another |
| ``"scores"`` | ``text``, or ``prompt`` and ``completion``; ``score`` | how good a text is, a number |
| ``"labels"`` | ``text``, or ``prompt`` and ``completion``; ``label`` | which class a text belongs to |
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from textgym import prompt_files

Kind = Literal["preferences", "scores", "labels"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FILE_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_NAMES = ("prompt", "completion", "text", "chosen", "rejected", "margin", "score", "label")
_TELLING: dict[str, Kind] = {"chosen": "preferences", "score": "scores", "label": "labels"}


@dataclass(frozen=True)
class RewardRow:
    """One row of training data.

    :param prompt: what came before the completion; empty where the data has whole texts
    :param completion: the text that is judged, of a pair the better one
    :param rejected: of a pair the worse completion, otherwise None
    :param target: the score, the index of the class, or the margin of a pair
    """

    prompt: str
    completion: str
    rejected: str | None
    target: float


@dataclass(frozen=True)
class RewardData:
    """Rows of one kind.

    :param kind: ``"preferences"``, ``"scores"`` or ``"labels"``
    :param rows: at least one
    :param classes: the names of the classes of labels, in the order of their indices; otherwise empty
    """

    kind: Kind
    rows: tuple[RewardRow, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """A hash of all of it, by which a resumed run knows its data."""
        content = [self.kind, self.classes, [[r.prompt, r.completion, r.rejected, r.target] for r in self.rows]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_reward_data(
    source: str | os.PathLike[str] | RewardData | Iterable[Mapping[str, Any]],
    *,
    kind: Kind | None = None,
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    name: str = "data",
) -> RewardData:
    """Read preference pairs, scores or labels.

    :param source: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a folder that ``datasets`` saved, a
        ``datasets.Dataset``, or any iterable of rows that are mappings; :class:`RewardData` is returned as it is
    :param kind: by default what the columns say
    :param columns: what the data calls a column, such as ``{"score": "rating"}``; others keep their name
    :param classes: the names of the classes in their order; by default those there are, sorted (numbers by size). Of
        two classes the second is the positive one
    :param name: what errors call rows that come from no file
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if a file is broken, a column is missing, a number isn't finite, or there are no rows
    :raises TypeError: if a text is no text or a number no number
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
    rows: list[RewardRow] = []
    labels: list[str] = []
    label_places: list[str] = []
    for where, row in _located_rows(source, name):
        if not isinstance(row, Mapping):
            raise TypeError(f"{where} must be an object with named columns, got {type(row).__name__}")
        kind = kind or _kind_of(row, columns, where)
        read = _Reader(row, columns, where)
        if kind == "preferences":
            rows.append(_pair(read))
            continue
        prompt, completion = _judged_text(read)
        if kind == "scores":
            rows.append(RewardRow(prompt, completion, None, read.number("score")))
        else:
            rows.append(RewardRow(prompt, completion, None, math.nan))
            labels.append(read.label("label"))
            label_places.append(where)
    if not rows or kind is None:
        raise ValueError(f"{_described(source, name)} has no rows; at least one is needed")
    if kind != "labels":
        if classes is not None:
            raise ValueError(f"classes={list(classes)!r} is for labels; the data has {kind}")
        return RewardData(kind, tuple(rows))
    names = tuple(sorted(set(labels), key=_class_order)) if classes is None else tuple(map(str, classes))
    if len(names) < 2:
        raise ValueError(f"{_described(source, name)} has the one class {names[0]!r}; at least two are needed")
    if len(set(names)) < len(names):
        raise ValueError(f"classes={list(names)!r} names a class twice")
    index = {label: i for i, label in enumerate(names)}
    for label, where in zip(labels, label_places, strict=True):
        if label not in index:
            raise ValueError(f"{where}: the label {label!r} is none of the classes {', '.join(map(repr, names))}")
    numbered = (replace(row, target=float(index[label])) for row, label in zip(rows, labels, strict=True))
    return RewardData(kind, tuple(numbered), names)


def split_by_prompt(data: RewardData, validation_share: float, seed: int = 0) -> tuple[RewardData, RewardData]:
    """Split so that no prompt is in both parts, nor, where there are no prompts, a text.

    :param validation_share: of the prompts, more than 0 and less than 1; at least one prompt goes to each part
    :param seed: of the draw
    :return: for training, and for validation; each in the order of the data
    :raises ValueError: if the share is out of range, or all rows hang together by their prompts
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be more than 0 and less than 1, got {validation_share}")
    groups = _groups(data.rows)
    names = sorted(set(groups))
    if len(names) < 2:
        raise ValueError(
            f"the {len(data)} rows all share one prompt, or are pairs without prompts that share texts, and can't be "
            "split by prompt; pass validation data"
        )
    random.Random(seed).shuffle(names)
    held_out = set(names[: min(len(names) - 1, max(1, round(validation_share * len(names))))])
    parts = [
        replace(
            data, rows=tuple(row for row, group in zip(data.rows, groups, strict=True) if (group in held_out) == out)
        )
        for out in (False, True)
    ]
    return parts[0], parts[1]


def check_disjoint(training: RewardData, validation: RewardData) -> None:
    """Check that two data sets are of one kind and share no prompt, nor, where there are no prompts, a text.

    :raises ValueError: if they do, with an example
    """
    if training.kind != validation.kind:
        raise ValueError(f"the data has {training.kind}, the validation data {validation.kind}")
    if training.classes != validation.classes:
        raise ValueError(f"the data has the classes {training.classes}, the validation data {validation.classes}")
    shared = {key for row in training.rows for key in _keys(row)} & {k for row in validation.rows for k in _keys(row)}
    if shared:
        example = min(shared)[1]
        raise ValueError(
            f"{len(shared)} prompts (or texts without one) of the validation data are in the training data, too, "
            f"such as {example[:60]!r}; what was learned can't be told from what was remembered"
        )


def _keys(row: RewardRow) -> list[tuple[str, str]]:
    """What a row must not share with one of the other part."""
    if row.prompt.strip():
        return [("prompt", row.prompt)]
    return [("text", text) for text in (row.completion, row.rejected) if text is not None]


def _groups(rows: Sequence[RewardRow]) -> list[int]:
    """For each row the number of its group: rows with a key in common are in one group (union-find)."""
    parents: dict[tuple[str, str], tuple[str, str]] = {}

    def root(key: tuple[str, str]) -> tuple[str, str]:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for row in rows:
        first, *others = _keys(row)
        for other in others:
            parents[root(other)] = root(first)
    numbers: dict[tuple[str, str], int] = {}
    return [numbers.setdefault(root(_keys(row)[0]), len(numbers)) for row in rows]


class _Reader:
    """The values of one row, checked as they are read."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> None:
        self.row, self.columns, self.where = row, columns, where

    def has(self, name: str) -> bool:
        return self.columns.get(name, name) in self.row

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
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place} has half of a surrogate pair at character {error.start + 1}, which no tokenizer can read"
            ) from None
        return value

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
        if isinstance(value, (str, int)) and str(value).strip():
            return str(value)
        place = f"{self.where}: {self.columns.get(name, name)!r}"
        raise TypeError(f"{place} must be a class, a text or a whole number, got {type(value).__name__} {value!r:.60}")


def _pair(read: _Reader) -> RewardRow:
    prompt, chosen, rejected = read.text("prompt"), read.text("chosen"), read.text("rejected")
    margin = 0.0
    # A data set fills the gaps of a column with None, a CSV file with nothing.
    if read.has("margin") and read.value("margin") not in (None, ""):
        margin = read.number("margin")
    if margin < 0:
        raise ValueError(f"{read.where}: the margin is {margin}; a margin by which chosen is better can't be negative")
    if chosen == rejected:
        raise ValueError(f"{read.where}: 'chosen' and 'rejected' are the same text {chosen!r:.60}")
    _check_readable(prompt + chosen, read.where)
    _check_readable(prompt + rejected, read.where)
    return RewardRow(prompt, chosen, rejected, margin)


def _judged_text(read: _Reader) -> tuple[str, str]:
    if read.has("text") and not read.has("completion"):
        if read.has("prompt"):
            raise ValueError(
                f"{read.where} has a prompt and a text, but no completion; if the text is what follows the prompt, say "
                'columns={"completion": "text"}, otherwise remove the prompt'
            )
        prompt, completion = "", read.text("text")
    elif read.has("completion"):
        prompt, completion = read.text("prompt"), read.text("completion")
    else:
        completion = read.text("text")  # the error that names the columns
        prompt = ""
    _check_readable(prompt + completion, read.where)
    return prompt, completion


def _check_readable(text: str, where: str) -> None:
    if not text.strip():
        raise ValueError(f"{where} has no text; prompt and completion are both empty")


def _kind_of(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Kind:
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


def _located_rows(source: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Where each row stands, for errors, and the row."""
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise TypeError(f"{name} must be a file, a datasets.Dataset or rows, got {type(source).__name__}")
        for i, row in enumerate(source):
            yield f"{name}, row {i}", row
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{name}: there is no file or folder {str(path)!r}")
    kind = path.suffix.lower()
    if path.is_dir() or kind == ".parquet":
        dataset = prompt_files._saved(path, None) if path.is_dir() else prompt_files._parquet(path)
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(dataset))
    elif kind in FILE_KINDS:
        yield from prompt_files._KINDS[kind](path, "text")
    else:
        raise ValueError(
            f"{name}: {str(path)!r} ends in {path.suffix!r}; it must end in one of {', '.join(FILE_KINDS)}"
        )


def _described(source: Any, name: str) -> str:
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else name
