"""Other people's clients on episodes of several turns: nothing in them has to know of turns."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
from gymnasium.wrappers import NormalizeReward, RecordEpisodeStatistics
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv
from text_envs import DEFAULTS, REWARDS, ids, make, make_vec, play
from tiny_models import EOS

from textgym.envs.sb3 import as_vec_env
from textgym.replies import ReplyResult

SAID = (" very good", " story", " a great movie")
OPTIONS: dict[str, Any] = {
    "reward": REWARDS["function"], "max_new_tokens": 3, "max_turns": 3, "max_reply_tokens": 4, "kl_coef": 0.0
}  # fmt: skip
LONGEST = 9


def say(transcripts: list[list[dict[str, Any]]]) -> list[ReplyResult]:
    """Something else in each turn, for points."""
    return [ReplyResult(SAID[len(transcript) // 2], float(len(transcript))) for transcript in transcripts]


def rows(**options: Any) -> VecEnv:
    return as_vec_env(make_vec(2, reply=say, **{**OPTIONS, **options}))


def singles(**options: Any) -> VecEnv:
    return make_vec_env(lambda: make(reply=say, **{**OPTIONS, **options}), n_envs=2, seed=0)


ENVS = pytest.mark.parametrize("make_env", [rows, singles], ids=["one vector environment", "single ones"])


@ENVS
def test_stock_ppo_learns_with_an_eval_callback_and_is_loaded(make_env, tmp_path):
    callback = EvalCallback(
        make_env(),
        eval_freq=8,
        n_eval_episodes=3,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model = sb3.PPO("MultiInputPolicy", make_env(), n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(64, callback=callback)
    assert any(not before[key].equal(value) for key, value in model.policy.state_dict().items())
    lengths = [episode["l"] for episode in model.ep_info_buffer]
    assert lengths
    assert max(lengths) <= LONGEST  # of the agent's own tokens

    evaluations = np.load(tmp_path / "evaluations.npz")
    assert evaluations["results"].shape == evaluations["ep_lengths"].shape
    assert evaluations["ep_lengths"].max() <= LONGEST
    best = sb3.PPO.load(tmp_path / "best_model.zip", device="cpu")
    returns, lengths = evaluate_policy(best, make_env(), n_eval_episodes=2, return_episode_rewards=True)
    assert len(returns) == 2
    assert max(lengths) <= LONGEST


@ENVS
def test_maskable_ppo_writes_only_what_its_turn_allows(make_env):
    contrib = pytest.importorskip("sb3_contrib")
    from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked

    env = make_env(action_masking=True, min_new_tokens=3)
    model = contrib.MaskablePPO("MultiInputPolicy", env, n_steps=12, batch_size=12, seed=0, device="cpu").learn(24)
    _, lengths = evaluate_masked(model, env, n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [LONGEST] * 4  # no turn may end before its third token, and there are three


def test_statistics_and_normalised_rewards_count_actions_and_not_replies():
    tokens = [*ids("good"), EOS, *ids("fine warm dull"), *ids("bad"), EOS]
    plain = make(reply=say, **OPTIONS)
    plain.reset(options={"prompt": "story"})
    rewards = [step[1] for step in play(plain, tokens)]

    env = NormalizeReward(RecordEpisodeStatistics(make(reply=say, **OPTIONS)), gamma=1.0)
    env.reset(options={"prompt": "story"})
    steps = play(env, tokens)
    assert steps[-1][3]
    assert steps[-1][4]["episode"]["l"] == len(tokens)
    assert steps[-1][4]["episode"]["r"] == pytest.approx(sum(rewards))
    sums = np.cumsum(rewards)
    assert env.return_rms.mean == pytest.approx(sums.mean(), abs=0.02)  # of the returns so far
    signs = [np.sign(step[1]) for step in steps]
    assert signs == [np.sign(reward) for reward in rewards]


def test_gymnasiums_vector_wrapper_counts_the_rows_actions():
    envs = gym.wrappers.vector.RecordEpisodeStatistics(
        gym.make_vec("TextGen-v0", num_envs=2, reply=say, **{**DEFAULTS, **OPTIONS})
    )
    envs.reset(seed=0)
    total = np.zeros(2)
    for _ in range(LONGEST):
        _, rewards, _, truncated, infos = envs.step(np.array(ids("good fine")))
        total += rewards
    assert truncated.all()
    assert infos["episode"]["l"].tolist() == [LONGEST] * 2
    np.testing.assert_allclose(infos["episode"]["r"], total, rtol=1e-5)
