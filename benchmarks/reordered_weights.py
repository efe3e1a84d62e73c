"""What reordered weights save: rollouts of textgym's PPO with them and without, in turns, and those of ``generate``.

    python benchmarks/reordered_weights.py                   # the shape of SmolLM2-135M, on a CPU, some minutes
    python benchmarks/reordered_weights.py --preset small --rounds 15 --ragged

On a processor on which textgym leaves the weights as they are they are reordered all the same, for the comparison. The
weights count as changed after each rollout, so that they are reordered anew as in training. Scoring is not counted, and
nothing is learned.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bare_model import Generate
from iteration import say
from measures import Clock
from ours import Setting, Textgym
from workload import PRESETS, Workload, cores

import textgym.language_model
from textgym.engine.freed_memory import keep_freed_memory


@contextmanager
def reordering(wanted: bool) -> Iterator[None]:
    """Rollouts of this context do it, or do not."""
    usual = textgym.language_model.worth_reordering
    textgym.language_model.worth_reordering = lambda rows, steps: wanted
    try:
        yield
    finally:
        textgym.language_model.worth_reordering = usual


def rollout(contender: Any, clock: Clock, reordered: bool) -> None:
    """One of them, timed."""
    with reordering(reordered):
        clock.start()
        if not isinstance(contender, Textgym):
            contender.iterate(clock)
            return
        contender.collect(clock)
    torch.autograd.graph.increment_version(list(contender.model.policy.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="135m")
    parser.add_argument("--rounds", type=int, default=5, help="rollouts of each way, after one to warm up")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compiled rollouts, too; 30 layers take long")
    parser.add_argument("--output", type=Path, default=Path("runs/reordered_weights"), help="folder")
    arguments = parser.parse_args()
    workload: Workload = PRESETS[arguments.preset].replace(
        ragged=arguments.ragged, rows=arguments.rows, threads=cores()
    )
    torch.set_num_threads(workload.threads)
    keep_freed_memory()
    plain, generate = Textgym(workload), Generate(workload)
    ways: dict[str, tuple[Any, bool]] = {"as they are": (plain, False), "reordered": (plain, True)}
    if arguments.compile:
        compiled = Textgym(workload, Setting({"compile": True}))
        ways |= {"as they are, compiled": (compiled, False), "the head's reordered, compiled": (compiled, True)}
    ways["generate (transformers)"] = generate, False
    clock = Clock("cpu")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(1 + arguments.rounds):
        say(f"round {number} of {arguments.rounds} ...")
        for way, (contender, reordered) in ways.items():
            rollout(contender, clock, reordered)
            if number:
                found[way].append({"seconds": clock.seconds["rollout"], "cpu": clock.cpu["rollout"]})
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = {"workload": str(workload), "cpu": torch.backends.cpu.get_cpu_capability(), "rollouts": found}
    (arguments.output / "reordered_weights.json").write_text(json.dumps(facts), encoding="utf-8")
    print(f"{workload}; {facts['cpu']}; medians of {arguments.rounds}\n")
    print("| weights | rollout s | CPU s |")
    print("|---|---:|---:|")
    for way, answers in found.items():
        cells = [f"{statistics.median(answer[name] for answer in answers):.3f}" for name in ("seconds", "cpu")]
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
