"""TextGen-v0 with many rows: equal to single environments, in every autoreset mode."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from text_envs import (
    DEFAULTS,
    REWARDS,
    SETTINGS,
    TOKENIZER,
    every_setting,
    ids,
    make,
    make_vec,
    phi,
    random_actions,
    text_score,
)
from tiny_models import EOS, VOCABULARY, tiny_causal_reward_model, tiny_model, tiny_tokenizer

from textgym.envs import TextGenVectorEnv
from textgym.rewards import FunctionReward

V = len(VOCABULARY)
GOOD, FILM = ids("good film")


# --- rows and single environments


@every_setting
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_all_autoreset_modes_equal_gymnasiums_vector_environment_of_single_ones(options, mode):
    n = 3
    ours = make_vec(n, autoreset_mode=mode, **options)
    theirs = SyncVectorEnv([lambda: make(**options) for _ in range(n)], autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is mode
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert_equivalent(ours.reset(seed=7), theirs.reset(seed=7))
    rng, finished = np.random.default_rng(0), 0
    for _ in range(18):
        actions, log_probs = random_actions(rng, ours)
        for env, log_prob in zip(theirs.envs, log_probs.tolist(), strict=True):
            env.unwrapped.report_log_prob(log_prob)
        got, expected = ours.step(actions, log_probs), theirs.step(actions)
        assert_equivalent(got, expected)
        done = got[2] | got[3]
        finished += done.sum()
        if mode == AutoresetMode.DISABLED and done.any():
            chosen = {"reset_mask": done}
            assert_equivalent(ours.reset(options=dict(chosen)), theirs.reset(options=dict(chosen)))
    assert finished > 3


def assert_equivalent(got: Any, expected: Any) -> None:
    """The same keys, types, shapes and dtypes; numbers equal to 1e-5."""
    if isinstance(expected, dict):
        assert set(got) == set(expected)
        for name in expected:
            assert_equivalent(got[name], expected[name])
    elif isinstance(expected, tuple):
        assert len(got) == len(expected)
        for mine, other in zip(got, expected, strict=True):
            assert_equivalent(mine, other)
    elif expected is None:
        assert got is None
    else:
        assert isinstance(got, np.ndarray)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        if got.dtype != object:
            np.testing.assert_allclose(got, expected, atol=1e-5)
        elif any(isinstance(value, dict) for value in expected):
            assert_equivalent(tuple(got), tuple(expected))
        else:
            assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [SETTINGS[name] for name in ("plain", "masked", "at the end")])
def test_row_i_equals_a_single_environment_with_seed_plus_i(options):
    n, rng = 3, np.random.default_rng(1)
    envs, singles = make_vec(n, **options), [make(**options) for _ in range(n)]
    observation, _ = envs.reset(seed=20)
    for i, single in enumerate(singles):
        np.testing.assert_equal({k: v[i] for k, v in observation.items()}, single.reset(seed=20 + i)[0])
    for _ in range(14):
        actions, log_probs = random_actions(rng, envs)
        observation, rewards, terminated, truncated, infos = envs.step(actions, log_probs)
        for i, single in enumerate(singles):
            single.unwrapped.report_log_prob(log_probs[i])
            final, reward, *flags, info = single.step(actions[i])
            assert rewards[i] == pytest.approx(reward, abs=1e-5)
            assert [terminated[i], truncated[i]] == flags
            if any(flags):
                assert infos["final_info"]["score"][i] == pytest.approx(info["score"], abs=1e-5)
                np.testing.assert_equal(infos["final_obs"][i], final)
                final, _ = single.reset()
            np.testing.assert_equal({k: v[i] for k, v in observation.items()}, final)


@pytest.mark.parametrize("options", [SETTINGS["causal"], SETTINGS["masked"]], ids=["causal", "masked"])
def test_the_number_of_rows_and_the_room_for_padding_change_nothing(options):
    few = make_vec(2, **options)
    many = make_vec(9, **options, max_prompt_tokens=40)
    rng = np.random.default_rng(0)
    few.reset(seed=3)
    many.reset(seed=3)
    for _ in range(16):
        actions, log_probs = random_actions(rng, many)
        got, expected = few.step(actions[:2], log_probs[:2]), many.step(actions, log_probs)
        np.testing.assert_allclose(got[1], expected[1][:2], atol=1e-5)
        np.testing.assert_array_equal(got[2], expected[2][:2])
        np.testing.assert_array_equal(got[0]["input_ids"], expected[0]["input_ids"][:2, : 12 + 8])


def test_rows_with_one_model_do_not_disturb_another_environment_on_it():
    options = SETTINGS["composed, every 3"]
    alone, first, second = (make_vec(3, **options) for _ in range(3))
    rng = np.random.default_rng(0)
    for env in (alone, first):
        env.reset(seed=1)
    second.reset(seed=9)
    for _ in range(12):
        actions, log_probs = random_actions(rng, first)
        mixed = first.step(actions, log_probs)[1]
        second.step(actions[::-1], log_probs)
        np.testing.assert_allclose(mixed, alone.step(actions, log_probs)[1], atol=1e-5)


def test_the_same_seed_gives_the_same_rewards_bit_by_bit():
    envs, runs = make_vec(4, **SETTINGS["composed, every 3"]), []
    for _ in range(2):
        rng = np.random.default_rng(5)
        envs.reset(seed=2)
        runs.append([envs.step(*random_actions(rng, envs))[1] for _ in range(20)])
        envs.step(np.full(4, FILM))  # what is cached of other texts must not show
    np.testing.assert_array_equal(*runs)


# --- seeds and resets


def prompts(envs: Any, **reset: Any) -> list[str]:
    return envs.reset(**reset)[1]["prompt"].tolist()


MANY = [f"{a} {b}" for a in VOCABULARY[4:] for b in VOCABULARY[4:]]


def test_seeds_are_those_of_gymnasiums_vector_environments():
    ours = make_vec(3, prompts=MANY)
    theirs = SyncVectorEnv([lambda: make(prompts=MANY) for _ in range(3)])
    for seed in (5, None, [7, 8, 9], None, [1, None, 3], None, np.int64(6)):
        assert prompts(ours, seed=seed) == prompts(theirs, seed=int(seed) if np.ndim(seed) == 0 and seed else seed)
    assert ours.np_random_seed == (6, 7, 8)


def test_the_seed_option_seeds_all_rows_at_the_first_reset():
    assert prompts(make_vec(3, prompts=MANY, seed=4)) == prompts(make_vec(3, prompts=MANY), seed=4)
    assert len(set(prompts(make_vec(8, prompts=MANY, seed=4)))) > 5


def test_without_a_seed_rows_and_runs_differ():
    runs = [prompts(make_vec(4, prompts=MANY)) for _ in range(2)]
    assert runs[0] != runs[1]
    assert len(set(runs[0])) > 1


@pytest.mark.parametrize("seed", [[1, 2], (1, 2, 3)])
def test_a_list_of_seeds_has_one_for_each_row(seed):
    with pytest.raises(ValueError, match=f"seed has {len(seed)} entries, expected one number or num_envs=4"):
        make_vec(4).reset(seed=seed)


def test_reset_options_choose_the_prompts_of_all_rows():
    envs = make_vec(2)
    assert prompts(envs, options={"prompt": "fresh music"}) == ["fresh music"] * 2
    assert prompts(envs, options={"prompt": ["fresh music", "we"]}) == ["fresh music", "we"]
    with pytest.raises(
        ValueError, match="options\\['prompt'\\]=.*must be a non-empty text or a conversation, or 2 of them"
    ):
        envs.reset(options={"prompt": ["we"]})


def test_a_partial_reset_leaves_the_other_rows_alone():
    envs = make_vec(3, autoreset_mode="Disabled")
    envs.reset(seed=0)
    before, *_ = envs.step(np.full(3, GOOD))
    mask = np.array([False, True, False])
    observation, infos = envs.reset(options={"reset_mask": mask, "prompt": "we love this"})
    assert infos["prompt"].tolist() == [None, "we love this", None]
    assert infos["_prompt"].tolist() == mask.tolist()
    for row in (0, 2):
        np.testing.assert_array_equal(observation["input_ids"][row], before["input_ids"][row])
    assert observation["attention_mask"][1].sum() == 3


@pytest.mark.parametrize("mask", [np.array([True]), np.array([1, 0]), [True, False], None, np.zeros(2, dtype=bool)])
def test_a_wrong_reset_mask_is_an_error(mask):
    envs = make_vec(2)
    envs.reset()
    if mask is None:
        envs.reset(options={"reset_mask": None})  # as if it weren't there
        return
    with pytest.raises((TypeError, ValueError), match="reset_mask"):
        envs.reset(options={"reset_mask": mask})


def test_a_finished_row_must_be_reset_where_nobody_else_does_it():
    envs = make_vec(2, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset()
    envs.step(np.array([EOS, GOOD]))
    with pytest.raises(gym.error.ResetNeeded, match="row 0 has finished and autoreset is disabled"):
        envs.step(np.array([GOOD, GOOD]))


# --- making, closing, wrong input


@pytest.mark.parametrize("mode", ["vector_entry_point", "sync", "async"])
def test_make_vec_works_in_every_mode(mode, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options = {**DEFAULTS, "language_model": str(tmp_path)}
    envs = gym.make_vec("TextGen-v0", num_envs=2, vectorization_mode=mode, **options)
    expected = make_vec(2)
    try:
        np.testing.assert_equal(envs.reset(seed=1)[0], expected.reset(seed=1)[0])
        actions = np.array([GOOD, FILM])
        np.testing.assert_allclose(envs.step(actions)[1], expected.step(actions)[1], atol=1e-5)
    finally:
        envs.close()


def test_the_vector_entry_point_is_the_default():
    assert isinstance(gym.make_vec("TextGen-v0", num_envs=2, **DEFAULTS), TextGenVectorEnv)


def test_a_spec_makes_the_vector_environment_again_and_shares_its_models():
    model = tiny_model("llama")
    envs = make_vec(2, language_model=model, tokenizer=TOKENIZER)
    again = gym.make_vec(envs.spec)
    assert again.options.language_model is model
    assert again._process.language_model.held.model is model
    assert prompts(again, seed=3) == prompts(envs, seed=3)


def test_an_autoreset_mode_in_a_spec_survives_json(tmp_path):
    tiny_causal_reward_model().save_pretrained(tmp_path / "reward")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    for folder in ("reward", "model"):
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    parts = {"language_model": str(tmp_path / "model"), "reward": str(tmp_path / "reward")}
    spec = make_vec(2, **parts, autoreset_mode=AutoresetMode.DISABLED).spec
    again = gym.make_vec(EnvSpec.from_json(spec.to_json()))
    assert again.metadata["autoreset_mode"] is AutoresetMode.DISABLED


@pytest.mark.parametrize("num_envs", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_of_rows_is_an_error(num_envs):
    with pytest.raises((ValueError, TypeError), match="num_envs=.* must be a whole number, at least 1"):
        TextGenVectorEnv(num_envs, **DEFAULTS)


@pytest.mark.parametrize("mode", ["same", None, 3, "SAME_STEP"])
def test_a_wrong_autoreset_mode_is_an_error(mode):
    with pytest.raises(ValueError, match="autoreset_mode=.* must be an AutoresetMode or one of"):
        make_vec(2, autoreset_mode=mode)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([GOOD], r"shape \(1,\), expected \(2,\)"),
        ([[GOOD, GOOD]], r"shape \(1, 2\), expected \(2,\)"),
        (GOOD, r"shape \(\), expected \(2,\)"),
        ([GOOD, V], r"actions\[1\]=64 is not a token id: expected 0 to 63"),
        ([-1, GOOD], r"actions\[0\]=-1 is not a token id"),
        ([1.0, 2.0], "whole numbers"),
        ([True, False], "whole numbers"),
    ],
)
def test_wrong_actions_are_errors_that_change_nothing(actions, message):
    envs = make_vec(2)
    before, _ = envs.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        envs.step(actions)
    after, *_ = envs.step(torch.tensor([GOOD, FILM]))
    np.testing.assert_array_equal(after["attention_mask"].sum(1), before["attention_mask"].sum(1) + 1)


@pytest.mark.parametrize("log_probs", [[-1.0], [[-1.0, -1.0]], [-1.0, 0.5], [-1.0, np.nan], [-np.inf, -1.0], -1.0])
def test_wrong_log_probs_are_errors(log_probs):
    envs = make_vec(2)
    envs.reset()
    with pytest.raises(ValueError, match="log_probs"):
        envs.step(np.array([GOOD, FILM]), log_probs)


def test_a_closed_environment_says_so():
    envs = make_vec(2, action_masking=True)
    with pytest.raises(gym.error.ResetNeeded, match="step before reset"):
        envs.step(np.array([GOOD, FILM]))
    envs.reset()
    envs.close()
    for call in (envs.reset, envs.action_masks, lambda: envs.step(np.array([GOOD, FILM]))):
        with pytest.raises(gym.error.ClosedEnvironmentError, match="after close"):
            call()
    envs.close()


def test_rendering_gives_one_frame_for_each_row():
    envs = make_vec(2, render_mode="ansi")
    envs.reset(options={"prompt": ["fresh music", "we love"]})
    envs.step(np.array([GOOD, FILM]))
    first, second = envs.render()
    assert ("fresh music" in first, "we love" in second) == (True, True)


def test_rendering_without_a_mode_warns_and_gives_nothing():
    envs = make_vec(1)
    envs.reset()
    with pytest.warns(UserWarning, match="render\\(\\) needs a render_mode"):
        assert envs.render() is None


def test_gymnasiums_vector_wrappers_work_around_it():
    inner = make_vec(3, reward=REWARDS["composed"])
    envs, rng = gym.wrappers.vector.RecordEpisodeStatistics(inner), np.random.default_rng(0)
    envs.reset(seed=0)
    returns, lengths, finished = np.zeros(3), np.zeros(3, dtype=int), 0
    for _ in range(20):
        actions, log_probs = random_actions(rng, inner)
        inner.report_log_probs(log_probs)
        _, rewards, terminated, truncated, infos = envs.step(actions)
        returns, lengths, done = returns + rewards, lengths + 1, terminated | truncated
        for row in np.flatnonzero(done):
            assert infos["_episode"][row]
            assert infos["episode"]["r"][row] == pytest.approx(returns[row])
            assert infos["episode"]["l"][row] == lengths[row]
        returns[done], lengths[done], finished = 0, 0, finished + done.sum()
    assert finished > 3


# --- scores and rewards


def test_scores_in_infos_are_those_of_the_finished_texts():
    envs, rng = make_vec(3, reward=REWARDS["composed"]), np.random.default_rng(3)
    envs.reset(seed=1)
    seen = 0
    for _ in range(20):
        *_, terminated, truncated, infos = envs.step(*random_actions(rng, envs))
        for row in np.flatnonzero(terminated | truncated):
            final, n = infos["final_obs"][row], int(infos["final_obs"][row]["prompt_length"][0])
            text = final["input_ids"][final["attention_mask"] == 1].tolist()
            assert infos["final_info"]["score"][row] == pytest.approx(phi("composed", text[:n], text[n:]), abs=1e-5)
            seen += 1
    assert seen > 3


def test_a_reward_is_called_once_a_step_with_all_rows():
    sizes = []

    def reward(prompts, completions, **_):
        sizes.append(len(prompts))
        return text_score(prompts, completions)

    envs = make_vec(5, reward=FunctionReward(reward))
    envs.reset(seed=0)
    for _ in range(4):
        envs.step(np.full(5, GOOD))
    assert sizes == [5] * 5
