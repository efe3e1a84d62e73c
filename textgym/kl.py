"""The KL penalty: estimators of KL(π ‖ π_ref) from single tokens, and a controller for its coefficient.

The estimators are those of John Schulman, "Approximating KL Divergence" (2020,
http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from textgym.checks import check_choice, check_number

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(log_prob: Array, ref_log_prob: Array, estimator: str = "k1") -> Array:
    """Estimate KL(π ‖ π_ref) at tokens that were sampled from π.

    With d = log π − log π_ref: ``"k1"`` is d, unbiased but negative for about half of the tokens; ``"k2"`` is
    ½ d², biased and of low variance; ``"k3"`` is exp(−d) − 1 + d, unbiased and never negative.

    :param log_prob: log π of the tokens, in nats; a numpy array or torch tensor of any shape
    :param ref_log_prob: log π_ref of the same tokens, in nats, of the same shape
    :param estimator: ``"k1"``, ``"k2"`` or ``"k3"``
    :return: the estimates, in nats, of the same shape and type; gradients flow through tensors
    :raises ValueError: if there is no such estimator

    >>> log_prob, ref_log_prob = np.log([0.5, 0.2]), np.log([0.25, 0.4])
    >>> kl_estimate(log_prob, ref_log_prob).round(3)
    array([ 0.693, -0.693])
    >>> kl_estimate(log_prob, ref_log_prob, "k3").round(3)
    array([0.193, 0.307])
    """
    check_choice("kl_estimator", estimator, KL_ESTIMATORS)
    difference: Any = log_prob - ref_log_prob
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        # expm1 keeps its digits where the two policies are nearly the same
        negative = -difference
        return (negative.expm1() if hasattr(negative, "expm1") else np.expm1(negative)) + difference
    return difference


class AdaptiveKLController:
    """Moves the KL coefficient β so that the measured KL approaches a target.

    β ← β · (1 + clip(KL / target − 1, −0.2, 0.2) · n / horizon), from Ziegler et al., "Fine-Tuning Language
    Models from Human Preferences" (2019), section 2.2. There KL is that of whole completions and n counts
    completions.

    :param init_kl_coef: the first β
    :param target: the KL to aim for, in nats, summed over a completion
    :param horizon: over how many completions β may change by a factor of about e^0.2
    :param least: no smaller β
    :raises ValueError: if one of the first three is not finite and positive, or ``least`` is negative
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float, least: float = 0.0) -> None:
        for name, value in {"init_kl_coef": init_kl_coef, "target": target, "horizon": horizon}.items():
            check_number(name, value, low=0.0, open_low=True)
        self.kl_coef = float(init_kl_coef)
        self.target = float(target)
        self.horizon = float(horizon)
        check_number("least", least, low=0.0)
        self.least = float(least)

    def update(self, kl: float, n: int) -> float:
        """Adapt the coefficient to a measurement.

        :param kl: mean KL of the completions measured, in nats
        :param n: how many there were
        :return: the new coefficient, also ``kl_coef``
        :raises ValueError: if ``kl`` is not finite, or ``n`` is negative or so large, five horizons, that the
            coefficient could become zero or negative
        """
        check_number("kl", kl)
        if not 0 <= n < 5 * self.horizon:
            raise ValueError(f"n must be at least 0 and less than 5 * horizon = {5 * self.horizon:g}, got {n}")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef = max(self.kl_coef * (1 + error * n / self.horizon), self.least)
        return self.kl_coef
