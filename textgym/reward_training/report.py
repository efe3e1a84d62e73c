"""How good a reward model is: the metrics, as numbers, a table, JSON and a picture.

Plain NumPy; the tests compare each with scikit-learn's or SciPy's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

BINS = 10


@dataclass
class RewardReport:
    """What was measured on the validation rows.

    :param kind: ``"preferences"``, ``"scores"``, ``"labels"`` or ``"tasks"``
    :param metrics: by name; one that is not defined, such as a correlation with a constant, is left out
    :param by_prefix: for each share of the completion's tokens that was read the accuracy, where there is one, and the
        calibration error
    :param confusion: rows are the true classes, columns the predicted ones; empty where there are no classes
    :param classes: names of the classes
    :param calibration: for each bin the mean prediction, the mean outcome and the number of rows
    :param history: what was logged: dicts with ``"epoch"`` and ``"loss"`` or ``"eval_loss"``
    :param rows: training and validation rows
    :param seconds: of training
    :param peak_memory_mib: of the GPU, or else of the process; None where the system doesn't say
    :param tasks: of several tasks the report of each by its name; the metrics of all of them then stand in ``metrics``
        as ``"task/metric"``
    :param members: of an ensemble the metrics of each member; ``metrics`` are those of their mean
    """

    kind: str
    metrics: dict[str, float]
    by_prefix: dict[str, dict[str, float]] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    calibration: list[tuple[float, float, int]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mib: float | None = None
    tasks: dict[str, RewardReport] = field(default_factory=dict)
    members: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``report.json`` and, where matplotlib is installed, ``report.png``."""
        folder = Path(folder)
        (folder / "report.json").write_text(self.to_json(), encoding="utf-8")
        try:
            import matplotlib  # noqa: F401  the picture is the only part that needs it
        except ModuleNotFoundError:
            return
        draw_report(self, folder / "report.png")


def classification_metrics(classes: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, precision, recall, F1, AUC and expected calibration error.

    Of two classes, precision, recall, F1 and AUC are those of the second; of more, means over the classes (of AUC one
    against the rest). A ratio with nothing below the line is 0, as in scikit-learn with ``zero_division=0``.

    :param classes: ``(N,)`` the true classes
    :param probabilities: ``(N, C)``
    """
    predicted = probabilities.argmax(1)
    matrix = confusion_matrix(classes, predicted, probabilities.shape[1])
    hits = np.diag(matrix)
    precision = _ratio(hits, matrix.sum(0))
    recall = _ratio(hits, matrix.sum(1))
    f1 = _ratio(2 * hits, matrix.sum(0) + matrix.sum(1))
    chosen = slice(1, 2) if len(matrix) == 2 else slice(None)
    metrics = {
        "accuracy": float((predicted == classes).mean()),
        "precision": float(precision[chosen].mean()),
        "recall": float(recall[chosen].mean()),
        "f1": float(f1[chosen].mean()),
    }
    curves = [area_under_curve(classes == c, probabilities[:, c]) for c in range(len(matrix))][chosen]
    metrics["auc"] = float(np.mean(curves))
    metrics["calibration_error"] = expected_calibration_error(probabilities.max(1), predicted == classes)
    return _defined(metrics)


def regression_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Pearson's r, Spearman's ρ, mean squared and mean absolute error, and the calibration error in score units."""
    return _defined(
        {
            "pearson": pearson(scores, targets),
            "spearman": pearson(ranks(scores), ranks(targets)),
            "mse": float(((scores - targets) ** 2).mean()),
            "mae": float(np.abs(scores - targets).mean()),
            "calibration_error": expected_calibration_error(scores, targets),
        }
    )


def confusion_matrix(classes: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """``(C, C)``: how many of the true class (row) were taken for each class (column)."""
    matrix = np.zeros((count, count), dtype=np.int64)
    np.add.at(matrix, (classes, predicted), 1)
    return matrix


def area_under_curve(positive: np.ndarray, scores: np.ndarray) -> float:
    """Chance that a positive scores higher than a negative, ties counting half; NaN where one of them is absent."""
    count = int(positive.sum())
    if count in (0, len(positive)):
        return math.nan
    above = ranks(scores)[positive].sum() - count * (count + 1) / 2  # Mann and Whitney's U
    return float(above / (count * (len(positive) - count)))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; NaN where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    below = math.sqrt(float((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / below) if below > 0 else math.nan


def calibration_bins(predictions: np.ndarray, outcomes: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Mean prediction, mean outcome and size of bins of equal width over the range of the predictions."""
    low, high = (0.0, 1.0) if predictions.min() >= 0 and predictions.max() <= 1 else _range(predictions)
    number = np.clip(((predictions - low) / (high - low or 1.0) * bins).astype(int), 0, bins - 1)
    found = []
    for i in np.unique(number):
        inside = number == i
        found.append((float(predictions[inside].mean()), float(outcomes[inside].mean()), int(inside.sum())))
    return found


def expected_calibration_error(predictions: np.ndarray, outcomes: np.ndarray, bins: int = BINS) -> float:
    """Mean over the rows of ``|mean prediction - mean outcome|`` of their bin (Guo et al. 2017, equation 3).

    :param predictions: ``(N,)`` confidences, with outcomes 0 and 1, or predicted scores
    """
    found = calibration_bins(np.asarray(predictions, dtype=float), np.asarray(outcomes, dtype=float), bins)
    return sum(abs(mean - outcome) * size for mean, outcome, size in found) / len(predictions)


def report_table(report: RewardReport, title: str = "Reward model") -> Table:
    """The report as a rich table."""
    from rich.table import Table

    held_out = report.rows.get("validation", "?")
    measured = f"{held_out} validation" if held_out else f"the {report.rows['training']} training"
    table = Table(title=f"{title}: {measured} {report.kind}", show_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in report.metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
        each = [member[name] for member in report.members if name in member]
        if each:
            table.add_row("  of its members", f"{min(each):.4f} to {max(each):.4f}")
    table.add_section()
    for share, values in report.by_prefix.items():
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
        table.add_row(f"after {share} of the tokens", shown)
    if report.confusion:
        table.add_section()
        for name, row in zip(report.classes, report.confusion, strict=True):
            taken = ", ".join(f"{count} {other}" for other, count in zip(report.classes, row, strict=True))
            table.add_row(f"{name} taken for", taken)
    table.add_section()
    table.add_row("seconds", f"{report.seconds:.1f}")
    if report.peak_memory_mib is not None:
        table.add_row("peak memory, MiB", f"{report.peak_memory_mib:.0f}")
    return table


def draw_report(report: RewardReport, path: str | os.PathLike[str]) -> None:
    """Draw losses, calibration, prefix lengths and the confusion matrix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    losses, calibration, prefixes, confusion = figure.subplots(1, 4)
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "validation", "o")):
        points = [(entry["epoch"], entry[key]) for entry in report.history if key in entry]
        if points:
            losses.plot(*zip(*points, strict=True), marker=marker, label=label)
    losses.set(title="Loss", xlabel="epoch")
    if losses.get_lines():
        losses.legend(frameon=False)
    if report.calibration:
        predicted, outcome, _ = zip(*report.calibration, strict=True)
        ends = [min(*predicted, *outcome), max(*predicted, *outcome)]
        calibration.plot(ends, ends, color="0.7", linestyle="--")
        calibration.plot(predicted, outcome, marker="o")
    calibration.set(title="Calibration", xlabel="mean prediction", ylabel="mean outcome")
    shown = "accuracy" if any("accuracy" in values for values in report.by_prefix.values()) else "pearson"
    curve = [(share, values[shown]) for share, values in report.by_prefix.items() if shown in values]
    if curve:
        prefixes.plot(*zip(*curve, strict=True), marker="o")
    prefixes.set(title=f"{shown.title()} by prefix", xlabel="share of the completion")
    if report.confusion:
        matrix = np.array(report.confusion)
        confusion.imshow(matrix, cmap="Blues")
        for (i, j), count in np.ndenumerate(matrix):
            confusion.text(
                j, i, str(count), ha="center", va="center", color="white" if count > matrix.max() / 2 else "k"
            )
        names: Sequence[str] = report.classes
        confusion.set_xticks(range(len(names)), names)
        confusion.set_yticks(range(len(names)), names)
        confusion.set(title="Confusion", xlabel="predicted", ylabel="true")
    else:
        confusion.axis("off")
    figure.savefig(path, dpi=110)


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``report.json`` of a trained reward model."""
    content: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    return content


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _defined(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
