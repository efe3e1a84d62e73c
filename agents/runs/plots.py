"""Training curves: pictures of the ``metrics.jsonl`` of one run, or of several runs against each other.

``metrics.jsonl`` has one JSON object per rollout, with the names under which Stable-Baselines3 logs: among them
``time/total_timesteps`` (tokens), ``rollout/score_mean``, ``rollout/kl_ref`` (nats per completion),
``rollout/ep_len_mean``, ``train/entropy_loss`` (minus the entropy, nats per token), ``train/kl_coef``, and, where
held-out prompts were evaluated, ``eval/score_mean``, with its interval ``eval/score_low`` to ``eval/score_high``, and
``eval/kl``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
TOKENS = "time/total_timesteps"
BETA = "train/kl_coef"
_Curve: TypeAlias = "tuple[np.ndarray, np.ndarray]"

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
    ("KL coefficient β", "β", BETA, None, 1.0),
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


def plot_runs(folders: Sequence[str | PathLike[str]], output: str | PathLike[str], separate: bool = False) -> None:
    """Draw score, KL, length, entropy and KL coefficient against tokens, and score against KL.

    One run fills the picture by itself. Runs whose configurations differ in nothing but the seed share a colour: the
    line is their mean, the band reaches from the lowest to the highest of them. Stars are evaluations on held-out
    prompts. What no run has recorded, and a KL coefficient that never changes, get no panel.

    :param folders: of the runs, each with a ``metrics.jsonl``
    :param output: the picture; its ending says which kind, such as ``.png``, ``.svg`` or ``.pdf``
    :param separate: give every run a colour of its own
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
    runs = {path: read_metrics(path) for path in paths}
    for path, rows in runs.items():
        if not len(_series(rows, TOKENS, path)[0]):
            raise ValueError(f"the run {str(path)!r} has not finished a rollout yet: nothing to draw")
    groups = [[path] for path in paths] if separate else _alike_but_for_the_seed(paths)
    colours = run_colours(len(groups))

    def curves(name: str, against: str = TOKENS, factor: float = 1.0) -> list[list[_Curve]]:
        return [[_series(runs[path], name, path, against=against, factor=factor) for path in group] for group in groups]

    panels: list[Callable[[Axes], None]] = []
    for title, label, name, held_out, factor in _PANELS:
        found = curves(name, factor=factor)
        evaluated = [[] for _ in groups] if held_out is None else curves(held_out)
        ends = [curves(f"eval/score_{end}") for end in ("low", "high")] if held_out == "eval/score_mean" else None
        if _has_points(found + evaluated) and not (name == BETA and _is_constant(found)):
            panels.append(partial(_over_tokens, title, label, found, evaluated, ends, colours))
    training, held_out_points = curves("rollout/score_mean", "rollout/kl_ref"), curves("eval/score_mean", "eval/kl")
    if _has_points(training + held_out_points):
        panels.append(partial(_score_against_kl, training, held_out_points, colours))

    columns = min(3, len(panels)) or 1
    rows_of_panels = max(1, math.ceil(len(panels) / columns))
    figure = new_figure(max(6.5, 4.34 * columns), 3.5 * rows_of_panels)
    grid = figure.subplots(rows_of_panels, columns, squeeze=False).flatten().tolist()
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes)
    for axes in grid[len(panels) :]:
        axes.remove()
    names = [_group_name(group, paths) for group in groups]
    _draw_legend(figure, names, colours, _has_points(held_out_points), any(len(group) > 1 for group in groups))
    save_figure(figure, output)


def _alike_but_for_the_seed(paths: Sequence[Path]) -> list[list[Path]]:
    """The runs in groups: those whose ``config.yaml`` says the same but for the seed. A run without one is alone."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        config = path / CONFIG_FILE
        key = f"alone: {path}"
        if config.is_file():
            lines = config.read_text(encoding="utf-8").splitlines()
            key = "\n".join(line for line in lines if not line.startswith("seed:"))
        groups.setdefault(key, []).append(path)
    return list(groups.values())


def _group_name(group: Sequence[Path], paths: Sequence[Path]) -> str:
    """What the legend calls runs that are drawn as one: what their names begin with, and how many they are."""
    names = dict(zip(paths, run_names(paths), strict=True))
    if len(group) == 1:
        return names[group[0]]
    mine = [names[path] for path in group]
    common = re.sub(r"[-_./ ]*(seed)?[-_./= ]*$", "", _common_start(mine).rstrip("0123456789"))
    return f"{common or mine[0] + ' …'} ({len(group)} seeds)"


def _common_start(names: Sequence[str]) -> str:
    """The characters that all names begin with."""
    first, last = min(names), max(names)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


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


def _has_points(groups: Sequence[Sequence[_Curve]]) -> bool:
    return any(len(x) for group in groups for x, _ in group)


def _is_constant(groups: Sequence[Sequence[_Curve]]) -> bool:
    return all(np.ptp(y) == 0 for group in groups for _, y in group if len(y))


def _over_tokens(
    title: str,
    label: str,
    found: list[list[_Curve]],
    evaluated: list[list[_Curve]],
    ends: list[list[list[_Curve]]] | None,
    colours: Sequence[Any],
    axes: Axes,
) -> None:
    """A panel with a line for each group of runs.

    :param ends: of the intervals of what was evaluated, the lower and the upper ones; drawn where a run is alone
    """
    for i, (group, stars, colour) in enumerate(zip(found, evaluated, colours, strict=True)):
        if len(group) == 1:
            _draw_curve(axes, *group[0], colour)
        else:
            _draw_band(axes, [curve for curve in group if len(curve[0])], colour)
        if ends is not None and len(group) == 1:
            (x, low), (_, high) = (of_groups[i][0] for of_groups in ends)
            axes.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.6)
        _draw_marks(axes, *_mean_of(stars), colour, **_HELD_OUT)
    style_axes(axes, title, label)
    axes.set_xlabel("tokens of training")
    _abbreviate_thousands(axes)


def _score_against_kl(
    training: list[list[_Curve]], held_out: list[list[_Curve]], colours: Sequence[Any], axes: Axes
) -> None:
    for points, marks in ((training, _ROLLOUTS), (held_out, _HELD_OUT)):
        for group, colour in zip(points, colours, strict=True):
            for x, y in group:
                _draw_marks(axes, x, y, colour, **marks)
    style_axes(axes, "Score against KL", "reward Φ")
    axes.set_xlabel("KL to the reference, nats per completion")


def _mean_of(curves: Sequence[_Curve]) -> _Curve:
    """The mean over runs at the places that all of them have."""
    if len(curves) == 1:
        return curves[0]
    found = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in curves]
    places = sorted(set.intersection(*map(set, found))) if found else []
    return np.array(places), np.array([np.mean([values[x] for values in found]) for x in places])


def _draw_band(axes: Axes, curves: Sequence[_Curve], colour: Any) -> None:
    """The mean of several runs, over the tokens that all have trained on, between the lowest and the highest."""
    if not curves:
        return
    smooth = [_smoothed(x, y) for x, y in curves]
    places = np.unique(np.concatenate([x for x, _ in smooth]))
    places = places[(places >= max(x[0] for x, _ in smooth)) & (places <= min(x[-1] for x, _ in smooth))]
    if not len(places):
        return
    values = np.stack([np.interp(places, x, y) for x, y in smooth])  # (runs, places)
    axes.plot(places, values.mean(0), color=colour, marker="o" if len(places) == 1 else "", markersize=4)
    axes.fill_between(places, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)


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
    axes.plot(*_smoothed(x, y), color=colour)


def _smoothed(x: np.ndarray, y: np.ndarray) -> _Curve:
    """The running mean over a curve of many rollouts; a short one stays as it is."""
    if len(x) < _SMOOTHED_FROM:
        return x, y
    reach = len(x) // 40
    sums = np.concatenate([[0.0], np.cumsum(y)])
    low, high = np.arange(len(y)) - reach, np.arange(len(y)) + reach + 1
    low, high = low.clip(0), high.clip(max=len(y))
    return x, (sums[high] - sums[low]) / (high - low)


def _abbreviate_thousands(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _draw_legend(figure: Figure, names: list[str], colours: list[Any], held_out: bool, bands: bool) -> None:
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Artist] = [
        Line2D([], [], color=colour, label=plain_text(name)) for name, colour in zip(names, colours, strict=True)
    ]
    if bands:
        entries.append(Patch(color="#767676", alpha=0.25, linewidth=0, label="lowest to highest seed"))
    if held_out:
        entries.append(Line2D([], [], color="#767676", label="held-out prompts", **_HELD_OUT))
    figure.legend(handles=entries, loc="outside lower center", ncols=min(len(entries), 5), frameon=False)
