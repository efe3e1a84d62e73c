"""The memory benchmark counts each tensor once, and all of them."""

from __future__ import annotations

import sys

import pytest
import torch
from places import BENCHMARKS

sys.path.append(str(BENCHMARKS))  # scripts that import each other, no package

import memory
import ours
from workload import Workload

TINY = Workload(
    rows=4, prompt_tokens=3, new_tokens=4, hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocab=128, tied=True,
    epochs=1, minibatches=2, threads=1, compile=False,
)  # fmt: skip


def test_memory_of_what_shares_its_storage_counts_once() -> None:
    tensor = torch.zeros(8, 4)
    assert memory.size([tensor, tensor[2:], torch.zeros(3, dtype=torch.bfloat16)]) == 8 * 4 * 4 + 3 * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_of_an_iterations_memory_are_those_of_its_tensors(checkpointing: bool) -> None:
    contender = ours.Textgym(TINY, ours.Setting({"gradient_checkpointing": checkpointing}))
    clock = memory.PeakClock("cpu")
    contender.iterate(clock)
    parts, (saved, logits) = memory.counted(contender), memory.saved_for_backward(contender)
    weights = sum(p.numel() for p in contender.model.policy.parameters())
    frozen = sum(p.numel() for model in contender.models()[1:] for p in model.parameters())
    buffers = sum(b.numel() for model in contender.models() for b in model.buffers())
    assert parts["weights"] == 4 * (weights + frozen + buffers)
    assert parts["gradients"] == 4 * weights
    assert parts["optimizer"] == pytest.approx(8 * weights, rel=0.02)  # and a step counter for each weight matrix
    assert set(clock.peaks) == {"rollout", "score", "update"}
    tokens = TINY.rows // TINY.minibatches * TINY.new_tokens
    assert logits >= 4 * tokens * TINY.vocab
    read = TINY.rows // TINY.minibatches * (TINY.prompt_tokens + TINY.new_tokens - 1)
    # Checkpointed, each of the two blocks keeps what enters it; otherwise some twenty times as much.
    assert (saved < 12 * read * TINY.hidden * 4) == checkpointing


def test_tables_have_a_line_for_each_setting_and_say_what_failed() -> None:
    done = {"peak": 5 * memory.MIB, "phases": {"update": 5 * memory.MIB}, "parts": {"weights": 2 * memory.MIB}}
    table = memory.settings_table({"full": done, "lora": {"failed": "why\n  no peft", "phases": {}, "parts": {}}})
    lines = table.splitlines()
    assert lines[2].split("|")[2].strip() == "2"
    assert lines[2].split("|")[-2].strip() == "5"
    assert "failed: no peft" in lines[3]
