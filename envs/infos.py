"""Infos of N rows in the form of Gymnasium's vector environments."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs


class VectorInfos:
    """Collects infos: an array per key, and beside it under ``_key`` a mask of the rows that have it.

    :param num_rows: N
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.values: dict[str, Any] = {}

    def put(self, name: str, rows: np.ndarray, values: Any, dtype: Any = np.float64) -> None:
        """Set the info of some rows.

        :param rows: ``(B,)``
        :param values: B values, or an array ``(B, ...)``
        :param dtype: of the array; ``object`` for texts, whose gaps are None, as Gymnasium has it
        """
        if not len(rows):
            return
        if dtype is object:
            array = np.empty(len(rows), dtype=object)
            for i, value in enumerate(values):  # at once, NumPy would take lists apart
                array[i] = value
        else:
            array = np.asarray(values, dtype=dtype)
        if name not in self.values:
            gap = None if dtype is object else 0
            self.values[name] = np.full((self.num_rows, *array.shape[1:]), gap, dtype=dtype)
        self.values[name][rows] = array
        self.values.setdefault(f"_{name}", np.zeros(self.num_rows, dtype=bool))[rows] = True

    def move_to_final(self, rows: np.ndarray, observations: list[dict[str, np.ndarray]]) -> None:
        """Take what finished rows have into ``final_info``, and their last observations into ``final_obs``.

        :param rows: ``(B,)`` rows that begin anew in the same step
        :param observations: their B last observations
        """
        final = VectorInfos(self.num_rows)
        for name in [key for key in self.values if not key.startswith("_")]:
            values, has = self.values[name], self.values[f"_{name}"]
            kind = object if values.dtype == object else values.dtype
            mine = rows[has[rows]]
            final.put(name, mine, values[mine], kind)
            has[mine] = False
            values[mine] = None if kind is object else 0
            if not has.any():
                del self.values[name], self.values[f"_{name}"]
        last = np.full(self.num_rows, None, dtype=object)
        for row, observation in zip(rows.tolist(), observations, strict=True):
            last[row] = observation
        finished = np.zeros(self.num_rows, dtype=bool)
        finished[rows] = True
        self.values.update(final_obs=last, _final_obs=finished, final_info=final.values, _final_info=finished.copy())


class SameInfoKeys(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Gives the infos of a single text environment the same keys at every step, for clients that record them.

    Recorders such as Minari's put infos into arrays and want all of them in one form. What an episode says only at its
    end, or not at its reset, is NaN (numbers) or ``""`` (texts) where it has nothing to say. ::

        >>> import gymnasium as gym, textgym
        >>> from textgym.envs import SameInfoKeys
        >>> env = SameInfoKeys(gym.make("TextGen-v0", max_new_tokens=2))
        >>> _, at_reset = env.reset(seed=0)
        >>> *_, at_step = env.step(5)
        >>> at_reset.keys() == at_step.keys(), at_step["finish_reason"], at_step["score"]
        (True, '', nan)
        >>> env.close()

    :param env: a ``TextGen-v0`` environment, wrapped or not
    :raises TypeError: if it is another environment
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        if not hasattr(env.unwrapped, "has_reference") or not isinstance(env.action_space, gym.spaces.Discrete):
            raise TypeError(f"env={env} is not a TextGen-v0 environment")
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**arguments)
        return observation, self._filled(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, self._filled(info)

    def _filled(self, info: dict[str, Any]) -> dict[str, Any]:
        rows: Any = self.unwrapped
        gaps: dict[str, Any] = dict.fromkeys(("prompt", "completion", "finish_reason"), "")
        gaps["applies"] = True  # until the reward says otherwise
        gaps |= dict.fromkeys(("reward_model", "score"), np.nan)
        if rows.has_reference:
            gaps |= dict.fromkeys(("kl", "ref_log_prob"), np.nan)
        if rows.options.missing_eos_penalty:
            gaps["missing_eos_penalty"] = np.nan
        return {**gaps, **info}
