"""What the trainings of the embedded models do alike: a step of the optimizer, and work in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn


def take_step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any = None) -> None:
    """Go down the gradient of a loss, whose norm is at most 1.

    :param model: whose gradients they are
    :param schedule: of the learning rate, where there is one
    """
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if schedule is not None:
        schedule.step()
    optimizer.zero_grad(set_to_none=True)


def run_processes(workers: Sequence[BaseProcess], what: str) -> None:
    """Start processes and wait for all of them.

    :param what: a process of theirs, for the message
    :raises RuntimeError: if one of them failed
    """
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"a {what} process failed: exit codes {[worker.exitcode for worker in workers]}")
