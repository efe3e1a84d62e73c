"""PPO on text: it learns, it keeps its promises about ratios and KL, and it works with what Stable-Baselines3 has."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize
from tiny_agents import (
    LIKED,
    KeepRollouts,
    count_liked,
    logs_of_learning,
    tiny_env,
    tiny_language_model,
    tiny_ppo,
    tiny_vector_env,
    values_of,
)
from tiny_models import BOS, EOS, PAD, UNK, tiny_causal_reward_model, tiny_tokenizer

from textgym.agents import GRPO, PPO, QLearning
from textgym.agents.common.normalisation import whitened
from textgym.envs.sb3 import TextGenVecEnv, as_vec_env
from textgym.rewards import CausalRewardModel, RewardError

# Learning


def learner(seed: int = 0, num_envs: int = 16, max_new_tokens: int = 8, **arguments: Any) -> PPO:
    kl_coef = arguments.pop("kl_coef", 0.0)
    env = tiny_vector_env(num_envs, kl_coef=kl_coef, max_new_tokens=max_new_tokens, action_masking=True)
    arguments = {"n_steps": 16, "batch_size": 128, "n_epochs": 4, "learning_rate": 1e-2, "seed": seed, **arguments}
    return tiny_ppo(env, **arguments)


def mean_liked(model: PPO) -> float:
    """Mean share of liked words in completions of fresh prompts."""
    texts = model.policy.generate(["the film is", "this"] * 50, max_new_tokens=8, seed=1)
    return float(np.mean([sum(w in LIKED for w in t.split()) / max(1, len(t.split())) for t in texts]))


@pytest.mark.parametrize("agent", [PPO, GRPO, QLearning])
def test_a_rate_that_falls_to_0_stays_there_when_the_last_rollout_is_longer_than_what_is_left(agent):
    rates = []

    def falling(left):
        rates.append(1e-3 * left)
        return rates[-1]

    arguments = {"n_steps": 12} if agent is PPO else {"episodes": 4}
    arguments |= {"group_size": 2} if agent is GRPO else {}
    model = agent("LanguageModelPolicy", tiny_vector_env(), learning_rate=falling, seed=0, device="cpu", **arguments)
    model.learn(1)
    assert model.num_timesteps > 1
    assert rates[-1] == model.policy.optimizer.param_groups[0]["lr"] == 0.0
    assert min(rates) == 0.0


def test_it_learns_a_programmatic_reward():
    model = learner()
    assert mean_liked(model) < 0.2
    logs_of_learning(model, 16 * 16 * 16, until=("rollout/score_mean", 1.5))
    assert mean_liked(model) > 0.7


def test_with_learning_rate_0_it_does_not():
    model = learner(learning_rate=0.0)
    before, share = model.policy.parameters_to_vector(), mean_liked(model)
    model.learn(16 * 16 * 3)
    assert np.array_equal(before, model.policy.parameters_to_vector())
    assert mean_liked(model) == share


def test_ten_times_the_kl_coefficient_gives_a_clearly_smaller_kl():
    finals = {}
    for kl_coef in (0.05, 0.5):
        logs = logs_of_learning(learner(kl_coef=kl_coef), 16 * 16 * 8)
        finals[kl_coef] = values_of(logs, "rollout/kl_ref")[-1]
    assert finals[0.05] > 1.0
    assert finals[0.5] < 0.5 * finals[0.05]


# What must hold in every update


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.5, "action_masking": True, "min_new_tokens": 3},
        {"action_masking": True, "top_k": 5},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_ratio_is_one_in_the_first_minibatch_and_the_kl_zero_before_any_update(options, architecture):
    env = tiny_vector_env(4, language_model=tiny_language_model(architecture), **options)
    keep = KeepRollouts()
    logs = logs_of_learning(tiny_ppo(env, learning_rate=3e-3), 4 * 12 * 4, callback=keep)
    ratios = values_of(logs, "train/ratio_first")
    assert len(ratios) == 4
    assert max(ratios) < 1e-4
    assert all(abs(episode["kl"]) < 1e-4 for episode in keep.episodes[0])
    assert max(abs(episode["kl"]) for episode in keep.episodes[-1]) > 1e-2
    assert abs(values_of(logs, "rollout/kl_ref")[0]) < 1e-4


@pytest.mark.parametrize("options", [{}, {"action_masking": True, "missing_eos_penalty": 0.5, "temperature": 0.8}])
def test_deferred_and_instant_scoring_give_the_same_rewards_and_weights(options):
    kept, weights = {}, {}
    for scoring in ("deferred", "instant"):
        keep = kept[scoring] = KeepRollouts()
        # A reward for every token: advantages of noise alone, normalised, would make any two runs differ.
        reward = CausalRewardModel(tiny_causal_reward_model(), tiny_tokenizer())
        model = tiny_ppo(tiny_vector_env(4, reward=reward, **options), scoring=scoring, n_steps=11)
        before = model.policy.parameters_to_vector()
        model.learn(4 * 11 * 2, callback=keep)
        assert np.abs(before - model.policy.parameters_to_vector()).max() > 1e-3
        weights[scoring] = model.policy.parameters_to_vector()
    deferred, instant = kept["deferred"], kept["instant"]
    for step in range(2):
        np.testing.assert_array_equal(deferred.actions[step], instant.actions[step])
        np.testing.assert_allclose(deferred.rewards[step], instant.rewards[step], atol=1e-4)
        assert np.abs(instant.rewards[step]).max() > 0.1
        ours, theirs = (sorted(k.episodes[step], key=lambda e: (e["r"], e["l"])) for k in (deferred, instant))
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            for name in ("r", "score", "kl"):
                assert one[name] == pytest.approx(other[name], abs=1e-4), name
            assert [one[n] for n in ("l", "finish_reason")] == [other[n] for n in ("l", "finish_reason")]
    np.testing.assert_allclose(weights["deferred"], weights["instant"], atol=2e-5)


def test_the_same_seed_gives_the_same_tokens_and_weights():
    runs = []
    for seed in (1, 1, 2):
        keep = KeepRollouts()
        model = tiny_ppo(tiny_vector_env(3), seed=seed).learn(3 * 12 * 2, callback=keep)
        runs.append((np.concatenate(keep.actions), model.policy.parameters_to_vector()))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    assert not np.array_equal(runs[0][0], runs[2][0])


def test_truncated_completions_are_bootstrapped_only_on_request():
    rewards, values = {}, None
    for bootstrap in (False, True):
        env = tiny_vector_env(4, max_new_tokens=5, action_masking=True, min_new_tokens=5, kl_coef=0.0)
        model = tiny_ppo(env, n_steps=10, gamma=0.9, bootstrap_truncated=bootstrap, learning_rate=0.0)
        with torch.no_grad():
            model.policy.value_net.bias.fill_(2.0)
        keep = KeepRollouts()
        model.learn(40, callback=keep)
        rewards[bootstrap], values = keep.rewards[0], model.rollout_buffer.values
    assert values is not None
    np.testing.assert_allclose(values, 2.0)
    added = np.zeros((10, 4))
    added[[4, 9]] = 0.9 * 2.0  # every episode runs out of its five tokens
    np.testing.assert_allclose(rewards[True] - rewards[False], added, atol=1e-5)


def test_whitening_keeps_the_mean_and_gives_biased_variance_one():
    rewards = np.random.default_rng(0).normal(3.0, 5.0, size=(7, 4)).astype(np.float32)
    assert whitened(rewards).mean() == pytest.approx(rewards.mean(), abs=1e-5)
    assert whitened(rewards).var() == pytest.approx(1.0, abs=1e-5)
    plain, white = KeepRollouts(), KeepRollouts()
    tiny_ppo().learn(48, callback=plain)
    tiny_ppo(whiten_rewards=True).learn(48, callback=white)
    np.testing.assert_allclose(white.rewards[0], whitened(plain.rewards[0]), atol=1e-5)


def test_logged_statistics_are_those_of_the_finished_episodes():
    keep = KeepRollouts()
    model = tiny_ppo(tiny_vector_env(6, kl_coef=0.3), n_steps=20, learning_rate=3e-3)
    logs = logs_of_learning(model, 6 * 20 * 2, callback=keep)
    episodes = [e for rollout in keep.episodes for e in rollout][-100:]
    assert len(episodes) > 5
    last = next(row for row in reversed(logs) if "rollout/kl_ref" in row)
    assert last["rollout/kl_ref"] == pytest.approx(np.mean([e["kl"] for e in episodes]), rel=1e-5)
    per_token = sum(e["kl"] for e in episodes) / sum(e["l"] for e in episodes)
    assert last["rollout/kl_ref_per_token"] == pytest.approx(per_token, rel=1e-5)
    assert last["rollout/score_mean"] == pytest.approx(np.mean([e["score"] for e in episodes]), rel=1e-5)
    assert last["rollout/eos_rate"] == np.mean([e["finish_reason"] == "eos" for e in episodes])
    assert last["rollout/ep_len_mean"] == pytest.approx(np.mean([e["l"] for e in episodes]), rel=1e-5)
    for e in episodes:  # a return is the score less the penalty: rewards telescope
        assert e["r"] == pytest.approx(e["score"] - 0.3 * e["kl"], abs=1e-4)
        assert e["score"] == count_liked([], [e["completion"]])[0]
    assert last["train/kl_coef"] == 0.3
    assert last["time/total_timesteps"] == 240
    assert {"train/approx_kl", "train/clip_fraction", "train/grad_norm", "train/explained_variance"} <= set(last)


# Environments


class TinyIds:
    """An id whose environments hold tiny models."""

    def __enter__(self) -> str:
        gym.register(
            "TinyText-v0",
            entry_point=lambda **options: tiny_env(**options),
            vector_entry_point=lambda num_envs, **options: tiny_vector_env(num_envs, **options),
        )
        return "TinyText-v0"

    def __exit__(self, *args: object) -> None:
        del gym.registry["TinyText-v0"]


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize("action_masking", [False, True])
@pytest.mark.parametrize(
    "kind", ["id", "env", "wrapped env", "vector", "vec", "dummy", "monitored", "normalised", "vector wrapper"]
)
def test_every_kind_of_environment_is_accepted(kind, action_masking):
    with TinyIds() as env_id:
        env = {
            "id": lambda: env_id,
            "env": lambda: tiny_env(action_masking=action_masking),
            "wrapped env": lambda: gym.wrappers.RecordEpisodeStatistics(tiny_env(action_masking=action_masking)),
            "vector": lambda: tiny_vector_env(2, action_masking=action_masking),
            "vec": lambda: TextGenVecEnv(tiny_vector_env(2, action_masking=action_masking)),
            "dummy": lambda: DummyVecEnv([lambda: Monitor(tiny_env(action_masking=action_masking))] * 2),
            "monitored": lambda: VecMonitor(TextGenVecEnv(tiny_vector_env(2, action_masking=action_masking))),
            "normalised": lambda: VecNormalize(
                TextGenVecEnv(tiny_vector_env(2, action_masking=action_masking)), norm_obs=False
            ),
            "vector wrapper": lambda: gym.wrappers.vector.RecordEpisodeStatistics(
                tiny_vector_env(2, action_masking=action_masking)
            ),
        }[kind]()
        model = tiny_ppo(env, batch_size=12)
        assert isinstance(model.env, VecEnv)
        logs = logs_of_learning(model, 2 * model.n_envs * 12)
    assert len(values_of(logs, "rollout/ep_rew_mean")) > 0
    assert len(values_of(logs, "rollout/score_mean")) > 0
    assert abs(values_of(logs, "rollout/kl_ref")[0]) < 1e-4
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    masked = action_masking and kind != "id"
    assert (model.rollout_buffer.packed_masks is not None) == masked
    assert not (masked and np.isin(model.rollout_buffer.actions, [PAD, BOS, UNK]).any())


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_deferred_scoring_is_refused_where_somebody_looks_at_the_rewards():
    for env in (VecMonitor(TextGenVecEnv(tiny_vector_env(2))), DummyVecEnv([tiny_env])):
        with pytest.raises(ValueError, match="scoring='deferred' needs the bare text vector environment"):
            tiny_ppo(env, scoring="deferred", batch_size=12)


def test_a_model_object_given_to_the_policy_is_copied_so_that_the_reference_does_not_learn():
    lm = tiny_language_model()
    before = lm.model.lm_head.weight.clone()
    model = tiny_ppo(tiny_vector_env(4, language_model=lm), policy_kwargs={"language_model": lm}, learning_rate=1e-2)
    logs = logs_of_learning(model, 4 * 12 * 3)
    torch.testing.assert_close(lm.model.lm_head.weight, before, rtol=0, atol=0)
    assert values_of(logs, "rollout/kl_ref")[-1] > 0.05


def test_the_policy_starts_from_a_model_of_its_own_where_one_is_given():
    other = tiny_language_model(seed=5)
    model = tiny_ppo(policy_kwargs={"language_model": other, "value_head": "mlp"})
    torch.testing.assert_close(model.policy.transformer.lm_head.weight, other.model.lm_head.weight)
    logs = logs_of_learning(model, 96)
    assert values_of(logs, "rollout/kl_ref")[0] > 0.5


# Stable-Baselines3's callbacks and learn()


def test_stable_baselines3_callbacks_work_untouched(tmp_path):
    model = tiny_ppo(tiny_vector_env(2))
    evaluation = EvalCallback(
        as_vec_env(tiny_vector_env(3)), eval_freq=6, n_eval_episodes=3, best_model_save_path=str(tmp_path), verbose=0
    )
    checkpoints = CheckpointCallback(save_freq=10, save_path=str(tmp_path), name_prefix="at")
    logs = logs_of_learning(model, 48, callback=[evaluation, checkpoints])
    assert len(values_of(logs, "eval/mean_reward")) >= 2
    assert np.isfinite(evaluation.best_mean_reward)
    assert (tmp_path / "best_model.zip").exists()
    assert sorted(p.name for p in tmp_path.glob("at_*")) == ["at_20_steps.zip", "at_40_steps.zip"]
    # An evaluation between two steps, with the same policy and its cache, changes nothing in the rollout.
    assert max(values_of(logs, "train/ratio_first")) < 1e-4


@pytest.mark.parametrize("scoring", ["deferred", "instant"])
@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_a_rollout_stopped_by_a_callback_can_be_gone_on_from(scoring, reset_num_timesteps):
    env = tiny_vector_env(4)
    model = tiny_ppo(env, scoring=scoring, n_steps=30)
    model.learn(10_000, callback=StopTrainingOnMaxEpisodes(max_episodes=1))
    stopped_at = model.num_timesteps
    assert 0 < stopped_at < 4 * 30
    assert len(model.finished_episodes) >= 4
    logs = logs_of_learning(model, 240, reset_num_timesteps=reset_num_timesteps)
    assert model.num_timesteps == 240 + (0 if reset_num_timesteps else stopped_at)
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    env.reset(seed=0)
    assert env.step(np.full(4, 5))[1].any()  # and the environment pays at once again


class Interrupt(BaseCallback):
    def _on_step(self) -> bool:
        if self.n_calls == 5:
            raise KeyboardInterrupt
        return True


def test_an_interrupted_rollout_leaves_a_usable_environment():
    env = tiny_vector_env(4)
    model = tiny_ppo(env)
    with pytest.raises(KeyboardInterrupt):
        model.learn(1000, callback=Interrupt())
    assert model.num_timesteps == 20
    model.learn(48)
    assert model.num_timesteps == 48
    model.learn(48, reset_num_timesteps=False)
    assert model.num_timesteps == 96


def test_an_error_of_the_reward_reaches_the_user():
    def broken(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if any(len(text.split()) > 3 for text in completions):
            raise KeyError("no such word")
        return [0.0] * len(completions)

    for scoring in ("deferred", "instant"):
        model = tiny_ppo(tiny_vector_env(4, reward=broken), scoring=scoring)
        with pytest.raises(RewardError, match="broken"):
            model.learn(1000)


def test_learning_can_be_continued():
    model = tiny_ppo()
    model.learn(48)
    model.learn(48, reset_num_timesteps=False)
    assert model.num_timesteps == 96
    model.learn(48)
    assert model.num_timesteps == 48


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1e-4}, "learning_rate=-0.0001"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"gae_lambda": 2}, "gae_lambda=2"),
        ({"clip_range": 0.0}, "clip_range=0.0"),
        ({"clip_range_vf": -0.2}, "clip_range_vf=-0.2"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_steps": 1.5}, "n_steps=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 49}, r"batch_size=49 is more than the rollout has, n_steps \* num_envs = 48"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"n_epochs": 0}, "n_epochs=0"),
        ({"ent_coef": float("nan")}, "ent_coef=nan"),
        ({"vf_coef": -1.0}, "vf_coef=-1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"target_kl": 0.0}, "target_kl=0.0"),
        ({"normalize_advantage": "batch"}, "normalize_advantage='batch'"),
        ({"scoring": "later"}, "scoring='later'"),
        ({"policy_kwargs": {"temperature": 0.5}}, r"temperature=0.5 is not the environment's 1.0"),
    ],
)
def test_impossible_hyperparameters_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_ppo(**arguments)


def test_a_rollout_smaller_than_the_default_batch_is_one_batch():
    assert tiny_ppo(batch_size=None).batch_size == 48
    assert tiny_ppo(tiny_vector_env(64), batch_size=None).batch_size == 512


def test_what_is_no_text_agent_is_refused():
    with pytest.raises(ValueError, match="text environment"):
        PPO("LanguageModelPolicy", gym.make("CartPole-v1"), policy_kwargs={"language_model": tiny_language_model()})
    with pytest.raises(ValueError, match="Policy MlpPolicy unknown"):
        PPO("MlpPolicy", tiny_vector_env())
    with pytest.raises(ValueError, match="policy=ActorCriticPolicy must be a LanguageModelPolicy"):
        PPO(ActorCriticPolicy, tiny_vector_env())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="env=None"):
        PPO("LanguageModelPolicy", None)
    with pytest.raises(TypeError, match="env=3"):
        PPO("LanguageModelPolicy", 3)  # type: ignore[arg-type]


def test_ending_a_text_is_learned_like_any_other_token():
    env = tiny_vector_env(16, reward=lambda prompts, completions, **_: [-len(c.split()) for c in completions])
    model = tiny_ppo(env, n_steps=16, batch_size=64, learning_rate=5e-3)
    rates = values_of(logs_of_learning(model, 16 * 16 * 15, until=("rollout/eos_rate", 0.95)), "rollout/eos_rate")
    assert rates[0] < 0.5 < 0.9 < rates[-1]
    assert EOS in model.rollout_buffer.actions
