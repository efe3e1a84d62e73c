"""Formats: regular expressions, JSON, tags.

A half-written text has no format yet, so these are best paid with ``reward_every="end"``, or beside another reward that
pays on the way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from textgym.checks import check_choice, check_texts, shown
from textgym.rewards.text.text_rules import TextRule


class RegexMatch(TextRule):
    """Whether the completion matches a regular expression.

    ``form="bonus"`` (the positive form) gives 1.0 for a match and 0.0 for none; ``form="penalty"`` (the negative form)
    gives −1.0 for a match and 0.0 for none. Mind the time: an expression with nested repetitions can take for ever.

    Where the prompt ends in an opened tag, as that of a chat template that writes ``<think>``, an expression that
    matches tag and completion together matches, too.

    :param pattern: a regular expression of Python's ``re``, or a compiled one
    :param where: ``"anywhere"``, at the ``"start"``, or the ``"whole"`` completion
    :param form: ``"bonus"`` or ``"penalty"``

    >>> RegexMatch(r"\\d+ stars?")(prompts=["p"] * 2, completions=[" I give it 4 stars", " four stars"])
    [1.0, 0.0]
    >>> RegexMatch(r"\\d", form="penalty")(prompts=["p"] * 2, completions=[" I give it 4 stars", " four stars"])
    [-1.0, 0.0]
    """

    def __init__(
        self,
        pattern: str | re.Pattern[str],
        *,
        where: Literal["anywhere", "start", "whole"] = "anywhere",
        form: Literal["bonus", "penalty"] = "bonus",
    ) -> None:
        check_choice("where", where, ("anywhere", "start", "whole"))
        check_choice("form", form, ("bonus", "penalty"))
        if not isinstance(pattern, str | re.Pattern) or not isinstance(getattr(pattern, "pattern", pattern), str):
            raise TypeError(f"pattern={shown(pattern)} must be a regular expression of texts")
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        self.pattern = compiled
        self._matches = {"anywhere": compiled.search, "start": compiled.match, "whole": compiled.fullmatch}[where]
        self.form = form

    def score(self, completion: str) -> float:
        return self._value(self._matches(completion) is not None)

    def score_behind(self, prompt: str, completion: str) -> float:
        tag = opened_tag(prompt)
        matches = self._matches(completion) is not None
        return self._value(matches or (tag is not None and self._matches(tag + completion) is not None))

    def _value(self, matches: bool) -> float:
        return float(matches) if self.form == "bonus" else 0.0 - matches


class JsonFormat(TextRule):
    """Whether the completion is one JSON value, and has the keys that are asked for: from 0 to 1.

    0.0 for what is not JSON (RFC 8259: NaN and Infinity are not), 1.0 for what is. With ``keys``, a JSON object gets
    half for being one and the other half for the share of the keys it has; other values get 0.0. Objects nested more
    deeply than Python's recursion limit are not treated as JSON.

    :param keys: keys that the object has to have

    >>> JsonFormat()(prompts=["p"] * 3, completions=[' {"a": [1, 2]}', "{'a': 1}", ""])
    [1.0, 0.0, 0.0]
    >>> JsonFormat(keys=["a", "b"])(prompts=["p"] * 3, completions=['{"a": 1, "b": 2}', '{"a": 1}', "[1]"])
    [1.0, 0.75, 0.0]
    """

    def __init__(self, keys: Sequence[str] | None = None) -> None:
        self.keys = None if keys is None else tuple(check_texts("keys", keys, least=1))

    def score(self, completion: str) -> float:
        try:
            value: Any = json.loads(completion, parse_int=float, parse_constant=_no_constant)  # int() refuses long ones
        except (ValueError, RecursionError):
            return 0.0
        if self.keys is None:
            return 1.0
        if not isinstance(value, dict):
            return 0.0
        return 0.5 + 0.5 * sum(key in value for key in self.keys) / len(self.keys)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class XmlTags(TextRule):
    """Share of the tags that the completion opens once, then closes once, in the given order: from 0 to 1.

    With the default tags that is the format of DeepSeek-R1 (2025): ``<think>...</think><answer>...</answer>``. A tag
    counts if it stands after the last one that counted, so that none is inside another. Some chat templates open the
    first tag themselves: where the prompt ends in ``<think>`` (and white space), the completion has opened it.

    :param tags: names of the tags, in their order

    >>> reward = XmlTags()
    >>> good, half, twice = "<think>a</think> <answer>b</answer>", "<think>a</think> b", "<think></think>" * 2
    >>> reward(prompts=["p"] * 3, completions=[good, half, twice])
    [1.0, 0.5, 0.0]
    >>> reward(prompts=["p<think>\\n"], completions=["a</think> <answer>b</answer>"])
    [1.0]
    """

    def __init__(self, tags: Sequence[str] = ("think", "answer")) -> None:
        if not all(re.fullmatch(r"[\w.:-]+", tag) for tag in check_texts("tags", tags, least=1)):
            raise ValueError(f"tags={shown(tags)} must be names such as 'think'")
        if len(set(tags)) < len(tags):
            raise ValueError(f"tags must differ from each other, got {tags!r}")
        self.tags = tuple(tags)

    def score_behind(self, prompt: str, completion: str) -> float:
        tag = opened_tag(prompt)
        opened = tag is not None and tag.strip().strip("<>") in self.tags
        return self.score(f"{tag}{completion}" if opened else completion)

    def score(self, completion: str) -> float:
        found, behind = 0, 0
        for tag in self.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            once = completion.count(opening) == 1 and completion.count(closing) == 1
            start, end = completion.find(opening), completion.find(closing)
            if once and behind <= start < end:
                found += 1
                behind = end + len(closing)
        return found / len(self.tags)


def opened_tag(prompt: str) -> str | None:
    """The tag that a prompt ends in, such as ``<think>``, with the white space after it; None without one."""
    found = re.search(r"<[\w.:-]+>\s*\Z", prompt)
    return found[0] if found else None
