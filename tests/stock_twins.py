"""Stable-Baselines3's own PPO with a copy of our policy and of its rollout, to compare updates with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.logger import Logger
from tiny_agents import tiny_language_model, tiny_ppo, tiny_vector_env

from textgym.agents import PPO, LanguageModelPolicy
from textgym.envs.sb3 import TextGenVecEnv

KEYS = (
    "train/loss",
    "train/policy_gradient_loss",
    "train/value_loss",
    "train/entropy_loss",
    "train/approx_kl",
    "train/clip_fraction",
    "train/explained_variance",
    "train/n_updates",
    "train/clip_range",
    "train/learning_rate",
)


def with_rollout(env: Any, scale: float = 0.02, **arguments: Any) -> PPO:
    """An agent with a rollout that it has not learned from, whose policy isn't the one that collected it any more.

    :param scale: of the steps away from the old policy, so that ratios and values are clipped here and there
    """
    model = tiny_ppo(env, **{"n_steps": 20, "batch_size": 80, "n_epochs": 1, "learning_rate": 1e-3, **arguments})
    with torch.no_grad():
        for parameter in model.policy.value_net.parameters():
            parameter.normal_(std=0.1)
    callback = model._setup_learn(1000)[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def stock_twin(model: PPO) -> sb3.PPO:
    """Stable-Baselines3's PPO with a copy of the policy and the same rollout as single steps."""
    twin = sb3.PPO(
        LanguageModelPolicy,
        TextGenVecEnv(tiny_vector_env(4)),
        learning_rate=model.learning_rate,
        n_steps=model.n_steps,
        batch_size=model.n_steps * model.n_envs,
        n_epochs=model.n_epochs,
        clip_range_vf=None if model.clip_range_vf is None else model.clip_range_vf(1.0),
        clip_range=model.clip_range(1.0),
        normalize_advantage=model.normalize_advantage is True,
        ent_coef=model.ent_coef,
        vf_coef=model.vf_coef,
        max_grad_norm=model.max_grad_norm,
        target_kl=model.target_kl,
        policy_kwargs={"language_model": tiny_language_model()},
        device="cpu",
    )
    twin.policy = copy.deepcopy(model.policy)
    twin.rollout_buffer = model.rollout_buffer.as_single_steps()
    return twin


def train(model: Any) -> tuple[dict[str, Any], list[list[torch.Tensor]]]:
    """Update, and return what was logged and the clipped gradients of every optimizer step."""
    model.set_logger(Logger(None, []))
    gradients = []
    step = model.policy.optimizer.step

    def kept_step() -> None:
        gradients.append([p.grad.clone() for p in model.policy.parameters()])
        step()

    model.policy.optimizer.step = kept_step
    model.train()
    return dict(model.logger.name_to_value), gradients


def assert_same_update(model: PPO, twin: sb3.PPO) -> None:
    ours, our_gradients = train(model)
    theirs, their_gradients = train(twin)
    for key in KEYS:
        assert ours[key] == pytest.approx(theirs[key], rel=2e-5, abs=1e-6), key
    assert len(our_gradients) == len(their_gradients)
    for ours_at_step, theirs_at_step in zip(our_gradients, their_gradients, strict=True):
        scale = max(float(g.abs().max()) for g in theirs_at_step)
        assert scale > 1e-3
        for ours_of, theirs_of in zip(ours_at_step, theirs_at_step, strict=True):
            torch.testing.assert_close(ours_of, theirs_of, rtol=1e-4, atol=1e-5 * scale)
    for ours_of, theirs_of in zip(model.policy.parameters(), twin.policy.parameters(), strict=True):
        torch.testing.assert_close(ours_of, theirs_of, rtol=1e-5, atol=1e-2 * model.learning_rate)
