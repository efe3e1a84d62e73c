"""Paths of a run's configuration, which mean the same from whichever folder the run is gone on with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from textgym.agents.runs.config import RunConfig
from textgym.replies.opening import code_of_reply
from textgym.rewards.code_names import code_in

_NAMES = ("train", "test", "auto", "embedded", "smollm2", "gemma3")


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths where it names files and folders that are there."""
    changed: dict[str, Any] = {
        name: _absolute(value)
        for name in ("model", "tokenizer", "prompts", "held_out")
        if (value := getattr(config, name)) is not None
    }
    if config.reply is not None:
        changed["reply"] = _absolute_reply(config.reply)
    return dataclasses.replace(config, **changed, reward=_absolute_reward(config.reward))


def _absolute(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.absolute()) if text not in _NAMES and path.exists() else text


def _absolute_reward(text: str) -> str:
    """A reward with the absolute paths of its files; a formula of several stays as readable as it was."""
    if text == "embedded":
        return text
    if Path(text).expanduser().is_dir():
        return _absolute(text)
    for code in code_in(text):
        where, colon, name = code.rpartition(":")
        if where.endswith(".py") and not _needs_quotes(_absolute(where), code == text.strip()):
            text = text.replace(code, f"{_absolute(where)}{colon}{name}")
    return text


def _absolute_reply(text: str) -> str:
    """A reply with the absolute paths of its files: of code, of a script, or of a model."""
    kind, _, what = text.strip().partition(":")
    if kind in ("model", "script"):
        return f"{kind}:{_absolute(what)}"
    for code in code_of_reply(text):
        where, colon, name = code.rpartition(":")
        if where.endswith(".py"):
            text = text.replace(code, f"{_absolute(where)}{colon}{name}")
    return text


def _needs_quotes(path: str, alone: bool) -> bool:
    """Whether a path has characters that a formula takes for its own."""
    return not alone and not all(character.isalnum() or character in "/._~:\\" for character in path)
