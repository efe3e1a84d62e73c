"""Rewards from word lists and small tables: sentiment, language, profanity.

The packages come with ``pip install "textgym[rules]"``.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from textgym.checks import check_text, check_texts, listed
from textgym.encodable_text import well_formed
from textgym.extras import import_extra
from textgym.rewards.text.text_rules import TextRule
from textgym.text_units import words_of

EXTRA = "rules"


class SentimentLexicon(TextRule):
    """VADER's compound sentiment of English, from −1 to 1, as ``vaderSentiment`` returns it (Hutto and Gilbert 2014).

    The valences of the words in a lexicon of 7,500, with rules for negation, degree, capitals and exclamation marks,
    sum to s, and Φ = s / √(s² + 15). 0.0 without a word of the lexicon.

    >>> reward = SentimentLexicon()
    >>> reward(prompts=["p"] * 3, completions=[" a good film", " not a good film", " a film"])
    [0.4404, -0.3412, 0.0]
    """

    def __init__(self) -> None:
        vader = import_extra("vaderSentiment.vaderSentiment", EXTRA, "SentimentLexicon")
        self.analyzer = vader.SentimentIntensityAnalyzer()

    def score(self, completion: str) -> float:
        return float(self.analyzer.polarity_scores(completion)["compound"])


class LanguageIdentity(TextRule):
    """Probability that the completion is in a language, from 0 to 1, as ``py3langid`` returns it.

    Lui and Baldwin, "langid.py: An Off-the-shelf Language Identification Tool" (2012): a naive Bayes classifier over
    byte n-grams, for 140 languages. A few words are too little: their probability is spread over related languages;
    give ``among`` where only some can occur. Text in Chinese characters is Chinese or Japanese, and ``"zh"`` is
    all of Chinese, Wu and Cantonese included. 0.0 for a completion without a letter.

    :param language: ISO 639 code, such as ``"en"``
    :param among: codes of the languages that are told apart; by default all

    >>> reward = LanguageIdentity("de", among=["de", "en", "fr"])
    >>> german, english = reward(prompts=["p"] * 2, completions=[" ein schöner Film", " a beautiful film"])
    >>> german > 0.9, english < 0.1
    (True, True)
    """

    def __init__(self, language: str = "en", *, among: Iterable[str] | None = None) -> None:
        self.identifier = copy.copy(_identifier())  # which languages it tells apart is its own, the tables are shared
        known = set(self.identifier.labels)
        check_text("language", language)
        wanted = known if among is None else {language, *check_texts("among", listed(among))}
        unknown = sorted(({language} | wanted) - known)
        if unknown:
            raise ValueError(f"unknown language {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        if among is not None:
            self.identifier.set_languages(sorted(wanted))
        self.language = language

    def score(self, completion: str) -> float:
        if not any(letter.isalpha() for letter in completion):
            return 0.0
        ranks = {language: float(p) for language, p in self.identifier.rank(well_formed(completion))}
        if _is_east_asian(completion):  # a few of these characters look like many languages to a table of bytes
            possible = {language: p for language, p in ranks.items() if language in _EAST_ASIAN}
            total = sum(possible.values())
            ranks = {language: p / total for language, p in possible.items()} if total > 0 else ranks
        meant = {self.language, *_INCLUDED.get(self.language, ())}
        return min(max(sum(ranks.get(language, 0.0) for language in meant), 0.0), 1.0)


# Languages that ISO 639-3 counts to another one, which is written alike.
_INCLUDED = {"zh": ("wuu", "yue"), "ar": ("ary", "arz"), "no": ("nn",), "ku": ("sdh",), "uz": ("uzs",), "lv": ("ltg",)}
_EAST_ASIAN = ("zh", "wuu", "yue", "ja")
_EAST_ASIAN_LETTER = re.compile("[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def _is_east_asian(text: str) -> bool:
    """Whether most letters are Han or kana."""
    return 2 * len(_EAST_ASIAN_LETTER.findall(text)) > sum(letter.isalpha() for letter in text)


@functools.cache
def _identifier() -> Any:
    """The tables of py3langid, which take a second or two to unpack."""
    langid = import_extra("py3langid.langid", EXTRA, "LanguageIdentity")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


class Profanity(TextRule):
    """Minus the share of words that are profane, from −1 to 0: the negative form.

    Words are compared whole and in lower case; a phrase counts as many words as it has. The default list is that of
    ``better-profanity`` 0.7 (908 English words and phrases), without its detection of disguised spellings. Such lists
    hold mild words, too, and miss what is hurtful without them: a classifier sees more.

    :param words: words and phrases; by default the list of ``better-profanity``

    >>> Profanity(["damn", "bloody hell"])(prompts=["p"] * 2, completions=[" Damn, what a film", " oh bloody hell"])
    [-0.25, -0.666...]
    >>> Profanity()(prompts=["p"], completions=[" a lovely film"])
    [0.0]
    """

    def __init__(self, words: Iterable[str] | None = None) -> None:
        given = _default_words() if words is None else words if isinstance(words, str) else listed(words)
        phrases = (tuple(words_of(word.casefold())) for word in check_texts("words", given))
        self.words = frozenset(phrase for phrase in phrases if phrase)
        if not self.words:
            raise ValueError("words holds no word; give at least one")
        self._lengths = sorted({len(phrase) for phrase in self.words}, reverse=True)

    def score(self, completion: str) -> float:
        words = words_of(completion.casefold())
        profane, place = 0, 0
        while place < len(words):
            # The longest phrase that begins here.
            left = len(words) - place
            found = next((n for n in self._lengths if n <= left and tuple(words[place : place + n]) in self.words), 0)
            profane += found
            place += max(found, 1)
        return 0.0 - profane / max(len(words), 1)


def _default_words() -> list[str]:
    package = import_extra("better_profanity", EXTRA, "Profanity")
    return Path(package.__path__[0], "profanity_wordlist.txt").read_text(encoding="utf-8").splitlines()
