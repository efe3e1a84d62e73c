"""What the benchmark found: one table, the bars that textgym has to clear, JSON and a plot."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workload import Workload

PHASES = ("rollout", "score", "update")
FASTEST = "textgym-fast"
COMPILED = "textgym-compiled"  # in the workload's precision
Results = dict[str, dict[str, Any]]  # of a workload, by contender: see iteration.measure
Works = Sequence[tuple[Workload, Results]]


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds.

    :param seconds: by phase, of the phases that the contender has
    :param cpu: CPU seconds of all its threads, by phase
    :param total: seconds of an iteration, all phases together
    :param cpu_total: CPU seconds of an iteration
    :param tokens: real tokens of an iteration
    :param tokens_per_s: real tokens a second, over all phases
    :param decode_tokens_per_s: the same over the rollout alone; None without one
    :param per_token: ``seconds`` and ``cpu`` seconds of a real token, each by phase
    :param memory: peak, in bytes: ``resident``, and ``allocated`` on a GPU
    """

    seconds: dict[str, float]
    cpu: dict[str, float]
    total: float
    cpu_total: float
    tokens: float
    tokens_per_s: float
    decode_tokens_per_s: float | None
    per_token: dict[str, dict[str, float]]
    memory: dict[str, int]

    @classmethod
    def of(cls, result: dict[str, Any]) -> Figures:
        """:param result: of one contender that did not fail"""
        rounds, covers = result["rounds"], result["covers"]

        def median(value: Any) -> float:
            return statistics.median(value(answer) for answer in rounds)

        def total(answer: dict[str, Any]) -> float:
            return sum(answer["seconds"][phase] for phase in covers)

        return cls(
            seconds={p: median(lambda a, p=p: a["seconds"][p]) for p in covers},
            cpu={p: median(lambda a, p=p: a["cpu"][p]) for p in covers},
            total=median(total),
            cpu_total=median(lambda a: sum(a["cpu"][p] for p in covers)),
            tokens=median(lambda a: a["tokens"]),
            tokens_per_s=median(lambda a: a["tokens"] / total(a)),
            decode_tokens_per_s=median(lambda a: a["decode_tokens_per_s"]) if "rollout" in covers else None,
            per_token={
                kind: {p: median(lambda a, kind=kind, p=p: a[kind][p] / a["tokens"]) for p in covers}
                for kind in ("seconds", "cpu")
            },
            memory=result["memory"],
        )


def figures_of(results: Results) -> dict[str, Figures]:
    """Of all contenders that did not fail."""
    return {name: Figures.of(result) for name, result in results.items() if "failed" not in result}


def times_as_long(slower: Figures, faster: Figures, phases: Sequence[str] = PHASES, kind: str = "seconds") -> float:
    """How many times as long one takes as the other for a token, over the phases that both have.

    :param kind: ``seconds``, or ``cpu`` for CPU seconds, which a busy machine changes less
    """
    mine, theirs = slower.per_token[kind], faster.per_token[kind]
    common = [p for p in phases if p in mine and p in theirs]
    return sum(mine[p] for p in common) / sum(theirs[p] for p in common)


# The table


def table(works: Works) -> str:
    """A row for each contender and workload, in Markdown."""
    lines = [
        "| work | contender | rollout s | score s | update s | total s | CPU s | tokens | tokens/s | decoded/s "
        "| peak MiB | × textgym | × floor | CPU × textgym | CPU × floor |",
        "|---|---|" + "---:|" * 13,
    ]
    for workload, results in works:
        figures = figures_of(results)
        for name, result in results.items():
            if "failed" in result:
                lines.append(f"| {workload.name} | {name} | failed |" + " |" * 12)
                continue
            mine, ours, floor = figures[name], figures.get("textgym"), figures.get(floor_of(name, workload))
            phases = [f"{mine.seconds[p]:.3f}" if p in mine.seconds else "" for p in PHASES]
            cells = [
                *phases,
                f"{mine.total:.3f}",
                f"{mine.cpu_total:.2f}",
                f"{mine.tokens:,.0f}",
                f"{mine.tokens_per_s:,.0f}",
                "" if mine.decode_tokens_per_s is None else f"{mine.decode_tokens_per_s:,.0f}",
                " + ".join(f"{size / 2**20:,.0f}" for size in mine.memory.values()),
            ]
            for kind in ("seconds", "cpu"):
                for other in (ours, floor):
                    cells.append("" if other is None else f"{times_as_long(mine, other, kind=kind):.2f}")
            lines.append(f"| {workload.name} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def floor_of(contender: str, workload: Workload) -> str:
    """Which floor has a contender's precision."""
    low = workload.dtype == "bfloat16" or contender in (FASTEST, "generate-bf16", "floor-bf16")
    return "floor-bf16" if low and contender != "floor-fp32" else "floor-fp32"


# The bars


@dataclass(frozen=True)
class Bar:
    """Something that has to hold.

    :param what: in words
    :param wanted: the ratio
    :param at_least: or at most
    :param measured: None where a contender is missing
    :param by_cpu: the same by CPU seconds, where it is about time
    """

    what: str
    wanted: float
    at_least: bool
    measured: float | None
    by_cpu: float | None = None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted


def bars_of(workload: Workload, results: Results, preset: str) -> list[Bar]:
    """The bars of a workload; which there are depends on the shape of the work and of the models."""
    figures = figures_of(results)

    def bar(what: str, wanted: float, at_least: bool, slower: str, faster: str, phases: Sequence[str] = PHASES) -> Bar:
        if slower not in figures or faster not in figures:
            return Bar(what, wanted, at_least, None)
        both = figures[slower], figures[faster]
        return Bar(what, wanted, at_least, *(times_as_long(*both, phases, kind) for kind in ("seconds", "cpu")))

    def memory(mine: str, theirs: str) -> float | None:
        if mine not in figures or theirs not in figures:
            return None
        kind = "allocated" if "allocated" in figures[mine].memory else "resident"
        return figures[mine].memory[kind] / figures[theirs].memory[kind]

    precise = "textgym" if workload.dtype == "float32" else f"textgym ({workload.dtype})"
    same_floor = floor_of("textgym", workload)
    compiled = f"{precise}, compiled,"
    as_fast, fastest = (6.0, 6.0) if workload.ragged else (2.0, 3.5)
    if preset != "small":
        as_fast = fastest = 2.0
    bars = [
        bar(f"iteration, {precise} against TRL PPO", as_fast, True, "trl-ppo", "textgym"),
        bar(f"iteration, {compiled} against TRL PPO", as_fast, True, "trl-ppo", COMPILED),
        bar("iteration, fastest setting against TRL PPO", fastest, True, "trl-ppo", FASTEST),
        bar(f"iteration, {precise} over {same_floor}", 1.25, False, "textgym", same_floor),
        bar(f"iteration, {compiled} over {same_floor}", 1.25, False, COMPILED, same_floor),
        bar("iteration, fastest setting over floor-bf16", 1.25, False, FASTEST, "floor-bf16"),
    ]
    if workload.ragged:
        return bars
    bars += [
        bar(f"rollout, {precise} against generate", 1.3, True, "generate", "textgym", ["rollout"]),
        bar(f"rollout, {compiled} against generate", 1.3, True, "generate", COMPILED, ["rollout"]),
        bar("rollout, fastest setting against generate", 1.8, True, "generate", FASTEST, ["rollout"]),
        bar("update against SB3's over prefixes", workload.new_tokens / 2, True, "sb3", "textgym", ["update"]),
        bar("update, compiled, against SB3's", workload.new_tokens / 2, True, "sb3", COMPILED, ["update"]),
        bar("instant over deferred scoring", 2.5, False, "textgym-instant", "textgym"),
        Bar(f"peak memory, {precise} over TRL PPO", 1.0, False, memory("textgym", "trl-ppo")),
        Bar("peak memory, fastest setting over TRL PPO", 1.0, False, memory(FASTEST, "trl-ppo")),
    ]
    if workload.device.startswith("cuda"):
        share = None
        if FASTEST in figures and "bytes_per_s" in results[FASTEST]:
            decoded = figures[FASTEST].decode_tokens_per_s
            assert decoded is not None
            low = workload.replace(dtype="bfloat16")
            share = decoded / low.memory_bound_tokens_per_s(results[FASTEST]["bytes_per_s"])
        bars.append(Bar("decode, fastest setting, share of what the memory's bandwidth allows", 0.6, True, share))
    return bars


def bars_table(works: Works, preset: str) -> str:
    """Each bar with what was measured, in Markdown."""
    lines = ["| work | bar | wanted | measured | by CPU time | met |", "|---|---|---:|---:|---:|---|"]
    for workload, results in works:
        for bar in bars_of(workload, results, preset):
            sign = "≥" if bar.at_least else "≤"
            measured, by_cpu = ("" if x is None else f"{x:.2f}" for x in (bar.measured, bar.by_cpu))
            met = {None: "not measured", True: "yes", False: "**no**"}[bar.met]
            lines.append(f"| {workload.name} | {bar.what} | {sign} {bar.wanted:g} | {measured} | {by_cpu} | {met} |")
    return "\n".join(lines)


# Files


def write_report(works: Works, preset: str, rounds: int, output: Path) -> str:
    """Write ``benchmark.json``, ``benchmark.md`` and ``benchmark.png``.

    :return: the Markdown
    """
    output.mkdir(parents=True, exist_ok=True)
    head = [f"{workload}; medians of {rounds} interleaved rounds" for workload, _ in works]
    text = "\n\n".join([*head, table(works), bars_table(works, preset)]) + "\n"
    (output / "benchmark.md").write_text(text, encoding="utf-8")
    record = {
        "preset": preset,
        "rounds": rounds,
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cpu": cpu_name()},
        "works": [
            {
                "workload": dataclasses.asdict(workload),
                "contenders": {
                    name: {
                        **result,
                        **({} if "failed" in result else {"medians": dataclasses.asdict(Figures.of(result))}),
                    }
                    for name, result in results.items()
                },
                "bars": [{**dataclasses.asdict(bar), "met": bar.met} for bar in bars_of(workload, results, preset)],
            }
            for workload, results in works
        ],
    }
    (output / "benchmark.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot(works, output / "benchmark.png")
    return text


def cpu_name() -> str:
    """As the system calls it; empty where it doesn't say."""
    cpus = Path("/proc/cpuinfo")
    if not cpus.exists():
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def plot(works: Works, path: Path) -> None:
    """Stacked bars, microseconds of each phase for a real token."""
    import matplotlib.pyplot as plt

    tallest = max(len(results) for _, results in works)
    figure, axes = plt.subplots(
        1, len(works), figsize=(6.5 * len(works), 1.2 + 0.42 * tallest), squeeze=False, layout="constrained"
    )
    for axis, (workload, results) in zip(axes[0], works, strict=True):
        figures = figures_of(results)
        # Stock SB3's update would make all others invisible.
        shown = [name for name in figures if name != "sb3"][::-1]
        left = [0.0] * len(shown)
        for phase, colour in zip(PHASES, ("#4477aa", "#ccbb44", "#cc6677"), strict=True):
            widths = [1e6 * figures[name].per_token["seconds"].get(phase, 0.0) for name in shown]
            axis.barh(shown, widths, left=left, color=colour, label=phase)
            left = [x + width for x, width in zip(left, widths, strict=True)]
        axis.bar_label(axis.containers[-1], [f"{x:,.0f}" for x in left], padding=3)
        axis.set_title(workload.name)
        axis.set_xlabel("µs for a real token")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
