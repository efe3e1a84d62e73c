"""Several rewards of the same thing, and what to make of their disagreement.

A policy that is optimised against one reward model finds the texts that this model overrates. Models trained from
different seeds or data overrate different texts, so their disagreement shows where none of them can be trusted: Coste
et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", https://arxiv.org/abs/2310.02743.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from textgym.checks import check_choice, check_number, shown
from textgym.rewards.arithmetic import Composed
from textgym.rewards.function_reward import RewardLike, check_reward
from textgym.rewards.scores import scores_of

Aggregate = Literal["mean", "min", "mean-std", "mean-variance"]


class Ensemble(Composed):
    """One score from those of several rewards.

    ================= ======================= ===============================================
    ``aggregate``     Φ                       name in Coste et al. 2023
    ================= ======================= ===============================================
    ``mean``          mean                    mean optimisation
    ``min``           min                     worst-case optimisation (WCO)
    ``mean-std``      mean − k · std          as UWO, with a penalty on the scale of the score
    ``mean-variance`` mean − k · std²         uncertainty-weighted optimisation (UWO)
    ================= ======================= ===============================================

    Standard deviations are biased. Members to which a text does not apply (None) are left out; where none applies Φ is
    None. Members should have one scale: normalise them first, ``[m.normalized() for m in models]``.

    Range: between the least and the greatest member for ``mean`` and ``min``; the penalties reach below the least.

        >>> from textgym.rewards import FunctionReward
        >>> members = [FunctionReward(lambda completions, n=n: [n] * len(completions)) for n in (1.0, 2.0, 6.0)]
        >>> for aggregate in ("mean", "min", "mean-std", "mean-variance"):
        ...     [score] = Ensemble(members, aggregate, k=0.5)(prompts=[""], completions=["a film"])
        ...     print(f"{aggregate}: {score:.3f}")
        mean: 3.000
        min: 1.000
        mean-std: 1.920
        mean-variance: 0.667

    :param members: at least two rewards or functions with the signature of one; ``as_reward`` opens those of
        directories
    :param aggregate: see the table
    :param k: weight of the penalty
    :raises ValueError: for fewer than two members, an unknown aggregate, or a k that is negative or not finite
    """

    def __init__(self, members: Sequence[RewardLike], aggregate: Aggregate = "mean-std", k: float = 1.0) -> None:
        given: Any = members
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"members={shown(members)} must be a list of at least two rewards")
        if len(members) < 2:
            raise ValueError(f"an ensemble has at least two members, got {len(members)}")
        check_aggregate(aggregate, k)
        rewards = [check_reward(f"members[{i}]", member) for i, member in enumerate(members)]
        super().__init__(rewards, f"ensemble({aggregate}: {', '.join(reward.name for reward in rewards)})")
        self.aggregate = aggregate
        self.k = float(k)

    def spread(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """How far the members disagree on complete texts: standard deviations; None where none applies."""
        scores = np.stack([scores_of(part, prompts, completions, columns) for part in self.parts])
        return spread_of(scores)

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        return aggregated(np.stack(scores), self.aggregate, self.k)


def check_aggregate(aggregate: str, k: float) -> None:
    """:raises ValueError: if the aggregate is unknown or the weight negative or not finite"""
    check_choice("aggregate", aggregate, get_args(Aggregate))
    check_number("k", k, low=0.0)


def aggregated(scores: np.ndarray, aggregate: str, k: float) -> np.ndarray:
    """What several scores of each text amount to.

    :param scores: ``(K, N)`` with NaN where a score does not apply
    :return: ``(N,)`` with NaN where none applies
    """
    applies = ~np.isnan(scores)
    none = ~applies.any(axis=0)
    if aggregate == "min":
        return np.where(none, np.nan, np.where(applies, scores, np.inf).min(axis=0))
    mean, std = _mean_and_std(scores)
    penalty = {"mean": 0.0, "mean-std": k * std, "mean-variance": k * std**2}[aggregate]
    return np.where(none, np.nan, mean - penalty)


def spread_of(scores: np.ndarray) -> list[float | None]:
    """Standard deviation of ``(K, N)`` scores over K; None where none applies."""
    _, std = _mean_and_std(scores)
    none = np.isnan(scores).all(axis=0)
    return [None if missing else value for missing, value in zip(none.tolist(), std.tolist(), strict=True)]


def _mean_and_std(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased standard deviation ``(N,)`` of the scores that apply; 0 where none does."""
    applies = ~np.isnan(scores)
    count = np.maximum(applies.sum(axis=0), 1)
    mean = np.nan_to_num(scores).sum(axis=0) / count
    distance = np.where(applies, scores - mean, 0.0)
    return mean, np.sqrt((distance**2).sum(axis=0) / count)
