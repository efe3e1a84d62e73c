"""Divergence ends training before it reaches the weights, a checkpoint, or what a run keeps of its models."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_agents import tiny_language_model, tiny_vector_env

from textgym.agents import (
    A2C,
    DPO,
    GRPO,
    NLPO,
    PPO,
    REINFORCE,
    RLOO,
    SARSA,
    TRPO,
    DivergedError,
    ExpertIteration,
    QLearning,
    SoftQLearning,
    TrainingCheckpoints,
)
from textgym.agents.callbacks.checkpoints import read_latest, training_state
from textgym.envs import TextGenEnv
from textgym.rewards import PrefixBatch, Reward, RewardError

AGENTS = [A2C, DPO, GRPO, NLPO, PPO, REINFORCE, RLOO, SARSA, TRPO, ExpertIteration, QLearning, SoftQLearning]


def made(agent: type[Any], env: Any = None, **arguments: Any) -> Any:
    arguments = {"seed": 0, "device": "cpu", **arguments}
    if "episodes" not in arguments and agent in (PPO, A2C, NLPO, TRPO):
        arguments.setdefault("n_steps", 8)
    return agent("LanguageModelPolicy", tiny_vector_env() if env is None else env, **arguments)


def assert_finite(model: Any) -> None:
    assert all(torch.isfinite(value).all() for value in model.policy.state_dict().values())


class Overridden(Reward):
    """Φ as a reward says that computes it itself: 0 at first and then another value."""

    def __init__(self, value: float, after: int = 0) -> None:
        self.value, self.left = value, after

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        raise NotImplementedError

    def potentials(self, batch: PrefixBatch) -> np.ndarray:
        self.left -= len(batch)
        return np.where(batch.completion_lengths > 0, self.value if self.left < 0 else 0.0, 0.0)

    def prefix_potentials(self, batch: PrefixBatch, at: Any) -> list[np.ndarray]:
        self.left -= len(batch)
        return [np.where(np.asarray(row) > 0, self.value if self.left < 0 else 0.0, 0.0) for row in at]


@pytest.mark.parametrize("agent", AGENTS)
def test_a_model_that_is_nan_from_the_start_is_told(agent: type[Any]) -> None:
    model = made(agent)
    with torch.no_grad():
        next(model.policy.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(DivergedError, match=r"diverged at step \d+: "):
        model.learn(64)


@pytest.mark.parametrize("agent", AGENTS)
def test_rewards_that_overflow_in_the_loss_leave_the_weights_as_they_were(agent: type[Any]) -> None:
    def extreme(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [1.5e38 * (-1) ** len(text) for text in completions]

    model = made(agent, tiny_vector_env(reward=extreme))
    # Those that compare completions with each other may learn from such rewards, too.
    told = agent not in (ExpertIteration, DPO, GRPO, RLOO)
    with pytest.raises(DivergedError, match=r"diverged at step \d+: ") if told else contextlib.suppress(DivergedError):
        model.learn(64)
    assert_finite(model)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, -3e38, 1e300])
@pytest.mark.parametrize("scoring", ["deferred", "instant"])
def test_what_an_overriding_reward_says_is_judged_where_it_enters(value: float, scoring: str) -> None:
    model = made(PPO, tiny_vector_env(reward=Overridden(value)), scoring=scoring)
    with pytest.raises(RewardError, match="Overridden"):
        model.learn(32)
    assert_finite(model)


def test_a_single_environment_pays_no_nan() -> None:
    env = TextGenEnv(
        language_model=tiny_language_model(), prompts=["this"], reward=Overridden(np.nan), max_new_tokens=4
    )
    env.reset(seed=0)
    with pytest.raises(RewardError, match="Overridden"):
        env.step(7)


@pytest.mark.parametrize("result", [[0.0, 0.0, 0.0], None, "nothing", [[0.0]] * 4])
def test_potentials_of_a_wrong_kind_are_named(result: Any) -> None:
    class Wrong(Overridden):
        def potentials(self, batch: PrefixBatch) -> Any:
            return result

    with pytest.raises(RewardError, match="potentials"):
        tiny_vector_env(reward=Wrong(0.0)).reset(seed=0)


@pytest.mark.parametrize("agent", [PPO, GRPO, TRPO, QLearning])
def test_weights_that_ran_away_never_become_a_checkpoint(agent: type[Any], tmp_path: Path) -> None:
    def explode(remaining: float) -> float:
        return 1e-3 if remaining > 0.8 else 1e30

    model = made(agent, learning_rate=explode)
    keep = TrainingCheckpoints(tmp_path, every=1)
    with pytest.raises(DivergedError, match=r"diverged at step \d+: "):
        model.learn(320, callback=keep)
    _, state = read_latest(tmp_path)
    model.policy.load_state_dict(state["policy"], strict=False)
    model.check_finite()


def test_weights_that_are_nan_after_the_last_update_are_told() -> None:
    class Careless(PPO):
        def train(self) -> None:
            super().train()
            with torch.no_grad():
                self.policy.value_net.weight.fill_(torch.nan)

    with pytest.raises(DivergedError, match=r"diverged at step 128: the weights value_net"):
        made(Careless, n_steps=32).learn(128)


@pytest.mark.parametrize("part", ["", "embed_tokens", "lm_head", "norm"])
@pytest.mark.parametrize("agent", [PPO, QLearning])
def test_huge_weights_that_are_finite_never_become_a_checkpoint(agent: type[Any], part: str) -> None:
    model = made(agent)
    model.learn(32)
    with torch.no_grad():
        for name, parameter in model.policy.named_parameters():
            if part in name:
                parameter.copy_(parameter.sign() * 1e38)
    with pytest.raises(DivergedError, match=r"diverged at step \d+: the weights .* are as large as 1e\+38"):
        training_state(model)


def test_a_checkpoint_is_of_a_model_whose_logits_are_finite() -> None:
    model = made(PPO)
    model.learn(32)
    with torch.no_grad():
        model.policy.language_model.model.lm_head.weight.fill_(1e19)
        model.policy.language_model.model.model.norm.weight.fill_(1e19)
        model.policy.language_model.model.model.norm.weight[0] = -1e19
    model.policy.forget_cached()
    with pytest.raises(DivergedError, match=r"diverged at step \d+: what the policy says of a text is not finite"):
        training_state(model)
