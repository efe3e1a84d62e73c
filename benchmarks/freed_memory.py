"""What keeping freed memory saves: iterations of textgym's PPO with it and without, in processes that take turns.

    python benchmarks/freed_memory.py                    # the shape of SmolLM2-135M, on a CPU, some minutes
    python benchmarks/freed_memory.py --preset small --rounds 9

Without is a process whose environment has a setting of the C library's memory, which textgym then leaves alone; the
setting itself is the default one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from iteration import Worker, say
from workload import PRESETS, Workload, cores

LEAVE_ALONE = "glibc.malloc.tcache_count=7"  # the default
WAYS = {"kept": "", "given back": LEAVE_ALONE}


def run(workload: Workload, tunables: str, rounds: int, logs: Path) -> list[dict[str, Any]]:
    """Answers of iterations of one process, without the first, and ``peak``, its most memory in MiB."""
    os.environ["GLIBC_TUNABLES"] = tunables
    worker = Worker("textgym", workload, logs / "freed_memory.log")
    try:
        answers = [worker.iterate() for _ in range(1 + rounds)][1:]
        peak = worker.stop()["resident"] / 2**20
    finally:
        worker.close()
    return [{**answer, "peak": peak} for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="135m")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way")
    parser.add_argument("--iterations", type=int, default=2, help="of each process, after one to warm up")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/freed_memory"), help="folder")
    arguments = parser.parse_args()
    workload = PRESETS[arguments.preset].replace(
        epochs=arguments.epochs, ragged=arguments.ragged, rows=arguments.rows, threads=cores()
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    answers: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way, tunables in WAYS.items():
            say(f"round {number + 1} of {arguments.rounds}: {way} ...")
            answers[way] += run(workload, tunables, arguments.iterations, arguments.output)
    (arguments.output / "freed_memory.json").write_text(
        json.dumps({"workload": str(workload), "answers": answers}), encoding="utf-8"
    )
    print(f"{workload}; medians of {arguments.rounds * arguments.iterations}\n")
    print("| freed memory | rollout s | score s | update s | CPU s | pages from the system | peak MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for way, found in answers.items():
        seconds = [statistics.median(a["seconds"][phase] for a in found) for phase in ("rollout", "score", "update")]
        cpu = statistics.median(sum(a["cpu"].values()) for a in found)
        pages, peak = (statistics.median(a[name] for a in found) for name in ("pages", "peak"))
        cells = [way, *(f"{s:.2f}" for s in seconds), f"{cpu:.1f}", f"{pages:,.0f}", f"{peak:,.0f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
