"""The adaptive KL callback moves the environment's coefficient by Ziegler's rule."""

from __future__ import annotations

import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny_agents import (
    KeepRollouts,
    logs_of_learning,
    tiny_env,
    tiny_language_model,
    tiny_ppo,
    tiny_vector_env,
    values_of,
)

from textgym.agents import AdaptiveKLCallback


def test_the_coefficient_follows_zieglers_rule_after_every_rollout():
    env = tiny_vector_env(6, kl_coef=0.2)
    keep = KeepRollouts()
    model = tiny_ppo(env, n_steps=16, learning_rate=3e-3)
    adaptive = AdaptiveKLCallback(target=0.5, horizon=40)
    logs = logs_of_learning(model, 6 * 16 * 5, callback=[keep, adaptive])
    expected = 0.2
    for episodes in keep.episodes:
        kl = np.mean([e["kl"] for e in episodes])
        expected *= 1 + np.clip(kl / 0.5 - 1, -0.2, 0.2) * len(episodes) / 40
    assert env.kl_coef == pytest.approx(expected, rel=1e-9)
    coefs = values_of(logs, "train/kl_coef")
    assert len(coefs) == 5
    assert coefs[0] < 0.2  # the KL was 0 before the first update: too little
    assert coefs[-1] == env.kl_coef
    assert values_of(logs, "train/kl_target")[-1] == 0.5


def test_a_small_target_ends_at_a_smaller_kl_than_a_large_one():
    finals = {}
    for target in (0.3, 20.0):
        env = tiny_vector_env(12, kl_coef=0.1)
        model = tiny_ppo(env, n_steps=16, batch_size=96, n_epochs=4, learning_rate=1e-2)
        logs = logs_of_learning(model, 12 * 16 * 12, callback=AdaptiveKLCallback(target=target, horizon=20))
        finals[target] = values_of(logs, "rollout/kl_ref")[-1]
    assert finals[0.3] < 0.6 * finals[20.0]


def test_it_goes_on_in_a_second_learn_and_can_set_the_first_coefficient():
    env = tiny_vector_env(4, kl_coef=0.1)
    model = tiny_ppo(env)
    adaptive = AdaptiveKLCallback(target=1.0, horizon=100, init_kl_coef=0.7)
    model.learn(48, callback=adaptive)
    reached = env.kl_coef
    assert 0.5 < reached < 0.7
    env.kl_coef = 5.0
    model.learn(48, callback=adaptive)
    assert env.kl_coef == adaptive.controller.kl_coef < 1.0


def test_single_environments_get_the_coefficient_too():
    env = DummyVecEnv([lambda: Monitor(tiny_env(kl_coef=0.4))] * 2)
    model = tiny_ppo(env)
    model.learn(48, callback=AdaptiveKLCallback(target=1.0, horizon=100))
    coefs = env.get_attr("kl_coef")
    assert coefs[0] == coefs[1] < 0.4
    assert all(e.unwrapped.kl_coef == coefs[0] for e in env.envs)


def test_the_coefficient_stays_above_its_least_however_many_texts_a_rollout_has():
    env = tiny_vector_env(6, kl_coef=0.2)
    model = tiny_ppo(env, n_steps=16, learning_rate=3e-3)
    adaptive = AdaptiveKLCallback(target=0.5, horizon=1, least=0.2)  # a rollout has more than five horizons
    coefs = values_of(logs_of_learning(model, 6 * 16 * 5, callback=adaptive), "train/kl_coef")
    assert coefs[0] == 0.2  # the KL was 0, and would have let it fall
    assert coefs[-1] > 0.2
    assert AdaptiveKLCallback(target=1e9, horizon=1, least=0.3, init_kl_coef=0.4).controller.update(0.0, 4) == 0.3


def test_impossible_arguments_are_refused():
    for arguments, message in [
        ({"target": 0.0, "horizon": 10}, "target=.* must be"),
        ({"target": 1.0, "horizon": -1}, "horizon=.* must be"),
        ({"target": 1.0, "horizon": 10, "init_kl_coef": 0.0}, "init_kl_coef=.* must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            AdaptiveKLCallback(**arguments)
    model = tiny_ppo(tiny_vector_env(4, kl_coef=0.0, language_model=tiny_language_model()))
    with pytest.raises(ValueError, match=r"kl_coef=0.0, which can't be adapted"):
        model.learn(48, callback=AdaptiveKLCallback(target=1.0, horizon=10))
