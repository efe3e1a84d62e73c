"""The Gymnasium side: the environment, its vector form, and the adapter for Stable-Baselines3."""

from textgym.envs.env import TextGenEnv
from textgym.envs.options import TextGenOptions
from textgym.envs.scoring import DeferredScores
from textgym.envs.vector_env import TextGenVectorEnv

__all__ = ["DeferredScores", "TextGenEnv", "TextGenOptions", "TextGenVectorEnv"]
