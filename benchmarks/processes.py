"""How much faster two processes train than one: whole PPO iterations, rows per process held constant.

    python benchmarks/processes.py                              # the small model on two cores, some minutes
    python benchmarks/processes.py --model 135m --rows 8 --output scaling.json
    python benchmarks/processes.py --processes 8 --device cuda  # a process for each GPU

Every process has one thread on a CPU. Three contenders take turns, so that a noisy machine hits all alike: one process
alone; several that don't know of each other, which shows what they take from each other in memory bandwidth and
clock; and several that train together. What the last loses against the second is the exchange of gradients and the
waiting for the slowest. Tokens are those of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workload import PRESETS, Workload

ALONE, APART, TOGETHER = "one process", "apart", "together"


def work(workload: Workload, iterations: int, output: Path) -> None:
    """What one process does; the first of those that train together, and each of the others, writes its seconds."""
    import torch
    from measures import Clock
    from ours import Textgym

    from textgym.agents.distributed.processes import Processes

    torch.set_num_threads(workload.threads)
    processes = Processes.join(timeout=600, cpu=workload.device == "cpu")
    contender = Textgym(workload)
    seconds = []
    for _ in range(iterations + 1):  # the first warms up
        processes.total(0.0)  # all begin together
        start = time.perf_counter()
        contender.iterate(Clock(workload.device))
        processes.total(0.0)
        seconds.append(time.perf_counter() - start)
    if processes.is_main:
        output.write_text(json.dumps(seconds[1:]), encoding="utf-8")
    processes.leave()


def launched(contender: str, number: int, workload: Workload, iterations: int, folder: Path) -> list[float]:
    """Seconds of each iteration of a contender; of those apart the mean over them.

    :raises RuntimeError: if a process failed
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(workload.threads)}
    script = [str(Path(__file__).resolve()), "--work", workload.to_json(), "--iterations", str(iterations)]
    outputs = [folder / f"{rank}.json" for rank in range(number if contender == APART else 1)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(number), "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0"]
    started = []
    for rank, output in enumerate(outputs):
        before = torchrun if contender == TOGETHER else []
        own = {"CUDA_VISIBLE_DEVICES": str(rank)} if workload.device == "cuda" and contender == APART else {}
        command = [sys.executable, *before, *script, "--output", str(output)]
        started.append(
            subprocess.Popen(command, env={**environment, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    printed = [process.communicate()[0].decode() for process in started]
    for process, text in zip(started, printed, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"{contender}: a process ended with {process.returncode}:\n{text[-4000:]}")
    each = [json.loads(output.read_text(encoding="utf-8")) for output in outputs]
    return [statistics.fmean(parts) for parts in zip(*each, strict=True)]


def report(seconds: dict[str, list[float]], number: int, tokens: float) -> list[dict[str, Any]]:
    """Medians, tokens per second and the share of the ideal of each contender.

    :param tokens: of one process and iteration
    """
    rows = []
    for contender, values in seconds.items():
        several = 1 if contender == ALONE else number
        median = statistics.median(values)
        speed = several * tokens / median
        ideal = several * tokens / statistics.median(seconds[ALONE])
        rows.append(
            {
                "contender": contender, "processes": several, "seconds": median, "fastest": min(values),
                "slowest": max(values), "tokens_per_s": speed, "share_of_ideal": speed / ideal,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(PRESETS), default="small", help="default %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default %(default)s")
    parser.add_argument("--rows", type=int, default=32, help="texts side by side in each process (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens of a text (default %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s")
    parser.add_argument("--iterations", type=int, default=4, help="measured in each turn (default %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="of each contender (default %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file with the figures")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(Workload.from_json(arguments.work), arguments.iterations, arguments.output)
        return
    if min(arguments.processes - 1, arguments.iterations, arguments.turns) < 1:
        parser.error("--processes must be at least 2, --iterations and --turns at least 1")

    workload = PRESETS[arguments.model].replace(
        rows=arguments.rows, new_tokens=arguments.new_tokens, device=arguments.device, threads=1
    )
    print(f"Each process: {workload}")
    seconds: dict[str, list[float]] = {ALONE: [], APART: [], TOGETHER: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.turns):
            for contender, values in seconds.items():
                values += launched(contender, arguments.processes, workload, arguments.iterations, Path(folder))
                print(f"  turn {turn + 1}, {contender}: {values[-1]:.2f} s", flush=True)
    rows = report(seconds, arguments.processes, workload.rows * workload.rollout_steps)
    print(
        f"\n{'':14}{'processes':>10}{'s/iteration':>13}{'fastest':>10}{'slowest':>10}{'tokens/s':>11}{'of ideal':>10}"
    )
    for row in rows:
        print(
            f"{row['contender']:14}{row['processes']:>10}{row['seconds']:>13.2f}{row['fastest']:>10.2f}"
            f"{row['slowest']:>10.2f}{row['tokens_per_s']:>11,.0f}{row['share_of_ideal']:>10.0%}"
        )
    if arguments.output is not None:
        figures = {"workload": json.loads(workload.to_json()), "contenders": rows}
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
