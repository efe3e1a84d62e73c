"""Tokens that continue a text by exactly the characters given.

A tokenizer is made for whole texts. What it says about a piece of one isn't what continues the text: SentencePiece puts
a space in front ("foo" becomes "▁foo"), others put a beginning-of-sequence token, "</s>" is read as a special token,
and Unicode is normalised. Here every proposal is decoded together with the text before it, and only one that gives text
and piece, character by character, is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from textgym.chat.between_turns import ANCHORS
from textgym.vocabulary import Vocabulary


def decode(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    """The text of token ids, as rewards see it."""
    return vocabulary.decode(ids)


def continuation_ids(vocabulary: Vocabulary, ids: Sequence[int], piece: str) -> list[int]:
    """Tokens that append a piece of text to a tokenised one.

    Where they agree with the tokens of the whole text, it is those; else those of the piece by itself, in as few parts
    as the tokenizer allows.

    :param vocabulary: of the language model
    :param ids: the text so far
    :param piece: what to append; no special token is read from it
    :return: ids ``n`` with ``decode(ids + n) == decode(ids) + piece``
    :raises ValueError: naming the character, if the tokenizer can't write it there
    """
    try:
        piece.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"{_shown(piece)} has half of a surrogate pair at position {e.start}: it is not a text") from e
    added: list[int] = []
    waiting = [piece] if piece else []
    while waiting:
        part, so_far = waiting.pop(), [*ids, *added]
        text = decode(vocabulary, so_far)
        fitting = (
            proposal
            for proposal in _proposals(vocabulary, so_far, text, part)
            if decode(vocabulary, [*so_far, *proposal]) == text + part
        )
        proposal = next(fitting, None)
        if proposal is not None:
            added += proposal
        elif len(part) > 1:
            # A special token's name, or characters that it normalises where they meet: in two parts they can stand.
            middle = len(part) // 2
            waiting += [part[middle:], part[:middle]]
        else:
            raise ValueError(
                f"the tokenizer can't write {_shown(piece)} after {_shown(decode(vocabulary, ids)[-30:])}: it has no "
                f"tokens for {part!r} there. Some know certain words only, or write one character as another"
            )
    return added


def _proposals(vocabulary: Vocabulary, ids: list[int], text: str, piece: str) -> Iterator[list[int]]:
    """Tokens that might append the piece, the most natural ones first."""
    whole = _encode(vocabulary, text + piece, add_special_tokens=True)
    closing = vocabulary.turns.closing_ids
    if closing and whole[-len(closing) :] == closing:
        whole = whole[: -len(closing)]
    if whole[: len(ids)] == ids:
        yield whole[len(ids) :]
    yield _encode(vocabulary, piece)
    for anchor in ANCHORS:
        start, both = _encode(vocabulary, anchor), _encode(vocabulary, anchor + piece)
        if both[: len(start)] == start:
            yield both[len(start) :]


def _encode(vocabulary: Vocabulary, text: str, add_special_tokens: bool = False) -> list[int]:
    encoded = vocabulary.tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)
    return list(encoded["input_ids"])


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
