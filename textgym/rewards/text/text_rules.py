"""Rules of text quality that need no model: length, repetition, keywords, readability, grammar.

Each has a positive form, or a negative one where what it counts is unwanted, and says which. Any of them turns into a
demand with :class:`~textgym.rewards.Constraint`.
"""

from __future__ import annotations

import itertools
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from textgym.checks import check_bool, check_choice, check_int, check_number, check_texts
from textgym.rewards.base import Reward
from textgym.rewards.columns import column_of
from textgym.rewards.errors import RewardError
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import wanted_per_row
from textgym.text_units import keyword_pattern, ngrams_of, sentences_of, units_of, words_of


class TextRule(Reward):
    """A function of the completion alone, or, where a format may begin in the prompt, of how that ends."""

    @abstractmethod
    def score(self, completion: str) -> float:
        """Φ of one completion."""

    def score_behind(self, prompt: str, completion: str) -> float:
        """Φ of one completion, for rules to which it matters how the prompt ends."""
        return self.score(completion)

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [float(self.score_behind(p, c)) for p, c in zip(prompts, completions, strict=True)]


class LengthTarget(Reward):
    """How near the completion's length is to a target, from 0 to 1.

    Φ = max(0, 1 − |n − target| / target): 0 for the empty completion, 1 at the target, 0 again from twice the
    target on. Within ``tolerance`` of the target it is 1. Counted are the policy's tokens, an end-of-sequence token
    included, or words between white space, or characters; in scripts without spaces, such as Chinese, each character
    is a word. With tokens no text is decoded.

    :param target: the length that is wanted
    :param unit: ``"tokens"``, ``"words"`` or ``"characters"``
    :param tolerance: how far from the target still counts as it

    >>> reward = LengthTarget(4, unit="words")
    >>> reward(prompts=["p"] * 4, completions=["", " a good", " a good film .", " " + "very " * 9])
    [0.0, 0.5, 1.0, 0.0]
    """

    def __init__(
        self, target: float, unit: Literal["tokens", "words", "characters"] = "tokens", *, tolerance: float = 0.0
    ) -> None:
        self.unit = check_choice("unit", unit, ("tokens", "words", "characters"))
        self.target = check_number("target", target, low=0.0, open_low=True)
        self.tolerance = check_number("tolerance", tolerance, low=0.0, high=self.target, open_high=True)

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """:raises RewardError: if tokens are counted and there are no ``completion_ids``"""
        if self.unit == "tokens":
            lengths = [len(ids) for ids in column_of(self.name, "completion_ids", columns, completions)]
        elif self.unit == "words":
            lengths = [len(units_of(completion)) for completion in completions]
        else:
            lengths = [len(completion) for completion in completions]
        return list(self._value(np.array(lengths, dtype=np.float64)).tolist())

    def potentials(self, batch: PrefixBatch) -> np.ndarray:
        return self._value(batch.completion_lengths) if self.unit == "tokens" else super().potentials(batch)

    def prefix_potentials(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.unit != "tokens":
            return super().prefix_potentials(batch, at)
        wanted_per_row(batch, at)
        return [self._value(np.asarray(lengths)) for lengths in at]

    def _value(self, lengths: np.ndarray) -> np.ndarray:
        away = np.maximum(np.abs(lengths - self.target) - self.tolerance, 0.0)
        scores: np.ndarray = np.maximum(1 - away / (self.target - self.tolerance), 0.0)
        return scores


class Repetition(TextRule):
    """Minus the share of n-grams that occurred before in the completion: from above −1 to 0.

    Φ = −(1 − distinct / all), minus "seq-rep-n" of Welleck et al., "Neural Text Generation with Unlikelihood Training"
    (2020); 0.0 for a completion with fewer than n units. Words are separated by white space; in
    scripts without spaces, such as Chinese, each character is one.

    :param n: units in an n-gram
    :param unit: ``"words"`` or ``"characters"``

    >>> Repetition(n=1)(prompts=["p"] * 2, completions=[" very very very very good", " a good film"])
    [-0.6, 0.0]
    """

    def __init__(self, n: int = 3, unit: Literal["words", "characters"] = "words") -> None:
        self.n, self.unit = _checked_ngrams(n, unit)

    def score(self, completion: str) -> float:
        grams = ngrams_of(units_of(completion) if self.unit == "words" else completion, self.n)
        return (len(set(grams)) - len(grams)) / max(len(grams), 1)


class DistinctN(TextRule):
    """Distinct n-grams of the completion divided by all of them, from 0 to 1.

    Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016), within one text;
    0.0 for a completion with fewer than n units. Words are separated by white space; in scripts without
    spaces, such as Chinese, each character is one. One word is perfectly distinct: combine it with
    :class:`LengthTarget`.

    :param n: units in an n-gram
    :param unit: ``"words"`` or ``"characters"``

    >>> DistinctN(n=1)(prompts=["p"] * 3, completions=[" very very very very good", " a good film", ""])
    [0.4, 1.0, 0.0]
    """

    def __init__(self, n: int = 2, unit: Literal["words", "characters"] = "words") -> None:
        self.n, self.unit = _checked_ngrams(n, unit)

    def score(self, completion: str) -> float:
        grams = ngrams_of(units_of(completion) if self.unit == "words" else completion, self.n)
        return len(set(grams)) / max(len(grams), 1)


class KeywordPresence(Reward):
    """Share of the keywords that the completion has, from 0 to 1: the positive form.

    A keyword counts once, however often it occurs, as a whole word (or several) and in upper or lower case alike. None
    where the column has None.

    :param keywords: the keywords, the same for all rows
    :param column: or the column that has a list of them, or one, for each row
    :param whole_words: whether a keyword inside a longer word is none. Where there are no spaces between words, as in
        Chinese, one is found anywhere

    >>> reward = KeywordPresence(["warm", "very funny"])
    >>> reward(prompts=["p"] * 3, completions=[" Warm and warm!", " warmth", " a very funny, warm film"])
    [0.5, 0.0, 1.0]
    """

    def __init__(
        self, keywords: Sequence[str] | None = None, *, column: str | None = None, whole_words: bool = True
    ) -> None:
        if (keywords is None) == (column is None):
            raise ValueError(f"give keywords= or column=, got keywords={keywords!r} and column={column!r}")
        self.keywords = None if keywords is None else _checked_keywords(keywords)
        self.column = column
        self.whole_words = check_bool("whole_words", whole_words)
        self._patterns: dict[str, re.Pattern[str]] = {}

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """:raises RewardError: if the column is missing, with those there are, or an entry is not a list of texts"""
        return [
            None if words is None else self._value(len(self._found(completion, words)) / len(words))
            for completion, words in zip(completions, self._words(columns, completions), strict=True)
        ]

    def _value(self, share: float) -> float:
        return share

    def _found(self, completion: str, keywords: tuple[str, ...]) -> list[str]:
        text = completion.casefold()
        return [word for word in keywords if self._pattern(word).search(text)]

    def _pattern(self, keyword: str) -> re.Pattern[str]:
        if keyword not in self._patterns:
            text = keyword.casefold()
            self._patterns[keyword] = keyword_pattern(text) if self.whole_words else re.compile(re.escape(text))
        return self._patterns[keyword]

    def _words(self, columns: dict[str, Any], completions: list[str]) -> list[tuple[str, ...] | None]:
        if self.column is None:
            return [self.keywords] * len(completions)
        words: list[tuple[str, ...] | None] = []
        for row, entry in enumerate(column_of(self.name, self.column, columns, completions)):
            try:
                words.append(None if entry is None else _checked_keywords([entry] if isinstance(entry, str) else entry))
            except ValueError as error:
                problem = f"column {self.column!r}: {error}"
                raise RewardError(self.name, problem, row=row, completion=completions[row]) from error
        return words


class KeywordAbsence(KeywordPresence):
    """Minus the share of the keywords that the completion has, from −1 to 0: the negative form.

    Parameters as in :class:`KeywordPresence`.

    >>> KeywordAbsence(["bad", "dull"])(prompts=["p"] * 2, completions=[" a bad, bad film", " a badge"])
    [-0.5, 0.0]
    """

    def _value(self, share: float) -> float:
        return 0.0 - share


class Readability(TextRule):
    """How easily English reads: Flesch's reading ease, or the school grade that it takes.

    ``"ease"`` = 206.835 − 1.015 · words / sentences − 84.6 · syllables / words (Flesch, "A New Readability Yardstick",
    1948): about 100 for very easy and 0 for very hard text, at most 121.22, without a lower limit. ``"grade"`` =
    0.39 · words / sentences + 11.8 · syllables / words − 15.59 (Kincaid et al. 1975), at least −3.40, without an upper
    limit; harder is higher. 0.0 for a completion without a word. Syllables are counted by :func:`syllables`.

    :param measure: ``"ease"`` or ``"grade"``

    >>> Readability()(prompts=["p"] * 2, completions=["The cat sat on the mat.", "Incomprehensible terminology."])
    [116.145..., -260.49...]
    >>> Readability("grade")(prompts=["p"], completions=["The cat sat on the mat."])
    [-1.4499...]
    """

    def __init__(self, measure: Literal["ease", "grade"] = "ease") -> None:
        self.measure = check_choice("measure", measure, ("ease", "grade"))

    def score(self, completion: str) -> float:
        words = words_of(completion)
        if not words:
            return 0.0
        length = len(words) / max(len(sentences_of(completion)), 1)
        weight = sum(map(syllables, words)) / len(words)
        if self.measure == "ease":
            return 206.835 - 1.015 * length - 84.6 * weight
        return 0.39 * length + 11.8 * weight - 15.59


def syllables(word: str) -> int:
    """About how many syllables an English word has: groups of vowels, less silent e, and at least 1.

    Of the words in the embedded prompts 97.8 % get a number that the CMU Pronouncing Dictionary has for them (95.3 % of
    the different words).

    >>> [syllables(word) for word in ("cat", "movie", "table", "liked", "wanted", "reading", "Beautiful")]
    [1, 2, 2, 1, 2, 2, 3]
    """
    letters = word.lower()
    count = len(_VOWELS.findall(letters)) + len(_DIVIDED.findall(letters)) - len(_SILENT_WITHIN.findall(letters))
    return max(count - (_SILENT_END.search(letters) is not None), 1)


_VOWELS = re.compile(r"[aeiouyàáâäèéêëìíîïòóôöùúûü]+")
_DIVIDED = re.compile(r"(?<![tcsxg])i[ao](?!u)|[aeiouy]ing|sm$")  # piano, but not nation; seeing; criticism
_SILENT_END = re.compile(r"[^aeiouyl]e$|[aeiouyrl]le$|[^aeiouytd]ed$|[^aeiouysxzcgh]es$")  # made, liked; not table
_SILENT_WITHIN = re.compile(r"[^aeiouy]e(?:ly|ment|ful|less|ness)")  # movement


class Grammar(TextRule):
    """How few of a small set of rules the completion breaks, from 0 to 1.

    Φ = max(0, 1 − violations / words); 0.0 for a completion without a word. The rules are about English and its marks:

    - ``"capital"``: a sentence begins with a capital letter (the first may go on with the prompt's)
    - ``"end"``: the completion ends in . ! ? … or their like, perhaps after a quotation mark or parenthesis
    - ``"repeated"``: no word occurs twice in a row ("the the"), but for "had had" and "that that"
    - ``"article"``: "an" before a vowel's letter, "a" before another, with the usual exceptions ("an hour", "a user")
    - ``"spacing"``: no space before , . ; : ! ? and no two spaces in a row
    - ``"pronoun"``: I is written with a capital letter
    - ``"brackets"``: parentheses, brackets and double quotation marks are closed

    What it does not know it does not find: it can be satisfied by nonsense. :class:`~textgym.rewards.SentenceFluency`
    is a language model's view.

    :param rules: which rules; by default all

    >>> reward = Grammar()
    >>> reward(prompts=["p"] * 3, completions=[" This is an apple.", " this is is a apple", ""])
    [1.0, 0.4, 0.0]
    >>> Grammar().violations(" so i saw a old film .")
    {'capital': 0, 'end': 0, 'repeated': 0, 'article': 1, 'spacing': 1, 'pronoun': 1, 'brackets': 0}
    """

    def __init__(self, rules: Sequence[str] | None = None) -> None:
        self.rules = tuple(_RULES) if rules is None else tuple(check_texts("rules", rules, least=1))
        for rule in self.rules:
            check_choice("rules", rule, tuple(_RULES))

    def score(self, completion: str) -> float:
        words = len(words_of(completion))
        return max(0.0, 1 - sum(self.violations(completion).values()) / words) if words else 0.0

    def violations(self, completion: str) -> dict[str, int]:
        """How often the completion breaks each rule."""
        return {rule: _RULES[rule](completion) for rule in self.rules}


_VOWEL_SOUND = re.compile(r"(?!(?:uni|use|usu|eur|ewe|one|once|ut[ie]|ub[i])\w*)[aeiou]|hour|honest|honou?r|heir", re.I)
_CLOSING = {")": "(", "]": "[", "}": "{", "”": "“"}


def _small_beginnings(text: str) -> int:
    return sum(sentence.lstrip("\"'“‘([")[:1].islower() for sentence in sentences_of(text)[1:])


def _open_end(text: str) -> int:
    return int(re.search(r"[.!?…。！？][\"'”’)\]]*\s*\Z", text) is None)


def _repeated_words(text: str) -> int:
    words = [word.casefold() for word in re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text)]
    pairs = itertools.pairwise(words)
    return sum(a == b and a[0].isalpha() and a not in ("had", "that") for a, b in pairs)


def _wrong_articles(text: str) -> int:
    found = re.findall(r"\b(an?)\s+([^\W\d_]\w*)", text, re.I)
    return sum((article.lower() == "an") != bool(_VOWEL_SOUND.match(word)) for article, word in found)


def _wrong_spaces(text: str) -> int:
    return len(re.findall(r"[^\s.,;:!?] +[,;:!?]|[^\s.,;:!?] +\.(?!\w)|\S  +(?=\S)", text))


def _small_pronouns(text: str) -> int:
    return len(re.findall(r"(?<![\w.'’-])i(?:['’](?:m|ll|ve|d))?(?![\w.'’-])", text))


def _open_brackets(text: str) -> int:
    opened: list[str] = []
    unmatched = text.count('"') % 2
    for mark in text:
        if mark in _CLOSING.values():
            opened.append(mark)
        elif mark in _CLOSING:
            if opened[-1:] == [_CLOSING[mark]]:
                opened.pop()
            else:
                unmatched += 1
    return unmatched + len(opened)


_RULES: dict[str, Callable[[str], int]] = {
    "capital": _small_beginnings,
    "end": _open_end,
    "repeated": _repeated_words,
    "article": _wrong_articles,
    "spacing": _wrong_spaces,
    "pronoun": _small_pronouns,
    "brackets": _open_brackets,
}


def _checked_ngrams(n: int, unit: Any) -> tuple[int, Any]:
    return check_int("n", n, low=1), check_choice("unit", unit, ("words", "characters"))


def _checked_keywords(keywords: Any) -> tuple[str, ...]:
    if isinstance(keywords, str) or not isinstance(keywords, (list, tuple, set, frozenset)):
        raise ValueError(f"keywords must be a list of texts, got {keywords!r}")
    if not keywords or not all(isinstance(word, str) and word.strip() for word in keywords):
        raise ValueError(f"keywords must be a list of at least one text, none of them empty; got {keywords!r}")
    return tuple(dict.fromkeys(word.strip() for word in keywords))
