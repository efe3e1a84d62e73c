"""The record of a rollout where something stands between agent and environment: made of what steps returned."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from textgym.envs.scoring import RolloutScores

_OF_STEPS = ("reward_model", "kl", "ref_log_prob")
_OF_EPISODES = ("score", "applies", "finish_reason", "prompt", "completion", "is_success")


class ReturnedSteps:
    """Steps of a ``VecEnv`` as its outermost wrapper gave them back, with the rewards that this has made of them.

    :param num_rows: N
    """

    def __init__(self, num_rows: int) -> None:
        self._kl = np.zeros(num_rows)  # of the running episodes, nats
        self.clear()

    def begin(self, fresh: np.ndarray) -> None:
        """Begin a record.

        :param fresh: ``(N,)`` bool, rows whose episode begins with the next step
        """
        self._kl[fresh] = 0.0
        self.clear()

    def clear(self) -> None:
        """Forget the steps; running episodes go on."""
        self._rewards: list[np.ndarray] = []
        self._said: list[list[list[float]]] = []  # of each step: for each of _OF_STEPS, what the rows' infos say
        self._turn_ends: list[np.ndarray] = []
        self._episodes: list[dict[str, Any]] = []

    def add(self, returned: VecEnvStepReturn) -> None:
        """Note what a step returned."""
        _, rewards, dones, infos = returned
        said = [[info.get(name, np.nan) for info in infos] for name in _OF_STEPS]
        self._kl += said[_OF_STEPS.index("kl")]
        for row in np.flatnonzero(dones).tolist():
            info = infos[row]
            self._episodes.append(
                {
                    **info.get("episode", {}),  # r, l and t, as SB3's Monitor says them
                    **{name: info[name] for name in _OF_EPISODES if name in info},
                    "kl": float(self._kl[row]),
                    "row": row,
                    "step": len(self._rewards),
                }
            )
            self._kl[row] = 0.0
        self._rewards.append(np.asarray(rewards, dtype=np.float32))
        self._said.append(said)
        self._turn_ends.append(dones | np.array(["turn" in info for info in infos]))

    def scores(self) -> RolloutScores:
        """What the steps since the last call earned, and the episodes that ended in them."""
        said = np.array(self._said, dtype=np.float32)  # (S, 3, N), NaN where infos said nothing
        scores = RolloutScores(
            rewards=np.stack(self._rewards),
            **{name: said[:, i] for i, name in enumerate(_OF_STEPS)},
            turn_ends=np.stack(self._turn_ends),
            episodes=self._episodes,
        )
        self.clear()
        return scores
