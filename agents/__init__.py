"""The Stable-Baselines3 side: a language model as a policy, and agents that train it."""

from textgym.agents.blueprint import LanguageModelBlueprint
from textgym.agents.callbacks import AdaptiveKLCallback
from textgym.agents.checkpoints import CheckpointError, TrainingCheckpoints, resume
from textgym.agents.early_stopping import StopOnKL
from textgym.agents.episode_buffer import EpisodeBuffer, Segment, SegmentSamples
from textgym.agents.learning_rewards import LearningRewards
from textgym.agents.on_policy import TextEnvironment, TextOnPolicyAlgorithm, TrustWarning
from textgym.agents.policy import LanguageModelPolicy
from textgym.agents.ppo import PPO

__all__ = [
    "PPO",
    "AdaptiveKLCallback",
    "CheckpointError",
    "EpisodeBuffer",
    "LanguageModelBlueprint",
    "LanguageModelPolicy",
    "LearningRewards",
    "Segment",
    "SegmentSamples",
    "StopOnKL",
    "TextEnvironment",
    "TextOnPolicyAlgorithm",
    "TrainingCheckpoints",
    "TrustWarning",
    "resume",
]
