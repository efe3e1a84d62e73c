"""The benchmark of turns compares episodes of as many tokens."""

from __future__ import annotations

import sys

from places import BENCHMARKS

sys.path.append(str(BENCHMARKS))  # scripts that import each other, no package

import turns
from measures import Clock
from workload import Workload

TINY = Workload(
    rows=2, hidden=16, layers=1, heads=2, kv_heads=1, mlp=16, vocab=64, epochs=1, minibatches=2, threads=1
)  # fmt: skip


def test_six_turns_have_as_many_tokens_as_one() -> None:
    texts = {}
    for name, contender in turns.contenders(TINY).items():
        contender.collect(Clock("cpu"))
        texts[name] = contender.model.rollout_buffer.segments
    assert [len(segment.ids) for segment in texts["one turn"]] == [256, 256]
    # What the reply says after the last turn isn't read by anybody.
    assert [len(segment.ids) + turns.REPLY for segment in texts["six turns"]] == [256, 256]
    assert [len(segment.positions) for segment in texts["six turns"]] == [216, 216]
