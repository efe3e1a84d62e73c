"""On one and the same rollout our update is Stable-Baselines3's: same loss, same gradients, same weights after it.

The real ``stable_baselines3.PPO.train`` runs over the single steps of the rollout, a forward over the whole prefix for
each, with a copy of the policy. Everything is in fp32; what differs is the order of summation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.callbacks import ConvertCallback
from stock_twins import assert_same_update, stock_twin, train, with_rollout
from tiny_agents import tiny_language_model, tiny_vector_env

from textgym.agents import PPO, LanguageModelPolicy, Segment
from textgym.envs.sb3 import TextGenVecEnv


def moved(architecture: str = "llama", **arguments: Any) -> PPO:
    return with_rollout(
        tiny_vector_env(4, language_model=tiny_language_model(architecture), temperature=0.9), **arguments
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.parametrize("clip_range_vf", [None, 0.05])
def test_one_update_equals_stock_ppo(architecture, normalize_advantage, clip_range_vf):
    model = moved(
        architecture,
        normalize_advantage=normalize_advantage,
        clip_range_vf=clip_range_vf,
        clip_range=0.1,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
    )
    assert_same_update(model, stock_twin(model))


def test_without_entropy_bonus_too():
    model = moved(ent_coef=0.0)
    assert_same_update(model, stock_twin(model))


def test_the_rollout_exercises_clipping():
    """Otherwise the tests above would pass with a wrong clip."""
    model = moved(clip_range=0.1, clip_range_vf=0.05)
    batch = next(model.rollout_buffer.get())
    with torch.no_grad():
        values, log_prob, _ = model.policy.evaluate_segments(batch)
    ratio = (log_prob - batch.old_log_prob).exp()
    assert 0.1 < ((ratio - 1).abs() > 0.1).float().mean() < 0.95
    assert 0.1 < ((values.flatten() - batch.old_values).abs() > 0.05).float().mean() < 0.95


def test_several_epochs_of_minibatches_equal_stock_ppo_on_the_same_partition(monkeypatch):
    model = moved(batch_size=20, n_epochs=3, ent_coef=0.01)
    twin = stock_twin(model)
    partition: list[list[Segment]] = []
    samples = model.rollout_buffer.samples

    def kept_samples(segments: list[Segment]) -> Any:
        partition.append(segments)
        return samples(segments)

    monkeypatch.setattr(model.rollout_buffer, "samples", kept_samples)
    epochs = iter(range(3))
    stock = twin.rollout_buffer
    next(stock.get())  # flattens its arrays: row 0's steps, then row 1's

    def same_batches(batch_size: int) -> Iterator[Any]:
        per_epoch = len(partition) // 3
        epoch = next(epochs)
        for segments in partition[epoch * per_epoch : (epoch + 1) * per_epoch]:
            steps = [s.row * model.n_steps + np.arange(s.start, s.start + s.steps) for s in segments]
            yield stock._get_samples(np.concatenate(steps))

    monkeypatch.setattr(stock, "get", same_batches)
    assert_same_update(model, twin)
    assert len(partition) == 12


def test_early_stopping_by_target_kl_is_that_of_stock_ppo():
    for target_kl in (1e-4, 10.0):
        model = moved(n_epochs=3, target_kl=target_kl)
        twin = stock_twin(model)
        assert_same_update_or_stop(model, twin, stops=target_kl == 1e-4)


def assert_same_update_or_stop(model: PPO, twin: sb3.PPO, stops: bool) -> None:
    before = model.policy.parameters_to_vector()
    ours, our_steps = train(model)
    theirs, their_steps = train(twin)
    assert len(our_steps) == len(their_steps) == (0 if stops else 3)
    assert ours["train/n_updates"] == theirs["train/n_updates"]
    assert ours["train/approx_kl"] == pytest.approx(theirs["train/approx_kl"], rel=1e-3)
    assert np.array_equal(before, model.policy.parameters_to_vector()) == stops


def test_advantages_normalised_over_the_rollout_have_mean_0_and_biased_variance_1():
    model = moved(normalize_advantage="rollout", batch_size=20)
    train(model)
    advantages = model.rollout_buffer.advantages
    assert advantages.mean() == pytest.approx(0, abs=1e-5)
    assert np.mean(advantages**2) == pytest.approx(1, abs=1e-4)


def test_stock_ppo_can_learn_with_the_policy():
    """The policy keeps to SB3's interface: its own algorithm trains it, single steps, without knowing of text."""
    model = sb3.PPO(
        LanguageModelPolicy,
        TextGenVecEnv(tiny_vector_env(4)),
        n_steps=8,
        batch_size=16,
        n_epochs=1,
        policy_kwargs={"language_model": tiny_language_model()},
        device="cpu",
        seed=0,
    )
    before = model.policy.parameters_to_vector()
    model.learn(64, callback=ConvertCallback(None))
    assert model.num_timesteps == 64
    assert not np.array_equal(before, model.policy.parameters_to_vector())
