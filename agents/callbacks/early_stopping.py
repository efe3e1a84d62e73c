"""Stopping a training that has gone too far from its reference model."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.checks import check_int, check_number


class StopOnKL(BaseCallback):
    """End training once the KL to the reference model stays above a limit.

    The true reward rises and then falls with the distance from the reference model, √KL, while the proxy keeps rising
    (Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization", https://arxiv.org/abs/2210.10760): a limit on
    the KL stops before most of the fall. After each rollout the mean KL of the episodes that ended in it, in all
    processes, is compared with the limit; the update from that rollout still happens, and training ends with the first
    step of the next, so that callbacks see an ordinary end and checkpoints and ``save`` are as ever. To stay near a KL
    instead of stopping there, use :class:`~textgym.agents.callbacks.adaptive_kl.AdaptiveKLCallback`.

    :param max_kl: nats per completion
    :param patience: rollouts in a row that must be above it
    :param verbose: 1 says when and why training ends
    :raises ValueError: if an argument is impossible; at the end of the first rollout if the environment measures no KL
    """

    def __init__(self, max_kl: float, patience: int = 1, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_number("max_kl", max_kl, low=0.0, open_low=True)
        check_int("patience", patience, low=1)
        self.max_kl = float(max_kl)
        self.patience = patience
        self._above = 0  # rollouts in a row
        self.last_kl: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether the limit was exceeded for long enough."""
        return self._above >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """How many rollouts in a row were above the limit, for checkpoints."""
        return {"above": self._above, "last_kl": self.last_kl}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._above = state["above"]
        self.last_kl = state["last_kl"]

    def _on_step(self) -> bool:
        if self.stopped and self.verbose >= 1:
            print(
                f"Training ends after {self.num_timesteps} tokens: KL to the reference {self.last_kl:.2f} nats, "
                f"more than {self.max_kl:g} in {self._above} rollouts"
            )
        return not self.stopped

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, TextOnPolicyAlgorithm)
        kl = np.array([episode["kl"] for episode in self.model.finished_episodes], dtype=np.float64)
        kl = np.concatenate(self.model.processes.gather(kl))  # all stop at the same step
        if len(kl) == 0:
            return
        if np.isnan(kl).all():
            raise ValueError("the environment has kl_coef=0 and so measures no KL: give it a small one, such as 1e-6")
        self.last_kl = float(np.nanmean(kl))
        self._above = self._above + 1 if self.last_kl > self.max_kl else 0
        self.logger.record("train/kl_limit", self.max_kl)
