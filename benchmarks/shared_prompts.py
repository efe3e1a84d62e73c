"""What it saves that the completions of a prompt read it once: iterations of GRPO on long prompts, side by side.

    python benchmarks/shared_prompts.py                                    # some minutes
    python benchmarks/shared_prompts.py --before ../older/.venv/bin/python  # beside an older build of textgym

32 completions of 32 tokens, 8 for each prompt of 192: once with one optimizer step for a rollout, once with four passes
of four. Contenders take turns as in ``iteration.py``, whose figures are these: textgym's GRPO, the same matrix work and
nothing else (``floor-groups``), TRL's GRPO, and textgym's on another interpreter, where one is named.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iteration import BEFORE, measure
from report import PHASES, cpu_name, figures_of, times_as_long
from workload import PRESETS, Workload, cores

OURS = "textgym-grpo"
WORKS = {"one step": (1, 1), "sixteen steps": (4, 4)}  # passes, and optimizer steps in each


def workload_of(work: str, parsed: argparse.Namespace) -> Workload:
    """What the flags say, with the passes of one of ``WORKS``."""
    epochs, minibatches = WORKS[work]
    return PRESETS[parsed.preset].replace(
        rows=parsed.rows, prompt_tokens=parsed.prompt_tokens, new_tokens=parsed.new_tokens, epochs=epochs,
        minibatches=minibatches, threads=parsed.threads, device=parsed.device, compile=False,
    )  # fmt: skip


def summary(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each contender: CPU seconds by phase, peak memory in bytes, and how many times as long as textgym it takes,
    by CPU seconds and by the clock."""
    figures = figures_of(results)
    return {
        name: {
            "cpu": {**mine.cpu, "iteration": mine.cpu_total},
            "seconds": {**mine.seconds, "iteration": mine.total},
            "tokens": mine.tokens,
            "memory": mine.memory,
            "times": {kind: times_as_long(mine, figures[OURS], kind=kind) for kind in ("cpu", "seconds")},
        }
        for name, mine in figures.items()
    }


def table(works: dict[str, dict[str, dict[str, Any]]]) -> str:
    """In Markdown, a line for each contender of each work."""
    head = ["work", "contender", *(f"{phase}, CPU s" for phase in PHASES), "iteration", "peak MiB", "× textgym"]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for work, contenders in works.items():
        for name, mine in contenders.items():
            seconds = [f"{mine['cpu'][phase]:.2f}" for phase in (*PHASES, "iteration")]
            memory = f"{mine['memory']['resident'] / 2**20:,.0f}"
            lines.append(f"| {work} | {name} | {' | '.join(seconds)} | {memory} | {mine['times']['cpu']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="shape of the models (default %(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="completions side by side (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=192, help="(default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="each contender runs once a round; a warm-up comes first")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--before", help="an interpreter with another build of textgym, which is measured, too")
    parser.add_argument(
        "--without-trl", action="store_true", help="leave TRL out, which is installed when first asked for"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/shared_prompts"), help="folder for table, JSON and logs"
    )
    parsed = parser.parse_args()
    contenders = [OURS, "floor-groups"]
    contenders += [] if parsed.without_trl else ["trl-grpo"]
    contenders += [] if parsed.before is None else [OURS + BEFORE]
    works, workloads = {}, {}
    for work in WORKS:
        workload = workload_of(work, parsed)
        results = measure(workload, contenders, parsed.rounds, parsed.output / "logs" / work, before=parsed.before)
        if any("failed" in result for result in results.values()):
            return 1
        works[work], workloads[work] = summary(results), asdict(workload)
    record = {
        "machine": {"platform": platform.platform(), "cpu": cpu_name()},
        "rounds": parsed.rounds,
        "workloads": workloads,
        "works": works,
    }
    (parsed.output / "shared-prompts.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(works))
    return 0


if __name__ == "__main__":
    sys.exit(main())
