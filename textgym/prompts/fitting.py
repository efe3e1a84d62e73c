"""What a model sees of a prompt: all of it, or as much as the limit of tokens leaves.

A text loses its beginning. A conversation loses content and no header: turns before the last question first, from the
oldest on; where that is not enough, the longest of what is left, system or question. Each loses its beginning.
Rewards, infos and logs get the prompt that the model saw.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from textgym.chat.chat_prompts import MESSAGES, chat_prompt
from textgym.chat.messages import is_conversation
from textgym.prompts.layouts import stored_tools
from textgym.prompts.rows import PromptRow
from textgym.vocabulary import Vocabulary

_READ_AT_ONCE = 1000  # prompts that are tokenised together where all are judged


class FittedPrompt(NamedTuple):
    """A prompt as the model sees it: the row, with its text, and the token ids."""

    row: PromptRow
    ids: list[int]


def fit_prompt(row: PromptRow, vocabulary: Vocabulary, limit: int | None = None) -> FittedPrompt:
    """The prompt of a row as token ids, cut where they are too many.

    A conversation is cut as one where the chat template makes its prompt of the row's column ``messages``, or of the
    messages that can be read in the prompt itself.

    :param row: the prompt, with its columns
    :param vocabulary: of the language model
    :param limit: most tokens, None for any number
    :raises ValueError: if the prompt has no token, or the headers of a conversation alone are more than ``limit``
    """
    ids = vocabulary.encode(row.prompt)
    if not ids:
        raise ValueError(
            f"the tokenizer makes no token of the prompt {row.prompt[:60]!r}; give prompts that have at least one"
        )
    if limit is None or len(ids) <= limit:
        return FittedPrompt(row, ids)
    messages = messages_of(row, vocabulary)
    if messages is not None:
        return _cut_conversation(row, messages, vocabulary, limit)
    ids = vocabulary.cut_left(ids, limit)
    return FittedPrompt(PromptRow(vocabulary.written(ids), row.columns), ids)


def is_chat(row: PromptRow, vocabulary: Vocabulary) -> bool:
    """Whether a prompt is a conversation in the model's chat template, and not a plain text."""
    opening = vocabulary.turns.answer_opening
    return bool(opening.strip() and row.prompt.endswith(opening)) or messages_of(row, vocabulary) is not None


def all_chat(rows: Iterable[PromptRow], vocabulary: Vocabulary) -> bool:
    """Whether all prompts are conversations; the first that is a plain text decides."""
    return bool(vocabulary.tokenizer.chat_template) and all(is_chat(row, vocabulary) for row in rows)


def as_chat(row: PromptRow, vocabulary: Vocabulary, system: str | None = None) -> PromptRow:
    """A plain text as what a user says, in the model's chat template; prompts that are in it stay as they are.

    :param row: the prompt, with its columns
    :param vocabulary: of the language model
    :param system: what the system says before
    :raises ValueError: if the tokenizer has no chat template, or it refuses the messages
    """
    if is_chat(row, vocabulary):
        return row
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": row.prompt})
    return PromptRow(chat_prompt(messages, vocabulary.tokenizer, "the prompt"), {**row.columns, MESSAGES: messages})


@dataclass(frozen=True)
class LongPrompts:
    """Prompts that are longer than a limit: how many of how many, the first one and its tokens."""

    count: int
    of: int
    first: str
    tokens: int

    def told(self, name: str, limit: int) -> str:
        """What they are, for messages.

        :param name: of the limit
        :param limit: most tokens
        """
        others = f", as are {self.count - 1} others of {self.of}" if self.count > 1 else ""
        return f"a prompt of {self.tokens} tokens is longer than {name}={limit}{others}: {self.first[:60]!r}..."


def find_long_prompts(rows: Iterable[PromptRow], vocabulary: Vocabulary, limit: int) -> LongPrompts | None:
    """Which prompts have more tokens than ``limit``; None where all fit."""
    count, total, first, tokens = 0, 0, "", 0
    sure = limit - len(vocabulary.encode_all(["a"])[0])  # characters, beside the tokens around a text
    prompts = (row.prompt for row in rows)
    while part := list(itertools.islice(prompts, _READ_AT_ONCE)):
        total += len(part)
        # A token stands for at least a byte, so short texts need no tokenizer, unless it writes characters as others.
        doubtful = [text for text in part if len(text) > sure or not text.isascii()]
        for text, ids in zip(doubtful, vocabulary.encode_all(doubtful), strict=True):
            if len(ids) > limit:
                first, tokens = (first, tokens) if count else (text, len(ids))
                count += 1
    return LongPrompts(count, total, first, tokens) if count else None


def judge_lengths(rows: Iterable[PromptRow], vocabulary: Vocabulary, limit: int, overflow: str) -> bool:
    """Say before anything is computed which prompts are too long.

    :param rows: all of them
    :param vocabulary: of the language model
    :param limit: ``max_prompt_tokens``
    :param overflow: ``"truncate"`` or ``"error"``
    :return: whether some are too long
    :raises ValueError: if some are too long and ``overflow`` is ``"error"``
    :warns UserWarning: if some will be cut
    """
    found = find_long_prompts(rows, vocabulary, limit)
    if found is None:
        return False
    problem = found.told("max_prompt_tokens", limit)
    if overflow == "error":
        raise ValueError(f"{problem}; raise max_prompt_tokens or shorten the prompt")
    warnings.warn(
        f"{problem}; a long text loses its beginning, a conversation content of its oldest turns", stacklevel=3
    )
    return True


def messages_of(row: PromptRow, vocabulary: Vocabulary) -> list[dict[str, Any]] | None:
    """The messages that a prompt was made of; None where it is not a conversation in the chat template."""
    given = row.columns.get(MESSAGES)
    if not is_conversation(given) or not given or not all(isinstance(message, dict) for message in given):
        given = vocabulary.turns.templated.messages(row.prompt)
    if given is None:
        return None
    messages = [dict(message) for message in given]
    try:
        return messages if rendered(messages, row, vocabulary) == row.prompt else None
    except (TypeError, ValueError):
        return None


def rendered(messages: Sequence[dict[str, Any]], row: PromptRow, vocabulary: Vocabulary) -> str:
    """The prompt that messages make in the place of those of a row.

    :raises ValueError: if the template refuses them
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say was said when the prompt was made
        return chat_prompt(messages, vocabulary.tokenizer, tools=stored_tools(row.columns.get("tools")))


def _cut_conversation(
    row: PromptRow, messages: list[dict[str, Any]], vocabulary: Vocabulary, limit: int
) -> FittedPrompt:
    asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    older = [i for i, message in enumerate(messages[:asked]) if message["role"] != "system"]
    needed = [i for i in range(len(messages)) if i not in older]  # the system, and all from the last question on
    while True:
        text = rendered(messages, row, vocabulary)
        ids = vocabulary.encode(text)
        excess = len(ids) - limit
        if excess <= 0:
            columns = {**row.columns, MESSAGES: messages} if MESSAGES in row.columns else row.columns
            return FittedPrompt(PromptRow(text, columns), ids)
        cuttable = {i: _content_tokens(messages[i], vocabulary) for i in older + needed if _has_text(messages[i])}
        if not cuttable:
            break
        i = next(iter(cuttable))
        if i not in older:
            i, *others = sorted(cuttable, key=lambda j: cuttable[j], reverse=True)
            second = cuttable[others[0]] if others else 0
            excess = min(excess, max(cuttable[i] - second, (excess + 1) // 2))
        messages[i] = {**messages[i], "content": _without_beginning(messages[i]["content"], excess, vocabulary)}
    raise ValueError(
        f"the chat template's headers alone are {len(ids)} tokens, more than max_prompt_tokens={limit}: "
        f"{row.prompt[:60]!r}...; raise max_prompt_tokens"
    )


def _has_text(message: dict[str, Any]) -> bool:
    return isinstance(message["content"], str) and message["content"] != ""


def _content_tokens(message: dict[str, Any], vocabulary: Vocabulary) -> int:
    return len(vocabulary.tokenizer(message["content"], add_special_tokens=False)["input_ids"])


def _without_beginning(text: str, tokens: int, vocabulary: Vocabulary) -> str:
    """A text without its first tokens; shorter in any case."""
    ids = vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]
    rest = vocabulary.written(ids[tokens:]).lstrip("\ufffd") if tokens < len(ids) else ""
    return rest if len(rest) < len(text) else text[1:]
