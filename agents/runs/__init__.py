"""Training runs from scripts and from the command line: configuration, folder, resuming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textgym.agents.runs.config import RunConfig, read_config

if TYPE_CHECKING:
    from textgym.agents.runs.folder import RunFolder
    from textgym.agents.runs.training import Run, run_config

__all__ = ["Run", "RunConfig", "RunFolder", "read_config", "run_config"]


def __getattr__(name: str) -> Any:
    # The command line needs the configuration's options, and what trains only where it trains.
    if name == "RunFolder":
        from textgym.agents.runs.folder import RunFolder

        return RunFolder
    if name in ("Run", "run_config"):
        from textgym.agents.runs import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
