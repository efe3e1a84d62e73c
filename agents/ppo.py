"""Proximal policy optimisation of a language model, token by token.

It is Stable-Baselines3's PPO: the same arguments, rollouts, advantages and loss. What differs is how the loss
is computed: the log-probs, entropies and values of a minibatch come from one teacher-forced forward over its
episodes rather than from one forward over the whole prefix of every token. On the same rollout and the same
minibatches both give the same gradients. In several processes (:mod:`textgym.agents.distributed`) a minibatch is that
of all of them: ``self.processes`` exchanges what has to be known of the others.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347; for text,
Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", https://arxiv.org/abs/1909.08593.
"""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

from textgym.agents.buffers.episode_buffer import SegmentSamples
from textgym.agents.common.arguments import LearningArguments
from textgym.agents.common.exploration import Exploration
from textgym.agents.common.losses import Loss, clipped_surrogate, ratio_figures, value_loss
from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_schedule

DEFAULT_BATCH_SIZE = 512  # tokens


class PPOArguments(LearningArguments, total=False):
    """PPO's constructor arguments besides ``policy`` and ``env``, for what derives from it."""

    n_steps: int
    gae_lambda: float
    clip_range: float | Schedule
    clip_range_vf: float | Schedule | None
    normalize_advantage: bool | str
    vf_coef: float
    bootstrap_truncated: bool
    whole_episodes: bool


class PPO(TextOnPolicyAlgorithm):
    """PPO with clipped ratios for text environments.

    Arguments have the names and the meaning they have in Stable-Baselines3; a step is a token. ::

        >>> import gymnasium as gym, textgym
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> model = textgym.agents.PPO("LanguageModelPolicy", vec, n_steps=4, seed=0).learn(16)
        >>> model.num_timesteps
        16

    :param policy: ``"LanguageModelPolicy"`` or a subclass of
        :class:`~textgym.agents.policy.language_model_policy.LanguageModelPolicy`
    :param env: an id, a Gymnasium environment or vector environment, or a ``VecEnv``
    :param learning_rate: a number, or a function of the remaining progress (1 to 0)
    :param n_steps: tokens per row and rollout, T
    :param batch_size: tokens per minibatch and process, as nearly as whole episodes allow; default 512, or the whole
        rollout if that is smaller
    :param n_epochs: passes over a rollout
    :param gamma: discount per token
    :param gae_lambda: λ of generalised advantage estimation
    :param clip_range: ratios are clipped to 1 ± this; a number or a function of the remaining progress
    :param clip_range_vf: values are clipped to this much around the old ones; None for no clipping
    :param normalize_advantage: True: per minibatch, as SB3; ``"rollout"``: once over the rollout, with the
        biased variance; False: not at all
    :param ent_coef: weight of the entropy bonus
    :param vf_coef: weight of the value loss
    :param max_grad_norm: gradients are scaled down to this norm
    :param target_kl: stop the update when the new policy is 1.5 times this far from the old one, in nats per
        token
    :param whiten_rewards: see :class:`TextOnPolicyAlgorithm`
    :param bootstrap_truncated: see :class:`TextOnPolicyAlgorithm`
    :param whole_episodes: see :class:`TextOnPolicyAlgorithm`
    :param scoring: see :class:`TextOnPolicyAlgorithm`
    :param exploration: see :class:`TextOnPolicyAlgorithm`
    :param importance_cap: see :class:`TextOnPolicyAlgorithm`
    :param stats_window_size: episodes that ``rollout/*`` are averaged over
    :param tensorboard_log: where TensorBoard logs go
    :param policy_kwargs: further arguments of the policy, such as ``value_head`` or a ``language_model`` of
        its own
    :param verbose: 0, 1 or 2
    :param seed: of everything random
    :param device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda:1"`` ...
    :param _init_setup_model: whether to build the networks now
    :raises ValueError: if a hyperparameter is impossible
    """

    clip_range: Any  # a schedule, once the networks are built
    clip_range_vf: Any

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        learning_rate: float | Schedule = 1e-4,
        n_steps: int = 32,
        batch_size: int | None = None,
        n_epochs: int = 4,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool | str = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.1,
        max_grad_norm: float = 1.0,
        target_kl: float | None = None,
        whiten_rewards: bool = False,
        bootstrap_truncated: bool = False,
        whole_episodes: bool = False,
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
        check_schedule("clip_range", clip_range, open_low=True)
        if clip_range_vf is not None:
            check_schedule("clip_range_vf", clip_range_vf, open_low=True)
        vec_env = self.make_vec_env(env)
        if batch_size is None:
            batch_size = DEFAULT_BATCH_SIZE if vec_env is None else min(DEFAULT_BATCH_SIZE, n_steps * vec_env.num_envs)
        self.clip_range, self.clip_range_vf = clip_range, clip_range_vf
        super().__init__(
            policy,
            vec_env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            target_kl=target_kl,
            whiten_rewards=whiten_rewards,
            bootstrap_truncated=bootstrap_truncated,
            whole_episodes=whole_episodes,
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

    def _setup_model(self) -> None:
        super()._setup_model()
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    def loss(self, batch: SegmentSamples) -> Loss:
        """The clipped surrogate, the value loss and the entropy bonus (Schulman et al. 2017, equations 7 and 9)."""
        clip_range = self.clip_range(self._current_progress_remaining)
        values, log_prob, entropy = self.policy.evaluate_segments(batch, self.ent_coef != 0.0)
        values = values.flatten()
        advantages = self.normalized(batch.advantages)

        log_ratio = log_prob - batch.old_log_prob  # before the first optimizer step the ratio is 1
        policy_loss = clipped_surrogate(log_ratio, advantages, clip_range, batch.importance).mean()
        limit = None if self.clip_range_vf is None else self.clip_range_vf(self._current_progress_remaining)
        critic_loss = value_loss(batch.returns, values, batch.old_values, limit)
        entropy_loss = -entropy.mean()

        loss = policy_loss + self.vf_coef * critic_loss
        if self.ent_coef != 0.0:  # else a pass over (M, V) logits would compute a gradient of zero
            loss = loss + self.ent_coef * entropy_loss
        figures = {
            "policy_gradient_loss": policy_loss,
            "value_loss": critic_loss,
            "entropy_loss": entropy_loss,
            "clip_range": clip_range,
            **ratio_figures(log_ratio, clip_range),
        }
        if limit is not None:
            figures["clip_range_vf"] = limit
        return Loss(loss, figures)
