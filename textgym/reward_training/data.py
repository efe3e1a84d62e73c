"""Training data of reward models, and its split by prompt."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Kind = Literal["preferences", "scores", "labels", "tasks"]
TaskKind = Literal["preferences", "scores", "labels"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class RewardRow:
    """One row of training data.

    :param prompt: what came before the completion; empty where the data has whole texts
    :param completion: the text that is judged, of a pair the better one
    :param rejected: of a pair the worse completion, otherwise None
    :param target: the score, the index of the class, or the margin of a pair
    :param task: index of the task, where there are several
    """

    prompt: str
    completion: str
    rejected: str | None
    target: float
    task: int = 0


@dataclass(frozen=True)
class Task:
    """One of the things that a model is trained for.

    :param name: as the column ``task`` has it; empty where there is one task only
    :param kind: ``"scores"``, ``"labels"``, or of a task alone ``"preferences"``
    :param classes: of labels, in the order of their indices
    """

    name: str
    kind: TaskKind
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RewardData:
    """Rows of one kind.

    :param kind: ``"preferences"``, ``"scores"``, ``"labels"`` or ``"tasks"``
    :param rows: at least one
    :param classes: the names of the classes of labels, in the order of their indices; otherwise empty
    :param several: of ``"tasks"`` the tasks, in the order of their indices; otherwise empty
    """

    kind: Kind
    rows: tuple[RewardRow, ...]
    classes: tuple[str, ...] = ()
    several: tuple[Task, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks; without several, the one there is."""
        return self.several if self.kind == "tasks" else (Task("", self.kind, self.classes),)

    @property
    def fingerprint(self) -> str:
        """A hash of all of it, by which a resumed run knows its data."""
        rows = [[r.prompt, r.completion, r.rejected, r.target, r.task] for r in self.rows]
        content = [[[task.name, task.kind, task.classes] for task in self.tasks], rows]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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


def number_of_prompts(data: RewardData) -> int:
    """How many parts there are that a split leaves whole: prompts, or, where there are none, texts."""
    return len(set(_groups(data.rows)))


def check_disjoint(training: RewardData, validation: RewardData) -> None:
    """Check that two data sets are of one kind and share no prompt, nor, where there are no prompts, a text.

    :raises ValueError: if they do, with an example
    """
    if training.kind != validation.kind:
        raise ValueError(f"the data has {training.kind}, the validation data {validation.kind}")
    if training.classes != validation.classes:
        raise ValueError(f"the data has the classes {training.classes}, the validation data {validation.classes}")
    if training.several != validation.several:
        raise ValueError(f"the data has the tasks {training.several}, the validation data {validation.several}")
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
