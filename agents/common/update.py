"""The update after a rollout: passes over minibatches, an optimizer step on each, and what they were like."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.common.finite import check_gradients, check_loss
from textgym.agents.common.losses import Loss
from textgym.agents.distributed.processes import Processes
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.divergence import DivergedError


class Update:
    """Optimizer steps on the minibatches of a rollout, together with the other processes.

    :param policy: what learns
    :param processes: those that learn together
    :param timesteps: tokens trained on, for errors
    :param max_grad_norm: gradients are scaled down to this norm
    :param target_kl: at 1.5 times this KL to the policy before the update, nats per token, it stops; None for never
    """

    def __init__(
        self,
        policy: LanguageModelPolicy,
        processes: Processes,
        timesteps: int,
        max_grad_norm: float,
        target_kl: float | None = None,
    ) -> None:
        self._policy = policy
        self._processes = processes
        self._timesteps = timesteps
        self._max_grad_norm = max_grad_norm
        self._target_kl = target_kl
        self._figures: dict[str, list[float]] = {}
        self._grad_norms: list[float] = []
        self._ratio_first: float | None = None

    def run(
        self,
        minibatches: Callable[[], Iterable[SegmentSamples]],
        loss_of: Callable[[SegmentSamples], Loss],
        n_epochs: int,
        verbose: int = 0,
    ) -> int:
        """Learn.

        :param minibatches: of one pass
        :param loss_of: the loss of one
        :param n_epochs: passes
        :param verbose: from 1 on, an early end is printed
        :return: passes that began
        :raises DivergedError: if a loss or a gradient is not finite
        """
        optimizer = self._policy.optimizer
        self._processes.begin_update()
        epoch, near = 0, True
        while near and epoch < n_epochs:
            self._figures["approx_kl"] = []  # of the last epoch alone, as in SB3
            for batch in minibatches():
                optimizer.zero_grad()  # before the forward: old gradients beside activations are the peak
                loss = loss_of(batch)
                value = self._note(loss)
                weight = len(batch.actions) if loss.weight is None else loss.weight
                if self._target_kl is not None and self._too_far(self._target_kl, weight, epoch, verbose):
                    near = False
                    break
                self._processes.backward(loss.value, self._policy, weight)
                norm = self._processes.clip_gradients(self._policy, self._max_grad_norm)
                check_gradients(norm, value, self._timesteps)
                self._grad_norms.append(norm)
                optimizer.step()
            epoch += 1
        self._processes.end_update()
        return epoch

    def _note(self, loss: Loss) -> float:
        """Keep the figures of a minibatch; its loss."""
        for name, value in {**loss.figures, "loss": loss.value}.items():
            self._figures.setdefault(name, []).append(value.item() if isinstance(value, Tensor) else float(value))
        newest = self._figures["loss"][-1]
        check_loss(newest, self._processes, self._timesteps)
        if self._ratio_first is None and "ratio_first" in loss.figures:
            self._ratio_first = float(loss.figures["ratio_first"])
        return newest

    def _too_far(self, target_kl: float, weight: float, epoch: int, verbose: int) -> bool:
        """Whether the newest minibatch says that the policy went beyond ``target_kl``."""
        approx_kls = self._figures["approx_kl"]
        if not approx_kls:
            raise ValueError(f"target_kl={target_kl}: the loss has no ratio of policies, approx_kl, to stop at")
        approx_kl = self._processes.weighted_mean(approx_kls[-1], weight)
        if not np.isfinite(approx_kl):
            raise DivergedError(f"the KL to the policy before the update is {approx_kl}", self._timesteps)
        if approx_kl <= 1.5 * target_kl:
            return False
        if verbose >= 1 and self._processes.is_main:
            print(f"Early stopping in epoch {epoch} due to reaching max kl: {approx_kl:.2f}")
        return True

    def figures(self) -> dict[str, float]:
        """What the update was like: means over the minibatches of all processes, the last loss, the first ratio."""
        lists = {name: values for name, values in self._figures.items() if values and name != "ratio_first"}
        means = {name: values[-1] if name == "loss" else np.mean(values) for name, values in lists.items()}
        figures = dict(self._processes.means(means))
        if self._ratio_first is not None:
            figures["ratio_first"] = self._processes.largest(self._ratio_first)
        if self._grad_norms:
            figures["grad_norm"] = float(np.mean(self._grad_norms))
        return figures


def explained_variance(buffer: EpisodeBuffer, processes: Processes) -> float:
    """What the values of a rollout explain of its returns, at most 1; NaN where all returns are the same."""
    returns, values = buffer.returns[buffer.active], buffer.values[buffer.active]
    variance, residual = processes.variance(returns), processes.variance(returns - values)
    return float(1 - residual / variance) if variance else float("nan")
