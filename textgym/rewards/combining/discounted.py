"""Potential-based shaping with a discount."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from textgym.checks import check_number
from textgym.rewards.arithmetic import Composed
from textgym.rewards.base import prefix_potentials_of
from textgym.rewards.errors import RewardError
from textgym.rewards.function_reward import RewardLike, check_reward
from textgym.rewards.prefixes import PrefixBatch


class DiscountedPotential(Composed):
    """Makes the environment pay F_t = γ Φ(s_t) − Φ(s_{t−1}) at every token (Ng, Harada and Russell 1999).

    The environment pays the difference of its reward, Φ(s_t) − Φ(s_{t−1}), which is the shaping of Ng et al. for γ = 1,
    the default of textgym's agents. For an agent that discounts, shaping that leaves the optimal policies unchanged has
    a γ before the new potential. So this reward is the running sum of those terms,

        Ψ_t = Σ_{k=1..t} [γ Φ(s_k) − Φ(s_{k−1})],  Ψ_0 = 0,

    and the environment's difference Ψ_t − Ψ_{t−1} is F_t. Discounted, the F_t of a text sum to γ^T Φ(s_T) − Φ(s_0).
    Use it with ``reward_every=1`` and the agent's own ``gamma``; with ``"end"`` the environment pays Ψ_T at once.

    A prefix's Ψ needs Φ of all shorter ones. A causal reward model gives them in one pass; other rewards are called on
    each, so leave scoring deferred. None counts 0. Complete texts without their tokens have no Ψ: calling it raises
    :class:`RewardError`.

    Range: unbounded; for Φ in [0, 1] it lies between −T and 1.

        >>> import gymnasium as gym, textgym
        >>> from textgym.rewards import FunctionReward
        >>> words = FunctionReward(lambda completions: [len(text.split()) for text in completions], name="words")
        >>> env = gym.make("TextGen-v0", reward=DiscountedPotential(words, gamma=0.5), kl_coef=0.0)
        >>> _ = env.reset(seed=0, options={"prompt": "the film is"})
        >>> tokens = env.unwrapped.tokenizer("the film is good and", add_special_tokens=False)["input_ids"][-2:]
        >>> [env.step(token)[1] for token in tokens]  # 0.5 · 1 − 0, then 0.5 · 2 − 1
        [0.5, 0.0]

    :param reward: Φ, a reward or a function with the signature of one
    :param gamma: the agent's discount, in (0, 1]
    :raises ValueError: if gamma is not in (0, 1]
    """

    def __init__(self, reward: RewardLike, gamma: float) -> None:
        check_number("gamma", gamma, low=0.0, high=1.0, open_low=True)
        inner = check_reward("reward", reward)
        super().__init__([inner], f"discounted({inner.name}, {gamma:g})")
        self.gamma = float(gamma)

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        if not completions:
            return []
        raise RewardError(
            self.name,
            "needs the tokens of a text, of which a call on complete texts knows nothing; use it in an environment, or "
            f"call {self.parts[0].name!r} itself",
        )

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        values = self._evaluate_prefixes(batch, [np.array([n]) for n in batch.completion_lengths])
        return np.concatenate([np.zeros(0), *values])

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        lengths = [np.asarray(row, dtype=np.int64) for row in at]
        shorter = [np.arange(row.max(initial=-1) + 1) for row in lengths]
        potentials = prefix_potentials_of(self.parts[0], batch, shorter)
        return [self._sums(phi)[row] for phi, row in zip(potentials, lengths, strict=True)]

    def _sums(self, potentials: np.ndarray) -> np.ndarray:
        """Ψ of the prefixes of 0, 1, 2 ... tokens, from their Φ ``(T + 1,)``."""
        phi = np.nan_to_num(potentials)
        terms = self.gamma * phi[1:] - phi[:-1]
        return np.concatenate([np.zeros(min(1, len(phi))), np.cumsum(terms)])

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        return scores[0]
