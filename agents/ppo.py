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

from typing import Any, ClassVar

import numpy as np
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch.nn import functional as F

from textgym.agents.episode_buffer import EpisodeBuffer
from textgym.agents.on_policy import (
    SCORINGS,
    TextEnv,
    TextOnPolicyAlgorithm,
    check_choice,
    check_count,
    check_schedule,
)
from textgym.agents.policy import LanguageModelPolicy
from textgym.envs.options import check_number

DEFAULT_BATCH_SIZE = 512  # tokens


class PPO(TextOnPolicyAlgorithm, sb3.PPO):
    """PPO with clipped ratios for text environments.

    Arguments have the names and the meaning they have in Stable-Baselines3; a step is a token. ::

        >>> import gymnasium as gym, textgym
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> model = textgym.agents.PPO("LanguageModelPolicy", vec, n_steps=4, seed=0).learn(16)
        >>> model.num_timesteps
        16

    :param policy: ``"LanguageModelPolicy"`` or a subclass of
        :class:`~textgym.agents.policy.LanguageModelPolicy`
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
    :param scoring: see :class:`TextOnPolicyAlgorithm`
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

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"LanguageModelPolicy": LanguageModelPolicy}

    normalize_advantage: bool | str  # type: ignore[assignment]

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
        scoring: str = "auto",
        importance_cap: float | None = 2.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_schedule("learning_rate", learning_rate)
        check_count("n_steps", n_steps)
        check_count("n_epochs", n_epochs)
        check_number("gamma", gamma, low=0.0, high=1.0)
        check_number("gae_lambda", gae_lambda, low=0.0, high=1.0)
        check_schedule("clip_range", clip_range, open_low=True)
        if clip_range_vf is not None:
            check_schedule("clip_range_vf", clip_range_vf, open_low=True)
        check_choice("normalize_advantage", normalize_advantage, (True, False, "rollout"))
        check_number("ent_coef", ent_coef)
        check_number("vf_coef", vf_coef, low=0.0)
        check_number("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
        if target_kl is not None:
            check_number("target_kl", target_kl, low=0.0, open_low=True)
        check_choice("scoring", scoring, SCORINGS)
        if importance_cap is not None:
            check_number("importance_cap", importance_cap, low=1.0)
        vec_env = self.make_vec_env(env)
        rollout = n_steps * (1 if vec_env is None else vec_env.num_envs)
        if batch_size is None:
            batch_size = DEFAULT_BATCH_SIZE if vec_env is None else min(DEFAULT_BATCH_SIZE, rollout)
        check_count("batch_size", batch_size)
        if vec_env is not None and batch_size > rollout:
            raise ValueError(
                f"batch_size={batch_size} is more than the rollout has, n_steps * num_envs = {rollout}: "
                "make it smaller, or take more steps or rows"
            )
        if normalize_advantage is True and vec_env is not None and batch_size == 1:
            raise ValueError("batch_size=1 has nothing to normalize_advantage over: pass False or 'rollout'")

        super().__init__(
            policy,
            vec_env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=max(2, rollout),  # SB3 warns of truncated minibatches; ours are cut evenly
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage is True,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            rollout_buffer_class=EpisodeBuffer,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.batch_size = batch_size
        self.normalize_advantage = normalize_advantage
        self.whiten_rewards = whiten_rewards
        self.bootstrap_truncated = bootstrap_truncated
        self.scoring = scoring
        self.importance_cap = importance_cap
        if _init_setup_model:
            self._setup_model()

    def train(self) -> None:
        """Update the policy with the current rollout."""
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        clip_range_vf = None
        if self.clip_range_vf is not None:
            clip_range_vf = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
        buffer = self.rollout_buffer
        if self.normalize_advantage == "rollout":
            centred = buffer.advantages - self.processes.mean(buffer.advantages)
            buffer.advantages = centred / (np.sqrt(self.processes.variance(centred)) + 1e-8)
        # Every process makes as many minibatches; where whole episodes don't allow that many, all make fewer.
        tokens = buffer.buffer_size * buffer.n_envs
        wished = max(1, round(tokens / self.batch_size))
        batches = int(self.processes.smallest(min(wished, len(buffer.segments))))

        policy_losses, value_losses, entropy_losses = [], [], []
        clip_fractions, grad_norms = [], []
        ratio_first: float | None = None
        continue_training = True
        for epoch in range(self.n_epochs):
            approx_kls = []
            for batch in buffer.get(tokens / batches):  # type: ignore[arg-type]  # a wish, not a whole number
                values, log_prob, entropy = self.policy.evaluate_segments(batch, self.ent_coef != 0.0)
                values = values.flatten()
                advantages = batch.advantages
                if self.normalize_advantage is True:
                    count, mean, std = self.processes.moments(advantages)
                    if count > 1:
                        advantages = (advantages - mean) / (std + 1e-8)

                # Clipped surrogate loss. Before the first optimizer step the ratio is 1.
                log_ratio = log_prob - batch.old_log_prob
                ratio = log_ratio.exp()
                clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
                surrogate = torch.min(advantages * ratio, advantages * clipped)
                if batch.importance is not None:
                    surrogate = surrogate * batch.importance
                policy_loss = -surrogate.mean()

                if clip_range_vf is not None:
                    change = (values - batch.old_values).clamp(-clip_range_vf, clip_range_vf)
                    values = batch.old_values + change
                value_loss = F.mse_loss(batch.returns, values)
                entropy_loss = -entropy.mean()

                loss = policy_loss + self.vf_coef * value_loss
                if self.ent_coef != 0.0:  # else a pass over (M, V) logits would compute a gradient of zero
                    loss = loss + self.ent_coef * entropy_loss

                with torch.no_grad():
                    # Schulman's k3 estimate of KL(old ‖ new), http://joschu.net/blog/kl-approx.html
                    approx_kl = (ratio - 1 - log_ratio).mean().item()
                    distance = (ratio - 1).abs()
                    clip_fractions.append((distance > clip_range).float().mean().item())
                    ratio_first = distance.max().item() if ratio_first is None else ratio_first
                approx_kls.append(approx_kl)
                policy_losses.append(policy_loss.item())
                value_losses.append(value_loss.item())
                entropy_losses.append(entropy_loss.item())
                if self.target_kl is not None:
                    approx_kl = self.processes.weighted_mean(approx_kl, len(ratio))
                if self.target_kl is not None and approx_kl > 1.5 * self.target_kl:
                    continue_training = False
                    if self.verbose >= 1 and self.processes.is_main:
                        print(f"Early stopping in epoch {epoch} due to reaching max kl: {approx_kl:.2f}")
                    break

                self.policy.optimizer.zero_grad()
                loss.backward()
                self.processes.average_gradients(self.policy.parameters(), transitions=len(advantages))
                norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                grad_norms.append(norm.item())
                self.policy.optimizer.step()
            self._n_updates += 1
            if not continue_training:
                break

        figures = {
            "entropy_loss": np.mean(entropy_losses),
            "policy_gradient_loss": np.mean(policy_losses),
            "value_loss": np.mean(value_losses),
            "approx_kl": np.mean(approx_kls),
            "clip_fraction": np.mean(clip_fractions),
            "loss": loss.item(),
        }
        for name, value in self.processes.means(figures).items():
            self.logger.record(f"train/{name}", value)
        variance = self.processes.variance(buffer.returns.flatten())
        residual = self.processes.variance(buffer.returns.flatten() - buffer.values.flatten())
        self.logger.record("train/explained_variance", float(1 - residual / variance) if variance else np.nan)
        assert ratio_first is not None
        self.logger.record("train/ratio_first", self.processes.largest(ratio_first))
        if grad_norms:
            self.logger.record("train/grad_norm", np.mean(grad_norms))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", clip_range_vf)
