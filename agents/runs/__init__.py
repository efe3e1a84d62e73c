"""Training runs from scripts and from the command line: configuration, folder, resuming."""

from textgym.agents.runs.config import RunConfig, read_config
from textgym.agents.runs.folder import RunFolder
from textgym.agents.runs.training import Run, run_config

__all__ = ["Run", "RunConfig", "RunFolder", "read_config", "run_config"]
