"""What values are learned from: rewards, and what is expected after them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def bellman_targets(
    rewards: Tensor,
    ahead: Tensor,
    rows: np.ndarray,
    gamma: float,
    trace: float | Tensor = 0.0,
    toll: Tensor | None = None,
) -> Tensor:
    """Targets of Q in every state of some whole episodes, from the end backwards::

        y_t = r_t + γ · [(1 − λ_t+1) · ahead_t+1 + λ_t+1 · (y_t+1 − toll_t+1)]

    Nothing is expected after an episode's last token. With λ = 0 a target is the reward and what is ahead of the next
    state; with λ = 1 it is everything that the episode earned; in between each target is a mean over the n-step targets
    with weights (1 − λ) λⁿ⁻¹ (Sutton and Barto, "Reinforcement Learning: An Introduction", section 12.1). ::

        >>> rewards, ahead = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 10.0])
        >>> bellman_targets(rewards, ahead, np.array([0, 0]), 1.0)
        tensor([11.,  2.])
        >>> bellman_targets(rewards, ahead, np.array([0, 0]), 1.0, trace=1.0)
        tensor([3., 2.])

    :param rewards: ``(M,)``, the transitions of an episode in a row
    :param ahead: ``(M,)`` what the state in which each action was taken promises
    :param rows: ``(M,)`` which episode each belongs to, from 0 on, in order
    :param gamma: discount per token, γ
    :param trace: λ, a number or ``(M,)``, each action's own
    :param toll: ``(M,)`` how much more than its state each action promises by itself; default nothing
    :return: ``(M,)`` float32, without gradients
    """
    lengths = np.bincount(rows)
    offset = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = (torch.as_tensor(rows, device=rewards.device), torch.as_tensor(offset, device=rewards.device))
    shape = (len(lengths), int(lengths.max()) + 1)  # a column more: after the end there is nothing

    def padded(values: Tensor) -> Tensor:
        return torch.zeros(shape, device=rewards.device).index_put(at, values.detach().float())

    traces = padded(torch.full_like(rewards, trace) if isinstance(trace, float | int) else trace)
    reward, promise = padded(rewards), padded(ahead)
    tolls = torch.zeros_like(reward) if toll is None else padded(toll)
    targets = torch.zeros_like(reward)
    for t in reversed(range(shape[1] - 1)):
        later = targets[:, t + 1] - tolls[:, t + 1]
        mixed = torch.lerp(promise[:, t + 1], later, traces[:, t + 1])
        targets[:, t] = reward[:, t] + gamma * mixed
        # Beyond an episode's end all terms are 0, and so are its targets.
    return targets[at]
