"""Stable-Baselines3's ``VecEnv`` around Gymnasium vector environments, so that its algorithms get one batched forward.

``as_vec_env`` turns whatever a user passes to an agent into a ``VecEnv``; :class:`TextGenVecEnv` is the adapter.
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from textgym.envs.arguments import log_probabilities
from textgym.envs.vector_env import TextGenVectorEnv


class TextGenVecEnv(VecEnv):
    """A :class:`TextGenVectorEnv`, bare or inside Gymnasium's vector wrappers, as a Stable-Baselines3 ``VecEnv``.

    It reports finished episodes in ``info["episode"]`` as SB3's ``Monitor`` does, and says so to those who ask.
    Truncated completions carry ``TimeLimit.truncated``; whether to bootstrap from them is the algorithm's affair.

    :param env: the vector environment, with autoreset in the same step (its default)
    :raises ValueError: if it isn't a text environment or resets in another way
    :raises TypeError: at ``reset``, if a wrapper gives something else than NumPy arrays and a dictionary of infos
    """

    def __init__(self, env: VectorEnv | VectorWrapper) -> None:
        text_env = env.unwrapped
        if not isinstance(text_env, TextGenVectorEnv):
            raise ValueError(f"env={env} is not a TextGenVectorEnv; SB3's own make_vec_env serves other environments")
        if text_env.options.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"autoreset_mode={text_env.options.autoreset_mode} doesn't fit Stable-Baselines3, whose environments "
                "reset in the same step; leave autoreset_mode at its default"
            )
        self.env = env
        self.text_env = text_env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions = np.zeros(self.num_envs, dtype=np.int64)
        self._log_probs: Any = None
        self._reported = np.zeros(self.num_envs)  # log-probabilities that rows were told of one by one
        self._returns = np.zeros(self.num_envs)
        self._started_at = time.time()

    def reset(self) -> VecEnvObs:
        """Begin anew in all rows."""
        seeds: Any = self._seeds if any(seed is not None for seed in self._seeds) else None
        observation, infos = self.env.reset(seed=seeds, options=self._options_of_all_rows())
        if not isinstance(infos, dict) or not all(isinstance(value, np.ndarray) for value in _arrays(observation)):
            kinds = ", ".join(sorted({type(value).__name__ for value in _arrays(observation)}))
            raise TypeError(
                f"env={self.env} gives infos as a {type(infos).__name__} and observations as {kinds}; "
                "Stable-Baselines3 gets a dictionary and NumPy arrays, and makes lists and tensors of them itself: "
                "leave out the wrapper that does"
            )
        self.reset_infos = _by_row(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0.0
        return observation

    def _options_of_all_rows(self) -> dict[str, Any] | None:
        """What ``set_options`` was given for each row, in the form that the vector environment takes."""
        if not any(self._options):
            return None
        unknown = sorted({name for options in self._options for name in options} - {"prompt"})
        if unknown:
            raise ValueError(f"reset options have {unknown[0]!r}; known is 'prompt', a text")
        return {"prompt": [options.get("prompt") for options in self._options]}

    def step_async(self, actions: np.ndarray, log_probs: Any = None) -> None:
        """Note the actions, and the log-probabilities ``(N,)`` in nats under which they were sampled."""
        self._actions, self._log_probs = np.asarray(actions), log_probs

    def step_wait(self) -> VecEnvStepReturn:
        """Take the step that was noted."""
        if self._log_probs is None and self._reported.any():
            self._log_probs = self._reported
        if self._log_probs is not None:
            self.text_env.report_log_probs(self._log_probs)
            self._log_probs = None
        self._reported[:] = 0.0
        lengths = self.text_env.episode_lengths + 1  # of the episodes that end now
        observation, rewards, terminated, truncated, infos = self.env.step(self._actions)
        done = terminated | truncated
        self._returns += rewards
        rows = _by_row(infos, self.num_envs)
        if done.any():
            # Gymnasium keeps what an episode's last step says apart from what the reset after it says.
            final = _by_row(infos["final_info"], self.num_envs)
            for row in np.flatnonzero(done).tolist():
                self.reset_infos[row] = {k: rows[row][k] for k in ("prompt", "action_mask") if k in rows[row]}
                info = final[row]
                info["terminal_observation"] = infos["final_obs"][row]
                if not self.text_env.scoring_deferred:
                    info["episode"] = {
                        "r": round(float(self._returns[row]), 6),
                        "l": int(lengths[row]),
                        "t": round(time.time() - self._started_at, 6),
                    }
                rows[row] = info
                self._returns[row] = 0.0
        for row, cut in enumerate((truncated & ~terminated).tolist()):
            rows[row]["TimeLimit.truncated"] = cut
        return observation, rewards.astype(np.float32), done, rows

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def state_dict(self) -> dict[str, Any]:
        """Where every episode stands: :meth:`TextGenVectorEnv.state_dict` and the running returns."""
        return {"rows": self.text_env.state_dict(), "returns": self._returns.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> VecEnvObs:
        """Go on from what :meth:`state_dict` gave, and return the observation.

        :raises ValueError: if it is the state of an environment with other options
        """
        self.reset()  # Gymnasium's wrappers count on it
        self.text_env.load_state_dict(state["rows"])
        self._returns[:] = state["returns"]
        return self.text_env.observation()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the environment, once for each row asked for: of its own where rows have one."""
        value = getattr(self.text_env, _SINGLE.get(attr_name, attr_name))
        if attr_name in _BY_ROW:
            return [None if value is None else value[row] for row in self._get_indices(indices)]
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the environment; all rows share it.

        :raises ValueError: for some rows only
        """
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"{attr_name} belongs to all rows together; set it with indices=None")
        setattr(self.text_env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the environment; what comes back as one entry per row is handed out by row.

        ``report_log_prob``, which single environments have, tells the rows asked for of the coming step.
        """
        if method_name == "report_log_prob":
            rows = list(self._get_indices(indices))
            self._reported[rows] = _one_log_prob(*method_args, **method_kwargs)
            return [None] * len(rows)
        result = getattr(self.text_env, method_name)(*method_args, **method_kwargs)
        per_row = isinstance(result, tuple | list | np.ndarray) and len(result) == self.num_envs
        return [result[row] if per_row else result for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether the rows are wrapped; in ``Monitor`` they are as good as that."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def get_images(self) -> list[np.ndarray | None]:
        """One picture per row, with ``render_mode="rgb_array"``."""
        frames = self.text_env.render()
        return [None] * self.num_envs if frames is None else list(frames)


# What the rows of a vector environment have under another name, or each for itself.
_SINGLE = {"action_space": "single_action_space", "observation_space": "single_observation_space"}
_BY_ROW = ("np_random", "np_random_seed", "token_ids")


def _one_log_prob(log_prob: Any) -> float:
    return float(log_probabilities("log_prob", log_prob, ()))


def as_vec_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
    """What a user may pass to an agent, as a ``VecEnv``.

    :param env: an environment id (made with one row), a Gymnasium environment, a Gymnasium vector environment, or a
        ``VecEnv``, which is returned as it is
    :param verbose: 1 says which wrappers were put around
    :param monitor_wrapper: whether a single environment gets SB3's ``Monitor``
    """
    if isinstance(env, VecEnv):
        return env
    if isinstance(env, str):
        env = gym.make_vec(env, num_envs=1, vectorization_mode="vector_entry_point")
    if isinstance(env, VectorEnv | VectorWrapper):
        return TextGenVecEnv(env)
    if not isinstance(env, gym.Env):
        raise TypeError(
            f"env={env!r} is a {type(env).__name__}; give an environment id, a Gymnasium environment or vector "
            "environment, or a Stable-Baselines3 VecEnv"
        )
    wrapped = Monitor(env) if monitor_wrapper and not _has_monitor(env) else env
    if verbose >= 1:
        print("Wrapping the environment in a Monitor and a DummyVecEnv")
    return DummyVecEnv([lambda: wrapped])


def deferrable(env: VecEnv) -> TextGenVectorEnv | None:
    """The environment behind a ``VecEnv`` whose rewards nobody looks at before the agent does, else None.

    Only then may scoring be deferred: a wrapper that normalises, records or changes rewards must see them at each step.
    """
    if type(env) is TextGenVecEnv and env.env is env.text_env:
        return env.text_env
    return None


def _has_monitor(env: gym.Env) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, Monitor):
            return True
        env = env.env
    return False


def _arrays(observation: Any) -> list[Any]:
    return list(observation.values()) if isinstance(observation, dict) else [observation]


def _by_row(infos: dict[str, Any], num_rows: int) -> list[dict[str, Any]]:
    """Gymnasium's dictionary of arrays as one dictionary per row."""
    rows: list[dict[str, Any]] = [{} for _ in range(num_rows)]
    for name, values in infos.items():
        if name.startswith("_") or name in ("final_obs", "final_info"):
            continue
        has = infos.get(f"_{name}")
        for row in range(num_rows) if has is None else np.flatnonzero(has).tolist():
            value = {k: v[row] for k, v in values.items()} if isinstance(values, dict) else values[row]
            rows[row][name] = value.item() if isinstance(value, np.generic) else value
    return rows
