"""Training ends where the KL to the reference model stays above its limit."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_agents import KeepRollouts, logs_of_learning, tiny_language_model, tiny_ppo, tiny_vector_env, values_of

from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, resume
from textgym.agents.callbacks.early_stopping import StopOnKL

ROLLOUT = 12 * 16


def learning(patience: int = 1, max_kl: float = 0.2, rollouts: int = 12, **options):
    keep = KeepRollouts()
    stop = StopOnKL(max_kl, patience, **options)
    model = tiny_ppo(tiny_vector_env(12, kl_coef=1e-6), n_steps=16, batch_size=96, n_epochs=4, learning_rate=1e-2)
    logs = logs_of_learning(model, ROLLOUT * rollouts, callback=[keep, stop])
    return model, keep, stop, logs


@pytest.mark.parametrize("patience", [1, 2])
def test_training_ends_after_the_rollouts_that_exceed_the_limit(patience):
    model, keep, stop, logs = learning(patience)
    kl = [np.mean([episode["kl"] for episode in episodes]) for episodes in keep.episodes]
    above = [value > 0.2 for value in kl]
    assert stop.stopped
    assert above[-patience:] == [True] * patience
    assert not any(all(above[i : i + patience]) for i in range(len(above) - patience))
    assert model.num_timesteps == ROLLOUT * len(kl) + 12  # one step of the next rollout
    assert stop.last_kl == pytest.approx(kl[-1])
    assert values_of(logs, "train/kl_limit")[-1] == 0.2


def test_below_the_limit_training_runs_to_its_end(capsys):
    model, _, stop, _ = learning(max_kl=1e6, rollouts=3, verbose=1)
    assert not stop.stopped
    assert model.num_timesteps == ROLLOUT * 3
    assert capsys.readouterr().out == ""


def test_it_says_why_it_ends(capsys):
    learning(verbose=1)
    assert "KL to the reference" in capsys.readouterr().out


def test_rollouts_above_the_limit_are_counted_across_a_resume(tmp_path):
    def parts():
        return [StopOnKL(1e-9, patience=4), TrainingCheckpoints(tmp_path, every=48)]

    model, callbacks = tiny_ppo(learning_rate=1e-2), parts()
    model.learn(48 * 3, callback=callbacks)  # the first rollout's KL is 0
    counted = callbacks[0].state_dict()["above"]
    assert 1 <= counted < 4
    again, callbacks = tiny_ppo(learning_rate=1e-2), parts()
    resume(again, tmp_path, callback=callbacks)
    assert callbacks[0].state_dict()["above"] == counted
    again.learn(48 * 10, callback=callbacks, reset_num_timesteps=False)
    assert callbacks[0].stopped
    assert again.num_timesteps == 48 * (3 + 4 - counted) + 4


def test_impossible_limits_are_refused():
    with pytest.raises(ValueError, match="max_kl"):
        StopOnKL(0.0)
    with pytest.raises(ValueError, match="patience"):
        StopOnKL(1.0, patience=0)
    model = tiny_ppo(tiny_vector_env(4, kl_coef=0.0, language_model=tiny_language_model()))
    with pytest.raises(ValueError, match="kl_coef=0 and so measures no KL"):
        model.learn(48, callback=StopOnKL(1.0))
