"""Tasks of other packages: prompts, with what scores or answers them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ does, for type checkers
    from textgym.tasks.openenv import OpenEnvGame
    from textgym.tasks.reasoning_gym import ReasoningGym
    from textgym.tasks.textarena import TextArenaGame

__all__ = ["OpenEnvGame", "ReasoningGym", "TextArenaGame"]

_MODULES = {"OpenEnvGame": "openenv", "ReasoningGym": "reasoning_gym", "TextArenaGame": "textarena"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"textgym.tasks.{_MODULES[name]}"), name)
