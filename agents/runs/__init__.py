"""Training runs from scripts and from the command line: configuration, folder, resuming.

The configuration is plain data; the rest is imported when it is first used, with all that training needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from textgym.agents.runs.config import RunConfig, read_config

if TYPE_CHECKING:
    from textgym.agents.runs.folder import RunFolder
    from textgym.agents.runs.training import Run, run_config

__all__ = ["Run", "RunConfig", "RunFolder", "read_config", "run_config"]

_HOME = {"Run": "training", "run_config": "training", "RunFolder": "folder"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
