"""RL Baselines3 Zoo with textgym's agents among its algorithms.

The zoo's scripts take the name of an algorithm from a table that they fill when they are imported, so a package named
in ``--gym-packages`` comes too late to add to it. This module adds ``textgym_ppo`` and then runs the script::

    python -m textgym.agents.cli.zoo train --algo textgym_ppo --env TextGen-v0
    python -m textgym.agents.cli.zoo enjoy --algo textgym_ppo --env TextGen-v0 -f logs --stochastic --no-render

The first word names a module of ``rl_zoo3`` (``train``, ``enjoy``, ``record_video`` ...), and the rest are its own
arguments. ``train`` differs in two ways, unless told otherwise. Where an algorithm has hyperparameters in
:mod:`textgym.hyperparams`, it uses them; this holds for stock ``--algo ppo``, too. And our agents get their rows
stepped together (:class:`ZooRows`), unless ``--vec-env`` is given. Needs ``pip install "textgym[zoo]"``.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from textgym.agents.ppo import PPO
from textgym.envs import TextGenEnv, TextGenVectorEnv
from textgym.envs.sb3 import TextGenVecEnv
from textgym.hyperparams import ALGORITHMS, hyperparams_file

AGENTS: dict[str, type[Any]] = {"textgym_ppo": PPO}


class ZooRows(TextGenVecEnv):
    """N rows with one batched forward that write down finished episodes, as the zoo's plots expect it.

    :param env: the vector environment
    :param results: where ``Monitor`` would have written them, None for nowhere
    """

    def __init__(self, env: TextGenVectorEnv, results: ResultsWriter | None) -> None:
        super().__init__(env)
        self.results = results

    def step_wait(self) -> VecEnvStepReturn:
        """Take the step that was noted."""
        observation, rewards, dones, infos = super().step_wait()
        if self.results is not None:
            for episode in (info["episode"] for info in infos if "episode" in info):
                self.results.write_row({name: episode[name] for name in ("r", "l", "t")})
        return observation, rewards, dones, infos

    def close(self) -> None:
        """Close the environment and the file."""
        super().close()
        if self.results is not None:
            self.results.close()


def zoo_vec_env(env_fns: list[Callable[[], gym.Env[Any, Any]]], **options: Any) -> VecEnv:
    """The zoo's environments, as one vector environment where they are plain text environments.

    :param env_fns: N functions that make a monitored environment each
    :param options: of a ``DummyVecEnv``, which other environments get
    """
    first = env_fns[0]()
    inner = first.env if type(first) is Monitor else first
    while type(inner) in (OrderEnforcing, PassiveEnvChecker):
        inner = inner.env  # type: ignore[attr-defined]
    if type(first) is not Monitor or type(inner) is not TextGenEnv or first.info_keywords:
        # Another environment, or a wrapper that must see every step.
        return DummyVecEnv([lambda: first, *env_fns[1:]], **options)
    return ZooRows(TextGenVectorEnv(len(env_fns), **inner.spec.kwargs), first.results_writer)


def sample_hyperparameters(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """What ``train --optimize-hyperparameters`` tries with textgym's agents.

    :param trial: an ``optuna.Trial``
    """
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
        "n_steps": trial.suggest_categorical("n_steps", [16, 32, 64]),
        "n_epochs": trial.suggest_int("n_epochs", 1, 6),
        "gae_lambda": trial.suggest_float("gae_lambda", 0.8, 1.0),
        "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3]),
        "vf_coef": trial.suggest_float("vf_coef", 0.01, 1.0, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-6, 1e-2, log=True),
    }


def register() -> None:
    """Add textgym's agents to the zoo's tables.

    :raises ImportError: if the zoo isn't installed
    """
    try:
        from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
        from rl_zoo3.utils import ALGOS
    except ImportError as e:
        raise ImportError(f'{e}: RL Baselines3 Zoo comes with pip install "textgym[zoo]"') from e
    for name, agent in AGENTS.items():
        ALGOS[name] = agent
        HYPERPARAMS_SAMPLER[name] = sample_hyperparameters
        HYPERPARAMS_CONVERTER[name] = lambda sampled_params: sampled_params


def main() -> None:
    """Run a script of the zoo."""
    script, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    register()
    if not script.isidentifier() or importlib.util.find_spec(f"rl_zoo3.{script}") is None:
        sys.exit(
            f"usage: python -m textgym.agents.cli.zoo train|enjoy|... [arguments of rl_zoo3's script]; got {script!r}"
        )
    if script == "train":
        from rl_zoo3.exp_manager import ExperimentManager

        if value_of(arguments, "--algo") in AGENTS and value_of(arguments, "--vec-env") is None:
            # A static method: the zoo reads it from an instance, which would pass itself to a plain function.
            ExperimentManager.default_vec_env_cls = staticmethod(zoo_vec_env)  # type: ignore[assignment]
        arguments = with_hyperparams(arguments)
    sys.argv = [f"rl_zoo3.{script}", *arguments]
    runpy.run_module(f"rl_zoo3.{script}", run_name="__main__", alter_sys=True)


def with_hyperparams(arguments: list[str]) -> list[str]:
    """The arguments of ``rl_zoo3.train`` with textgym's hyperparameters, where it has any.

    :param arguments: without the name of the script; a ``--conf-file`` among them wins
    """
    algorithm = value_of(arguments, "--algo") or "ppo"
    env_id = value_of(arguments, "--env") or ""
    if algorithm in AGENTS or (algorithm in ALGORITHMS and env_id.startswith("TextGen-")):
        return ["--conf-file", str(hyperparams_file(algorithm)), *arguments]
    return arguments


def value_of(arguments: list[str], flag: str) -> str | None:
    """What follows a flag, after a space or ``=``; None where it isn't given."""
    for position, argument in enumerate(arguments):
        if argument == flag:
            return arguments[position + 1] if position + 1 < len(arguments) else ""
        if argument.startswith(f"{flag}="):
            return argument[len(flag) + 1 :]
    return None


if __name__ == "__main__":
    main()
