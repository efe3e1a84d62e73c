"""What a run makes of its held-out prompts: the best model, when to stop, and what is said at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from textgym.agents.cli.main import _show_progress, console
from textgym.agents.runs import Run, RunConfig
from textgym.agents.runs.agents import resolved
from textgym.agents.runs.diagnosis import diagnose
from textgym.agents.runs.held_out import BestEvaluation, HeldOutPrompts
from textgym.prompts.rows import PromptRow

pytestmark = pytest.mark.usefixtures("runs_without_pictures")

FIGURES = {
    "score": 0.1, "score_std": 0.3, "score_low": 0.05, "score_high": 0.15, "zero": 0.1, "kl": 0.0, "perplexity": 20.0,
    "distinct_2": 0.8, "length": 10.0, "ended": 0.7, "eos_rate": 0.7,
}  # fmt: skip


def rows(number: int) -> list[PromptRow]:
    return [PromptRow(f"film {i}") for i in range(number)]


def test_the_best_evaluation_is_not_the_luckiest_of_many():
    rng = np.random.default_rng(0)
    best, prompts = BestEvaluation(), rng.normal(size=64)
    taken = [best.take((prompts + 0.5 * rng.normal(size=64)).tolist()) for _ in range(100)]
    assert taken[0]
    assert sum(taken) <= 8  # the highest so far would be some five of a hundred, and then be kept for its luck
    better = (prompts + 0.5 + 0.5 * rng.normal(size=64)).tolist()
    assert best.take(better)
    assert best.without_better == 0
    assert not best.take(better)


def test_the_best_is_found_among_few_and_single_prompts():
    best = BestEvaluation()
    assert [best.take([score]) for score in (0.1, 0.1, 0.2, 0.15)] == [True, False, True, False]
    assert best.without_better == 1
    other = BestEvaluation()
    other.load_state_dict(best.state_dict())
    assert (other.take([0.19]), other.without_better) == (False, 2)


@pytest.mark.parametrize(
    ("available", "asked", "prompts", "times"),
    [(500, 128, 128, 1), (12, 128, 12, 6), (12, 24, 12, 2), (100, 128, 100, 1)],
)
def test_few_prompts_are_completed_several_times_and_it_is_said(available: int, asked: int, prompts: int, times: int):
    held_out = HeldOutPrompts(rows(available), RunConfig(eval_prompts=asked))
    assert (len(held_out.rows), held_out.completions_per_prompt) == (prompts, times)
    said = held_out.said()
    assert (said is None) == (available >= asked)
    if said is not None:
        assert said.startswith(f"{prompts} held-out prompts, fewer than eval_prompts={asked}")
        assert ("completed" in said) == (times > 1)


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({}, []),
        ({"zero": 0.95}, ["95% of the scores are 0"]),
        ({"ended": 0.0}, ["no text ended by itself"]),
        ({"perplexity": 41.0, "kl": 30.0}, ["perplexity under the reference rose from 20 to 41"]),
        (
            {"perplexity": 33.0, "kl": 7.0},
            ["perplexity under the reference rose from 20 to 33"],
        ),
        ({"perplexity": 23.0, "kl": 0.9}, []),
        ({"kl": 12.0}, ["the KL to the reference is 1.2 nats per token"]),
        ({"score": -0.2, "score_low": -0.3, "score_high": -0.1}, ["the score fell from 0.1 to -0.2"]),
        ({"distinct_2": 0.3}, ["distinct-2 fell from 0.800 to 0.300"]),
    ],
)
def test_what_went_wrong_is_said_in_a_line(last: dict[str, float], words: list[str]):
    sentences = diagnose(FIGURES, {**FIGURES, **last})
    assert len(sentences) == len(words)
    assert all(word in sentence for word, sentence in zip(words, sentences, strict=True))


def test_a_reward_that_says_nothing_is_told_apart():
    same = {**FIGURES, "score": 1.0, "score_std": 0.0, "score_low": 1.0, "score_high": 1.0}
    assert ["all texts have the same score, 1" in sentence for sentence in diagnose(same, same)] == [True]


def test_a_run_with_one_evaluation_shows_it_once():
    for evaluations, columns in ([0], 1), ([0, 512], 2), ([0, 512, 1024], 2):
        with console.capture() as shown:
            _show_progress([{**FIGURES, "timesteps": steps} for steps in evaluations], True)
        assert shown.get().count(" tokens") == columns
    assert "1,024 tokens" in shown.get()


@pytest.fixture
def small(tiny_directory: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "p.txt").write_text("\n".join(f"film {word}" for word in "good bad dull slow warm cold fine".split()))
    return {
        "model": str(tiny_directory), "prompts": str(tmp_path / "p.txt"), "held_out": "3", "eval_prompts": 6,
        "reward": "repetition", "rows": 4, "max_new_tokens": 4, "timesteps": 160, "eval_every": 16,
        "checkpoint_every": 48, "samples": 2, "device": "cpu", "threads": 1, "tensorboard": False, "n_epochs": 1,
        "learning_rate": 0.0,
    }  # fmt: skip


def test_patience_ends_a_run_that_gets_no_better(small: dict[str, Any], tmp_path: Path):
    run = Run("ppo", RunConfig(**small, patience=2), tmp_path / "run")
    assert run.train()
    # The first after training is the best; then two that are the same, for nothing is learned.
    assert [evaluation["timesteps"] for evaluation in run.recorder.evaluations] == [0, 16, 32, 48]
    assert run.recorder.out_of_patience
    assert (tmp_path / "run" / "model").is_dir()
    lines = run.recorder.sample_file.rows()
    assert len({line["prompt"] for line in lines}) == 2  # completed twice each, and shown once
    assert len(lines) == 2 * 4
    resumed = Run.resumed(tmp_path / "run")
    assert resumed.train()
    assert len(resumed.recorder.evaluations) == 4


def test_training_figures_are_those_of_one_rollout(small: dict[str, Any], tmp_path: Path):
    run = Run("ppo", RunConfig(**small), tmp_path / "run")
    assert run.config.stats_window_size == 4
    assert Run("ppo", RunConfig(**{**small, "n_steps": 8}), tmp_path / "b").config.stats_window_size == 8
    assert Run("ppo", RunConfig(**small, stats_window_size=50), tmp_path / "c").config.stats_window_size == 50


def test_only_a_pretrained_model_is_kept_near_its_reference_by_default():
    def kl_of(**options: Any) -> tuple[Any, ...]:
        config = resolved("ppo", RunConfig(max_new_tokens=20, rows=8, timesteps=32_000, **options))
        return config.kl_target, config.kl_coef_min, config.kl_horizon

    assert kl_of() == (0.0, 0.0, 10_000.0)
    assert kl_of(model="smollm2") == (4.0, 0.05, 80.0)
    assert kl_of(model="smollm2", kl_target=0) == (0.0, 0.0, 10_000.0)
    assert kl_of(model="smollm2", kl_coef=0) == (0.0, 0.0, 10_000.0)
    assert kl_of(model="smollm2", kl_target=3, kl_coef_min=0.01) == (3.0, 0.01, 10_000.0)
