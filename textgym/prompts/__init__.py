"""Where prompts come from: lists, rows with extra columns, data sets, files and functions behind one interface."""

from textgym.prompts.files import load_prompt_file
from textgym.prompts.opening import as_prompt_source, split_prompts
from textgym.prompts.reading import PromptFunction
from textgym.prompts.rows import PromptRow, PromptRows, PromptSource

__all__ = [
    "PromptFunction",
    "PromptRow",
    "PromptRows",
    "PromptSource",
    "as_prompt_source",
    "load_prompt_file",
    "split_prompts",
]
