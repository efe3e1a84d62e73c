"""Stable-Baselines3 callbacks for text environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.common.text_environment import TextEnvironment
from textgym.kl import AdaptiveKLController


class AdaptiveKLCallback(BaseCallback):
    """Steer the environment's ``kl_coef`` so that the KL to the reference model approaches a target.

    After every rollout :class:`~textgym.kl.AdaptiveKLController` (Ziegler et al. 2019, section 2.2) sees the
    mean KL of the completions that ended in it, in all processes. Logs ``train/kl_target``; ``train/kl_coef`` is
    logged anyway.

    :param target: nats per completion
    :param horizon: completions over which the coefficient may change by a factor of about e^0.2
    :param init_kl_coef: first coefficient; default what the environment has
    :param least: no smaller coefficient, so that it can only rise from there
    :param verbose: 0, 1 or 2
    :raises ValueError: at the start of training, if the coefficient to start from is 0
    """

    def __init__(
        self, target: float, horizon: float, init_kl_coef: float | None = None, least: float = 0.0, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        # Made now as well, so that impossible values are refused where they are written.
        first = 1.0 if init_kl_coef is None else init_kl_coef
        self.controller = AdaptiveKLController(first, target, horizon, least)
        self.init_kl_coef = init_kl_coef
        self._started = False

    def _on_training_start(self) -> None:
        environment = TextEnvironment(self.training_env)
        if not self._started:  # a second learn() goes on with the coefficient reached
            coef = environment.kl_coef if self.init_kl_coef is None else self.init_kl_coef
            if coef <= 0:
                raise ValueError(
                    f"the environment has kl_coef={coef}, which can't be adapted by factors: "
                    "give it a positive kl_coef, or init_kl_coef to this callback"
                )
            self._begin(coef)
            self._started = True
        environment.kl_coef = self.controller.kl_coef

    def _begin(self, coef: float) -> None:
        known = self.controller
        self.controller = AdaptiveKLController(coef, known.target, known.horizon, known.least)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient reached, for checkpoints."""
        return {"kl_coef": self.controller.kl_coef, "started": self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._begin(state["kl_coef"])
        self._started = state["started"]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, TextOnPolicyAlgorithm)
        kl = np.array([episode["kl"] for episode in self.model.finished_episodes])
        kl = np.concatenate(self.model.processes.gather(kl))
        # Many short completions may be more than the controller takes at once.
        count = min(len(kl), int(4 * self.controller.horizon))
        if count:
            TextEnvironment(self.training_env).kl_coef = self.controller.update(float(kl.mean()), count)
        self.logger.record("train/kl_target", self.controller.target)
