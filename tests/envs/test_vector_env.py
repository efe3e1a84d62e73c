"""TextGen-v0 with many rows: equal to single environments, in every autoreset mode and on both schedules of scoring."""

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
    LANGUAGE_MODEL,
    MASKING,
    PROMPTS,
    REWARDS,
    TOKENIZER,
    ids,
    make,
    make_vec,
    phi,
    random_actions,
    text_score,
)
from tiny_models import BOS, EOS, PAD, UNK, VOCABULARY, tiny_causal_reward_model, tiny_model, tiny_tokenizer

from textgym.envs import TextGenVectorEnv
from textgym.language_model import LanguageModel
from textgym.rewards import FunctionReward, RewardError
from textgym.rewards.models.causal import CausalRewardModel

V = len(VOCABULARY)
GOOD, FILM = ids("good film")
COLUMNS = [{"prompt": prompt, "answer": float(i)} for i, prompt in enumerate(PROMPTS)]


def graded(prompts, completions, answer, **_):
    return [a * len(c) / 10 for a, c in zip(answer, completions, strict=True)]


# Options that exercise everything a step does, in a few combinations.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"reward": REWARDS["causal"]},
    "composed, every 3": {"reward": REWARDS["composed"], "reward_every": 3, "kl_estimator": "k3"},
    "at the end": {"reward": REWARDS["composed"], "reward_every": "end", "missing_eos_penalty": 0.4},
    "masked": {"reward": REWARDS["causal"], **MASKING, "temperature": 0.7, "kl_estimator": "k2"},
    "stopping": {"stop": ["!", "e f"], "min_new_tokens": 2, "missing_eos_penalty": 0.4, "reward_every": 2},
    "no reference": {"kl_coef": 0},
    "columns": {"prompts": COLUMNS, "reward": graded},
    "short": {"max_new_tokens": 1},
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


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


# --- deferred scoring


def instant_and_deferred(options: dict[str, Any], seed: int, steps: int = 30, n: int = 4, **extra: Any):
    """Play the same actions on both schedules, deferred scores being asked for at random times.

    :return: rewards ``(steps, N)`` of both, parts ``(steps, N)`` of both, and the finished episodes of both
    """
    now, later = make_vec(n, **options, **extra), make_vec(n, **options, **extra)
    rng = np.random.default_rng(seed)
    now.reset(seed=seed)
    later.reset(seed=seed)
    rewards, parts, episodes = [], [], []
    scored, scored_parts, listed = [], [], []
    returns, lengths, kl = np.zeros(n), np.zeros(n, dtype=int), np.zeros(n)
    waiting = 0
    for step in range(steps):
        if not waiting and rng.random() < 0.25:
            (later.end_rollout if later.in_rollout else later.begin_rollout)()
        actions, log_probs = random_actions(rng, now)
        observation, reward, terminated, truncated, infos = now.step(actions, log_probs)
        got = later.step(actions, log_probs)
        for name in observation:
            np.testing.assert_array_equal(observation[name], got[0][name])
        np.testing.assert_array_equal(terminated, got[2])
        np.testing.assert_array_equal(truncated, got[3])

        done = terminated | truncated
        final = infos.get("final_info", {})
        merged = {}
        for name in ("reward_model", "kl", "ref_log_prob"):
            values = np.where(infos.get(f"_{name}", False), infos.get(name, np.nan), np.nan)
            merged[name] = np.where(final.get(f"_{name}", False), final.get(name, np.nan), values)
        rewards.append(reward)
        parts.append(merged)
        returns, lengths, kl = returns + reward, lengths + 1, kl + merged["kl"]
        for row in np.flatnonzero(done):
            episode = {name: final[name][row] for name in ("finish_reason", "score", "applies", "prompt", "completion")}
            episode |= {"row": row, "step": step, "r": returns[row], "l": lengths[row], "kl": kl[row]}
            episodes.append((later.scoring_deferred, episode))
        returns[done], lengths[done], kl[done] = 0, 0, 0

        if not later.scoring_deferred:
            scored.append(got[1])
            scored_parts.append(None)
            continue
        assert not got[1].any()
        assert "reward_model" not in got[4]
        waiting += 1
        if rng.random() < 0.3 or step == steps - 1:
            scores = later.scores()
            assert scores.rewards.shape == (waiting, n)
            assert scores.rewards.dtype == np.float32
            scored.extend(scores.rewards)
            names = ("reward_model", "kl", "ref_log_prob")
            scored_parts.extend({name: getattr(scores, name)[s] for name in names} for s in range(waiting))
            listed.extend({**episode, "step": episode["step"] + step + 1 - waiting} for episode in scores.episodes)
            waiting = 0
    expected = [episode for deferred, episode in episodes if deferred]
    return np.array(rewards), np.array(scored), parts, scored_parts, expected, listed


@every_setting
@pytest.mark.parametrize("seed", range(3))
def test_deferred_rewards_equal_instant_ones_however_they_are_cut(options, seed):
    rewards, scored, parts, scored_parts, expected, listed = instant_and_deferred(options, seed)
    np.testing.assert_allclose(scored, rewards, atol=1e-4)
    assert any(p is not None for p in scored_parts)
    assert any(p is None for p in scored_parts)
    for got, want in zip(scored_parts, parts, strict=True):
        for name in want if got is not None else ():
            np.testing.assert_allclose(got[name], want[name], atol=1e-4, err_msg=name)

    assert len(listed) == len(expected) > 0
    order = [(episode["step"], episode["row"]) for episode in listed]
    assert order == sorted(order)
    for got, want in zip(listed, expected, strict=True):
        assert set(got) == set(want)
        for name in ("row", "step", "l", "finish_reason", "prompt", "completion"):
            assert got[name] == want[name], name
        for name in ("r", "score", "kl"):
            assert got[name] == pytest.approx(want[name], abs=3e-4, nan_ok=True), name


@pytest.mark.parametrize("options", [SETTINGS["composed, every 3"], SETTINGS["masked"]], ids=["composed", "masked"])
def test_deferred_equals_instant_where_rows_reset_in_the_next_step(options):
    extra = {"autoreset_mode": AutoresetMode.NEXT_STEP, "max_new_tokens": 3}
    for n in (1, 3):  # with one row, steps that only reset are steps, too
        runs = []
        for deferred in (False, True):
            envs, rng = make_vec(n, **{**options, **extra}), np.random.default_rng(0)
            envs.reset(seed=0)
            envs.begin_rollout(defer_scoring=deferred)
            paid = [envs.step(*random_actions(rng, envs))[1] for _ in range(15)]
            runs.append(envs.scores().rewards)
            np.testing.assert_allclose(np.array(paid), 0.0 if deferred else runs[0], atol=1e-6)
        np.testing.assert_allclose(runs[0], runs[1], atol=1e-4)


@pytest.mark.parametrize("options", [SETTINGS["composed, every 3"], SETTINGS["masked"]], ids=["composed", "masked"])
@pytest.mark.parametrize("better", [False, True], ids=["reported", "better known"])
def test_the_record_is_the_same_whenever_rewards_are_computed(options, better):
    records = []
    for deferred in (False, True):
        envs, rng = make_vec(3, **options), np.random.default_rng(0)
        envs.reset(seed=0)
        envs.step(*random_actions(rng, envs))  # of before the record
        envs.begin_rollout(defer_scoring=deferred)
        for _ in range(12):
            envs.step(*random_actions(rng, envs))
        known = -rng.random((7, 3)) if better else None  # of the newest steps
        records.append(envs.scores(known))
        assert not envs.steps_waiting
        envs.end_rollout()
    instant, deferred = records
    for name in ("rewards", "reward_model", "kl", "ref_log_prob"):
        np.testing.assert_allclose(getattr(instant, name), getattr(deferred, name), atol=2e-4, err_msg=name)
    by_end = [sorted(r.episodes, key=lambda e: (e["step"], e["row"])) for r in records]
    assert len(by_end[0]) == len(by_end[1]) > 0
    for one, other in zip(*by_end, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == (pytest.approx(other[name], abs=3e-4) if isinstance(value, float) else other[name]), name


def test_small_passes_change_nothing(monkeypatch):
    envs, rng = make_vec(5, **SETTINGS["masked"]), np.random.default_rng(0)
    runs = []
    for tokens in (10**6, 30, 1):
        monkeypatch.setattr("textgym.teacher_forcing.FORWARD_TOKENS", tokens)
        monkeypatch.setattr("textgym.rewards.models.causal.BATCH_TOKENS", tokens)
        envs.reset(seed=0)
        envs.begin_rollout()
        rng = np.random.default_rng(0)
        for _ in range(12):
            envs.step(*random_actions(rng, envs))
        runs.append(envs.scores().rewards)
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-5)
    np.testing.assert_allclose(runs[0], runs[2], atol=1e-5)


def test_infos_of_finished_episodes_are_the_same_except_for_what_is_not_known_yet():
    now, later = make_vec(2), make_vec(2)
    for envs in (now, later):
        envs.reset(seed=0)
    later.begin_rollout()
    actions = np.array([EOS, GOOD])
    got, expected = later.step(actions)[4], now.step(actions)[4]
    assert set(expected["final_info"]) - set(got["final_info"]) == {
        name for key in ("reward_model", "kl", "ref_log_prob", "score", "applies") for name in (key, f"_{key}")
    }
    for name, values in got["final_info"].items():
        assert values.tolist() == expected["final_info"][name].tolist()


def test_the_coefficient_at_the_time_of_scoring_counts():
    envs = make_vec(2, kl_coef=0.5)
    envs.reset(seed=0)
    envs.begin_rollout()
    envs.step(np.array([GOOD, FILM]), [-1.0, -2.0])
    envs.kl_coef = 3.0
    scores = envs.scores()
    np.testing.assert_allclose(scores.rewards, scores.reward_model - 3 * scores.kl, atol=1e-5)
    np.testing.assert_allclose(scores.kl, np.array([[-1.0, -2.0]]) - scores.ref_log_prob, atol=1e-6)


def test_a_callers_array_of_log_probs_may_be_reused():
    envs, buffer = make_vec(2), np.zeros(2)
    envs.reset(seed=0)
    envs.begin_rollout()
    for value in (-1.0, -2.0):
        buffer[:] = value
        envs.step(np.array([GOOD, FILM]), buffer)
    scores = envs.scores()
    np.testing.assert_allclose(scores.kl + scores.ref_log_prob, [[-1.0] * 2, [-2.0] * 2], atol=1e-5)


def test_deferred_scoring_is_switched_and_asked_for_in_order():
    envs = make_vec(2)
    envs.reset()
    assert not envs.scoring_deferred
    with pytest.raises(RuntimeError, match="no step was recorded"):
        envs.scores()
    envs.begin_rollout()
    with pytest.raises(RuntimeError, match="no step was recorded"):
        envs.scores()
    envs.step(np.array([GOOD, FILM]))
    envs.step(np.array([GOOD, FILM]))
    with pytest.raises(RuntimeError, match="2 steps wait to be scored"):
        envs.end_rollout()
    with pytest.raises(RuntimeError, match="reset of some rows with steps in the record"):
        envs.reset(options={"reset_mask": np.array([True, False])})
    assert envs.scores().rewards.shape == (2, 2)
    envs.end_rollout()
    assert not envs.scoring_deferred


def test_prompts_of_episodes_that_begin_while_scoring_is_deferred_are_scored_when_it_is_needed():
    asked = []

    def length(completions, **_):
        asked.append(list(completions))
        return [0.5 + len(text) for text in completions]

    envs, instant = make_vec(2, reward=length, kl_coef=0), make_vec(2, reward=length, kl_coef=0)
    for env in (envs, instant):
        env.reset(seed=0)
    envs.begin_rollout()
    for env in (envs, instant):
        env.step(np.array([GOOD, EOS]))  # the second row begins anew
    envs.scores()
    asked.clear()
    envs.end_rollout()
    assert not asked
    actions = np.array([FILM, GOOD])
    rewards = [env.step(actions)[1] for env in (envs, instant)]
    np.testing.assert_allclose(*rewards)
    assert asked[0] == [""], "Φ of the prompt in the second row"
    state = envs.state_dict()
    np.testing.assert_allclose(state["potential"], instant.state_dict()["potential"])

    envs.begin_rollout()
    envs.step(np.array([EOS, EOS]))
    envs.scores()
    envs.end_rollout()
    asked.clear()
    again = make_vec(2, reward=length, kl_coef=0)
    again.load_state_dict(envs.state_dict())
    assert not asked, "a state asks for nothing"
    np.testing.assert_allclose(*(env.step(actions)[1] for env in (envs, again)))
    np.testing.assert_allclose(again.step(np.array([GOOD, GOOD]))[1], envs.step(np.array([GOOD, GOOD]))[1])


def test_a_full_reset_gives_up_what_waits_to_be_scored():
    broken = [True]

    def moody(completions, **_):
        if broken[0]:
            raise OSError("the judge is out")
        return [float(len(c)) for c in completions]

    envs = make_vec(2, reward=moody, kl_coef=0)
    envs.begin_rollout()
    envs.reset(seed=0)
    envs.step(np.array([GOOD, EOS]))
    for _ in range(2):  # asking again is not another question
        with pytest.raises(RewardError, match="the judge is out"):
            envs.scores()
    broken[0] = False
    envs.reset(seed=0)
    envs.step(np.array([GOOD, EOS]))
    scores = envs.scores()
    assert scores.rewards.tolist() == [[5.0, 0.0]]
    assert len(scores.episodes) == 1


@pytest.mark.parametrize("more", [0, 2, 6])
def test_scoring_that_failed_can_be_asked_for_again(more):
    broken = [False]

    def moody(prompts, completions, **_):
        if broken[0]:
            raise OSError("the judge is out")
        return text_score(prompts, completions)

    now, later = make_vec(3), make_vec(3, reward=moody)
    rng, paid, scored = np.random.default_rng(0), [], []
    for envs in (now, later):
        envs.reset(seed=0)
    later.begin_rollout()

    def play(steps):
        for _ in range(steps):
            actions, log_probs = random_actions(rng, now, eos_weight=0)
            paid.append(now.step(actions, log_probs)[1])
            later.step(actions, log_probs)

    play(2)
    scored.extend(later.scores().rewards)
    play(3)
    broken[0] = True
    with pytest.raises(RewardError, match="the judge is out"):
        later.scores()
    play(more)
    broken[0] = False
    scored.extend(later.scores().rewards)
    np.testing.assert_allclose(scored, paid, atol=1e-4)


# --- what it costs


class Forwards:
    """``(B, T)`` of what goes through a model's trunk."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def take(self) -> list[tuple[int, int]]:
        taken, self.shapes = self.shapes, []
        return taken


@pytest.fixture
def counted():
    """Models of an environment's own, and counters of their forwards."""
    model, reward = tiny_model("llama"), tiny_causal_reward_model()
    options = {
        "language_model": LanguageModel(model, tiny_tokenizer()),
        "reward": CausalRewardModel(reward, tiny_tokenizer()),
        "max_new_tokens": 20,
    }
    return options, Forwards(model), Forwards(reward)


@pytest.mark.parametrize("masking", [{}, {"action_masking": True, "top_k": 30, "top_p": 0.95}], ids=["plain", "top-k"])
def test_an_instant_step_is_one_forward_of_one_token_for_each_model(counted, masking):
    options, reference, reward = counted
    envs = make_vec(6, **options, **masking)
    envs.reset(seed=0)
    envs.step(np.full(6, GOOD))  # the first step reads the prompts
    reference.take(), reward.take()
    for _ in range(9):
        envs.step(np.full(6, FILM))
        assert reference.take() == [(6, 1)]
        assert reward.take() == [(6, 1)]
    envs.step(np.array([EOS, *[FILM] * 5]))
    envs.step(np.full(6, FILM))
    # Two steps, and one new prompt, read when it begins or at the step after.
    assert sum(rows * tokens for rows, tokens in reference.take()) <= 2 * 6 + 7 + 1


def test_nobody_asks_what_could_follow_a_finished_text(counted):
    options, reference, _ = counted
    envs = make_vec(2, **options, action_masking=True, top_k=30, autoreset_mode="Disabled")
    envs.reset(seed=0)
    envs.step(np.full(2, GOOD))
    reference.take()
    *_, infos = envs.step(np.full(2, EOS))
    assert reference.take() == []
    assert infos["action_mask"].sum(1).tolist() == [V - 3] * 2  # the special tokens are masked as ever


def test_the_reward_model_reads_only_where_a_score_is_due(counted):
    options, _, reward = counted
    envs = make_vec(2, **options, reward_every=4)
    envs.reset(seed=0)
    reward.take()
    shapes = []
    for _ in range(8):
        envs.step(np.full(2, FILM))
        shapes.append(reward.take())
    assert shapes == [[], [], [], [(2, 4)]] * 2


def test_deferred_scoring_is_a_few_passes_however_many_steps(counted):
    options, reference, reward = counted
    envs, rng = make_vec(6, **options), np.random.default_rng(0)
    envs.reset(seed=0)
    envs.begin_rollout()
    reference.take(), reward.take()
    for _ in range(40):
        envs.step(*random_actions(rng, envs))
    assert reference.take() == reward.take() == []
    envs.scores()
    assert len(reference.take()) == len(reward.take()) == 1


# --- action masks


def expected_mask(
    row: list[int], taken: int, options: dict[str, Any], temperature: float = 1.0
) -> tuple[set[int], list[tuple[int, float]]]:
    """Which tokens the options allow after a row of tokens, and the candidates with their probabilities, from the
    definition."""
    ordinary = [t for t in range(V) if t not in (PAD, BOS, UNK)]
    if taken < options.get("min_new_tokens", 0):
        ordinary.remove(EOS)
    with torch.no_grad():
        logits = LANGUAGE_MODEL.model(input_ids=torch.tensor([row])).logits[0, -1].double() / temperature
    weights = {t: float(logits[t].exp()) for t in ordinary}
    total = sum(weights.values())
    ranked = sorted(((w / total, t) for t, w in weights.items()), reverse=True)
    most = options.get("top_k", 0) or V
    allowed, mass = set(), 0.0
    for rank, (p, t) in enumerate(ranked):
        if rank < most and mass < options.get("top_p", 1.0):
            allowed.add(t)
        mass += p
    return allowed, [(t, p) for p, t in ranked]


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
@pytest.mark.parametrize(
    "restriction",
    [
        {},
        {"min_new_tokens": 3},
        {"top_k": 5},
        {"top_k": 62},
        {"top_p": 0.7},
        {"top_p": 0.01},
        {"top_k": 6, "top_p": 0.8, "min_new_tokens": 2},
    ],
    ids=str,
)
def test_masks_allow_what_the_definition_says(restriction, temperature):
    envs = make_vec(3, action_masking=True, temperature=temperature, **restriction)
    rng = np.random.default_rng(0)
    observation, infos = envs.reset(seed=0)
    for _ in range(5):
        masks = envs.action_masks()
        assert masks.shape == (3, V)
        assert masks.dtype == bool
        assert masks.any(1).all()
        assert infos["action_mask"].dtype == np.int8
        np.testing.assert_array_equal(infos["action_mask"], masks)
        assert infos["_action_mask"].all()
        for i in range(3):
            row = observation["input_ids"][i][observation["attention_mask"][i] == 1].tolist()
            taken = len(row) - int(observation["prompt_length"][i, 0])
            allowed, _ = expected_mask(row, taken, restriction, temperature)
            assert set(np.flatnonzero(masks[i])) == allowed
        observation, *_, infos = envs.step(*random_actions(rng, envs))
    if restriction == {"top_p": 0.01}:
        assert (masks.sum(1) == 1).all()


def test_a_peaked_distribution_does_not_shrink_top_k():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # all the probability that float32 can tell from 1 is on one token
    envs = make_vec(2, language_model=LanguageModel(model, TOKENIZER), action_masking=True, top_k=10)
    envs.reset(seed=0)
    assert envs.action_masks().sum(1).tolist() == [10, 10]


def test_without_masking_there_are_no_masks():
    envs = make_vec(2)
    _, infos = envs.reset()
    assert "action_mask" not in infos
    assert "action_mask" not in envs.step(np.array([GOOD, FILM]))[4]
    with pytest.raises(ValueError, match="action_masking=True"):
        envs.action_masks()


def test_masks_belong_to_whoever_asked_for_them():
    envs = make_vec(2, **MASKING)
    _, infos = envs.reset(seed=0)
    first = envs.action_masks()
    infos["action_mask"][:] = 1
    first[:] = True
    assert not envs.action_masks().all()
    *_, later = envs.step(np.array([GOOD, FILM]))
    assert later["action_mask"] is not infos["action_mask"]


def test_restricting_by_the_model_works_without_a_penalty():
    envs = make_vec(2, kl_coef=0, action_masking=True, top_k=4)
    observation, infos = envs.reset(seed=0)
    row = observation["input_ids"][0][observation["attention_mask"][0] == 1].tolist()
    assert set(np.flatnonzero(infos["action_mask"][0])) == expected_mask(row, 0, {"top_k": 4})[0]
    assert "kl" not in envs.step(infos["action_mask"].argmax(1))[4]


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
