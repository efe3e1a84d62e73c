"""Conversations as prompts: chat messages through the chat template of a tokenizer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from textgym.chat.messages import as_messages
from textgym.chat.turns import TurnTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
"""The column that holds conversations."""


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str = "messages",
    tools: Any = None,
) -> str:
    """The text with which a chat model begins its answer to a conversation.

    The environment tokenises prompts as any text, which may put a beginning-of-sequence token before it. Where the
    template's text begins with that token already, it is left out of what is returned, so that it stands there once.

    :param messages: the conversation, in a form that :func:`~textgym.chat.messages.as_messages` reads. Where the last
        message is the assistant's, it is the beginning of the answer, which goes on there
    :param tokenizer: whose chat template is used
    :param where: what errors call the messages
    :param tools: descriptions of tools, for the template
    :return: the prompt, which ends in what the template puts before an answer
    :raises TypeError: if the messages are not such a list
    :raises ValueError: if there are none, the tokenizer has no chat template, or the template refuses them
    :warns UserWarning: if the tokenizer makes other tokens of the prompt than the template asks for

    A template is a Jinja program that comes with the tokenizer; transformers runs it in a sandbox.
    """
    conversation = as_messages(messages, where)
    begun = conversation[-1]["role"] == "assistant"
    opening = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    text = _rendered(conversation, tokenizer, where, tools, **opening)
    return _with_one_beginning(text, tokenizer, _name(tokenizer))


def chat_answer(
    prompt: Sequence[Mapping[str, Any]],
    answer: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str = "messages",
    tools: Any = None,
) -> str:
    """What the assistant wrote after :func:`chat_prompt` of a conversation, without the end of its turn.

    That is the content of its message. Several messages, and calls of tools, are written as the template writes them.

    :param prompt: the conversation before the answer
    :param answer: the messages that follow
    :raises ValueError: if the template does not write the answer after the prompt
    """
    prompt, answer = as_messages(prompt, where), as_messages(answer, where)
    if len(answer) == 1 and not answer[0].get("tool_calls"):
        return str(answer[0]["content"])
    before = _rendered(prompt, tokenizer, where, tools, add_generation_prompt=prompt[-1]["role"] != "assistant")
    whole = _rendered([*prompt, *answer], tokenizer, where, tools)
    if not whole.startswith(before):
        raise ValueError(
            f"{where}: the chat template of the tokenizer {_name(tokenizer)!r} does not write the answer after the "
            "prompt, so the two can't be told apart"
        )
    end = TurnTokens(tokenizer).end_of_turn_id
    written = whole[len(before) :].rstrip()
    return written if end is None else written.removesuffix(str(tokenizer.convert_ids_to_tokens(end)))


def plain_conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as a text without any template, ``"\\n\\nHuman: ...\\n\\nAssistant:"``; the assistant is next.

    An answer to it begins with a space.
    """
    names = {"user": "Human"}
    turns = [f"\n\n{names.get(m['role'], str(m['role']).capitalize())}: {m['content']}" for m in messages]
    open_already = bool(messages) and messages[-1]["role"] == "assistant"
    return "".join(turns) + ("" if open_already else "\n\nAssistant:")


def has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether there is a tokenizer, with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _rendered(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, tools: Any, **options: Any
) -> str:
    if not has_template(tokenizer):
        raise ValueError(
            f"{where} is a conversation, but the tokenizer {_name(tokenizer)!r} has no chat template; give prompts "
            "that are texts, or the tokenizer of a chat model, or set tokenizer.chat_template"
        )
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, tools=tools or None, **options
            )
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: the chat template of the tokenizer {_name(tokenizer)!r} refuses it: {error}"
        ) from error


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _with_one_beginning(text: str, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The text so that tokenising it as a prompt gives the template's tokens, with one BOS and not two."""
    meant = tokenizer(text, add_special_tokens=False)["input_ids"]
    bare = text.removeprefix(str(tokenizer.bos_token or ""))
    turns = _turns_of(tokenizer, str(tokenizer.chat_template))
    for candidate in (bare, text):
        if turns.encode(candidate) == meant:
            return candidate
    got = tokenizer.convert_ids_to_tokens(turns.encode(bare)[:3])
    warnings.warn(
        f"tokenised as a prompt, what the chat template of the tokenizer {name!r} makes begins with {got}; the "
        f"template itself asks for {tokenizer.convert_ids_to_tokens(meant[:3])}. The model sees the former",
        UserWarning,
        stacklevel=3,
    )
    return bare


@functools.lru_cache(maxsize=4)
def _turns_of(tokenizer: PreTrainedTokenizerBase, template: str) -> TurnTokens:
    """Kept, as finding out what a template writes takes longer than to use it."""
    return TurnTokens(tokenizer)
