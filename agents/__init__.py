"""The Stable-Baselines3 side: a language model as a policy, and agents that train it.

Each name is imported when it is first used, with what it needs: torch, transformers and Stable-Baselines3.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from textgym.agents.names import HOME

if TYPE_CHECKING:  # what __getattr__ does, for type checkers: a test compares with the table of names
    from textgym.agents.a2c import A2C as A2C
    from textgym.agents.buffers.episode_buffer import EpisodeBuffer as EpisodeBuffer
    from textgym.agents.buffers.episode_buffer import SegmentSamples as SegmentSamples
    from textgym.agents.callbacks.adaptive_kl import AdaptiveKLCallback as AdaptiveKLCallback
    from textgym.agents.callbacks.checkpoints import TrainingCheckpoints as TrainingCheckpoints
    from textgym.agents.callbacks.checkpoints import resume as resume
    from textgym.agents.callbacks.early_stopping import StopOnKL as StopOnKL
    from textgym.agents.callbacks.learning_rewards import LearningRewards as LearningRewards
    from textgym.agents.common.exploration import Exploration as Exploration
    from textgym.agents.common.losses import Loss as Loss
    from textgym.agents.common.off_policy import TextOffPolicyAlgorithm as TextOffPolicyAlgorithm
    from textgym.agents.common.on_policy import TextOnPolicyAlgorithm as TextOnPolicyAlgorithm
    from textgym.agents.common.saved_agent import TrustWarning as TrustWarning
    from textgym.agents.common.text_environment import TextEnvironment as TextEnvironment
    from textgym.agents.common.whole_episodes import TextEpisodeAlgorithm as TextEpisodeAlgorithm
    from textgym.agents.dpo import DPO as DPO
    from textgym.agents.expert_iteration import ExpertIteration as ExpertIteration
    from textgym.agents.grpo import GRPO as GRPO
    from textgym.agents.imitation import WarmStartReport as WarmStartReport
    from textgym.agents.imitation import warm_start as warm_start
    from textgym.agents.nlpo import NLPO as NLPO
    from textgym.agents.policy.blueprint import LanguageModelBlueprint as LanguageModelBlueprint
    from textgym.agents.policy.language_model_policy import LanguageModelPolicy as LanguageModelPolicy
    from textgym.agents.ppo import PPO as PPO
    from textgym.agents.q_learning import QLearning as QLearning
    from textgym.agents.reinforce import REINFORCE as REINFORCE
    from textgym.agents.rloo import RLOO as RLOO
    from textgym.agents.sarsa import SARSA as SARSA
    from textgym.agents.soft_q_learning import SoftQLearning as SoftQLearning
    from textgym.agents.trpo import TRPO as TRPO
    from textgym.checkpoint_folders import CheckpointError as CheckpointError
    from textgym.divergence import DivergedError as DivergedError
    from textgym.envs.segments import Segment as Segment

__all__ = sorted(HOME)


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"textgym.{HOME[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
