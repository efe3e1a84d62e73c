"""Rounds of episodes: a fixed number of whole ones, several of each prompt, over rows that take the next when free."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from text_envs import REWARDS, make_vec
from tiny_models import EOS

MASKS = {"action_masking": True}


def actions_of(env: Any, generator: np.random.Generator, ends: float = 0.3) -> np.ndarray:
    """Random tokens; each row's is the end of its text with some probability."""
    tokens = generator.integers(5, env.vocab_size, env.num_envs)
    return np.where(generator.random(env.num_envs) < ends, EOS, tokens)


def finished_episodes(env: Any, seed: int = 0) -> tuple[list[tuple[int, str]], list[np.ndarray]]:
    """Play the round to its end: (number, prompt) of every episode in the order of their ends, and all rewards."""
    generator = np.random.default_rng(seed)
    ended, rewards = [], []
    while (env.episode_numbers >= 0).any():
        numbers = env.episode_numbers
        _, reward, terminated, truncated, infos = env.step(actions_of(env, generator))
        rewards.append(reward)
        for row in np.flatnonzero(terminated | truncated):
            ended.append((int(numbers[row]), infos["final_info"]["prompt"][row]))
    return ended, rewards


@pytest.mark.parametrize(("rows", "episodes", "group_size"), [(4, 4, 2), (3, 12, 4), (2, 7, 1), (1, 3, 3)])
def test_every_episode_of_a_round_is_played_once_and_groups_share_their_prompt(rows, episodes, group_size):
    env = make_vec(rows, prompts=[f"film {i}" for i in range(100)])
    env.reset(seed=3)
    observation = env.begin_round(episodes, group_size)
    assert (observation["prompt_length"] > 0).all()
    ended, _ = finished_episodes(env)
    assert sorted(number for number, _ in ended) == list(range(episodes))
    of_group: dict[int, set[str]] = {}
    for number, prompt in ended:
        of_group.setdefault(number // group_size, set()).add(prompt)
    assert all(len(prompts) == 1 for prompts in of_group.values())
    assert len(set.union(*of_group.values())) > 1 or episodes == group_size


def test_a_row_without_a_next_episode_waits():
    env = make_vec(3, max_new_tokens=4)
    env.reset(seed=0)
    env.begin_round(3)
    tokens = np.array([5, 5, 5])
    env.step(np.array([EOS, 5, 5]))
    before = env.observation()
    for _ in range(3):
        observation, reward, terminated, truncated, infos = env.step(tokens)
        assert reward[0] == 0.0
        assert not terminated[0]
        assert not truncated[0]
        assert (observation["input_ids"][0] == before["input_ids"][0]).all()
        assert not infos.get("_reward_model", np.zeros(3, dtype=bool))[0]
        assert env.episode_numbers[0] == -1
    assert truncated[1:].all()
    assert (env.episode_numbers == -1).all()
    with pytest.raises(ResetNeeded, match="all 3 episodes of the round"):
        env.step(tokens)


@pytest.mark.parametrize("name", list(REWARDS))
def test_a_round_is_scored_the_same_at_once_and_at_its_end(name):
    options = {"reward": REWARDS[name], "max_new_tokens": 5}
    instant, deferred = make_vec(3, **options), make_vec(3, **options)
    instant.reset(seed=1)
    deferred.reset(seed=1)
    deferred.begin_rollout()
    instant.begin_round(8, 2)
    deferred.begin_round(8, 2)
    _, rewards = finished_episodes(instant)
    finished_episodes(deferred)
    scores = deferred.scores()
    np.testing.assert_allclose(np.stack(rewards), scores.rewards, atol=1e-4)
    assert len(scores.episodes) == 8


def test_prompts_of_a_round_are_reproducible_and_go_on_where_the_last_round_ended():
    def prompts(rounds: int) -> list[str]:
        env = make_vec(4, prompts=[f"film {i}" for i in range(1000)])
        env.reset(seed=5)
        seen = []
        for _ in range(rounds):
            env.begin_round(8, 2)
            seen += [prompt for _, prompt in sorted(finished_episodes(env)[0])]
        return seen

    assert prompts(2) == prompts(2)
    assert max(Counter(prompts(2)).values()) == 2


def test_the_state_in_the_middle_of_a_round_goes_on_exactly():
    first, second = make_vec(2, max_new_tokens=6), make_vec(2, max_new_tokens=6)
    for env in (first, second):
        env.reset(seed=0)
    first.begin_round(6, 3)
    generator = np.random.default_rng(1)
    for _ in range(4):
        first.step(actions_of(first, generator))
    second.load_state_dict(first.state_dict())
    assert finished_episodes(first, seed=2)[0] == finished_episodes(second, seed=2)[0]


def test_masks_of_a_waiting_row_stay_and_those_of_others_follow():
    env = make_vec(2, max_new_tokens=4, min_new_tokens=2, **MASKS)
    env.reset(seed=0)
    env.begin_round(2)
    env.step(np.array([5, 5]))
    env.step(np.array([5, 5]))
    env.step(np.array([EOS, 5]))
    assert env.action_masks()[1, EOS]


def test_reset_ends_a_round():
    env = make_vec(2)
    env.reset(seed=0)
    env.begin_round(2)
    env.step(np.array([EOS, 5]))
    env.reset()
    assert not env.in_round
    _, _, terminated, _, _ = env.step(np.array([EOS, EOS]))
    assert terminated.all()
    env.step(np.array([5, 5]))  # rows begin anew by themselves again


def test_what_cannot_be_a_round_is_refused():
    env = make_vec(4)
    with pytest.raises(ResetNeeded, match="begin_round before reset"):
        env.begin_round(4)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="episodes=6 must be a multiple of group_size=4"):
        env.begin_round(6, 4)
    with pytest.raises(ValueError, match="episodes=2 is less than num_envs=4"):
        env.begin_round(2)
    with pytest.raises(ValueError, match="both at least 1"):
        env.begin_round(4, 0)
    env.begin_round(4)
    env.step(np.array([EOS, 5, 5, 5]))
    with pytest.raises(RuntimeError, match="within a round"):
        env.reset(options={"reset_mask": np.array([True, False, False, False])})
    env.end_round()
    with pytest.raises(ResetNeeded, match="row 0 has finished with the round"):
        env.step(np.array([5, 5, 5, 5]))
    other = make_vec(2, autoreset_mode=AutoresetMode.NEXT_STEP)
    other.reset(seed=0)
    with pytest.raises(ValueError, match="autoreset_mode"):
        other.begin_round(2)
    waiting = make_vec(2)
    waiting.reset(seed=0)
    waiting.begin_rollout()
    waiting.step(np.array([5, 5]))
    with pytest.raises(RuntimeError, match="1 steps are in the record"):
        waiting.begin_round(2)
