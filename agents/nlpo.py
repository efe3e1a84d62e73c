"""Natural language policy optimisation: PPO that draws its tokens from the nucleus of an older policy.

Ramamurthy et al. 2022, "Is Reinforcement Learning (Not) for Natural Language Processing: Benchmarks, Baselines, and
Building Blocks for Natural Language Policy Optimization", https://arxiv.org/abs/2210.01241. The *mask policy* is a copy
of the policy that lags behind. In every state the tokens outside its nucleus, the smallest set of most likely tokens
whose probability reaches p, are masked out, and the policy is renormalised over the others. A token that the policy
has lately come to like can only be drawn once the mask policy has caught up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import Unpack

from textgym.action_masks import nucleus
from textgym.agents.common.text_environment import TextEnv, TextEnvironment
from textgym.agents.policy.lagging_policy import follow, lagging_copy, set_weights, weights_of
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.agents.ppo import PPO, PPOArguments
from textgym.checks import check_int, check_number


class NLPO(PPO):
    """PPO under the top-p mask of a lagging copy of the policy. Loss and further arguments are those of PPO.

    The log-probabilities of the rollout, those that the environment is told for its KL and those of the update are all
    of the masked distribution, so the first ratios are 1. The KL to the reference, which is not masked, is then greater
    than 0 before any update: about −log p for each token. The mask acts while learning; ``predict`` and ``generate``
    use the whole distribution. ::

        >>> import gymnasium as gym, textgym
        >>> from textgym.agents.nlpo import NLPO
        >>> vec = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=4)
        >>> model = NLPO("LanguageModelPolicy", vec, n_steps=4, mask_top_p=0.5, seed=0).learn(16)
        >>> masks = next(model.rollout_buffer.get()).action_masks
        >>> masks.shape == (16, vec.single_action_space.n), bool((masks.sum(1) < 1000).all())
        (True, True)

    :param mask_top_p: p, the probability that the tokens that may be drawn have together under the mask policy, greater
        than 0; 1 is PPO
    :param mask_update_every: rollouts with one mask policy, before it takes the policy's weights; 1 is the policy at
        the beginning of each rollout
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        mask_top_p: float = 0.9,
        mask_update_every: int = 10,
        **arguments: Unpack[PPOArguments],
    ) -> None:
        check_number("mask_top_p", mask_top_p, low=0.0, high=1.0, open_low=True)
        check_int("mask_update_every", mask_update_every, low=1)
        self.mask_top_p = mask_top_p
        self.mask_update_every = mask_update_every
        super().__init__(policy, env, **arguments)

    def _setup_model(self) -> None:
        self.mask_policy: LanguageModelPolicy | None = (
            None  # made when the first rollout begins, from the weights of then
        )
        self._mask_age = 0  # rollouts that began with it
        super()._setup_model()

    def begin_rollout(self, environment: TextEnvironment) -> None:
        """Let the mask policy catch up, if it is time."""
        super().begin_rollout(environment)
        if self.mask_top_p == 1.0:
            return
        if self.mask_policy is None:
            self.mask_policy = lagging_copy(self.policy)
        elif self._mask_age >= self.mask_update_every:
            follow(self.mask_policy, self.policy)
            self._mask_age = 0
        self._mask_age += 1
        # Nothing cached reaches from one rollout into the next, see _collect.
        self.mask_policy.language_model.cached(self.policy.context).forget()

    def action_masks(self, environment: TextEnvironment) -> np.ndarray | None:
        """``(N, V)`` bool, the mask policy's nucleus among the tokens that the environment allows."""
        allowed = super().action_masks(environment)
        if self.mask_policy is None:
            return allowed
        model = self.mask_policy.language_model
        log_probs = self.policy.next_token_log_probs(model, self._last_obs, allowed)  # (N, V)
        masks: np.ndarray = nucleus(log_probs, self.mask_top_p).cpu().numpy()
        return masks

    def extra_state(self) -> dict[str, Any]:
        """The mask policy's weights and its age."""
        weights = None if self.mask_policy is None else weights_of(self.mask_policy, self.policy)
        return {**super().extra_state(), "mask_policy": weights, "mask_age": self._mask_age}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with the mask policy that :meth:`extra_state` gave."""
        super().load_extra_state(state)
        self._mask_age = state["mask_age"]
        self.mask_policy = None
        if state["mask_policy"] is not None:
            self.mask_policy = lagging_copy(self.policy)
            set_weights(self.mask_policy, state["mask_policy"])

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "mask_policy", "_mask_age"]
