"""Words, sentences and n-grams, as the rewards and metrics that read plain text count them.

Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan are written without spaces between words. There each character,
with the marks on it, is a unit of its own; elsewhere a word is one. A text in several scripts has both. That is what
sacrebleu does with Chinese, too. It needs no dictionary, and a prefix has the units that the whole text has there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TypeVar

Unit = TypeVar("Unit")


def _ranges(codes: Iterable[int]) -> str:
    """The inside of a character class of these code points, in ascending order."""
    spans: list[list[int]] = []
    for code in codes:
        if spans and code == spans[-1][1] + 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in spans)


_MARKS_ON_LETTERS = _ranges(code for code in range(0x300, 0xFE30) if unicodedata.category(chr(code))[0] == "M")
_JOINERS = "\u200c\u200d"  # stand inside words of several scripts
_WITHOUT_SPACES = (
    "\u0e01-\u0e3a\u0e40-\u0e5b\u0e81-\u0edf\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai to Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u302f\u3031-\u3035\u3038-\u303c\u3041-\u30ff\u3105-\u312f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f"  # Han, kana, Burmese letters
    "\U00020000-\U0003ffff"
)
# Their punctuation, which no space follows either.
_THEIR_MARKS = (
    "\u3001-\u3004\u3008-\u3020\u3030\u303d-\u303f\u30fb\ufe30-\ufe4f"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_CHARACTER = f"(?![{_THEIR_MARKS}])[{_WITHOUT_SPACES}][{_MARKS_ON_LETTERS}{_JOINERS}]*"
_LETTERS = f"(?:(?![{_WITHOUT_SPACES}])[\\w{_MARKS_ON_LETTERS}{_JOINERS}])+"

_WORD = re.compile(f"{_CHARACTER}|{_LETTERS}(?:['’]{_LETTERS})*")
_UNIT = re.compile(f"{_CHARACTER}|[{_THEIR_MARKS}]|(?:(?![{_WITHOUT_SPACES}{_THEIR_MARKS}])\\S)+")
_HAN = re.compile("[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_PIECE = re.compile(f"(?:{_UNIT.pattern})\\s*")
_UNSPACED = re.compile(_CHARACTER)
_MARKS = re.compile(r"[.!?…。！？។။\n]+[\"'”’)\]」』]*")
_CLAUSE_MARKS = re.compile(r"[,;:—，、；：،؛]+")
_LETTER = re.compile(r"\w")


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores, with apostrophes inside, and characters where there are no spaces.

    >>> words_of("It's a 90-minute film. 今天very好！")
    ["It's", 'a', '90', 'minute', 'film', '今', '天', 'very', '好']
    """
    return [word for word in _WORD.findall(text) if _LETTER.search(word)]


def units_of(text: str) -> list[str]:
    """What stands between white space, punctuation included, and characters where there are no spaces.

    >>> units_of("A good film. 今天very好！")
    ['A', 'good', 'film.', '今', '天', 'very', '好', '！']
    """
    return _UNIT.findall(text)


def pieces_of(text: str) -> list[str]:
    """The text in pieces, each one of :func:`units_of` with the white space after it; what stands before is left out.

    >>> pieces_of(" a film. 电影")
    ['a ', 'film. ', '电', '影']
    """
    return [match[0] for match in _PIECE.finditer(text)]


def has_unspaced(text: str) -> bool:
    """Whether a part of the text is in a script without spaces between words.

    >>> has_unspaced("a film"), has_unspaced("a 电影"), has_unspaced("영화")
    (False, True, False)
    """
    return _UNSPACED.search(text) is not None


def is_chinese(text: str) -> bool:
    """Whether the text has Chinese characters and nothing of another script without spaces.

    >>> is_chinese("今天 good"), is_chinese("今日は"), is_chinese("a film")
    (True, False, False)
    """
    characters = _UNSPACED.findall(text)
    return bool(characters) and all(_HAN.match(character) for character in characters)


def spaced(text: str) -> str:
    """The text with spaces between the characters of scripts that have none, for what counts words between spaces.

    >>> spaced("今天very好！ a film.")
    '今 天 very 好 ！ a film.'
    """
    return " ".join(units_of(text)) if has_unspaced(text) else text


def keyword_pattern(keyword: str) -> re.Pattern[str]:
    """Finds a keyword, but not inside a longer word; where there are no spaces, words have no ends to look for.

    >>> keyword_pattern("film").search("films") is None, keyword_pattern("伞").search("记得带伞哦") is None
    (True, False)
    """
    letters = f"[^\\W{_WITHOUT_SPACES}]"
    before = "" if _UNSPACED.match(keyword) else f"(?<!{letters})"
    # What a mark follows is another character: in Thai, say, another syllable.
    behind = f"(?![{_MARKS_ON_LETTERS}])" if _UNSPACED.match(keyword[-1:]) else f"(?!{letters})"
    return re.compile(before + re.escape(keyword) + behind)


def sentences_of(text: str) -> list[str]:
    """Sentences with their marks; the last one may be unfinished. What has no letter or digit is none.

    >>> sentences_of('Is it 3.5? "Yes!" he said. And then')
    ['Is it 3.5?', '"Yes!"', 'he said.', 'And then']
    """
    sentences, start = [], 0
    for marks in _MARKS.finditer(text):
        # A full stop inside a word ends nothing (3.5, e.g.). Chinese and Japanese write no space after theirs.
        if marks.end() == len(text) or text[marks.end()].isspace() or not set("。！？។။\n").isdisjoint(marks[0]):
            sentences.append(text[start : marks.end()].strip())
            start = marks.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if _LETTER.search(sentence)]


def clauses_of(text: str) -> list[str]:
    """Sentences, divided at their commas, semicolons, colons and dashes.

    >>> clauses_of("今天下雨，记得带伞。A film, 3,000 people")
    ['今天下雨，', '记得带伞。', 'A film,', '3,000 people']
    """
    clauses = []
    for sentence in sentences_of(text):
        start = 0
        for marks in _CLAUSE_MARKS.finditer(sentence):
            # A comma inside a number divides nothing; Chinese writes no space after its own.
            if sentence[marks.end() : marks.end() + 1].isspace() or not set("，、；：—").isdisjoint(marks[0]):
                clauses.append(sentence[start : marks.end()].strip())
                start = marks.end()
        clauses.append(sentence[start:].strip())
    return [clause for clause in clauses if _LETTER.search(clause)]


def ngrams_of(units: Sequence[Unit], n: int) -> list[tuple[Unit, ...]]:
    """All runs of n neighbours.

    >>> ngrams_of("abc", 2)
    [('a', 'b'), ('b', 'c')]
    """
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
