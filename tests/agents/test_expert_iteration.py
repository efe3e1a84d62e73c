"""Expert iteration: the best of each group, and nothing else, becomes the target of plain supervised learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from tiny_agents import KeepRollouts, logs_of_learning, tiny_language_model, tiny_vector_env, values_of

from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, resume
from textgym.agents.common.ranking import best_of_groups
from textgym.agents.expert_iteration import ExpertIteration


def tiny_expert(env: Any = None, **arguments: Any) -> ExpertIteration:
    arguments = {"group_size": 4, "episodes": 8, "n_epochs": 1, "seed": 0, "device": "cpu", **arguments}
    return ExpertIteration("LanguageModelPolicy", tiny_vector_env() if env is None else env, **arguments)


def checksum(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A number between 0 and 1 that tells any two completions apart."""
    return [crc32(text.encode()) / 2**32 for text in completions]


def collected(env: Any = None, **arguments: Any) -> ExpertIteration:
    """An agent with a rollout that it has not learned from."""
    model = tiny_expert(tiny_vector_env(reward=checksum) if env is None else env, **arguments)
    callback = model._setup_learn(1000)[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def returns_of(model: ExpertIteration) -> np.ndarray:
    """``(E,)`` sums of the rewards of each episode, in the order of their numbers."""
    buffer = model.rollout_buffer
    return np.array([buffer.rewards[buffer.episodes == number].sum() for number in range(model.episodes or 0)])


def target_numbers(model: ExpertIteration) -> list[int]:
    return sorted(segment.episode for unit in model.units(model.rollout_buffer) for segment in unit)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_targets_are_the_best_of_each_group(keep):
    model = collected(keep=keep)
    groups = returns_of(model).reshape(2, 4)
    assert np.diff(np.sort(groups, axis=None)).min() > 1e-5  # no two are equal, however a machine rounds
    best = np.argsort(-groups, axis=1)[:, :keep] + [[0], [4]]
    assert target_numbers(model) == sorted(best.ravel().tolist())


def test_only_completions_above_the_threshold_or_the_quantile_are_targets():
    returns = returns_of(collected())
    best = [int(returns[:4].argmax()), 4 + int(returns[4:].argmax())]
    better, worse = sorted(best, key=lambda number: -returns[number])
    between = float(returns[better] + returns[worse]) / 2
    assert target_numbers(collected(threshold=between)) == [better]
    assert target_numbers(collected(threshold=float(returns.min()))) == sorted(best)
    assert target_numbers(collected(keep=4, quantile=0.5)) == np.flatnonzero(returns >= np.median(returns)).tolist()


def test_a_rollout_without_targets_changes_nothing():
    model = tiny_expert(threshold=1e6, learning_rate=1e-2)
    before = model.policy.parameters_to_vector()
    logs = logs_of_learning(model, 100)
    np.testing.assert_array_equal(before, model.policy.parameters_to_vector())
    assert set(values_of(logs, "rollout/target_share")) == {0.0}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_is_that_of_transformers_with_labels(architecture):
    model = collected(env=tiny_vector_env(4, language_model=tiny_language_model(architecture)), keep=2)
    buffer = model.rollout_buffer
    segments = [segment for unit in model.units(buffer) for segment in unit]
    loss = model.loss(buffer.samples(segments)).value
    loss.backward()
    ours = [parameter.grad.clone() for parameter in model.policy.transformer.parameters()]

    width = max(len(s.prefix) + s.steps for s in segments)
    ids, labels, mask = torch.zeros(4, width, dtype=torch.long), torch.full((4, width), -100), torch.zeros(4, width)
    for row, segment in enumerate(segments):
        completion = buffer.actions[segment.start : segment.start + segment.steps, segment.row, 0]
        text = torch.as_tensor(np.concatenate([segment.prefix, completion]))
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
        labels[row, len(segment.prefix) : len(text)] = torch.as_tensor(completion)
    model.policy.transformer.zero_grad()
    theirs = model.policy.transformer(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    for grad, parameter in zip(ours, model.policy.transformer.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-5)


def test_it_learns():
    env = tiny_vector_env(16, kl_coef=0.0, action_masking=True)
    model = tiny_expert(env, episodes=32, n_epochs=2, batch_size=64, learning_rate=5e-3)
    scores = values_of(logs_of_learning(model, 2_500, until=("rollout/score_mean", 0.9)), "rollout/score_mean")
    assert scores[0] < 0.4
    assert scores[-1] > scores[0] + 0.4


def test_of_equal_completions_the_first_are_kept():
    kept = best_of_groups(np.array([2.0, 2.0, 1.0, 0.0, 0.0, 0.0]), group_size=3, keep=2)
    np.testing.assert_array_equal(kept, [True, True, False, True, True, False])


def test_it_is_saved_and_loaded(tmp_path: Path):
    model = tiny_expert(keep=2, threshold=-3.0, quantile=0.25)
    model.learn(50)
    model.save(tmp_path / "agent.zip")
    model.save_pretrained(tmp_path / "agent")
    loaded = ExpertIteration.load(tmp_path / "agent.zip", env=tiny_vector_env(), device="cpu", trust=True)
    opened = ExpertIteration.from_pretrained(tmp_path / "agent", env=tiny_vector_env(), device="cpu")
    for other in (loaded, opened):
        assert (other.group_size, other.keep, other.threshold, other.quantile) == (4, 2, -3.0, 0.25)
        np.testing.assert_array_equal(other.policy.parameters_to_vector(), model.policy.parameters_to_vector())
        steps = other.num_timesteps
        other.learn(1, reset_num_timesteps=False)
        assert other.num_timesteps > steps


def test_a_resumed_training_equals_one_that_was_not_stopped(tmp_path: Path):
    def new() -> ExpertIteration:
        return tiny_expert(learning_rate=3e-3)

    whole, kept = new(), KeepRollouts()
    whole.learn(150, callback=kept)
    stopped = new()
    stopped.learn(80, callback=TrainingCheckpoints(tmp_path, every=10**6))
    again, kept_again = new(), KeepRollouts()
    torch.manual_seed(99)
    resume(again, tmp_path, [TrainingCheckpoints(tmp_path / "other", every=10**6)])
    again.learn(150 - again.num_timesteps, callback=kept_again, reset_num_timesteps=False)
    left = len(kept_again.actions)
    assert 0 < left < len(kept.actions)
    np.testing.assert_array_equal(np.stack(kept.actions[-left:]), np.stack(kept_again.actions))
    np.testing.assert_array_equal(whole.policy.parameters_to_vector(), again.policy.parameters_to_vector())


@pytest.mark.parametrize("arguments", [{"keep": 5}, {"keep": 0}, {"quantile": 1.5}, {"threshold": float("nan")}])
def test_impossible_arguments_are_refused_by_name(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"{name}={arguments[name]}"):
        tiny_expert(**arguments)
