"""A learned difference between a completion and the target that its prompt row names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from textgym.checks import check_text
from textgym.rewards.base import Reward
from textgym.rewards.columns import column_of, rows_of_columns
from textgym.rewards.errors import RewardError
from textgym.rewards.function_reward import RewardLike, check_reward

SEPARATOR = "\n"


class PredictedDifference(Reward):
    """Φ(x, y) = −d̂(y, z), where d̂ predicts how much the completion y differs from the target z of the prompt row.

    For tasks whose targets are known and whose measure of difference is not differentiable, not quick, or a person's:
    the prediction is learned once, from triples of a completion, a target and their difference, and then scores every
    prefix. The model is any reward model that ``textgym train-reward`` makes; it reads the target where others read the
    prompt, and learns minus the difference (:func:`difference_rows` makes such rows). ::

        >>> from textgym.rewards import FunctionReward
        >>> def closeness(prompts, completions):
        ...     return [-abs(len(p.strip()) - len(c.strip())) for p, c in zip(prompts, completions)]
        >>> model = FunctionReward(closeness)
        >>> reward = PredictedDifference(model, "answer")
        >>> reward(prompts=["2 + 2 ="] * 2, completions=[" 4", " it is 4"], answer=[" 4", " 4"])
        [0.0, -6.0]

    Range: that of the model. None where the row's target is None.

    :param model: predicts minus the difference of ``completions`` and ``prompts``, which are given the targets: a
        reward, such as ``as_reward`` opens of a directory that ``textgym train-reward`` wrote, or a function
    :param column: the column of the prompt rows with the targets, texts
    :param separator: what comes between target and completion, where the model learned
    :raises RewardError: in scoring, if there is no such column or an entry is no text
    """

    def __init__(self, model: RewardLike, column: str = "target", separator: str = SEPARATOR) -> None:
        self.model = check_reward("model", model)
        self.column = check_text("column", column, empty=False)
        self.separator = check_text("separator", separator)

    @property
    def name(self) -> str:
        return f"predicted_difference({self.model.name}, {self.column})"

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        targets = column_of(self.name, self.column, columns, completions)
        for row, target in enumerate(targets):
            if target is not None and not isinstance(target, str):
                raise RewardError(
                    self.name,
                    f"column {self.column!r} holds {target!r}; expected a text, or None",
                    row=row,
                    completion=completions[row],
                )
        known = [row for row, target in enumerate(targets) if target is not None]
        scores: list[float | None] = [None] * len(completions)
        if known:
            others = {name: values for name, values in columns.items() if name not in (self.column, "completion_ids")}
            predicted = self.model(
                prompts=[targets[row] + self.separator for row in known],
                completions=[completions[row] for row in known],
                **rows_of_columns(others, known, len(completions)),
            )
            for row, score in zip(known, predicted, strict=True):
                scores[row] = score
        return scores

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)


def difference_rows(triples: Iterable[tuple[str, str, float]], separator: str = SEPARATOR) -> list[Mapping[str, Any]]:
    r"""Rows that ``train_reward`` and ``textgym train-reward`` take, for :class:`PredictedDifference`.

        >>> difference_rows([("a fine film", "a good film", 0.2)])
        [{'prompt': 'a good film\n', 'completion': 'a fine film', 'score': -0.2}]

    :param triples: completion, target, and how much they differ
    :param separator: put after each target
    """
    return [
        {"prompt": target + separator, "completion": completion, "score": -float(difference)}
        for completion, target, difference in triples
    ]
