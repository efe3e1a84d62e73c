"""Tries the installed wheel. `make smoke` runs it, not pytest, in an environment outside the checkout.

It finds what an editable install hides: a subpackage missing from pyproject.toml, data files that were not
packed, an import of something that only an extra or a developer's environment brings.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sysconfig
import warnings
from pathlib import Path

import gymnasium as gym

import textgym

STEPS = 5


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"wheel smoke test failed: {what}")
    print(f"ok: {what}")


def check_files() -> None:
    package = Path(textgym.__file__).parent
    installed = package.parent == Path(sysconfig.get_paths()["purelib"])
    check(installed, f"textgym {textgym.__version__} is the installed one")
    check((package / "py.typed").is_file(), "py.typed is there")
    check(not (package / "embedded" / "build").exists(), "textgym.embedded.build is not there")
    for name in ("envs", "agents"):
        check(importlib.util.find_spec(name) is None, f"there is no top-level package {name!r}")
    for name in ("envs", "agents", "rewards", "embedded"):
        module = getattr(textgym, name)
        check(Path(module.__file__).parent == package / name, f"textgym.{name} can be imported")
    check(bool(textgym.embedded.load_prompts("test")), "prompts are there")
    check(bool(textgym.embedded.WordSentiment()), "the judge is there")
    check(textgym.hyperparams.hyperparams_file("ppo").is_file(), "the hyperparameters for rl_zoo3 are there")


def check_environment() -> None:
    env = gym.make("TextGen-v0", render_mode="ansi")
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(STEPS):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    check(isinstance(env.render(), str), f"gym.make: {STEPS} steps and a rendering")
    env.close()


def check_vector_environment() -> None:
    env = gym.make_vec("TextGen-v0", num_envs=3)
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(STEPS):
        _, rewards, *_ = env.step(env.action_space.sample())
    check(rewards.shape == (3,), f"gym.make_vec: {STEPS} steps of 3 rows")
    env.close()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers is imported later, with the environment
    warnings.simplefilter("error")
    check_files()
    check_environment()
    check_vector_environment()
