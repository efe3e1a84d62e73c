"""Evaluations side by side: a table for the terminal, Markdown, JSON and a picture. And completions in colour."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from textgym.agents.runs.plots import new_figure, plain_text, run_colours, save_figure, style_axes
from textgym.envs.rendering import RenderedEpisode, render_ansi
from textgym.evaluation import Estimate, Evaluation, ScoredCompletion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table
    from rich.text import Text


class _Figure(NamedTuple):
    label: str
    form: str  # of the number
    unit: str = ""


FIGURES: dict[str, _Figure] = {
    "score": _Figure("Score", "+.3f", "reward Φ, mean"),
    "positive": _Figure("Scores above 0", ".0%", "share of texts"),
    "kl": _Figure("KL to the reference", ".2f", "nats per completion"),
    "perplexity": _Figure("Perplexity", ".1f", "under the reference, per token"),
    "distinct_1": _Figure("Distinct-1", ".3f", "different words / words"),
    "distinct_2": _Figure("Distinct-2", ".3f", "different word pairs / word pairs"),
    "repetition": _Figure("Repetition", ".3f", "repeated word pairs within a text"),
    "length": _Figure("Length", ".1f", "tokens"),
    "eos_rate": _Figure("End-of-sequence rate", ".0%", "share of texts that end with it"),
}
"""What the tables and the picture show of an evaluation, in this order."""

TURN_FIGURES: dict[str, _Figure] = {
    "turns": _Figure("Turns", ".2f", "of the model"),
    "reply_reward": _Figure("Replies' reward", "+.3f", "sum of what replies pay"),
    "return": _Figure("Score and replies' reward", "+.3f", "mean"),
    "ended_by_reply": _Figure("Ended by the reply", ".0%", "share of texts"),
    "ended_by_turns": _Figure("Ended after the last turn", ".0%", "share of texts"),
    "ended_by_length": _Figure("Ended without room", ".0%", "share of texts"),
}
"""What the tables show besides where somebody replied; and what each turn earned."""

_MARK: dict[str, Any] = {"fmt": "o", "capsize": 3, "markersize": 6}


def comparison_table(evaluations: Mapping[str, Evaluation], confidence: float = 0.95) -> Table:
    """A table for the terminal, a column an evaluation.

    :param evaluations: by the name that heads the column
    :param confidence: of the intervals
    :raises ValueError: if there are none
    :raises ImportError: if rich is missing
    """
    from rich.table import Table
    from rich.text import Text

    summaries = _summaries(evaluations, confidence)
    # Markup in a name would act otherwise: a run may be called "a[red]".
    table = Table(title=Text(_caption(evaluations, confidence, "brackets")), title_justify="left")
    table.add_column("")
    for name in summaries:
        table.add_column(Text(name), justify="right", overflow="fold")
    for key, figure in _figures_of(summaries).items():
        cells = [_cell(summary.get(key), figure.form, dim=True) for summary in summaries.values()]
        table.add_row(f"{figure.label}\n[dim]{figure.unit}[/dim]", *cells)
    return table


def comparison_markdown(evaluations: Mapping[str, Evaluation], confidence: float = 0.95) -> str:
    """The same table in Markdown, with a line that says what the intervals are.

    :raises ValueError: if there are no evaluations
    """
    summaries = _summaries(evaluations, confidence)
    lines = [
        "| | " + " | ".join(_escaped(name) for name in summaries) + " |",
        "|---|" + "---:|" * len(summaries),
    ]
    for key, figure in _figures_of(summaries).items():
        cells = [_cell(summary.get(key), figure.form) for summary in summaries.values()]
        lines.append(f"| {figure.label}, {figure.unit} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _caption(evaluations, confidence, "brackets") + ".", ""])


def comparison_json(evaluations: Mapping[str, Evaluation], confidence: float = 0.95) -> str:
    """Figures with their intervals, settings and texts of each evaluation; ``Evaluation.from_dict`` reads one back.

    :raises ValueError: if there are no evaluations
    """
    summaries = _summaries(evaluations, confidence)
    data: dict[str, Any] = {"confidence": confidence, "evaluations": {}}
    for name, evaluation in evaluations.items():
        intervals = {key: estimate._asdict() for key, estimate in summaries[name].items()}
        data["evaluations"][name] = {"intervals": intervals, **evaluation.to_dict()}
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def draw_comparison(
    evaluations: Mapping[str, Evaluation], output: str | PathLike[str], confidence: float = 0.95
) -> None:
    """Draw score against KL, and every figure of every evaluation, with intervals as error bars.

    :param output: the picture; its ending says which kind, such as ``.png`` or ``.svg``
    :raises ValueError: if there are no evaluations, or matplotlib doesn't know the ending
    :raises ImportError: if matplotlib is missing
    """
    summaries = _summaries(evaluations, confidence)
    names, colours = list(summaries), run_colours(len(summaries))
    rows = max(len(names), 2)
    figure = new_figure(13, 3 * (1.3 + 0.34 * rows) + 0.4)
    grid = figure.subplots(3, 3)
    *panels, against = grid.flatten().tolist()
    # What has no room here is in the tables.
    figures = _figures_of(summaries)
    shown = [key for key in figures if key != "positive"][: len(panels)]
    labels = [plain_text(_short(name)) for name in names]
    for place, (axes, key) in enumerate(zip(panels, shown, strict=True)):
        _draw_panel(axes, [summaries[name].get(key) for name in names], figures[key], colours)
        if place % 3 == 0:
            axes.set_yticks(range(len(names)), labels)
        else:
            axes.set_yticks([])
    for name, colour in zip(names, colours, strict=True):
        kl, score = summaries[name]["kl"], summaries[name]["score"]
        against.errorbar(kl.value, score.value, _reach(score), _reach(kl), color=colour, **_MARK)
    style_axes(against, "Score against KL", "reward Φ")
    against.set_xlabel("KL, nats per completion")
    figure.supxlabel(_caption(evaluations, confidence, "bars"), fontsize=9, color="#767676")
    save_figure(figure, output)


def coloured_completion(scored: ScoredCompletion) -> Text:
    """A completion for ``rich``: bold prompt, tokens on the colours of their rewards, and a line of figures below.

    Blue earned, orange cost; the scale is the environment's (``textgym.envs.rendering``). Where the environment
    variable ``NO_COLOR`` is set, rewards follow their tokens as numbers.

    :raises ImportError: if rich is missing
    """
    from rich.text import Text

    return Text.from_ansi(render_ansi(_as_episode(scored)))


def _as_episode(scored: ScoredCompletion) -> RenderedEpisode:
    rewards = [None if math.isnan(reward) else reward for reward in scored.rewards.tolist()]
    return RenderedEpisode(
        prompt=scored.prompt,
        tokens=scored.tokens,
        rewards=rewards,
        score=scored.score,
        kl=None if scored.kl is None else float(np.nansum(scored.kl)),
        ret=float(np.nansum(scored.rewards)),
        finish_reason=scored.finish_reason,
    )


def _summaries(evaluations: Mapping[str, Evaluation], confidence: float) -> dict[str, dict[str, Estimate]]:
    if not evaluations:
        raise ValueError("evaluations is empty; give at least one")
    return {name: evaluation.summary(confidence) for name, evaluation in evaluations.items()}


def _caption(evaluations: Mapping[str, Evaluation], confidence: float, marks: str) -> str:
    """What was measured and what the brackets or bars are, in one line."""
    sizes = {(len(evaluation), len(set(evaluation.prompts))) for evaluation in evaluations.values()}
    if len(sizes) == 1:
        texts, prompts = sizes.pop()
        measured = f"{texts:,} completions of {prompts:,} different prompts"
    else:
        measured = "Different numbers of completions"
    return f"{measured}; {marks} are {100 * confidence:.3g}% confidence intervals"


def _figures_of(summaries: Mapping[str, Mapping[str, Estimate]]) -> dict[str, _Figure]:
    """What there is to show of some evaluations."""
    known = {key for summary in summaries.values() for key in summary}
    figures = {key: figure for key, figure in (FIGURES | TURN_FIGURES).items() if key in known}
    turn = 1
    while (key := f"turn_{turn}_reward") in known:
        figures[key] = _Figure(f"Turn {turn}", "+.3f", "what it earns, where there is one")
        turn += 1
    return figures


def _cell(estimate: Estimate | None, form: str, dim: bool = False) -> str:
    """``+0.457 [+0.431, +0.482]``; the brackets hold together where the cell is broken into lines."""
    if estimate is None:
        return ""
    low, high = (f"{end:{form}}" for end in (estimate.low, estimate.high))
    interval = f"[{low},\N{NO-BREAK SPACE}{high}]"
    if dim:
        return f"{estimate.value:{form}} [dim]\\{interval}[/dim]"
    return f"{estimate.value:{form}} {interval}"


def _reach(estimate: Estimate) -> list[list[float]]:
    """How far the interval reaches below and above the value, as matplotlib wants it."""
    return [[max(estimate.value - estimate.low, 0.0)], [max(estimate.high - estimate.value, 0.0)]]


def _draw_panel(axes: Axes, estimates: list[Estimate | None], figure: _Figure, colours: list[Any]) -> None:
    for place, (estimate, colour) in enumerate(zip(estimates, colours, strict=True)):
        if estimate is None:
            continue
        axes.errorbar(estimate.value, place, xerr=_reach(estimate), color=colour, **_MARK)
    style_axes(axes, figure.label)
    axes.set_xlabel(figure.unit)
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.xaxis.set_major_locator(MaxNLocator(5))
    if figure.form.endswith("%"):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _short(name: str, most: int = 24) -> str:
    """A name short enough for the edge of a picture; both ends of it stay."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[len(name) - most // 2 :]}"


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
