"""Messages in place of texts, as TRL gives them to rewards where prompts are conversations.

A completion is then a list of one assistant's message. Functions that are written for that get messages, and rewards
of textgym, which read texts, are given texts.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from textgym.chat.chat_prompts import MESSAGES, plain_conversation
from textgym.chat.messages import is_one_conversation

OF_OTHER_TYPES = (TypeError, IndexError, KeyError, AttributeError)
"""What a function raises that is given texts where it expects messages."""


def is_annotated_with_messages(fn: Callable[..., Any]) -> bool:
    """Whether the parameter ``completions`` is annotated as lists of messages, ``list[list[dict[str, str]]]``."""
    inner = fn.func if isinstance(fn, functools.partial) else fn
    named = inner if inspect.isroutine(inner) else type(inner).__call__
    annotation = getattr(named, "__annotations__", {}).get("completions")
    written = annotation if isinstance(annotation, str) else str(annotation)
    written = re.sub(r"\s|typing\.|collections\.abc\.", "", written).lower()
    return re.match(r"(?:list|sequence)\[(?:list|sequence)\[", written) is not None


def as_messages(given: dict[str, Any]) -> dict[str, Any]:
    """A reward function's arguments with messages in place of texts.

    :param given: ``prompts`` and ``completions``, lists of B texts, and columns
    :return: the same, with the rows' conversations, or messages of a user, as prompts
    """
    conversations = given.get(MESSAGES) or [None] * len(given["prompts"])
    return {
        **given,
        "prompts": [
            conversation or [{"role": "user", "content": prompt}]
            for conversation, prompt in zip(conversations, given["prompts"], strict=True)
        ],
        "completions": [[{"role": "assistant", "content": completion}] for completion in given["completions"]],
    }


def as_watched_messages(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of :func:`as_messages`, and the names of the fields that the function looked at."""
    seen: list[str] = []
    messages = as_messages(given)
    for name in ("prompts", "completions"):
        messages[name] = [[_Watched(message, seen) for message in conversation] for conversation in messages[name]]
    return messages, seen


def as_texts(prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]) -> dict[str, Any]:
    """A reward's arguments with texts in place of messages.

    :param prompts: B texts or conversations; of these the text is
        :func:`~textgym.chat.chat_prompts.plain_conversation`, and models that have a chat template read the column
        ``messages``
    :param completions: B texts, or lists of messages, whose contents are joined
    :param columns: the others
    :return: all of them by name
    """
    given = dict(columns)
    if prompts and all(map(is_one_conversation, prompts)):
        given[MESSAGES] = list(prompts)
        prompts = [plain_conversation(conversation) for conversation in prompts]
    if completions and all(map(is_one_conversation, completions)):
        completions = ["".join(str(m.get("content") or "") for m in messages) for messages in completions]
    return {**given, "prompts": prompts, "completions": completions}


class _Watched(dict[str, Any]):
    """A message that takes down which of its fields are looked at."""

    def __init__(self, message: dict[str, Any], seen: list[str]) -> None:
        super().__init__(message)
        self._seen = seen

    def __getitem__(self, name: str) -> Any:
        self._seen.append(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._seen.append(name)
        return super().get(name, default)
