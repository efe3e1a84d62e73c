"""Messages of a conversation in one form, whichever public form they are stored in.

What a chat template reads is a list of ``{"role": ..., "content": ...}`` with texts as content. Data sets also hold
ShareGPT's ``{"from": "human", "value": ...}``, contents in parts, messages whose gaps a table filled with None, and
conversations as JSON in a text.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]

_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""What ShareGPT's speakers are called by chat templates."""


def is_conversation(value: Any) -> bool:
    """Whether a value looks like chat messages rather than like a text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def is_one_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, rather than a list of conversations or of texts."""
    return is_conversation(value) and bool(value) and all(isinstance(message, Mapping) for message in value)


def as_messages(value: Any, where: str) -> list[Message]:
    """A conversation as messages with ``"role"`` and ``"content"``, both texts.

    - ShareGPT's ``from`` and ``value`` are renamed, and its speakers get the roles that chat templates know
    - parts of a content that are texts are joined
    - a content that is None is empty, where the message has ``tool_calls``
    - other keys stay, unless they are None, which is how a table fills gaps

    :param value: the conversation, or a single message
    :param where: what errors call it
    :raises TypeError: if it is not a list of messages, or one is of a wrong type
    :raises ValueError: if there are no messages, or one has a part that is not a text
    """
    if isinstance(value, Mapping):
        value = [value]
    if not is_conversation(value):
        raise TypeError(f"{where} must be a list of messages, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{where} has no messages; a conversation needs at least one")
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(value, start=1)]


def stored_messages(value: Any, where: str) -> Any:
    """A conversation that is stored as a text, as in the cell of a CSV file, as the list that it is.

    The text is JSON, or what Python prints of such a list, as pandas writes one. Other values stay as they are.

    :raises ValueError: if a text begins as such a conversation and can't be read
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    keys = [f"{quote}{key}{quote}" for quote in "\"'" for key in _ROLE_KEYS]
    if not (text.startswith("[") and text[1:].lstrip().startswith("{") and any(key in text for key in keys)):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if _all_messages(found):
            return found
        return value
    raise ValueError(
        f"{where} begins as a conversation in JSON, {text[:60]!r}, but is broken; give a list of messages, each with "
        "'role' and 'content'"
    )


def _all_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and any(key in item for key in _ROLE_KEYS) for item in value)
    )


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be an object with 'role' and 'content', got {type(message).__name__}")
    given = {key: value for key, value in message.items() if value is not None}
    if "role" in given or "from" not in given:
        role = given.pop("role", None)
        if not isinstance(role, str):
            raise TypeError(f"{where} needs a text as 'role'; {_found(message, 'role')}")
    else:
        speaker = given.pop("from")
        role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(f"{where} is from {speaker!r}; known are {', '.join(_SPEAKERS)}")
    key = "value" if "value" in given and "content" not in given else "content"
    content = given.pop(key, None)
    if content is None and given.get("tool_calls"):
        content = ""
    return {"role": role, "content": _content(content, message, key, where), **given}


def _content(content: Any, message: Mapping[str, Any], key: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if not is_conversation(content):
        raise TypeError(f"{where} needs a text as {key!r}; {_found(message, key)}")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = repr(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{where} has a part of type {kind}; only texts can be read")
    return "".join(texts)


def _found(message: Mapping[str, Any], key: str) -> str:
    return f"got {type(message[key]).__name__}" if key in message else f"it has {', '.join(map(str, message))}"


def common_beginning(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many messages two conversations begin with alike."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return same


def answer_start(messages: Sequence[Message]) -> int:
    """Where the messages of the assistant begin that a conversation ends with; its length where it ends otherwise."""
    start = len(messages)
    while start and messages[start - 1]["role"] == "assistant":
        start -= 1
    return start
