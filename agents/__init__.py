"""The Stable-Baselines3 side: a language model as a policy, and agents that train it."""

from textgym.agents.blueprint import LanguageModelBlueprint
from textgym.agents.callbacks import AdaptiveKLCallback
from textgym.agents.checkpoints import CheckpointError, TrainingCheckpoints, resume
from textgym.agents.episode_buffer import EpisodeBuffer, Segment, SegmentSamples
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
    "Segment",
    "SegmentSamples",
    "TextEnvironment",
    "TextOnPolicyAlgorithm",
    "TrainingCheckpoints",
    "TrustWarning",
    "resume",
]
