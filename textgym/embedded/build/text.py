"""Text tidying: one spelling of punctuation, lower case, plain ASCII.

All text that the embedded models learn from passes through ``tidy``, and so should any text that is compared
with theirs: a vocabulary of 4,096 pieces holds mostly whole words only if "Film", "film" and "FILM" are one
word.
"""

import html
import re
import unicodedata

_QUOTES = str.maketrans({"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})
_ABBREVIATION = re.compile(r"\b(?:[a-z]\.){2,}")
_WORD = re.compile(r"[a-z0-9]+(?:['&-][a-z0-9]+)*|\$|\.\.\.|[^\sa-z0-9]")


def tidy(text: str) -> str:
    """Return ``text`` lower-cased and in ASCII, without quotation marks or brackets, punctuation attached.

    :param text: one sentence or snippet, from any source
    :return: one line that ends in a full stop, question or exclamation mark; may be empty
    """
    text = html.unescape(html.unescape(text)).translate(_QUOTES)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    text = text.replace("''", " ").replace('"', " ")
    text = re.sub(r"\s{3,}", " - ", text.strip())  # the snippets' dashes were replaced by spaces
    text = re.sub(r"[(){}\[\]<>*_|~^\\]", " ", text)
    text = re.sub(r"-{2,}", " - ", text)
    text = re.sub(r"(?<=\w)\s+'(?=s\b|t\b|re\b|ve\b|ll\b|d\b|m\b)", "'", text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)  # quotation marks; an apostrophe stands inside a word
    text = re.sub(r"(\w)\s*/\s*(\w)", r"\1/\2", text)
    text = re.sub(r"\s*\.(?:\s*\.)+", "...", text)
    text = re.sub(r"\s+([.,;:!?%])", r"\1", text)
    text = re.sub(r"([,;:!?])(?=[a-z])", r"\1 ", text)
    text = re.sub(r"\.\.\.(?=\w)", "... ", text)
    if not _ABBREVIATION.search(text):
        text = re.sub(r"([a-z]{3,}\.)(?=[a-z]{2,})", r"\1 ", text)
    text = re.sub(r"([!?,;:])\1+", r"\1", text)
    text = re.sub(r"^[\s.,;:!?-]+|[\s,;:-]+$", "", text)
    text = re.sub(r"\s+", " ", text)
    if text and text[-1] not in ".!?":
        text += "."
    return text


def words(text: str) -> list[str]:
    """Split a tidied text into words and punctuation marks ("it's" and "feel-good" are one word each)."""
    return _WORD.findall(text)
