"""TextGen-v0 with many rows: both schedules of scoring pay the same, and what a rollout's record holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from text_envs import SETTINGS, every_setting, ids, make_vec, random_actions, text_score
from tiny_models import EOS

from textgym.rewards import RewardError

GOOD, FILM = ids("good film")


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
