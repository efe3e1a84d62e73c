"""Q-learning on tokens: the value of the best text that can follow, learned from old episodes.

Watkins 1989, "Learning from Delayed Rewards"; Mnih et al. 2015, "Human-level control through deep reinforcement
learning"; van Hasselt et al. 2016, "Deep Reinforcement Learning with Double Q-learning",
https://arxiv.org/abs/1509.06461.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import SegmentSamples
from textgym.agents.common.arguments import ReplayArguments
from textgym.agents.common.bellman_targets import bellman_targets
from textgym.agents.common.losses import Loss, td_loss
from textgym.agents.common.off_policy import TextOffPolicyAlgorithm
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_bool, check_choice, check_number, check_schedule
from textgym.generation import sample_tokens
from textgym.language_model import HEAD_ELEMENTS, log_distribution

EXPLORATIONS = ("policy", "reference", "uniform")


class QLearning(TextOffPolicyAlgorithm):
    """DQN on whole episodes: Q of the token that was written learns from the best one that could have followed.

    With α for ``q_temperature``, the policy's log-probabilities and its value head are

        Q(s, a) = V(s) + α · log π(a|s),

    so π is the Boltzmann policy of Q at temperature α, V(s) = α · log Σ_a exp(Q(s, a) / α), and the most likely token
    is the best one: ``predict(deterministic=True)`` is greedy. Q starts as the language model's own log-probabilities:
    a token that nobody ever tried stays as bad as it is unlikely, which a network with an output for each token would
    have to learn from as many failures.

    The loss is ½ (Q(s_t, a_t) − y_t)² with y_t = r_t + γ · max_a Q'(s_t+1, a), ' being a lagging copy. With λ > 0 it is
    Watkins's Q(λ): a target goes on along the episode as long as this took the greedy token.

    Rewards are those of the greedy policy, which takes its token for sure: the penalty of a token is β times
    KL(δ_a ‖ π_ref) = −log π_ref(a|s), with the environment's ``kl_coef`` as β, whatever the probability was with which
    it was drawn. That makes the reward one of the state and the token alone, as Q-learning supposes, so that old
    episodes stay valid. What the environment is told, and ``rollout/kl_ref`` measures, is the probability with which
    the token really was drawn, exploration included.

    Further arguments are those of :class:`~textgym.agents.common.off_policy.TextOffPolicyAlgorithm`. ::

        >>> import gymnasium as gym, textgym
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4, kl_coef=0.0)
        >>> agent = textgym.agents.QLearning("LanguageModelPolicy", vec, epsilon=0.2, seed=0).learn(16)
        >>> len(agent.replay) >= 4
        True

    :param q_temperature: α: what a nat of log-probability is worth, in units of the reward. A token that earns δ more
        than another gets e^(δ/α) times its probability, so α should be well below the differences that matter
    :param epsilon: ε, the share of tokens that explore; the others are greedy. A number, or a function of the remaining
        progress (1 to 0). 1 with ``explore_with="policy"`` is Boltzmann exploration
    :param explore_with: what exploring tokens are drawn from: the ``"policy"`` π, the ``"reference"`` model, which
        costs a step of it for each token where it does not run already, or the allowed tokens ``"uniform"``, of which
        nearly all are nonsense in a large vocabulary
    :param double: whether the best token is the one that the policy itself likes best, valued by the lagging copy
    :param td_lambda: λ; default 0
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        q_temperature: float = 0.1,
        epsilon: float | Schedule = 1.0,
        explore_with: str = "policy",
        double: bool = True,
        td_lambda: float = 0.0,
        **arguments: Unpack[ReplayArguments],
    ) -> None:
        check_number("q_temperature", q_temperature, low=0.0, open_low=True)
        check_schedule("epsilon", epsilon)
        if not callable(epsilon):
            check_number("epsilon", epsilon, low=0.0, high=1.0)
        check_choice("explore_with", explore_with, EXPLORATIONS)
        check_bool("double", double)
        self.q_temperature = q_temperature
        self.epsilon = epsilon
        self.explore_with = explore_with
        self.double = double
        super().__init__(policy, env, td_lambda=td_lambda, **arguments)

    @property
    def exploration_rate(self) -> float:
        """ε now.

        :raises ValueError: if the function that it is gave something else than a probability
        """
        rate = FloatSchedule(self.epsilon)(self._current_progress_remaining)
        check_number("epsilon", rate, low=0.0, high=1.0)
        return rate

    @torch.no_grad()
    def draw(self, obs: Any, masks: np.ndarray | None, rows: np.ndarray | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy tokens, and exploring ones with probability ε; log-probabilities are those of the mixture."""
        epsilon = self.exploration_rate
        if epsilon == 1.0 and self.explore_with == "policy":
            return super().draw(obs, masks, rows)
        likely = self.policy.next_token_log_probs(self.policy.acting_model, obs, masks, rows)  # (B, V)
        best = likely.argmax(-1)
        explored = self._explored(likely, obs, masks, rows)
        exploring = torch.rand(len(best), device=best.device) < epsilon
        tokens = torch.where(exploring, sample_tokens(explored), best)
        probability = epsilon * explored.gather(1, tokens[:, None]).squeeze(1).exp() + (1 - epsilon) * (tokens == best)
        return tokens, self.policy.predict_values(obs, rows), probability.log()

    def _explored(self, likely: Tensor, obs: Any, masks: np.ndarray | None, rows: np.ndarray | None) -> Tensor:
        """``(B, V)`` the log-probabilities that exploring tokens are drawn with, given those of the policy."""
        if self.explore_with == "policy":
            return likely
        if self.explore_with == "uniform":
            allowed = None if masks is None else torch.as_tensor(masks, device=likely.device)
            return log_distribution(torch.zeros_like(likely), allowed=allowed)
        reference = self._environment.shared_language_model(self.device)
        return self.policy.next_token_log_probs(reference, obs, masks, rows).to(likely.device)

    def train(self) -> None:
        """Update the policy, see :class:`~textgym.agents.common.off_policy.TextOffPolicyAlgorithm`."""
        super().train()
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def loss(self, batch: SegmentSamples) -> Loss:
        """Squared difference of Q and its target."""
        alpha = self.q_temperature
        hidden = self.policy.hidden_of(batch)  # (M, H)
        values, log_prob, _ = self.policy.evaluate_hidden(hidden, batch.actions, batch.action_masks, False)
        q = values.flatten() + alpha * log_prob
        with torch.no_grad():
            lagging = self.target.hidden_of(batch)
            judge, states = (self.policy, hidden.detach()) if self.double else (self.target, lagging)
            best = most_likely(judge, states, batch.action_masks)
            ahead, best_log_prob, _ = self.target.evaluate_hidden(lagging, best, batch.action_masks)
            rewards = batch.rewards
            if self.kl_coef > 0:
                assert batch.ref_log_prob is not None
                rewards = rewards + self.kl_coef * batch.ref_log_prob
            ahead = ahead.flatten() + alpha * best_log_prob
            trace = self.td_lambda * (batch.actions == best).float()
            targets = bellman_targets(rewards, ahead, batch.rows, self.gamma, trace)
        return td_loss(q, targets, values)


@torch.no_grad()
def most_likely(policy: LanguageModelPolicy, hidden: Tensor, masks: Tensor | None) -> Tensor:
    """``(M,)`` the most likely token after each of some hidden states, in parts that bound the memory for logits.

    :param hidden: ``(M, H)`` of the policy
    :param masks: ``(M, V)`` bool, tokens that may follow; None for all
    """
    size = max(1, HEAD_ELEMENTS // policy.language_model.vocab_size)
    parts = []
    for start in range(0, len(hidden), size):
        logits = policy.language_model.head(hidden[start : start + size])
        if masks is not None:
            logits = logits.masked_fill(~masks[start : start + size], -torch.inf)
        parts.append(logits.argmax(-1))
    return torch.cat(parts)
