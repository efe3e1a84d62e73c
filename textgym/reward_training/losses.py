"""Losses of reward models. Each is a weighted mean over N elements: texts, pairs, or positions inside them.

The weighted mean is ``sum(w * l) / sum(w)``, as torch's own cross-entropy with class weights has it.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional

LossName = Literal["bradley_terry", "mse", "huber", "cross_entropy", "bce"]
LOSSES: tuple[LossName, ...] = get_args(LossName)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    centring: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """``-log σ(chosen - rejected - margin) + centring * (chosen + rejected)²``.

    The margin is Llama 2's (Touvron et al. 2023, equation 2), the centring, which keeps the scores about zero, that of
    Eisenstein et al. 2023; both as in TRL's ``RewardTrainer``.

    :param chosen: ``(N,)`` scores of the better texts
    :param rejected: ``(N,)`` scores of the worse texts
    :param margin: ``(N,)`` how much better; default 0
    :param centring: coefficient of the squared sum
    :param weights: ``(N,)``, default 1
    """
    difference = chosen - rejected
    losses = -functional.logsigmoid(difference if margin is None else difference - margin)
    if centring:
        losses = losses + centring * (chosen + rejected) ** 2
    return _mean(losses, weights)


def mse_loss(scores: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """``(score - target)²``, all ``(N,)``."""
    return _mean((scores - targets) ** 2, weights)


def huber_loss(scores: Tensor, targets: Tensor, delta: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """Half the squared error up to ``delta``, linear beyond, all ``(N,)``; in the units of the scores squared."""
    return _mean(functional.huber_loss(scores, targets, reduction="none", delta=delta), weights)


def cross_entropy_loss(logits: Tensor, classes: Tensor, weights: Tensor | None = None) -> Tensor:
    """``-log softmax(logits)[class]`` in nats.

    :param logits: ``(N, C)``
    :param classes: ``(N,)`` int64
    """
    return _mean(functional.cross_entropy(logits, classes, reduction="none"), weights)


def binary_cross_entropy_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """``-t log σ(z) - (1 - t) log(1 - σ(z))`` in nats, all ``(N,)``."""
    return _mean(functional.binary_cross_entropy_with_logits(logits, targets, reduction="none"), weights)


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()
