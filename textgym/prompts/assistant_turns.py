"""Which tokens of a conversation the assistant wrote, its ends of turns included.

Chat templates that mark them themselves (``{% generation %}``) are few. Here a template is run on the conversation once
more, with a word of its own in the place of each answer: what stands around the words is the template's, and what
stands there in the prompt is what the assistant wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from textgym.prompts.fitting import FittedPrompt, messages_of, rendered
from textgym.prompts.rows import PromptRow
from textgym.vocabulary import Vocabulary

_ANSWER = "Qza{}Q"  # stands in no template by chance


def assistant_mask(prompt: FittedPrompt, vocabulary: Vocabulary, whole: PromptRow | None = None) -> list[bool] | None:
    """Which tokens of a prompt are answers of the assistant, each with its end of turn.

    The last answer is not among them, as a prompt ends before it, nor is the beginning of one with which it ends.

    :param prompt: as :func:`~textgym.prompts.fitting.fit_prompt` made it
    :param vocabulary: of the language model
    :param whole: the row that was fitted; answers that were cut are not among them, as nobody began them so
    :return: ``(L,)``; None where the template does not say which they are. None of a text that is not a conversation is
    """
    messages = messages_of(prompt.row, vocabulary)
    if messages is None:
        return [False] * len(prompt.ids)
    before = messages if whole is None else messages_of(whole, vocabulary) or messages
    answers = [i for i in range(len(messages) - 1) if messages[i]["role"] == "assistant"]
    spans = _spans(messages, answers, prompt.row, vocabulary)
    if spans is None:
        return None
    mask = [False] * len(prompt.ids)
    for i, (start, end) in zip(answers, spans, strict=True):
        if messages[i].get("content") != before[i].get("content"):
            continue
        (first, _), (stop, exact) = (_tokens_before(prompt, place, vocabulary) for place in (start, end))
        if not exact or (stop < len(mask) and prompt.ids[stop] in vocabulary.end_ids):
            stop += 1  # of a token with the answer's end and what follows, or of the end of the turn
        mask[first:stop] = [True] * (stop - first)
    return mask


def _spans(
    messages: Sequence[Mapping[str, Any]], answers: Sequence[int], row: PromptRow, vocabulary: Vocabulary
) -> list[tuple[int, int]] | None:
    """From and up to which character of the prompt each answer goes; None where that can't be told."""
    words = [_ANSWER.format(i) for i in answers]
    marked: list[dict[str, Any]] = [dict(message) for message in messages]
    for i, word in zip(answers, words, strict=True):
        marked[i] = {"role": "assistant", "content": word}  # calls of tools are a part of what it wrote
    try:
        text = rendered(marked, row, vocabulary)
    except (TypeError, ValueError):
        return None
    if any(text.count(word) != 1 for word in words):
        return None
    around = re.split("|".join(words), text) if words else [text]
    for contents in _contents(messages, answers):
        if "".join(part for pair in zip(around, [*contents, ""], strict=True) for part in pair) == row.prompt:
            starts = [sum(map(len, around[: i + 1])) + sum(map(len, contents[:i])) for i in range(len(contents))]
            return [(start, start + len(content)) for start, content in zip(starts, contents, strict=True)]
    found = re.fullmatch("(.*?)".join(map(re.escape, around)), row.prompt, re.DOTALL)
    return None if found is None else [found.span(i + 1) for i in range(len(answers))]


def _contents(messages: Sequence[Mapping[str, Any]], answers: Sequence[int]) -> list[list[str]]:
    """What templates write of answers: all of it, or without the white space around."""
    contents = [str(messages[i].get("content") or "") for i in answers]
    return [contents, [content.strip() for content in contents]]


def _tokens_before(prompt: FittedPrompt, place: int, vocabulary: Vocabulary) -> tuple[int, bool]:
    """How many tokens end before a character of the prompt, and whether the next one begins there."""
    ids = vocabulary.turns.encode(prompt.row.prompt[:place])
    shared = 0
    for ours, theirs in zip(ids, prompt.ids, strict=False):
        if ours != theirs:
            break
        shared += 1
    return shared, shared == len(ids)
