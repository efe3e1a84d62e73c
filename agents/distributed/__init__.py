"""Training in several processes: what they exchange, the prompts that they divide, weights cut into parts."""

from textgym.agents.distributed.processes import ProcessError, Processes
from textgym.agents.distributed.shared_prompts import DividePrompts, SharedPrompts

__all__ = ["DividePrompts", "ProcessError", "Processes", "SharedPrompts"]
