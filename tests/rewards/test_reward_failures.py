"""A reward that fails for a while costs a training nothing but time."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny_agents import count_liked, tiny_env, tiny_vector_env

from textgym.agents import DPO, GRPO, PPO, QLearning
from textgym.rewards import RewardError


class Failing:
    """A reward that raises from its second to its third call."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.calls = fails, 0

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        if self.fails and self.calls in (2, 3):
            raise ConnectionError("the server is away")
        return count_liked(prompts, completions)


def trained(agent: type[Any], fails: bool, arguments: dict[str, Any]) -> tuple[Any, int]:
    model = agent("LanguageModelPolicy", tiny_vector_env(reward=Failing(fails)), seed=0, device="cpu", **arguments)
    failures, first = 0, True
    while first or model.num_timesteps < 96:
        try:
            model.learn(96 - model.num_timesteps, reset_num_timesteps=first)
        except RewardError:
            failures += 1
        first = False
    return model, failures


@pytest.mark.parametrize(
    ("agent", "arguments"),
    [
        (PPO, {"n_steps": 8}),
        (PPO, {"n_steps": 8, "whole_episodes": True, "policy_kwargs": {"rollout_dtype": "bfloat16"}}),
        (GRPO, {"group_size": 2}),
        (DPO, {"group_size": 2}),
        (QLearning, {}),
        (PPO, {"n_steps": 8, "scoring": "instant"}),
        (GRPO, {"group_size": 2, "scoring": "instant"}),
        (QLearning, {"scoring": "instant"}),
    ],
)
def test_a_rollout_whose_reward_fails_is_learned_from_later(agent: type[Any], arguments: dict[str, Any]) -> None:
    undisturbed, none = trained(agent, False, arguments)
    disturbed, failures = trained(agent, True, arguments)
    assert (none, failures) == (0, 2)
    assert disturbed.num_timesteps == undisturbed.num_timesteps
    assert disturbed._n_updates == undisturbed._n_updates
    for name, value in undisturbed.policy.state_dict().items():
        assert torch.equal(value, disturbed.policy.state_dict()[name]), name


def test_learning_anew_gives_up_what_was_not_scored() -> None:
    model = PPO("LanguageModelPolicy", tiny_vector_env(reward=Failing(True)), n_steps=8, seed=0, device="cpu")
    with pytest.raises(RewardError):
        model.learn(96)
    with pytest.raises(RewardError):
        model.learn(96)  # begins anew, and fails again
    model.learn(32)
    assert model.num_timesteps == 32


@pytest.mark.parametrize("failing", [2, 5, 6])
def test_a_step_whose_reward_fails_can_be_taken_again(failing: int) -> None:
    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == failing:
            raise ConnectionError("the server is away")
        return count_liked(prompts, completions)

    def stepped(fails: bool) -> list[Any]:
        calls[:] = [] if fails else [0] * failing
        options = {"kl_coef": 0.1, "max_new_tokens": 3, "stop": ["good film"], "action_masking": True}
        envs = tiny_vector_env(reward=reward, **options).unwrapped
        envs.reset(seed=0)
        found, actions, failures = [], np.random.default_rng(0).integers(4, 20, (8, envs.num_envs)), 0
        for tokens in actions:
            while True:
                try:
                    found.append(envs.step(tokens, log_probs=np.full(envs.num_envs, -1.0)))
                    break
                except RewardError:
                    failures += 1
            found[-1] = [*found[-1][:4], envs.action_masks(), envs.token_ids]
        assert failures == int(fails)
        return found

    calls: list[int] = []
    for undisturbed, disturbed in zip(stepped(False), stepped(True), strict=True):
        observations = (undisturbed[0], disturbed[0])
        for name in observations[0]:
            np.testing.assert_array_equal(observations[0][name], observations[1][name])
        for one, other in zip(undisturbed[1:], disturbed[1:], strict=True):
            assert one == other if isinstance(one, tuple) else np.array_equal(one, other)


def test_single_environments_begin_anew_after_a_failure() -> None:
    """Some rows have taken the step and others have not; what the agent sees is what they see."""
    vec = DummyVecEnv([lambda: tiny_env(reward=Failing(True)) for _ in range(2)])
    model = PPO("LanguageModelPolicy", vec, n_steps=8, seed=0, device="cpu")
    with pytest.raises(RewardError):
        model.learn(32)
    assert model.num_timesteps == 0
    while model.num_timesteps < 32:
        with contextlib.suppress(RewardError):
            model.learn(32 - model.num_timesteps, reset_num_timesteps=False)
    assert model.num_timesteps == 32
    assert model._last_obs is not None
    for row, ids in enumerate(vec.get_attr("token_ids")):
        seen = model._last_obs["input_ids"][row][model._last_obs["attention_mask"][row] == 1]
        assert seen.tolist() == list(ids)
