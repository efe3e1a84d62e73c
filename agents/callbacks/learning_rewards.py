"""Letting rewards learn from what the policy writes: a discriminator, a memory, running statistics."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.envs.sb3 import TextGenVecEnv
from textgym.prompts.rows import PromptRow, as_columns
from textgym.rewards import Reward
from textgym.rewards.learning import has_learning_parts, learn_from


class LearningRewards(BaseCallback):
    """Give the episodes that ended in each rollout to the learning parts of the environment's reward.

    Those are :class:`~textgym.rewards.AdversarialReward`, :class:`~textgym.rewards.NoveltyReward`,
    :class:`~textgym.rewards.RunningNormalized` and the routes of :class:`~textgym.rewards.Router`, wherever they stand
    in the reward. They learn after the rollout is scored and before the policy's update, and what they say of
    themselves is logged, such as ``adversarial/accuracy``. Under ``accelerate launch`` they learn from the episodes of
    all processes, in the same order in each, and stay the same. What they learned is saved with the environment's
    state, so a run resumed from a checkpoint goes on exactly; put this before
    :class:`~textgym.agents.callbacks.checkpoints.TrainingCheckpoints` among the callbacks.

    :param verbose: 0, 1 or 2
    :raises ValueError: at the start of training, if the reward has nothing to learn, or is out of reach in other
        processes
    """

    def __init__(self, verbose: int = 0) -> None:
        super().__init__(verbose)
        self._running: list[PromptRow] = []  # the prompt row of each row's episode
        self._ended: list[deque[PromptRow]] = []  # of those that ended in this rollout, in order

    def state_dict(self) -> dict[str, Any]:
        """Nothing: between two rollouts all that was learned is the reward's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""

    def _on_training_start(self) -> None:
        reward = _shared_reward(self.training_env)
        if not has_learning_parts(reward):
            raise ValueError(
                f"the environment's reward {reward.name!r} has no part that learns (AdversarialReward, NoveltyReward, "
                "RunningNormalized, Router): leave this callback out"
            )

    def _on_rollout_start(self) -> None:
        self._running = _prompt_rows(self.training_env)
        self._ended = [deque() for _ in self._running]

    def _on_step(self) -> bool:
        # Where an episode ended, the next has begun already: its columns were noted before.
        current = _prompt_rows(self.training_env)
        for row in np.flatnonzero(self.locals["dones"]).tolist():
            self._ended[row].append(self._running[row])
            self._running[row] = current[row]
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, TextOnPolicyAlgorithm)
        mine = [
            (episode["prompt"], episode["completion"], self._ended[episode["row"]].popleft().columns)
            for episode in self.model.finished_episodes
        ]
        episodes = [episode for part in self.model.processes.gather(mine) for episode in part]
        if not episodes:
            return
        prompts, completions, columns = zip(*episodes, strict=True)
        learners = learn_from(
            _shared_reward(self.training_env),
            prompts=list(prompts),
            completions=list(completions),
            columns=as_columns(list(columns)),
        )
        logged: set[str] = set()
        for learner in learners:
            for key, value in learner.metrics().items():
                number = 1
                while (name := key if number == 1 else f"{key}_{number}") in logged:
                    number += 1  # a second discriminator, say
                logged.add(name)
                self.logger.record(name, value)


def _text_envs(vec_env: VecEnv) -> list[Any]:
    """The text vector environments at the bottom of a ``VecEnv``: one, or one for each single environment."""
    bottom = vec_env.unwrapped
    if isinstance(bottom, TextGenVecEnv):
        return [bottom.text_env]
    if isinstance(bottom, DummyVecEnv):
        return [env.unwrapped._rows for env in bottom.envs]  # type: ignore[attr-defined]
    raise ValueError(
        f"{type(bottom).__name__} has its rewards in other processes, where they can't learn together; use "
        "gym.make_vec('TextGen-v0', num_envs=N)"
    )


def _prompt_rows(vec_env: VecEnv) -> list[PromptRow]:
    return [row for env in _text_envs(vec_env) for row in env.prompt_rows]


def _shared_reward(vec_env: VecEnv) -> Reward:
    rewards: list[Reward] = [env.reward for env in _text_envs(vec_env)]
    if any(reward is not rewards[0] for reward in rewards):
        raise ValueError("the environments have rewards of their own; give all of them the same object, to learn once")
    return rewards[0]
