"""The Stable-Baselines3 side: a language model as a policy, and agents that train it.

Each name is imported when it is first used, with what it needs: torch, transformers and Stable-Baselines3.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from textgym.agents.names import HOME

if TYPE_CHECKING:  # what __getattr__ does, for type checkers
    from textgym.agents.a2c import A2C
    from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
    from textgym.agents.callbacks.adaptive_kl import AdaptiveKLCallback
    from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, resume
    from textgym.agents.callbacks.early_stopping import StopOnKL
    from textgym.agents.callbacks.learning_rewards import LearningRewards
    from textgym.agents.common.exploration import Exploration
    from textgym.agents.common.losses import Loss
    from textgym.agents.common.off_policy import TextOffPolicyAlgorithm
    from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
    from textgym.agents.common.saved_agent import TrustWarning
    from textgym.agents.common.text_environment import TextEnvironment
    from textgym.agents.common.whole_episodes import TextEpisodeAlgorithm
    from textgym.agents.dpo import DPO
    from textgym.agents.expert_iteration import ExpertIteration
    from textgym.agents.grpo import GRPO
    from textgym.agents.imitation import WarmStartReport, warm_start
    from textgym.agents.nlpo import NLPO
    from textgym.agents.policy.blueprint import LanguageModelBlueprint
    from textgym.agents.policy.language_model_policy import LanguageModelPolicy
    from textgym.agents.ppo import PPO
    from textgym.agents.q_learning import QLearning
    from textgym.agents.reinforce import REINFORCE
    from textgym.agents.rloo import RLOO
    from textgym.agents.sarsa import SARSA
    from textgym.agents.soft_q_learning import SoftQLearning
    from textgym.agents.trpo import TRPO
    from textgym.checkpoint_folders import CheckpointError
    from textgym.divergence import DivergedError
    from textgym.envs.segments import Segment

__all__ = [
    "A2C",
    "DPO",
    "GRPO",
    "NLPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "SARSA",
    "TRPO",
    "AdaptiveKLCallback",
    "CheckpointError",
    "DivergedError",
    "EpisodeBuffer",
    "ExpertIteration",
    "Exploration",
    "LanguageModelBlueprint",
    "LanguageModelPolicy",
    "LearningRewards",
    "Loss",
    "QLearning",
    "Segment",
    "SegmentSamples",
    "SoftQLearning",
    "StopOnKL",
    "TextEnvironment",
    "TextEpisodeAlgorithm",
    "TextOffPolicyAlgorithm",
    "TextOnPolicyAlgorithm",
    "TrainingCheckpoints",
    "TrustWarning",
    "WarmStartReport",
    "resume",
    "warm_start",
]


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"textgym.{HOME[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
