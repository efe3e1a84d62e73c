"""The Gymnasium side: environments, their vector forms, wrappers, and the adapter for Stable-Baselines3."""

from textgym.envs.env import TextGenEnv
from textgym.envs.infos import SameInfoKeys
from textgym.envs.options import TextGenOptions
from textgym.envs.scoring import RolloutScores
from textgym.envs.text_actions import TextActions, TextObservations
from textgym.envs.text_space import UnicodeText
from textgym.envs.text_write import TextWriteEnv, TextWriteVectorEnv
from textgym.envs.vector_env import TextGenVectorEnv

__all__ = [
    "RolloutScores",
    "SameInfoKeys",
    "TextActions",
    "TextGenEnv",
    "TextGenOptions",
    "TextGenVectorEnv",
    "TextObservations",
    "TextWriteEnv",
    "TextWriteVectorEnv",
    "UnicodeText",
]
