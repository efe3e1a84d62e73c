"""Rewards and advantages of a rollout on a common scale, over all processes."""

from __future__ import annotations

import numpy as np

from textgym.agents.buffers.episode_buffer import EpisodeBuffer
from textgym.agents.distributed.processes import Processes


def whiten_rewards(buffer: EpisodeBuffer, processes: Processes) -> None:
    """Put :func:`whitened` rewards in the place of a rollout's."""
    buffer.rewards[buffer.active] = whitened(buffer.rewards[buffer.active], processes)


def whitened(rewards: np.ndarray, processes: Processes | None = None) -> np.ndarray:
    """Rewards of unit variance with their mean kept; the variance is the biased one.

    From Ziegler et al.'s code, see "The N Implementation Details of RLHF with PPO" (Huang et al. 2023).

    :param rewards: any shape
    :param processes: whose rewards mean and variance are taken over; default one alone
    """
    processes = processes or Processes()
    mean = processes.mean(rewards)
    whitened: np.ndarray = (rewards - mean) / np.sqrt(processes.variance(rewards) + 1e-8) + mean
    return whitened


def normalize_over_rollout(buffer: EpisodeBuffer, processes: Processes) -> None:
    """Give the advantages of a rollout, of all processes, mean 0 and deviation 1; the variance is the biased one."""
    advantages = buffer.advantages[buffer.active]
    centred = advantages - processes.mean(advantages)
    buffer.advantages[buffer.active] = centred / (np.sqrt(processes.variance(centred)) + 1e-8)
