"""Advantages from comparing the completions of one prompt with each other, for RLOO and GRPO.

What is judged is a *decision*, a run of tokens that have one advantage in common. ``credit`` says which:

- ``"completion"``: the whole completion, by its return; this is what both papers have
- ``"turn"``: a turn, by what it and later turns earn
- ``"token"``: a token, by what it and later tokens earn

Decision k of completion i, which begins with token b, is worth the discounted rewards from there on::

    G(i, k) = Σ_{s ≥ b} γ^(s − b) r(i, s)

and is compared with decision k of the other completions, turn by turn or token by token. A completion that has ended
before its decision k earns nothing from there on, and counts as 0: not only those that last longest are compared with
each other. So what a decision is compared with, the mean of the others' G(j, k), does not depend on it, and the
gradient is that of the expected return (Williams 1992), whatever the numbers of turns. Where every completion has one
turn, ``"turn"`` is ``"completion"``.

Advantages of turns in GRPO are from Zeng et al. 2025, "Reinforcing Multi-Turn Reasoning in LLM Agents via Turn-Level
Credit Assignment" (https://arxiv.org/abs/2505.11821). With two turns, a reward for the first and one for the outcome,
and nothing divided by a deviation, theirs (with λ = 1) are those here. They divide each turn's reward by its own
deviation before they add, and need equal numbers of turns; here rewards are added first, and the deviation is that of
the completions' returns.
"""

from __future__ import annotations

import numpy as np

CREDITS = ("completion", "turn", "token")
SCALES = ("group", "batch", "none")
EPSILON = 1e-4  # as in TRL


def by_credit(to_go: np.ndarray, turns: np.ndarray, credit: str) -> tuple[np.ndarray, np.ndarray]:
    """What each decision is worth, and which decision each token belongs to.

    ::

        >>> to_go = np.array([[6.0, 5.0, 3.0], [2.0, 1.0, 0.0]])
        >>> worth, decided = by_credit(to_go, np.array([[0, 0, 1], [0, 0, -1]]), "turn")
        >>> worth
        array([[6., 3.],
               [2., 0.]])
        >>> decided[0]
        array([0, 0, 1])

    :param to_go: ``(E, T)`` rewards from each token on, 0 after an episode's end
    :param turns: ``(E, T)`` the turn each token belongs to, from 0; -1 after an episode's end
    :param credit: ``"completion"``, ``"turn"`` or ``"token"``
    :return: ``(E, D)``, 0 after an episode's end, and ``(E, T)`` from 0
    """
    if credit == "token":
        return to_go, np.broadcast_to(np.arange(to_go.shape[1]), to_go.shape)
    decided = np.zeros_like(turns) if credit == "completion" else np.maximum(turns, 0)
    begins = (turns >= 0) & (np.diff(decided, axis=1, prepend=-1) != 0)
    episodes, places = np.nonzero(begins)
    worth = np.zeros((len(to_go), int(decided.max()) + 1))
    worth[episodes, decided[episodes, places]] = to_go[episodes, places]
    return worth, decided


def leave_one_out_advantages(returns: np.ndarray, group_size: int, judged: np.ndarray | None = None) -> np.ndarray:
    """``(E, D)`` each return minus the mean of the others of its group.

    Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", section 3.2 (https://arxiv.org/abs/2402.14740). ::

        >>> leave_one_out_advantages(np.array([[1.0], [2.0], [6.0]]), 3).ravel()
        array([-3. , -1.5,  4.5])
        >>> leave_one_out_advantages(np.array([[1.0], [0.0], [6.0]]), 3, np.array([True, False, True])).ravel()
        array([-5.,  0.,  5.])

    :param returns: ``(E, D)`` of decisions, the K completions of a prompt in a row
    :param group_size: K, at least 2
    :param judged: ``(E,)`` bool, completions to which the reward applies; the others are left out and have 0, as has
        one that nothing is left to be compared with. None for all
    """
    groups = returns.reshape(-1, group_size, returns.shape[1])  # (G, K, T)
    counted = _counted(judged, groups)
    number = counted.sum(1, keepdims=True)
    others = ((groups * counted).sum(1, keepdims=True) - groups) / np.maximum(number - 1, 1)
    advantages: np.ndarray = np.where(counted & (number > 1), groups - others, 0.0).reshape(returns.shape)
    return advantages


def group_relative_advantages(
    values: np.ndarray,
    returns: np.ndarray,
    group_size: int,
    scale: str = "group",
    judged: np.ndarray | None = None,
) -> np.ndarray:
    """``(E, D)`` each return minus the mean of its group, over a standard deviation of completions' returns.

    Shao et al. 2024, "DeepSeekMath", section 4.1.2 (https://arxiv.org/abs/2402.03300); without the scale, Liu et al.
    2025, "Understanding R1-Zero-Like Training" (https://arxiv.org/abs/2503.20783). The deviation is the unbiased one,
    plus 10⁻⁴, as in TRL. It is that of whole completions for turns and tokens, too: late ones have few completions
    left. ::

        >>> values = np.array([[1.0], [2.0], [6.0]])
        >>> group_relative_advantages(values, values[:, 0], 3).ravel().round(3)
        array([-0.756, -0.378,  1.134])

    :param values: ``(E, D)`` of decisions, from :func:`by_credit`, the K completions of a prompt in a row
    :param returns: ``(E,)`` of the completions
    :param group_size: K, at least 2
    :param scale: ``"group"``: the deviation of the K returns of the prompt; ``"batch"``: of all returns; ``"none"``
    :param judged: ``(E,)`` bool, completions to which the reward applies; the others are not part of mean and deviation
        and have 0. None for all
    """
    groups = values.reshape(-1, group_size, values.shape[1])  # (G, K, T)
    counted = _counted(judged, groups)
    means = (groups * counted).sum(1, keepdims=True) / np.maximum(counted.sum(1, keepdims=True), 1)
    advantages: np.ndarray = np.where(counted, groups - means, 0.0).reshape(values.shape)
    if scale == "group":
        deviations = _deviations(returns.reshape(-1, group_size), counted[:, :, 0])
        advantages = advantages / (np.repeat(deviations, group_size)[:, None] + EPSILON)
    elif scale == "batch":
        advantages = advantages / (_deviations(returns[None], counted.reshape(1, -1)) + EPSILON)
    return advantages


def _counted(judged: np.ndarray | None, groups: np.ndarray) -> np.ndarray:
    """``(G, K, 1)`` bool, which completions of the groups the reward applies to."""
    shape = (*groups.shape[:2], 1)
    return np.ones(shape, dtype=bool) if judged is None else np.asarray(judged, dtype=bool).reshape(shape)


def _deviations(returns: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Unbiased standard deviations ``(G,)`` of those of ``(G, K)`` returns that count; 0 for a single one."""
    number = counted.sum(1, keepdims=True)
    means = (returns * counted).sum(1, keepdims=True) / np.maximum(number, 1)
    squares = np.where(counted, (returns - means) ** 2, 0.0).sum(1)
    deviations: np.ndarray = np.sqrt(squares / np.maximum(number[:, 0] - 1, 1))
    return deviations
