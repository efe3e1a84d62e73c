"""The comparison of the agents: its task, its contenders, and what it keeps of runs."""

from __future__ import annotations

import json
import sys

import pytest
from places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))
from agent_tasks import PLACES, TASKS, right_letters
from separate_runs import keep, kept_result, path_of

import agents as comparison
from textgym.agents.runs.agents import AGENTS, resolved
from textgym.agents.runs.config import RunConfig


def test_letters_count_at_their_places_round_the_circle():
    scores = right_letters(["c", "h", "a", "a"], [" d e f g h a", "a b c", "c b", ""])
    assert scores == pytest.approx([1.0, 3 / PLACES, 0.0, 0.0])


def test_every_agent_of_the_command_line_is_compared_with_options_it_has():
    for algorithm, options in comparison.CONTENDERS.values():
        resolved(algorithm, RunConfig(**options))
    assert {algorithm for algorithm, _ in comparison.CONTENDERS.values()} == set(AGENTS)


@pytest.mark.parametrize("task", TASKS)
def test_the_model_that_all_start_from_is_far_from_solving_a_task(task):
    environment = TASKS[task].environment(seed=0)
    environment.reset(seed=0)
    assert environment.num_envs == 32
    if task != "reviews":
        figures = TASKS[task].measures(environment.reference_language_model())
        assert figures["score"] < 0.15
        assert abs(figures["kl"]) < 1e-3


def finished(score: float, tokens: int = 2) -> dict:
    point = {"tokens": tokens, "seconds": 1.0, "score": score, "kl": 1.0, "l": 6.0}
    after = {"score": score, "kl": 1.0, "distinct_2": 0.5, "length": 6.0}
    return {
        "task": "alphabet", "agent": "PPO", "rate": 1e-3, "seed": 0, "before": {**after, "score": 0.05}, "after": after,
        "seconds": 20.0, "memory": 2**29, "curve": [point, {**point, "tokens": 2 * tokens}], "texts": ["a"],
    }  # fmt: skip


def test_a_kept_run_is_not_run_again(tmp_path):
    keep(finished(0.5), tmp_path, "alphabet", "RLOO, token", 0.001, 3)
    assert path_of(tmp_path, "alphabet", "RLOO, token", 0.001, 3).is_file()
    assert kept_result("no such script", tmp_path, "alphabet", "RLOO, token", 0.001, 3) == finished(0.5)
    with pytest.raises(RuntimeError, match="alphabet RLOO 0.001 3"):
        kept_result("no such script", tmp_path, "alphabet", "RLOO", 0.001, 3)


def test_the_report_takes_the_best_rate_of_the_search_and_lists_the_best_agent_first(tmp_path, monkeypatch, capsys):
    for rate, score in ((3e-4, 0.2), (1e-3, 0.6), (3e-3, 0.4)):
        keep(finished(score), tmp_path, "alphabet", "PPO", rate, comparison.SEARCH_SEED)
        keep({**finished(score + 0.2), "rate": rate}, tmp_path, "alphabet", "A2C", rate, comparison.SEARCH_SEED)
    for seed, score in enumerate((0.5, 0.7)):
        keep(finished(score), tmp_path, "alphabet", "PPO", 1e-3, seed)
        keep(finished(score + 0.1), tmp_path, "alphabet", "A2C", 1e-3, seed)
    arguments = ["--report", "--tasks", "alphabet", "--agents", "PPO", "A2C", "GRPO"]
    monkeypatch.setattr(sys, "argv", ["agents.py", *arguments, "--work", str(tmp_path), "--output", str(tmp_path)])
    comparison.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["agent", "---", "*before*", "A2C", "PPO"]
    assert "0.600 ± 0.141" in lines[-1]
    table = json.loads((tmp_path / "agents.json").read_text())["tasks"]["alphabet"]["agents"]
    assert table["A2C"]["rate"] == 1e-3
    assert table["PPO"]["score"] == pytest.approx([0.6, 0.1414], abs=1e-4)
    assert (tmp_path / "agents-alphabet.png").stat().st_size > 10_000
