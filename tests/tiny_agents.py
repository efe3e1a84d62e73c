"""Tiny environments and what tests read off an agent; models and tokenizer come from tiny_models.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from tiny_models import tiny_model, tiny_tokenizer

from textgym.agents import PPO
from textgym.envs import TextGenEnv, TextGenVectorEnv
from textgym.language_model import LanguageModel

PROMPTS = ["the film is", "a very good", "this", "we like the story and"]
LIKED = ("good", "great", "fine", "warm")


def tiny_language_model(architecture: str = "llama", seed: int = 0) -> LanguageModel:
    """How an architecture is stepped is found out once, which takes longer than what many a test does with it."""
    return LanguageModel(tiny_model(architecture, seed), tiny_tokenizer(), like=_first_of(architecture))


@cache
def _first_of(architecture: str) -> LanguageModel:
    return LanguageModel(tiny_model(architecture), tiny_tokenizer())


def count_liked(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """How many liked words each completion has, over 4."""
    return [sum(word in LIKED for word in text.split()) / 4 for text in completions]


def _options(options: dict[str, Any]) -> dict[str, Any]:
    defaults = {"prompts": PROMPTS, "reward": count_liked, "max_new_tokens": 8, "kl_coef": 0.1, "device": "cpu"}
    options = {**defaults, **options}
    return options if "language_model" in options else {**options, "language_model": tiny_language_model()}


def tiny_vector_env(num_envs: int = 4, **options: Any) -> TextGenVectorEnv:
    return TextGenVectorEnv(num_envs, **_options(options))


def tiny_env(**options: Any) -> TextGenEnv:
    return TextGenEnv(**_options(options))


def tiny_ppo(env: Any = None, **arguments: Any) -> PPO:
    arguments = {"n_steps": 12, "batch_size": 16, "seed": 0, "device": "cpu", **arguments}
    return PPO("LanguageModelPolicy", tiny_vector_env() if env is None else env, **arguments)


class _Collector(KVWriter):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass


class _EndsAbove(BaseCallback):
    """Ends a training when a figure, in the mean of the last three rollouts, is above what a test asks for."""

    def __init__(self, logs: list[dict[str, Any]], key: str, wanted: float) -> None:
        super().__init__()
        self.logs, self.key, self.wanted = logs, key, wanted

    def _on_step(self) -> bool:
        last = values_of(self.logs, self.key)[-3:]
        return len(last) < 3 or np.mean(last) <= self.wanted


def logs_of_learning(
    model: PPO, timesteps: int, until: tuple[str, float] | None = None, callback: Any = (), **arguments: Any
) -> list[dict[str, Any]]:
    """Learn, and return what was logged: one dictionary per rollout, and one of what the last update left.

    :param until: a figure, and above which mean over the last three rollouts it is enough; then training ends
    """
    collector = _Collector()
    logger = Logger(None, [collector])
    model.set_logger(logger)
    callbacks = [*(callback if isinstance(callback, list | tuple) else [callback])]
    if until is not None:
        callbacks.append(_EndsAbove(collector.rows, *until))
    model.learn(timesteps, callback=callbacks or None, **arguments)
    return [*collector.rows, dict(logger.name_to_value)]


def values_of(logs: list[dict[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in logs if key in row]


class KeepRollouts(BaseCallback):
    """Copies of what every rollout held."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[np.ndarray] = []
        self.rewards: list[np.ndarray] = []
        self.episodes: list[list[dict[str, Any]]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        self.actions.append(buffer.actions[..., 0].copy())
        self.rewards.append(buffer.rewards.copy())
        self.episodes.append(list(self.model.finished_episodes))  # type: ignore[attr-defined]
