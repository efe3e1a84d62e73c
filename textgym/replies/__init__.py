"""Replies: who speaks after the policy's turns."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from textgym.replies.base import FunctionReply, Reply, ReplyResult
from textgym.replies.errors import ReplyError

if TYPE_CHECKING:  # what __getattr__ does, for type checkers
    from textgym.replies.games import Game, GameReply
    from textgym.replies.human import HumanReply
    from textgym.replies.language_model import LanguageModelReply
    from textgym.replies.opening import as_reply
    from textgym.replies.remote import RemoteReply
    from textgym.replies.scripted import ScriptedReply
    from textgym.replies.serving import ReplyServer, reply_app, serve_reply
    from textgym.replies.tools import ToolReply, calculate, lookup

__all__ = [
    "FunctionReply",
    "Game",
    "GameReply",
    "HumanReply",
    "LanguageModelReply",
    "RemoteReply",
    "Reply",
    "ReplyError",
    "ReplyResult",
    "ReplyServer",
    "ScriptedReply",
    "ToolReply",
    "as_reply",
    "calculate",
    "lookup",
    "reply_app",
    "serve_reply",
]

_MODULES = {
    "Game": "games",
    "GameReply": "games",
    "HumanReply": "human",
    "LanguageModelReply": "language_model",
    "RemoteReply": "remote",
    "ReplyServer": "serving",
    "ScriptedReply": "scripted",
    "ToolReply": "tools",
    "as_reply": "opening",
    "calculate": "tools",
    "lookup": "tools",
    "reply_app": "serving",
    "serve_reply": "serving",
}


def __getattr__(name: str) -> Any:
    # Replies that are made of models need what makes texts, which asks replies.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"textgym.replies.{_MODULES[name]}"), name)
