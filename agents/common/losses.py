"""Losses as functions of what a minibatch has: each with its formula and where it is from. Agents call them.

M is the number of tokens of a minibatch (or of completions, where those are the actions), B that of completions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from textgym.kl import kl_estimate


@dataclasses.dataclass
class Loss:
    """What an agent wants less of, for one minibatch.

    :param value: ``()`` a mean, with gradients
    :param figures: what is logged as ``train/NAME``, averaged over the minibatches of an update; ``approx_kl``, nats
        per token, is what ``target_kl`` looks at, and ``ratio_first`` is kept of the first minibatch
    :param weight: how much the mean counts beside those of other processes; default the number of transitions
    """

    value: Tensor
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    weight: float | None = None


def policy_gradient(log_prob: Tensor, advantages: Tensor, importance: Tensor | None = None) -> Tensor:
    """−A log π, whose gradient is the policy gradient (Williams 1992, REINFORCE).

    :param log_prob: ``(M,)`` with gradients, nats
    :param advantages: ``(M,)``
    :param importance: ``(M,)`` weights of tokens that were drawn from another distribution; None for none
    :return: ``(M,)``
    """
    return -(advantages if importance is None else advantages * importance) * log_prob


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_range: float | tuple[float, float],
    importance: Tensor | None = None,
) -> Tensor:
    """−min(r A, clip(r, 1 − ε, 1 + ε′) A), r being the ratio of new to old probabilities.

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7 (https://arxiv.org/abs/1707.06347); with
    ε′ greater than ε, "clip higher" of Yu et al. 2025, "DAPO" (https://arxiv.org/abs/2503.14476).

    :param log_ratio: ``(M,)`` log r, with gradients
    :param advantages: ``(M,)``
    :param clip_range: ε, or ε and ε′
    :param importance: ``(M,)`` weights of tokens that were drawn from another distribution; None for none
    :return: ``(M,)``
    """
    low, high = _below_and_above(clip_range)
    ratio = log_ratio.exp()
    surrogate = torch.min(advantages * ratio, advantages * ratio.clamp(1 - low, 1 + high))
    return -surrogate if importance is None else -surrogate * importance


def value_loss(
    returns: Tensor, values: Tensor, old_values: Tensor | None = None, clip_range: float | None = None
) -> Tensor:
    """Mean squared difference of value and return; as SB3's PPO clips it where there is a ``clip_range``.

    :param returns: ``(M,)``
    :param values: ``(M,)`` with gradients
    :param old_values: ``(M,)`` of the rollout; needed with ``clip_range``
    :param clip_range: values are kept so near to ``old_values``; None for no limit
    """
    if clip_range is not None:
        assert old_values is not None
        values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return F.mse_loss(returns, values)


def preference_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − s) log σ(m) − s log σ(−m), the mean over pairs.

    Rafailov et al. 2023, "Direct Preference Optimization", equation 7 (https://arxiv.org/abs/2305.18290); with
    smoothing, Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".

    :param margins: ``(P,)`` m, the reward of the chosen completion less that of the rejected one, with gradients
    :param label_smoothing: s, how often the preferences are thought to be the wrong way round
    """
    s = label_smoothing
    return -((1 - s) * F.logsigmoid(margins) + s * F.logsigmoid(-margins)).mean()


def td_loss(q: Tensor, targets: Tensor, values: Tensor) -> Loss:
    """Half the mean squared difference of Q and its target.

    :param q: ``(M,)`` with gradients
    :param targets: ``(M,)``
    :param values: ``(M, 1)`` or ``(M,)`` of the states, for the log
    """
    error = q - targets
    figures = {
        "td_error": error.detach().abs().mean(),
        "q_mean": q.detach().mean(),
        "target_mean": targets.mean(),
        "value_mean": values.detach().mean(),
    }
    return Loss(0.5 * error.square().mean(), figures)


def ratio_figures(log_ratio: Tensor, clip_range: float | tuple[float, float]) -> dict[str, float]:
    """What is logged of the ratio of new to old probabilities.

    :param log_ratio: ``(M,)``
    :param clip_range: beyond which distance from 1 a ratio counts as clipped; below and above where they differ
    :return: ``approx_kl``, the k3 estimate of KL(old ‖ new) in nats per token (:func:`~textgym.kl.kl_estimate`),
        ``clip_fraction``, and ``ratio_first``, the largest distance from 1
    """
    low, high = _below_and_above(clip_range)
    with torch.no_grad():
        change = log_ratio.exp() - 1
        return {
            "approx_kl": kl_estimate(-log_ratio, torch.zeros_like(log_ratio), "k3").mean().item(),
            "clip_fraction": ((change > high) | (change < -low)).float().mean().item(),
            "ratio_first": change.abs().max().item(),
        }


def _below_and_above(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    return clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
