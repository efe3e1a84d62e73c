"""A training that ends in the middle of a rollout, and a log of what it did that can be compared with another's."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter


class Log(KVWriter):
    """What was logged, without the figures that depend on the clock."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.rows.append({name: value for name, value in key_values.items() if not name.startswith("time/")})

    def close(self) -> None:
        pass


class StopAfter(BaseCallback):
    """Fail in the middle of a rollout, as a killed process does."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.timesteps:
            raise KeyboardInterrupt
        return True
