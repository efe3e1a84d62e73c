"""Measuring a trained model, or several together, on whole texts and on their beginnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .data import RewardData
from .encoding import EncodedText
from .objectives import Objective
from .report import (
    RewardReport,
    calibration_bins,
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    regression_metrics,
)
from .scorer import TextScorer
from .trainer import EncodedRows

PREFIX_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the completion's tokens, in the report
_SHOWN_BY_PREFIX = ("accuracy", "pearson", "calibration_error")


@dataclass(frozen=True)
class Predictions:
    """What a model says of validation rows, at one share of their tokens.

    :param values: for each objective :meth:`Objective.values` of all N rows
    :param rejected: the same of the worse texts of pairs
    """

    values: tuple[np.ndarray, ...]
    rejected: tuple[np.ndarray, ...] | None


def predictions_of(scorer: TextScorer, objectives: Sequence[Objective], rows: EncodedRows) -> dict[float, Predictions]:
    """What a model says of rows, for each share of the completion's tokens."""

    def values(texts: Sequence[EncodedText], share: float) -> tuple[np.ndarray, ...]:
        logits = scorer.logits([text.ids if share == 1 else text.prefix(_part(text, share)) for text in texts])
        return tuple(objective.values(objective.own(logits)) for objective in objectives)

    return {
        share: Predictions(values(rows.texts, share), None if rows.rejected is None else values(rows.rejected, share))
        for share in PREFIX_SHARES
    }


def mean_predictions(members: Sequence[dict[float, Predictions]]) -> dict[float, Predictions]:
    """What several models say together: the means of what they say."""

    def mean(sides: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        return tuple(np.mean(values, axis=0) for values in zip(*sides, strict=True))

    found = {}
    for share in PREFIX_SHARES:
        rejected = [member[share].rejected for member in members]
        worse = mean([side for side in rejected if side is not None]) if rejected[0] is not None else None
        found[share] = Predictions(mean([member[share].values for member in members]), worse)
    return found


def report_of(predictions: dict[float, Predictions], objectives: Sequence[Objective], data: RewardData) -> RewardReport:
    """The report of predictions on data. Of several tasks each has its own in ``tasks``, and the metrics its name."""
    parts = {}
    for number, objective in enumerate(objectives):
        rows = np.array([row.task == number for row in data.rows])
        if rows.any():
            targets = np.array([row.target for row in data.rows])[rows]
            parts[objective.task.name] = _report_of_task(predictions, number, objective, rows, targets)
    if data.kind != "tasks":
        return next(iter(parts.values()))
    for part, objective in ((parts[o.task.name], o) for o in objectives if o.task.name in parts):
        part.rows = {"validation": sum(data.tasks[row.task].name == objective.task.name for row in data.rows)}
    metrics = {f"{task}/{name}": value for task, part in parts.items() for name, value in part.metrics.items()}
    return RewardReport("tasks", metrics, tasks=parts)


def _report_of_task(
    predictions: dict[float, Predictions], number: int, objective: Objective, rows: np.ndarray, targets: np.ndarray
) -> RewardReport:
    by_prefix = {}
    metrics: dict[str, float] = {}
    for share, said in predictions.items():
        values = said.values[number][rows]
        if said.rejected is None:
            metrics, calibration, confusion = _of_texts(objective, values, targets)
        else:
            metrics, calibration = _of_pairs(values[:, 0], said.rejected[number][rows][:, 0], targets)
            confusion = []
        by_prefix[f"{share:.0%}"] = {name: metrics[name] for name in _SHOWN_BY_PREFIX if name in metrics}
    task = objective.task
    classes = list(task.classes) if task.kind == "labels" else ["below", "above"] if confusion else []
    return RewardReport(task.kind, metrics, by_prefix, confusion, classes, calibration)


def _of_pairs(
    chosen: np.ndarray, rejected: np.ndarray, margins: np.ndarray
) -> tuple[dict[str, float], list[tuple[float, float, int]]]:
    """Metrics and calibration bins of scores ``(N,)``."""
    difference = chosen - rejected
    right = (difference > 0) + 0.5 * (difference == 0)  # a tie is a coin's throw
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    metrics = {
        "accuracy": float(right.mean()),
        "mean_difference": float(difference.mean()),
        "calibration_error": expected_calibration_error(confidence, right),
    }
    if margins.std() > 0:
        correlations = regression_metrics(difference, margins)
        metrics |= {name: correlations[name] for name in ("pearson", "spearman") if name in correlations}
    return metrics, calibration_bins(confidence, right)


def _of_texts(
    objective: Objective, values: np.ndarray, targets: np.ndarray
) -> tuple[dict[str, float], list[tuple[float, float, int]], Any]:
    """Metrics, calibration bins and confusion matrix of values ``(N, 1)`` or ``(N, classes)``."""
    if objective.task.kind == "labels":
        classes = targets.astype(np.int64)
        predicted = values.argmax(1)
        bins = calibration_bins(values.max(1), (predicted == classes).astype(float))
        matrix = confusion_matrix(classes, predicted, values.shape[1])
        return classification_metrics(classes, values), bins, matrix.tolist()
    scores, threshold = values[:, 0], objective.threshold or 0.0
    above = (targets > threshold).astype(np.int64)
    by_sign = classification_metrics(above, np.stack([threshold - scores, scores - threshold], axis=1))
    del by_sign["calibration_error"]  # these were not probabilities
    matrix = confusion_matrix(above, (scores > threshold).astype(np.int64), 2)
    return by_sign | regression_metrics(scores, targets), calibration_bins(scores, targets), matrix.tolist()


def _part(text: EncodedText, share: float) -> int:
    return max(text.shortest, math.ceil(share * len(text.completion)))
