"""Train reward models: ``textgym train-reward`` and :func:`train_reward`, on ``transformers.Trainer``."""

from .data import RewardData, RewardRow, Task, check_disjoint, split_by_prompt
from .losses import binary_cross_entropy_loss, bradley_terry_loss, cross_entropy_loss, huber_loss, mse_loss
from .options import RewardTrainingOptions
from .reading import load_reward_data
from .report import RewardReport, draw_report, read_report, report_table
from .scorer import TextScorer
from .training import train_reward

__all__ = [
    "RewardData",
    "RewardReport",
    "RewardRow",
    "RewardTrainingOptions",
    "Task",
    "TextScorer",
    "binary_cross_entropy_loss",
    "bradley_terry_loss",
    "check_disjoint",
    "cross_entropy_loss",
    "draw_report",
    "huber_loss",
    "load_reward_data",
    "mse_loss",
    "read_report",
    "report_table",
    "split_by_prompt",
    "train_reward",
]
