"""How an iteration's cost grows with the length of completions, the number of rows and the vocabulary.

    python benchmarks/scaling.py                    # small ranges on a CPU, all of them on a GPU
    python benchmarks/scaling.py --full             # T 8 to 1,024, rows 1 to 512, vocabulary 1k to 128k

For each phase of textgym's PPO, with one optimizer step to a rollout, it measures seconds and counts the forwards of
all models and the tokens that went through them, padding included. Beside the slopes on logarithmic axes, over the
upper half of the range, stand those that the arithmetic has: a decode forward for each token of a row, one
teacher-forced pass for the score and the update, and for the seconds the multiplications. Small models spend much of
their time on what does not grow, so seconds may grow more slowly; never faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measures import PHASES, Clock
from ours import MIXED, Setting, Textgym
from workload import PRESETS, Workload, cores

# What is varied, over which range, and what the rest is meanwhile.
AXES: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "new_tokens": ((8, 16, 32, 64, 128, 256, 512, 1024), {"rows": 8}),
    "rows": ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), {"new_tokens": 16}),
    "vocab": ((1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072), {"new_tokens": 16}),
}
SHORT = 5  # points of each axis that are measured on a CPU, from the second on: overhead hides the first
QUICK: dict[str, tuple[int, ...]] = {"new_tokens": (8, 16, 32), "rows": (2, 4, 8), "vocab": (1024, 2048, 4096)}
COUNT_TOLERANCE, SECONDS_TOLERANCE = 0.1, 0.3  # by how much a slope may be above the arithmetic


@dataclass(frozen=True)
class Point:
    """One workload's cost, by phase."""

    value: int
    seconds: dict[str, float]
    forwards: dict[str, int]
    tokens: dict[str, int]  # that went through a model's layers


class CountingClock(Clock):
    """A clock whose laps also take what was forwarded since the last.

    :param contender: whose models are watched
    """

    def __init__(self, contender: Textgym) -> None:
        self._pending: Counter[str] = Counter()
        super().__init__(contender.workload.device)
        for model in contender.models():
            model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def start(self) -> None:
        self.forwards, self.tokens = Counter[str](), Counter[str]()
        self._pending.clear()
        super().start()

    def lap(self, phase: str) -> None:
        super().lap(phase)
        self.forwards[phase] += self._pending["forwards"]
        self.tokens[phase] += self._pending["tokens"]
        self._pending.clear()

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._pending["forwards"] += 1
        self._pending["tokens"] += kwargs["input_ids"].numel()


def measure(workload: Workload, value: int, repeats: int, setting: Setting | None = None) -> Point:
    """:param repeats: iterations that the seconds are the medians of; one more comes first"""
    contender = Textgym(workload, setting)
    clock = CountingClock(contender)
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for number in range(repeats + 1):
        clock.start()
        contender.iterate(clock)
        for phase in PHASES if number else ():
            seconds[phase].append(clock.seconds[phase])
    return Point(
        value,
        {phase: statistics.median(times) for phase, times in seconds.items()},
        {phase: clock.forwards[phase] for phase in PHASES},
        {phase: clock.tokens[phase] for phase in PHASES},
    )


def arithmetic(workload: Workload, value: int) -> Point:
    """What the counts are at least; instead of seconds the multiplications and additions, which the time follows."""
    rows, prompt, new = workload.rows, workload.prompt_tokens, workload.new_tokens
    read = rows * (prompt + new - 1)  # the last token is predicted, never read
    steps = workload.epochs * workload.minibatches
    attention = 4 * workload.layers * workload.hidden * (prompt + new) / 2  # of a token, on average
    trunk = read * (2 * workload.trunk_parameters + attention)
    forward = trunk + rows * new * 2 * workload.hidden * workload.vocab
    return Point(
        value,
        # The score is the reference model's forward and the reward model's, which has no head; a backward costs two.
        {"rollout": forward, "score": forward + trunk, "update": 3 * workload.epochs * forward},
        {"rollout": new, "score": 2, "update": steps},
        {"rollout": read, "score": 2 * read, "update": workload.epochs * read},
    )


def slope(points: Sequence[Point], figure: str, phase: str) -> float:
    """Least-squares slope on logarithmic axes over the upper half of the range."""
    upper = points[len(points) // 2 - (len(points) < 4) :]
    x = [math.log(point.value) for point in upper]
    y = [math.log(getattr(point, figure)[phase]) for point in upper]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


@dataclass(frozen=True)
class Slope:
    """How a figure grows, and how it should."""

    figure: str
    phase: str
    measured: float
    arithmetic: float

    @property
    def fits(self) -> bool:
        """Whether it does not grow faster than it should."""
        tolerance = SECONDS_TOLERANCE if self.figure == "seconds" else COUNT_TOLERANCE
        return self.measured <= self.arithmetic + tolerance


def slopes_of(measured: Sequence[Point], expected: Sequence[Point]) -> list[Slope]:
    return [
        Slope(figure, phase, slope(measured, figure, phase), slope(expected, figure, phase))
        for phase in PHASES
        for figure in ("seconds", "forwards", "tokens")
    ]


def report(axis: str, base: Workload, points: Sequence[Point], slopes: Sequence[Slope]) -> str:
    """The table of an axis, in Markdown, and its slopes under it."""
    titles = [f"{phase} {figure}" for phase in PHASES for figure in ("s", "forwards", "tokens")]
    lines = [
        f"{axis}; the rest: {base}",
        "",
        f"| {axis} | " + " | ".join(titles) + " |",
        "|---:|" + "---:|" * len(titles),
    ]
    for point in points:
        cells = [
            cell
            for phase in PHASES
            for cell in (f"{point.seconds[phase]:.4f}", f"{point.forwards[phase]:,}", f"{point.tokens[phase]:,}")
        ]
        lines.append(f"| {point.value:,} | " + " | ".join(cells) + " |")
    rows = {
        "slope": [f"{s.measured:.2f}" for s in slopes],
        "arithmetic": [f"{s.arithmetic:.2f}" for s in slopes],
        "fits": ["yes" if s.fits else "**no**" for s in slopes],
    }
    lines += [f"| *{name}* | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


def plot(found: dict[str, tuple[list[Point], list[Point]]], path: Path) -> None:
    """Seconds by phase; dashed, how the multiplications grow, through the last point."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4.6 * len(found), 3.8), squeeze=False, layout="constrained")
    for axis, (name, (points, expected)) in zip(axes[0], found.items(), strict=True):
        values = [point.value for point in points]
        for phase, colour in zip(PHASES, ("#4477aa", "#ccbb44", "#cc6677"), strict=True):
            axis.loglog(values, [p.seconds[phase] for p in points], "o-", color=colour, label=phase)
            scale = points[-1].seconds[phase] / expected[-1].seconds[phase]
            axis.loglog(values, [scale * p.seconds[phase] for p in expected], "--", color=colour, alpha=0.6)
        axis.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.set_xlabel(name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ranges(arguments: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """The values of each axis."""
    if arguments.quick:
        return QUICK
    if arguments.full or arguments.device.startswith("cuda"):
        return {axis: values for axis, (values, _) in AXES.items()}
    return {axis: values[1 : SHORT + 1] for axis, (values, _) in AXES.items()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the whole ranges on a CPU, too")
    size.add_argument("--quick", action="store_true", help="three points of a tiny model, to try it out")
    parser.add_argument("--repeats", type=int, default=3, help="iterations of which the medians are shown")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder for table, JSON and plot")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    base = PRESETS["small"].replace(
        epochs=1, minibatches=1, threads=arguments.threads, device=arguments.device, dtype=arguments.dtype
    )
    if arguments.quick:
        base = base.replace(rows=8, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=256)
    setting = MIXED if arguments.dtype == "bfloat16" else None
    found: dict[str, tuple[list[Point], list[Point]]] = {}
    texts, record, fits = [], {}, True
    for axis, values in ranges(arguments).items():
        rest = base.replace(**AXES[axis][1])
        measured, expected = [], []
        for value in values:
            print(f"{axis} {value:,} ...", file=sys.stderr, flush=True)
            workload = rest.replace(**{axis: value})
            measured.append(measure(workload, value, arguments.repeats, setting))
            expected.append(arithmetic(workload, value))
        slopes = slopes_of(measured, expected)
        found[axis] = measured, expected
        texts.append(report(axis, rest, measured, slopes))
        record[axis] = {
            "workload": dataclasses.asdict(rest),
            "points": [dataclasses.asdict(point) for point in measured],
            "slopes": [{**dataclasses.asdict(s), "fits": s.fits} for s in slopes],
        }
        fits = fits and all(s.fits for s in slopes if s.figure != "seconds")
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(texts) + "\n"
    (arguments.output / "scaling.md").write_text(text, encoding="utf-8")
    (arguments.output / "scaling.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot(found, arguments.output / "scaling.png")
    print(text)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
