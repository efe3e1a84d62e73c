"""Conversations as prompts: chat messages through the chat template of a tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
"""The column that holds conversations."""


def chat_prompt(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str = "messages"
) -> str:
    """The text with which a chat model begins its answer to a conversation.

    The environment tokenises prompts as any text, which may put a beginning-of-sequence token before it. Where the
    template's text begins with that token already, it is left out of what is returned, so that it stands there once.

    :param messages: the conversation, dicts with a ``"role"`` and a ``"content"``, both texts; the assistant is to
        speak next
    :param tokenizer: whose chat template is used
    :param where: what errors call the messages
    :return: the prompt, which ends in what the template puts before an answer
    :raises TypeError: if the messages are not such a list
    :raises ValueError: if there are none, the last is the assistant's own, the tokenizer has no chat template, or the
        template refuses them
    :warns UserWarning: if the tokenizer makes other tokens of the prompt than the template asks for

    A template is a Jinja program that comes with the tokenizer; transformers runs it in a sandbox.
    """
    _check_messages(messages, where)
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} is a conversation, but the tokenizer {name!r} has no chat template; give prompts that are texts, "
            "or the tokenizer of a chat model, or set tokenizer.chat_template"
        )
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: the chat template of the tokenizer {name!r} refuses it: {error}") from error
    return _with_one_beginning(text, tokenizer, name)


def is_conversation(value: Any) -> bool:
    """Whether a value looks like chat messages rather than like a text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _check_messages(messages: Any, where: str) -> None:
    if not is_conversation(messages):
        raise TypeError(f"{where} must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError(f"{where} has no messages; a conversation needs at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(
                f"{where}: message {i + 1} must be an object with 'role' and 'content', got {type(message).__name__}"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"got {type(message[key]).__name__}" if key in message else f"it has {', '.join(message)}"
                raise TypeError(f"{where}: message {i + 1} needs a text as {key!r}; {found}")
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: the last message is the assistant's, so there is nothing to answer; "
            "leave it out (a column of its own can hand it to the reward)"
        )


def _with_one_beginning(text: str, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The text so that tokenising it as a prompt gives the template's tokens, with one BOS and not two."""
    meant = tokenizer(text, add_special_tokens=False)["input_ids"]
    candidates = [text]
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        candidates.append(text[len(tokenizer.bos_token) :])
    for candidate in candidates:
        ids = _as_prompt(tokenizer, candidate)
        if ids == meant or ids == _without_end(tokenizer, meant):
            return candidate
    got = tokenizer.convert_ids_to_tokens(_as_prompt(tokenizer, candidates[-1])[:3])
    warnings.warn(
        f"tokenised as a prompt, what the chat template of the tokenizer {name!r} makes begins with {got}; the "
        f"template itself asks for {tokenizer.convert_ids_to_tokens(meant[:3])}. The model sees the former",
        UserWarning,
        stacklevel=3,
    )
    return candidates[-1]


def _as_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """As ``Vocabulary.encode`` does."""
    return _without_end(tokenizer, list(tokenizer(text)["input_ids"]))


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
