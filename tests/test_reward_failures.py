"""A reward that fails for a while costs a training nothing but time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_agents import count_liked, tiny_vector_env

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
