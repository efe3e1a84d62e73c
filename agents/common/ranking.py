"""Which completions of a round were the best and the worst of their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from textgym.agents.buffers.episode_buffer import EpisodeBuffer
from textgym.envs.segments import Segment


def rewards_without_kl(buffer: EpisodeBuffer, segments: Sequence[Segment], kl_coef: float) -> np.ndarray:
    """``(E,)`` what the environment paid for each completion, with its KL penalty given back.

    :param buffer: with rewards as they were paid, and the KL of each token
    :param segments: whole episodes
    :param kl_coef: β
    """
    rewards = buffer.rewards + kl_coef * buffer.kl if kl_coef else buffer.rewards  # without β the KL may be NaN
    return np.array([rewards[s.start : s.start + s.steps, s.row].sum(dtype=np.float64) for s in segments])


def best_of_groups(returns: np.ndarray, group_size: int, keep: int, judged: np.ndarray | None = None) -> np.ndarray:
    """``(E,)`` bool: the ``keep`` highest of each group; of equal ones the first.

    ::

        >>> best_of_groups(np.array([1.0, 3.0, 2.0, 5.0, 5.0, 5.0]), group_size=3, keep=1)
        array([False,  True, False,  True, False, False])

    :param returns: ``(E,)``, the K completions of a prompt in a row
    :param group_size: K
    :param keep: 1 to K
    :param judged: ``(E,)`` bool, completions to which the reward applies; the others are never among the best. None for
        all
    """
    judged = np.ones(len(returns), dtype=bool) if judged is None else judged
    returns = np.where(judged, returns, -np.inf)
    order = np.argsort(-returns.reshape(-1, group_size), axis=1, kind="stable")
    best = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(best, order[:, :keep], True, axis=1)
    return best.reshape(-1) & judged


def best_and_worst(
    paid: np.ndarray, group_size: int, min_margin: float = 0.0, judged: np.ndarray | None = None
) -> np.ndarray:
    """``(E,)`` 1 for the best of each group, -1 for its worst, 0 for the others and where these two are about equal.

    ::

        >>> best_and_worst(np.array([1.0, 3.0, 2.0, 5.0, 5.0, 5.0]), group_size=3)
        array([-1.,  1.,  0.,  0.,  0.,  0.])

    :param paid: ``(E,)``, the K completions of a prompt in a row
    :param group_size: K, at least 2
    :param min_margin: the two must differ by more
    :param judged: ``(E,)`` bool, completions to which the reward applies; the others are neither. None for all
    """
    groups = paid.reshape(-1, group_size)
    counted = np.ones(groups.shape, dtype=bool) if judged is None else judged.reshape(groups.shape)
    best, worst = np.where(counted, groups, -np.inf).argmax(1), np.where(counted, groups, np.inf).argmin(1)
    rows = np.arange(len(groups))
    differ = groups[rows, best] - groups[rows, worst] > min_margin
    marks = np.zeros(groups.shape)
    marks[rows[differ], best[differ]] = 1.0
    marks[rows[differ], worst[differ]] = -1.0
    return marks.reshape(-1)
