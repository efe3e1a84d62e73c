"""Ensembles of reward models: their members, resuming, misuse."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny_reward_training import QUICK, TOKENIZER, scored, tiny_causal

from textgym.reward_training import load_reward_data, read_report, split_by_prompt, train_reward
from textgym.reward_training import training as training_module
from textgym.rewards import Ensemble, as_reward
from textgym.rewards.reward_directory import open_reward

pytestmark = pytest.mark.usefixtures("frozen_garbage", "no_pictures")


def test_an_ensemble_has_members_of_its_own_and_opens_as_their_mean(untrained, tmp_path):
    folder = tmp_path / "ensemble"
    options = {**QUICK, "epochs": 2, "activation": "tanh", "seed": 3}
    report = train_reward(scored(80), folder, model=untrained, members=2, **options)
    reward = as_reward(folder)
    assert isinstance(reward, Ensemble)
    assert reward.aggregate == "mean"
    called = {"prompts": ["the film", "the story"], "completions": [" is good", " was very dull"]}
    one, other = (as_reward(folder / f"member_{i}")(**called) for i in range(2))
    assert one != pytest.approx(other, abs=1e-3)
    assert reward(**called) == pytest.approx(np.mean([one, other], axis=0), abs=1e-6)
    assert open_reward(folder, aggregate="min")(**called) == pytest.approx(np.min([one, other], axis=0), abs=1e-6)
    careful = open_reward(folder, aggregate="mean-std", k=0.5)(**called)
    spread = np.std([one, other], axis=0)
    assert careful == pytest.approx(np.mean([one, other], axis=0) - 0.5 * spread, abs=1e-6)

    held_out = [row.completion for row in split_by_prompt(load_reward_data(scored(80)), 0.25, 3)[1].rows]
    targets = {row["text"]: row["score"] for row in scored(80)}
    mean = reward(prompts=[""] * len(held_out), completions=held_out)
    expected = stats.pearsonr(mean, [targets[text] for text in held_out]).statistic
    assert report.metrics["pearson"] == pytest.approx(expected, abs=1e-4)
    assert [read_report(folder / f"member_{i}")["metrics"] for i in range(2)] == report.members
    assert "members" in (folder / "README.md").read_text()
    options = [json.loads((folder / f"member_{i}" / "training.json").read_text())["options"] for i in range(2)]
    assert [own["seed"] for own in options] == [3, 4]


def test_bootstrapped_members_see_rows_of_the_training_part_drawn_with_replacement(untrained, tmp_path, monkeypatch):
    seen = []
    train = training_module._train
    monkeypatch.setattr(
        training_module, "_train", lambda run, *rest: seen.append(run.training.rows) or train(run, *rest)
    )
    options = {**QUICK, "epochs": 1}
    train_reward(scored(40), tmp_path / "a", model=untrained, members=2, bootstrap=True, **options)
    whole = split_by_prompt(load_reward_data(scored(40)), 0.25, 0)[0].rows
    for rows in seen:
        assert len(rows) == len(whole)
        assert set(rows) < set(whole)
        assert 0.4 < len(set(rows)) / len(whole) < 0.85  # 1 - 1/e of them, on average
    assert seen[0] != seen[1]


def test_a_resumed_ensemble_trains_only_what_is_missing_and_ends_the_same(untrained, tmp_path, monkeypatch):
    options = {**QUICK, "epochs": 2, "members": 2, "model": untrained, "prefixes": "none"}
    whole = train_reward(scored(60), tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    save, saved = training_module.save_model, []

    def dies_behind_the_first(*arguments: Any) -> None:
        if saved:
            raise Killed
        saved.append(save(*arguments))

    monkeypatch.setattr(training_module, "save_model", dies_behind_the_first)
    with pytest.raises(Killed):
        train_reward(scored(60), tmp_path / "broken", **options)
    monkeypatch.undo()
    before = (tmp_path / "broken" / "member_0" / "model.safetensors").stat().st_mtime_ns
    resumed = train_reward(scored(60), tmp_path / "broken", resume=True, **options)
    assert (tmp_path / "broken" / "member_0" / "model.safetensors").stat().st_mtime_ns == before
    assert resumed.metrics == pytest.approx(whole.metrics, abs=1e-5)
    for i in range(2):
        files = [(tmp_path / name / f"member_{i}" / "model.safetensors").read_bytes() for name in ("whole", "broken")]
        assert files[0] == files[1]


def test_misuse_of_ensembles_is_refused(untrained, tmp_path):
    with pytest.raises(ValueError, match="members=0 must be a whole number, at least 1"):
        train_reward(scored(20), tmp_path / "x", members=0)
    with pytest.raises(ValueError, match="members=2: each starts from the model as it was; give a name or a directory"):
        train_reward(scored(20), tmp_path / "x", members=2, model=tiny_causal(1), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="bootstrap=True is for the members of an ensemble"):
        train_reward(scored(20), tmp_path / "x", model=untrained, bootstrap=True)
    with pytest.raises(ValueError, match="activation='sigmoid' reaches from 0 to 1"):
        train_reward(scored(20), tmp_path / "x", model=untrained, members=2, activation="sigmoid")
    assert not (tmp_path / "x").exists()
