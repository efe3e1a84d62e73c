"""The benchmark of shared prompts: textgym and the floor do the same work, and figures are read off it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from places import BENCHMARKS

sys.path.append(str(BENCHMARKS))  # scripts that import each other, no package

import measures
import shared_prompts
import worker
from workload import Workload

ROWS, PROMPT, NEW = 16, 48, 9  # two groups
WORK = Workload(
    rows=ROWS, prompt_tokens=PROMPT, new_tokens=NEW, hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, vocab=128,
    epochs=2, minibatches=2, threads=1, compile=False,
)  # fmt: skip


def read_in_the_update(contender: Any, update: Any, trunk: Any) -> list[int]:
    """Tokens of each forward, padding included."""
    read: list[int] = []
    hook = trunk.register_forward_pre_hook(
        lambda module, _, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    update()
    hook.remove()
    return read


def test_textgym_and_the_floor_read_each_prompt_once_for_its_group() -> None:
    ours, floor = worker.build("textgym-grpo", WORK), worker.build("floor-groups", WORK)
    ours.collect(measures.Clock("cpu"))
    once = PROMPT + 8 * (NEW - 1)
    assert read_in_the_update(floor, floor.update, floor.policy.model) == [once] * 4
    ours_read = read_in_the_update(ours, ours.model.train, ours.model.policy.transformer.base_model)
    assert len(ours_read) == 4
    assert max(ours_read) <= once  # completions may begin alike, too
    assert ours.iterate(measures.Clock("cpu"))["tokens"] == floor.iterate(measures.Clock("cpu"))["tokens"] == ROWS * NEW


def test_the_floor_of_groups_computes_the_models_own_states() -> None:
    floor = worker.build("floor-groups", WORK)
    with torch.no_grad():
        got = floor.read(floor.policy.model, floor.rows)[:, floor.places].view(ROWS, NEW, -1)
        expected = floor.policy.model(input_ids=floor.ids[:, :-1]).last_hidden_state[:, PROMPT - 1 :]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert floor.targets.view(ROWS, NEW).equal(floor.ids[:, PROMPT:])


def test_figures_are_medians_and_ratios_to_textgym() -> None:
    def result(*seconds: float) -> dict[str, Any]:
        rounds = [
            {"seconds": dict.fromkeys(measures.PHASES, s), "cpu": dict.fromkeys(measures.PHASES, s / 2), "tokens": 10,
             "decode_tokens_per_s": 1.0}
            for s in seconds
        ]  # fmt: skip
        return {"covers": measures.PHASES, "rounds": rounds, "memory": {"resident": 2**20}}

    found = shared_prompts.summary({"textgym-grpo": result(1.0, 2.0, 9.0), "trl-grpo": result(8.0, 8.0, 8.0)})
    assert found["textgym-grpo"]["cpu"] == {"rollout": 1.0, "score": 1.0, "update": 1.0, "iteration": 3.0}
    assert found["trl-grpo"]["times"] == pytest.approx({"cpu": 4.0, "seconds": 4.0})
    assert "| one | trl-grpo | 4.00 | 4.00 | 4.00 | 12.00 | 1 | 4.00 |" in shared_prompts.table({"one": found})
