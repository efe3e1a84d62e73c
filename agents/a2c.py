"""Advantage actor-critic, the on-policy agent without ratios: one step on each rollout.

It is Stable-Baselines3's A2C with the log-probs, entropies and values of one teacher-forced forward over each episode.
Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", https://arxiv.org/abs/1602.01783.
"""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule

from textgym.agents.buffers.episode_buffer import SegmentSamples
from textgym.agents.common.exploration import Exploration
from textgym.agents.common.losses import Loss, policy_gradient, value_loss
from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.policy.language_model_policy import LanguageModelPolicy


class A2C(TextOnPolicyAlgorithm):
    """A2C for text environments: log-probabilities weighted by advantages, with a value head as critic.

    Arguments are those of :class:`~textgym.agents.common.on_policy.TextOnPolicyAlgorithm`, which PPO shares, with the
    defaults that SB3's A2C has for λ and the advantages. The optimizer is Adam, and not SB3's RMSprop, which
    ``policy_kwargs=dict(optimizer_class=torch.optim.RMSprop, optimizer_kwargs=dict(alpha=0.99, eps=1e-5))`` gives. ::

        >>> import gymnasium as gym, textgym
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> textgym.agents.A2C("LanguageModelPolicy", vec, n_steps=4, seed=0).learn(16).num_timesteps
        16

    :param n_steps: tokens per row and rollout, T; the update is one step on all of them
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        learning_rate: float | Schedule = 1e-4,
        n_steps: int = 32,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        normalize_advantage: bool | str = False,
        ent_coef: float = 0.0,
        vf_coef: float = 0.1,
        max_grad_norm: float = 1.0,
        whiten_rewards: bool = False,
        bootstrap_truncated: bool = False,
        scoring: str = "auto",
        exploration: Exploration | None = None,
        importance_cap: float | None = 2.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            whiten_rewards=whiten_rewards,
            bootstrap_truncated=bootstrap_truncated,
            scoring=scoring,
            exploration=exploration,
            importance_cap=importance_cap,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def loss(self, batch: SegmentSamples) -> Loss:
        """Policy gradient, value loss and entropy bonus."""
        values, log_prob, entropy = self.policy.evaluate_segments(batch, self.ent_coef != 0.0)
        policy_loss = policy_gradient(log_prob, self.normalized(batch.advantages), batch.importance).mean()
        critic_loss = value_loss(batch.returns, values.flatten())
        entropy_loss = -entropy.mean()
        loss = policy_loss + self.vf_coef * critic_loss
        if self.ent_coef != 0.0:
            loss = loss + self.ent_coef * entropy_loss
        return Loss(loss, {"policy_loss": policy_loss, "value_loss": critic_loss, "entropy_loss": entropy_loss})
