"""Training curves: pictures of the ``metrics.jsonl`` of one run, or of several runs against each other.

``metrics.jsonl`` has one JSON object per rollout, with the names under which Stable-Baselines3 logs: among them
``time/total_timesteps`` (tokens), ``rollout/score_mean``, ``rollout/kl_ref`` (nats per completion),
``rollout/ep_len_mean``, ``train/entropy_loss`` (minus the entropy, nats per token), ``train/kl_coef``, and, where
held-out prompts were evaluated, ``eval/score_mean`` and ``eval/kl``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
TOKENS = "time/total_timesteps"

# Okabe and Ito's colours, which people with the common forms of colour blindness can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_HELD_OUT: dict[str, Any] = {
    "marker": "*",
    "markersize": 10,
    "markeredgecolor": "white",
    "markeredgewidth": 0.6,
    "linestyle": "none",
}
_ROLLOUTS: dict[str, Any] = {"marker": "o", "markersize": 3.5, "markeredgewidth": 0, "alpha": 0.45, "linestyle": "none"}
_SMOOTHED_FROM = 60  # rollouts; a curve of more is drawn pale, with its running mean over it

# Title, vertical label, name of the metric, its name on held-out prompts, factor.
_PANELS = (
    ("Score", "reward Φ", "rollout/score_mean", "eval/score_mean", 1.0),
    ("KL to the reference", "nats per completion", "rollout/kl_ref", "eval/kl", 1.0),
    ("Length", "tokens per completion", "rollout/ep_len_mean", None, 1.0),
    ("Entropy", "nats per token", "train/entropy_loss", None, -1.0),
    ("KL coefficient β", "β", "train/kl_coef", None, 1.0),
)


def read_metrics(folder: str | PathLike[str]) -> list[dict[str, Any]]:
    """The metrics of a run, one dictionary per rollout.

    A last line that was not written to its end, as a process leaves it that is killed, does not count.

    :param folder: of the run
    :raises FileNotFoundError: if there is no such folder, or no ``metrics.jsonl`` in it
    :raises ValueError: if a line is broken, with its number
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}; give the output folder of a run")
    path = folder / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"the folder {str(folder)!r} has no {METRICS_FILE}; give the output folder of a run")
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # broken JSON, or half a character
            if number == len(lines):
                break  # only a line that is written to its end ends in a line break
            raise ValueError(f"{path}:{number} is broken JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} must be an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def plot_runs(folders: Sequence[str | PathLike[str]], output: str | PathLike[str]) -> None:
    """Draw score, KL, length, entropy and KL coefficient against tokens, and score against KL.

    One run fills the picture by itself; of several, each has its own colour and its name in the legend. Stars are
    evaluations on held-out prompts. Runs are never averaged.

    :param folders: of the runs, each with a ``metrics.jsonl``
    :param output: the picture; its ending says which kind, such as ``.png``, ``.svg`` or ``.pdf``
    :raises FileNotFoundError: as :func:`read_metrics`
    :raises ValueError: if no folder is given, one twice, a run has no finished rollout, a line is broken, or
        matplotlib doesn't know the ending
    :raises ImportError: if matplotlib is missing
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("folders is empty; give the output folder of at least one run")
    twice = [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise ValueError(f"the run {twice[0]!r} is given twice")
    runs = dict(zip(run_names(paths), map(read_metrics, paths), strict=True))
    for path, rows in zip(paths, runs.values(), strict=True):
        if not len(_series(rows, TOKENS, path)[0]):
            raise ValueError(f"the run {str(path)!r} has not finished a rollout yet: nothing to draw")
    figure = new_figure(13, 7)
    grid = figure.subplots(2, 3)
    panels = grid.flatten().tolist()
    colours = run_colours(len(runs))
    for axes, (title, label, name, held_out, factor) in zip(panels, _PANELS, strict=False):
        for (rows, path), colour in zip(zip(runs.values(), paths, strict=True), colours, strict=True):
            _draw_curve(axes, *_series(rows, name, path, factor=factor), colour)
            if held_out is not None:
                _draw_marks(axes, *_series(rows, held_out, path), colour, **_HELD_OUT)
        style_axes(axes, title, label)
        axes.set_xlabel("tokens of training")
        _abbreviate_thousands(axes)
    beta, against = panels[-2:]
    if beta.has_data():
        beta.set_ylim(bottom=min(0.0, beta.get_ylim()[0]))  # a constant would be drawn as if it were anything
    for (rows, path), colour in zip(zip(runs.values(), paths, strict=True), colours, strict=True):
        _draw_marks(against, *_series(rows, "rollout/score_mean", path, against="rollout/kl_ref"), colour, **_ROLLOUTS)
        _draw_marks(against, *_series(rows, "eval/score_mean", path, against="eval/kl"), colour, **_HELD_OUT)
    style_axes(against, "Score against KL", "reward Φ")
    against.set_xlabel("KL to the reference, nats per completion")
    for axes in panels:
        if not axes.has_data():
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="#767676")
            axes.set(xticks=[], yticks=[])
    _draw_legend(figure, list(runs), colours)
    save_figure(figure, output)


def run_names(folders: Sequence[str | PathLike[str]]) -> list[str]:
    """Short names for folders: the last part of each path, with as many parts before it as tell them apart.

    >>> run_names(["runs/a/seed0", "runs/b/seed0", "runs/mixed"])
    ['a/seed0', 'b/seed0', 'mixed']
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        count = Counter(names)
        longer = [
            length + 1 if count[name] > 1 and length < len(part) else length
            for name, part, length in zip(names, parts, lengths, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


# What all pictures of runs share.


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. It belongs to no window and leaves matplotlib's backend as it is.

    :raises ImportError: if matplotlib is missing
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures are drawn with matplotlib: pip install "textgym[extra]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def run_colours(count: int) -> list[Any]:
    """A colour for each of so many runs."""
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def style_axes(axes: Axes, title: str, label: str = "") -> None:
    """Title, vertical label, a pale grid, and no frame above and on the right."""
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def plain_text(name: str) -> str:
    """A name as matplotlib shows it unchanged: a dollar sign would begin a formula."""
    return name.replace("$", r"\$")


def check_picture(output: str | PathLike[str]) -> None:
    """For asking before the work is done that leads to a picture.

    :raises ValueError: if the file has no ending, or one that matplotlib doesn't know
    :raises ImportError: if matplotlib is missing
    """
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if Path(output).suffix[1:].lower() not in kinds:
        raise ValueError(f"output={str(output)!r} must end in one of {', '.join('.' + kind for kind in sorted(kinds))}")


def save_figure(figure: Figure, output: str | PathLike[str]) -> None:
    """Write a figure; the folder is made where it is missing.

    :raises ValueError: as :func:`check_picture`
    """
    check_picture(output)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def _series(
    rows: Sequence[Mapping[str, Any]], name: str, folder: Path, *, against: str = TOKENS, factor: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two metrics where both were recorded and are finite: ``against`` and ``name``."""
    points = []
    for i, row in enumerate(rows):
        pair = (row.get(against), row.get(name))
        for metric, value in zip((against, name), pair, strict=True):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{folder / METRICS_FILE}, row {i + 1}: {metric!r} must be a number, got {value!r}")
        if all(value is not None and math.isfinite(value) for value in pair):
            points.append(pair)
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return x, factor * y


def _draw_marks(axes: Axes, x: np.ndarray, y: np.ndarray, colour: Any, **marks: Any) -> None:
    if len(x):
        axes.plot(x, y, color=colour, **marks)


def _draw_curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: Any) -> None:
    if not len(x):
        return
    if len(x) < _SMOOTHED_FROM:
        axes.plot(x, y, color=colour, marker="o" if len(x) == 1 else "", markersize=4)
        return
    axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    reach = len(x) // 40
    sums = np.concatenate([[0.0], np.cumsum(y)])
    low, high = np.arange(len(y)) - reach, np.arange(len(y)) + reach + 1
    low, high = low.clip(0), high.clip(max=len(y))
    axes.plot(x, (sums[high] - sums[low]) / (high - low), color=colour)


def _abbreviate_thousands(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _draw_legend(figure: Figure, names: list[str], colours: list[Any]) -> None:
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=colour, label=plain_text(name)) for name, colour in zip(names, colours, strict=True)
    ]
    entries.append(Line2D([], [], color="#767676", label="held-out prompts", **_HELD_OUT))
    figure.legend(handles=entries, loc="outside lower center", ncols=min(len(entries), 5), frameon=False)
