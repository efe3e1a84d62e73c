"""The layouts in which public data sets hold prompts, answers and preferences, read into one.

| layout | columns |
|---|---|
| plain | ``prompt``; ``completion``; ``chosen`` and ``rejected``: texts or messages |
| messages | ``messages``, ``conversation`` or ``conversations``: OpenAI's, or ShareGPT's with ``from`` and ``value`` |
| Alpaca | ``instruction``, ``input``, ``output`` (Dolly: ``context``, ``response``), and ``system``, ``history`` |
| preferences without a prompt | ``chosen`` and ``rejected`` that begin alike: messages, or texts with marks of turns |

A conversation that ends with the assistant is a prompt and its answer. Only in the column ``prompt`` itself it is the
beginning of an answer that is to go on. Messages that a text holds as JSON, as the cell of a CSV file does, are
messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from textgym.chat.chat_prompts import chat_answer, chat_prompt, has_template, plain_conversation
from textgym.chat.messages import (
    Message,
    answer_start,
    as_messages,
    common_beginning,
    is_conversation,
    is_one_conversation,
    stored_messages,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Part: TypeAlias = "str | list[Message] | None"

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold conversations, where a row has no column of prompts."""
INSTRUCTION = "instruction"
COMPLETION = "completion"

# What stands in a text before the assistant speaks.
_ASSISTANT_SPEAKS = re.compile(
    r"(?:^|\n)[ \t]*(?:\#+[ \t]*)?(?:Assistant|ASSISTANT|Response|Answer|Bot|AI|GPT|助手|回答)[ \t]*[:：]"
    r"|\nA:|<\|(?:im_start\|>)?assistant\|?>?\n?|<\|start_header_id\|>assistant<\|end_header_id\|>\s*"
    r"|<start_of_turn>model\n|\[/INST\]|<｜Assistant｜>"
)


@dataclass(frozen=True)
class ReadRow:
    """A row whose layout is known.

    :param prompt: a text, messages, or None where the row has whole texts only
    :param completion: the answer, where the row has one
    :param chosen: the better of two answers, where the row has them
    :param rejected: the worse one
    :param columns: the other columns
    :param written: how the prompt is written where the tokenizer has no chat template
    :param tools: descriptions of tools, for the template
    :param source: the column that the prompt comes from
    """

    prompt: Part
    completion: Part = None
    chosen: Part = None
    rejected: Part = None
    columns: dict[str, Any] = field(default_factory=dict)
    written: str | None = None
    tools: Any = None
    source: str = "prompt"

    def prompt_text(self, tokenizer: PreTrainedTokenizerBase | None, where: str, plain: bool = False) -> str:
        """The prompt as a text, through the chat template where it is a conversation.

        :param plain: write a conversation as :func:`~textgym.chat.chat_prompts.plain_conversation` does where there is
            no template
        :raises ValueError: if there is no template and nothing else to write it with
        """
        if self.prompt is None or isinstance(self.prompt, str):
            return self.prompt or ""
        if not has_template(tokenizer):
            if self.written is not None:
                return self.written
            if plain:
                return plain_conversation(self.prompt)
        if tokenizer is None:
            raise ValueError(f"{where} is a conversation; pass tokenizer=, the language model's, for its chat template")
        return chat_prompt(self.prompt, tokenizer, where, self.tools)

    def answer_text(self, answer: Part, tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
        """An answer to the prompt as the text that goes on where :meth:`prompt_text` ends."""
        templated = has_template(tokenizer)
        if isinstance(answer, str) or answer is None:
            text = answer or ""
        elif isinstance(self.prompt, list) and templated and tokenizer is not None:
            text = chat_answer(self.prompt, answer, tokenizer, where, self.tools)
        elif len(answer) == 1:
            text = answer[0]["content"]
        else:
            text = f"{answer[0]['content']}{plain_conversation(answer[1:])}".removesuffix("\n\nAssistant:")
        plain = isinstance(self.prompt, list) and not templated
        apart = not text or text[0].isspace() or (self.written or ":")[-1].isspace()
        return f" {text}" if plain and not apart else text


def read_row(row: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None) -> ReadRow:
    """Recognise the layout of a row.

    :param row: its columns; gaps may be None
    :param where: what errors call it
    :param names: what the row calls a column, such as ``{"prompt": "question"}``
    :raises ValueError: if its parts don't fit together
    :raises TypeError: if a part is of a wrong type
    """
    names = dict(names or {})
    rest = dict(row)

    def take(name: str) -> Any:
        column = names.get(name, name)
        value = rest.pop(column, None)
        return stored_messages(value, f"{where}: {column!r}")

    def take_answer(name: str) -> Any:
        value = take(name)
        if value is None or isinstance(value, (str, Mapping)) or is_conversation(value):
            return value
        rest[names.get(name, name)] = value  # something else of that name
        return None

    given_prompt, completion = take("prompt"), take_answer(COMPLETION)
    chosen, rejected = take_answer("chosen"), take_answer("rejected")
    tools = stored_tools(rest.get("tools"))
    origin = names.get("prompt", "prompt")
    written: str | None = None
    prompt: Part = given_prompt
    if is_conversation(given_prompt):
        prompt = _with_system(as_messages(given_prompt, f"{where}: {names.get('prompt', 'prompt')!r}"), rest)
    elif isinstance(given_prompt, str) and completion is None and chosen is None:
        whole = _conversation_of(given_prompt, rest.get("messages"), where)
        if whole:  # the prompt is said again, in the conversation that it opens
            origin = "messages"
            prompt, completion = _divided(_with_system(whole, rest))
            del rest["messages"]
    elif given_prompt is None:
        source = next((name for name in CONVERSATIONS if rest.get(name) is not None), None)
        if source is not None:
            origin = source
            stored = stored_messages(rest.pop(source), f"{where}: {source!r}")
            prompt, answer = _divided(_with_system(as_messages(stored, f"{where}: {source!r}"), rest))
            if answer and (completion is not None or chosen is not None):
                raise ValueError(
                    f"{where}: {source!r} ends with the assistant's answer, and there is a column "
                    f"{COMPLETION if completion is not None else 'chosen'!r}, too; drop one of the two"
                )
            completion = answer or completion
        elif rest.get(INSTRUCTION) is not None:
            origin = INSTRUCTION
            prompt, written, output = _alpaca(rest, where)
            if output is not None:
                completion = output if completion is None else completion
    if chosen is not None and rejected is not None:
        prompt, (chosen, rejected) = _answers(prompt, (chosen, rejected), where)
    if completion is not None:
        prompt, (completion,) = _answers(prompt, (completion,), where)
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if (chosen is None) != (rejected is None) and value is not None:
            rest[names.get(name, name)] = value
    both = chosen is not None and rejected is not None
    return ReadRow(
        prompt, completion, chosen if both else None, rejected if both else None, rest, written, tools, origin
    )


def stored_tools(value: Any) -> Any:
    """Descriptions of tools, which may be stored as JSON in a text; None for anything else."""
    if isinstance(value, str) and value.strip().startswith("["):
        import json

        try:
            return json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _conversation_of(prompt: str, stored: Any, where: str) -> list[Message]:
    """The conversation that a prompt opens, where it ends with the assistant's answer; otherwise none."""
    stored = stored_messages(stored, f"{where}: 'messages'")
    if not is_one_conversation(stored):
        return []
    messages = as_messages(stored, f"{where}: 'messages'")
    asked = next((message for message in messages if message["role"] != "system"), None)
    opens = asked is not None and asked["content"].strip() == prompt.strip()
    return messages if opens and messages[-1]["role"] == "assistant" else []


def _with_system(messages: list[Message], rest: Mapping[str, Any]) -> list[Message]:
    """ShareGPT keeps what the system says in a column of its own."""
    system = rest.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _divided(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """A conversation as what is to be answered and the answer; a conversation of answers alone is none."""
    start = answer_start(messages)
    return (messages[:start], messages[start:]) if start else (messages, [])


def _alpaca(rest: dict[str, Any], where: str) -> tuple[list[Message], str, Any]:
    """Instruction, input and output: the prompt as messages and as text, and the answer."""
    values = {}
    for name in (INSTRUCTION, "input", "context", "system"):
        value = rest.pop(name, None) if name != "system" else rest.get(name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{where}: {name!r} must be a text, got {type(value).__name__}")
        values[name] = value or ""
    instruction, further = values[INSTRUCTION], values["input"] or values["context"]
    if not instruction.strip():
        raise ValueError(f"{where}: {INSTRUCTION!r} is an empty text")
    output = rest.pop("output", None)
    if output is None:
        output = rest.pop("response", None)
    history = rest.pop("history", None) or []
    messages: list[Message] = []
    written = ""
    if values["system"].strip():
        messages.append({"role": "system", "content": values["system"]})
        written = f"{values['system']}\n\n"
    for turn in history:
        if not (is_conversation(turn) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise TypeError(f"{where}: 'history' must be a list of pairs of texts, found {turn!r:.60}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        written += f"### Instruction:\n{turn[0]}\n\n### Response:\n{turn[1]}\n\n"
    messages.append({"role": "user", "content": f"{instruction}\n{further}" if further else instruction})
    written += f"### Instruction:\n{instruction}\n\n"
    written += f"### Input:\n{further}\n\n" if further else ""
    return messages, f"{written}### Response:\n", output


def _answers(prompt: Part, answers: Sequence[Any], where: str) -> tuple[Part, tuple[Any, ...]]:
    """A prompt and the answers to it, out of answers that may be texts, messages or whole conversations."""
    if any(is_conversation(answer) or isinstance(answer, Mapping) for answer in answers):
        if not all(is_conversation(answer) or isinstance(answer, Mapping) for answer in answers):
            raise TypeError(f"{where}: 'chosen' and 'rejected' must both be texts or both be messages")
        conversations = [as_messages(answer, f"{where}: the answer") for answer in answers]
        return _conversational(prompt, conversations, where)
    if prompt is None and len(answers) == 2:
        start = _turn_boundary(*answers)
        return answers[0][:start] or None, tuple(answer[start:] for answer in answers)
    return prompt, tuple(answers)


def _conversational(prompt: Part, conversations: list[list[Message]], where: str) -> tuple[Part, tuple[Any, ...]]:
    if isinstance(prompt, list) and all(
        common_beginning(prompt, conversation) == len(prompt) for conversation in conversations
    ):
        conversations = [conversation[len(prompt) :] for conversation in conversations]
    elif conversations[0][0]["role"] != "assistant":  # whole conversations
        same = min(answer_start(conversation) for conversation in conversations)
        if len(conversations) == 2:
            same = min(same, common_beginning(*conversations))
        head = conversations[0][:same]
        if not head:
            raise ValueError(f"{where}: 'chosen' and 'rejected' answer different messages")
        asked = [prompt] if isinstance(prompt, str) else [m["content"] for m in (prompt or [])[-1:]]
        if asked and asked[0].strip() not in {message["content"].strip() for message in head}:
            raise ValueError(
                f"{where}: the prompt {asked[0][:60]!r} is not a message of the conversations beside it; drop one of "
                "them"
            )
        prompt, conversations = head, [conversation[same:] for conversation in conversations]
    if any(not conversation or conversation[0]["role"] != "assistant" for conversation in conversations):
        raise ValueError(f"{where}: an answer must begin with a message of the assistant, after what both share")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else None
    return prompt, tuple(conversations)


def _turn_boundary(first: str, second: str) -> int:
    """Where two texts that begin alike let the assistant speak for the last time; 0 without such a place."""
    pairs = zip(first, second, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    ends = [mark.end() for mark in _ASSISTANT_SPEAKS.finditer(first) if mark.end() <= same]
    return ends[-1] if ends else 0
