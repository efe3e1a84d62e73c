"""SARSA: the value of each token under the policy that writes, learned from its own episodes, and acted upon at once.

Rummery and Niranjan 1994, "On-line Q-learning using connectionist systems"; van Seijen et al. 2009, "A Theoretical and
Empirical Analysis of Expected Sarsa"; Sutton and Barto, "Reinforcement Learning: An Introduction", chapters 6 and 12.
"""

from __future__ import annotations

from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import SegmentSamples
from textgym.agents.common.arguments import RoundArguments
from textgym.agents.common.bellman_targets import bellman_targets
from textgym.agents.common.exploration import Exploration
from textgym.agents.common.losses import Loss, td_loss
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.common.whole_episodes import TextEpisodeAlgorithm
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_bool, check_number


class SARSA(TextEpisodeAlgorithm):
    """SARSA(λ) on whole episodes, with the Boltzmann policy of its own Q.

    With α for ``q_temperature``, the policy's log-probabilities and its value head are

        Q(s, a) = V(s) + α · log π(a|s),

    so π = softmax(Q / α) is the policy, and V(s) = α · log Σ_a exp(Q(s, a) / α). The loss is ½ (Q(s_t, a_t) − y_t)²
    with

        y_t = r_t + γ · [(1 − λ) · Q(s_t+1, a_t+1) + λ · y_t+1],

    all from the present weights, without gradients through y. Rewards are as paid, KL penalty included: they are those
    of the policy that wrote. Where Q is right, the policy is therefore
    π(a|s) ∝ [π_ref(a|s)^β · exp(r + γ · v(s'))]^(1 / (α + β)) with v(s) = E_π[Q(s, ·)], the best compromise of return,
    KL (weight β, the environment's ``kl_coef``) and entropy of the token at hand (weight α).

    There is no replay: old episodes say what an older policy earns. The gradient of Q with respect to V is 1 / α times
    that with respect to a log-probability and would drown it in the transformer that both share, so α times of it goes
    from the value head into the transformer; where the loss is least stays the same. Further arguments are those of
    :class:`~textgym.agents.common.whole_episodes.TextEpisodeAlgorithm`. ::

        >>> import gymnasium as gym, textgym
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> textgym.agents.SARSA("LanguageModelPolicy", vec, td_lambda=0.9, seed=0).learn(8).num_timesteps >= 8
        True

    :param q_temperature: α: what a nat of log-probability is worth, in units of the reward. A token that earns δ more
        than another gets e^(δ/α) times its probability, so α should be well below the differences that matter
    :param td_lambda: λ, from 0, the next token's Q, to 1, all that the episode earned
    :param expected: Expected SARSA: the mean of Q over the policy, in the place of Q of the token that was drawn
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        q_temperature: float = 0.1,
        td_lambda: float = 0.9,
        expected: bool = False,
        batch_size: int | None = None,
        gamma: float = 1.0,
        exploration: Exploration | None = None,
        **arguments: Unpack[RoundArguments],
    ) -> None:
        check_number("q_temperature", q_temperature, low=0.0, open_low=True)
        check_number("td_lambda", td_lambda, low=0.0, high=1.0)
        check_bool("expected", expected)
        self.q_temperature = q_temperature
        self.td_lambda = td_lambda
        self.expected = expected
        super().__init__(
            policy, env, batch_size=batch_size, gamma=gamma, exploration=exploration, importance_cap=None, **arguments
        )

    def loss(self, batch: SegmentSamples) -> Loss:
        """Squared difference of Q and its target."""
        values, log_prob, entropy = self.policy.evaluate_segments(
            batch, entropy_gradient=False, value_gradient=self.q_temperature
        )
        q = values.flatten() + self.q_temperature * log_prob
        # The mean of log π over π is minus the entropy.
        ahead = values.flatten() - self.q_temperature * entropy if self.expected else q
        targets = bellman_targets(batch.rewards, ahead.detach(), batch.rows, self.gamma, self.td_lambda)
        return td_loss(q, targets, values)
