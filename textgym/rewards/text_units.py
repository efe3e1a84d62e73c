"""Words, sentences and n-grams, as the rewards that read plain text count them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

Unit = TypeVar("Unit")

_SURROGATES = re.compile("[\ud800-\udfff]")
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_MARKS = re.compile(r"[.!?…。！？\n]+[\"'”’)\]]*")
_LETTER = re.compile(r"\w")


def well_formed(text: str) -> str:
    """The text with lone surrogates, which no encoding can write, as U+FFFD.

    >>> well_formed("a\\ud800b")
    'a\ufffdb'
    """
    return _SURROGATES.sub("\ufffd", text)


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores, with apostrophes inside; Chinese and Japanese are not divided.

    >>> words_of("It's a 90-minute film.")
    ["It's", 'a', '90', 'minute', 'film']
    """
    return _WORD.findall(text)


def sentences_of(text: str) -> list[str]:
    """Sentences with their marks; the last one may be unfinished. What has no letter or digit is none.

    >>> sentences_of('Is it 3.5? "Yes!" he said. And then')
    ['Is it 3.5?', '"Yes!"', 'he said.', 'And then']
    """
    sentences, start = [], 0
    for marks in _MARKS.finditer(text):
        # A full stop inside a word ends nothing (3.5, e.g.). Chinese and Japanese write no space behind theirs.
        if marks.end() == len(text) or text[marks.end()].isspace() or not set("。！？\n").isdisjoint(marks[0]):
            sentences.append(text[start : marks.end()].strip())
            start = marks.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if _LETTER.search(sentence)]


def ngrams_of(units: Sequence[Unit], n: int) -> list[tuple[Unit, ...]]:
    """All runs of n neighbours.

    >>> ngrams_of("abc", 2)
    [('a', 'b'), ('b', 'c')]
    """
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
