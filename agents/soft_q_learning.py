"""Soft Q-learning: the language model's log-probabilities are advantages in units of β, learned from old episodes.

Guo et al. 2021, "Efficient (Soft) Q-Learning for Text Generation with Limited Good Data",
https://arxiv.org/abs/2106.07704; path consistency: Nachum et al. 2017, "Bridging the Gap Between Value and Policy Based
Reinforcement Learning", https://arxiv.org/abs/1702.08892.
"""

from __future__ import annotations

import torch
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import SegmentSamples
from textgym.agents.common.arguments import ReplayArguments
from textgym.agents.common.bellman_targets import bellman_targets
from textgym.agents.common.exploration import Exploration
from textgym.agents.common.losses import Loss, td_loss
from textgym.agents.common.off_policy import TextOffPolicyAlgorithm
from textgym.agents.common.text_environment import TextEnv, TextEnvironment
from textgym.agents.policy.language_model_policy import LanguageModelPolicy


class SoftQLearning(TextOffPolicyAlgorithm):
    """Q-learning of the KL-regularised task, whose optimal policy is π_ref(a|s) · exp((Q(s, a) − V(s)) / β).

    With the environment's ``kl_coef`` as β, the policy's log-probabilities and its value head are

        Q(s, a) = V(s) + β · (log π(a|s) − log π_ref(a|s)),

    so that V(s) = β · log Σ_a π_ref(a|s) · exp(Q(s, a) / β) holds always, and π is the policy that Q asks for: acting,
    ``predict`` and ``save_pretrained`` are those of any language model. Guo et al. (2021, equation 8) read Q / β
    directly from the logits, with a uniform prior in the place of π_ref. That is the same where a model's logits may
    have any mean; a pretrained model's have one that says nothing of rewards, so here V has a head of its own and
    starts as 0, and Q as β · 0.

    The loss is ½ (Q(s_t, a_t) − y_t)². With λ = 0, y_t = r_t + γ · V'(s_t+1), and with λ = 1

        y_t = r_t + γ · [r_t+1 − β · (log π' − log π_ref)(a_t+1|s_t+1)] + γ² · [r_t+2 − ...] + ...

    (equation 11; Nachum et al.'s path consistency, equation 12), r being the rewards without KL penalty and ' a lagging
    copy. At the optimum both hold for every token of every episode, whoever wrote it, so neither is biased by old
    episodes; that is peculiar to soft values. Long paths carry what the end earns to the beginning at once.

    Needs an environment with ``kl_coef`` > 0. Further arguments are those of
    :class:`~textgym.agents.common.off_policy.TextOffPolicyAlgorithm`. ::

        >>> import gymnasium as gym, textgym
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4, kl_coef=0.1)
        >>> agent = textgym.agents.SoftQLearning("LanguageModelPolicy", vec, replay_episodes=100, seed=0).learn(16)
        >>> len(agent.replay) >= 4
        True

    :param td_lambda: λ; default 1
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        td_lambda: float = 1.0,
        exploration: Exploration | None = None,
        **arguments: Unpack[ReplayArguments],
    ) -> None:
        super().__init__(policy, env, td_lambda=td_lambda, exploration=exploration, **arguments)

    def _checked_environment(self, env: VecEnv) -> TextEnvironment:
        environment = super()._checked_environment(env)
        if environment.kl_coef <= 0:
            raise ValueError(
                f"kl_coef={environment.kl_coef} of the environment must be greater than 0: it is what soft Q-learning "
                "measures advantages in; QLearning needs none"
            )
        return environment

    def loss(self, batch: SegmentSamples) -> Loss:
        """Squared difference of Q and its target."""
        assert batch.ref_log_prob is not None
        beta = self.kl_coef
        values, log_prob, _ = self.policy.evaluate_segments(batch, entropy_gradient=False)
        q = values.flatten() + beta * (log_prob - batch.ref_log_prob)
        with torch.no_grad():
            ahead, lagging_log_prob, _ = self.target.evaluate_segments(batch)
            toll = beta * (lagging_log_prob - batch.ref_log_prob)
            targets = bellman_targets(batch.rewards, ahead.flatten(), batch.rows, self.gamma, self.td_lambda, toll)
        return td_loss(q, targets, values)
