"""Advantages from comparing the completions of one prompt with each other, for RLOO and GRPO.

With ``credit="completion"`` every token of a completion has the same advantage, that of the completion's return; this
is what both papers have. With ``credit="token"`` a token's advantage is made of its own *reward-to-go*, the rewards
from it on, compared with the rewards-to-go at the same place of the other completions (0 where they have ended):
instant rewards then credit the tokens that earned them. Both baselines are independent of the token that is judged, so
the gradient is that of the expected return (Williams 1992).
"""

from __future__ import annotations

import numpy as np

CREDITS = ("completion", "token")
SCALES = ("group", "batch", "none")
EPSILON = 1e-4  # as in TRL


def by_credit(to_go: np.ndarray, credit: str) -> np.ndarray:
    """``(E, T)`` what a token is judged by: its reward-to-go, or its completion's return.

    :param to_go: ``(E, T)`` rewards from each token on, 0 after an episode's end
    :param credit: ``"token"`` or ``"completion"``
    """
    return to_go if credit == "token" else np.broadcast_to(to_go[:, :1], to_go.shape)


def leave_one_out_advantages(returns: np.ndarray, group_size: int) -> np.ndarray:
    """``(E, T)`` each return minus the mean of the others of its group.

    Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", section 3.2 (https://arxiv.org/abs/2402.14740). ::

        >>> leave_one_out_advantages(np.array([[1.0], [2.0], [6.0]]), 3).ravel()
        array([-3. , -1.5,  4.5])

    :param returns: ``(E, T)``, the K completions of a prompt in a row
    :param group_size: K, at least 2
    """
    groups = returns.reshape(-1, group_size, returns.shape[1])
    others = (groups.sum(1, keepdims=True) - groups) / (group_size - 1)
    advantages: np.ndarray = (groups - others).reshape(returns.shape)
    return advantages


def group_relative_advantages(
    judged: np.ndarray, returns: np.ndarray, group_size: int, scale: str = "group"
) -> np.ndarray:
    """``(E, T)`` each return minus the mean of its group, over a standard deviation of completions' returns.

    Shao et al. 2024, "DeepSeekMath", section 4.1.2 (https://arxiv.org/abs/2402.03300); without the scale, Liu et al.
    2025, "Understanding R1-Zero-Like Training" (https://arxiv.org/abs/2503.20783). The deviation is the unbiased one,
    plus
    10⁻⁴, as in TRL. It is that of whole completions for rewards-to-go, too: late places have few completions left. ::

        >>> judged = np.array([[1.0], [2.0], [6.0]])
        >>> group_relative_advantages(judged, judged[:, 0], 3).ravel().round(3)
        array([-0.756, -0.378,  1.134])

    :param judged: ``(E, T)`` from :func:`by_credit`, the K completions of a prompt in a row
    :param returns: ``(E,)`` of the completions
    :param group_size: K, at least 2
    :param scale: ``"group"``: the deviation of the K returns of the prompt; ``"batch"``: of all returns; ``"none"``
    """
    groups = judged.reshape(-1, group_size, judged.shape[1])
    advantages: np.ndarray = (groups - groups.mean(1, keepdims=True)).reshape(judged.shape)
    if scale == "group":
        deviations = returns.reshape(-1, group_size).std(1, ddof=1)
        advantages = advantages / (np.repeat(deviations, group_size)[:, None] + EPSILON)
    elif scale == "batch":
        advantages = advantages / (returns.std(ddof=1) + EPSILON)
    return advantages
