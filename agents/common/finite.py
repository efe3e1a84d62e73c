"""Divergence: training ends before what is not finite reaches the weights, or what is kept of them.

Each check raises :class:`~textgym.divergence.DivergedError`, with the tokens that were trained on by then.
"""

from __future__ import annotations

import numpy as np
import torch

from textgym.agents.buffers.episode_buffer import EpisodeBuffer
from textgym.agents.distributed.processes import Processes
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.divergence import DivergedError

# The square of a larger one is infinite in float32. Where layers normalise, what comes of such weights may be finite.
LARGEST_WEIGHT = 1.8e19


def check_rollout(buffer: EpisodeBuffer, names: tuple[str, ...], timesteps: int) -> None:
    """:raises DivergedError: if one of these arrays of the buffer is not finite where it is learned from"""
    for name in names:
        if not np.isfinite(getattr(buffer, name)[buffer.active]).all():
            raise DivergedError(f"{name.replace('_', '-')} of the rollout are not finite", timesteps)


def check_loss(loss: float, processes: Processes, timesteps: int) -> None:
    """:raises DivergedError: if it is not finite; of several processes all find out by their gradients"""
    if processes.world_size == 1 and not np.isfinite(loss):
        raise DivergedError(f"the loss is {loss}", timesteps)


def check_gradients(norm: float, loss: float, timesteps: int) -> None:
    """:raises DivergedError: if the norm of the gradients, which is the same in all processes, is not finite"""
    if not np.isfinite(norm):
        what = f"the loss is {loss}" if not np.isfinite(loss) else f"the norm of the gradients is {norm}"
        raise DivergedError(what, timesteps)


def check_policy(policy: LanguageModelPolicy, buffer: EpisodeBuffer, processes: Processes, timesteps: int) -> None:
    """Find out whether the weights, and what comes of them for a text of the last rollout, are finite.

    :raises DivergedError: if they aren't, or weights are so large that their squares are infinite
    """
    problem = _weights_problem(policy)
    segments = buffer.segments
    if problem is None and segments and not processes.shard:
        with torch.no_grad():
            values, log_prob, _ = policy.evaluate_segments(buffer.samples(segments[:1]))
        if not (torch.isfinite(values).all() and torch.isfinite(log_prob).all()):
            problem = "what the policy says of a text is not finite"
    if processes.any(problem is not None):
        raise DivergedError(problem or "another process found something that is not finite", timesteps)


def _weights_problem(policy: LanguageModelPolicy) -> str | None:
    """What is wrong with the first weights that are not finite, or too large."""
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and parameter.numel():
            largest = max(map(abs, torch.stack(parameter.detach().aminmax()).tolist()))  # NaN where one weight is
            if not largest < LARGEST_WEIGHT:
                what = f"are as large as {largest:.0e}" if np.isfinite(largest) else "are not finite"
                return f"the weights {name} {what}"
    return None
