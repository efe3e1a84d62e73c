"""Rewards: what turns text into numbers.

A reward is any callable with TRL's signature, ``reward(prompts, completions, **columns) -> list[float |
None]``, or a :class:`Reward`, which is such a callable too and composes by arithmetic. The environment passes
whatever it is given through :func:`as_reward`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textgym.rewards.base import FunctionReward, PrefixBatch, Reward, RewardError, as_reward

if TYPE_CHECKING:
    from textgym.rewards.causal import CausalRewardModel

__all__ = ["CausalRewardModel", "FunctionReward", "PrefixBatch", "Reward", "RewardError", "as_reward"]


def __getattr__(name: str) -> Any:
    # Who rewards text with a Python function need not wait for transformers to load.
    if name == "CausalRewardModel":
        from textgym.rewards.causal import CausalRewardModel

        return CausalRewardModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
