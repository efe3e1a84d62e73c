"""What turns cost: PPO iterations on episodes of six turns and on those of one turn, with as many tokens in all.

    python benchmarks/turns.py                       # some minutes
    python benchmarks/turns.py --rounds 9 --threads 1

Each row has a prompt of 4 tokens and 252 after it. With one turn the policy writes them all. With six it writes 36 a
turn, and a reply says 6 after each: those are read, but there is nothing to choose or to learn. The iterations take
turns in one process, after one each to warm up; the figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from measures import Clock
from ours import Textgym
from workload import PRESETS, Workload, cores, prompt_texts

from textgym.engine.freed_memory import keep_freed_memory
from textgym.replies import ScriptedReply

TURNS, TURN, REPLY, PROMPT = 6, 36, 6, 4


def contenders(workload: Workload) -> dict[str, Textgym]:
    """The same work in one turn and in six."""
    one = workload.replace(prompt_tokens=PROMPT, new_tokens=TURNS * (TURN + REPLY), steps=0, context=256)
    six = one.replace(new_tokens=TURN, steps=TURNS * TURN)
    lines = [f" {line}" for line in prompt_texts(one.replace(prompt_tokens=REPLY), TURNS)]
    talk = {"reply": ScriptedReply(lines), "max_turns": TURNS, "max_reply_tokens": REPLY}
    return {"one turn": Textgym(one), "six turns": Textgym(six, **talk)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each, after one to warm up")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    workload = PRESETS[arguments.preset].replace(rows=arguments.rows, threads=arguments.threads)
    torch.set_num_threads(workload.threads)
    keep_freed_memory()
    figures: dict[str, Any] = {}
    both = contenders(workload)
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in both}
    for _ in range(arguments.rounds + 1):
        for name, contender in both.items():
            clock = Clock(workload.device)
            clock.start()
            contender.iterate(clock)
            laps[name].append(dict(clock.seconds))
    for name, rounds in laps.items():
        phases = {phase: statistics.median(lap[phase] for lap in rounds[1:]) for phase in rounds[1]}
        segments = both[name].model.rollout_buffer.segments
        figures[name] = {
            **phases,
            "iteration": statistics.median(sum(lap.values()) for lap in rounds[1:]),
            "tokens": sum(len(segment.ids) for segment in segments),
        }
    print(f"{'':12}" + "".join(f"{phase:>12}" for phase in figures["one turn"]))
    for name, row in figures.items():
        print(f"{name:12}" + "".join(f"{value:12.2f}" for value in row.values()))
    ratio = figures["six turns"]["iteration"] / figures["one turn"]["iteration"]
    print(f"\nsix turns take {ratio:.2f} × the time of one")
    if arguments.output:
        arguments.output.write_text(json.dumps({**figures, "ratio": ratio}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
