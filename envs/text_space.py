"""The space of Unicode texts up to some length."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence, Set
from typing import Any

import numpy as np
from gymnasium import spaces

LONGEST_SAMPLE = 16  # characters: a word or two, so that a random agent's text takes several actions
SAMPLED = "abcdefghijklmnopqrstuvwxyz     ,.'"


class UnicodeText(spaces.Text):
    """A ``spaces.Text`` that contains every text of at most ``max_length`` characters, in any script.

    ``spaces.Text`` keeps a table of its characters; for all of Unicode that would be a million entries a space. Here
    the index of a character is its code point, so flattening and batching work as they do for other texts. Samples are
    short and of lower-case letters, spaces and a few marks. ::

        >>> space = UnicodeText(40)
        >>> "这部电影 is great 🙂" in space, "x" * 41 in space, "\\ud800" in space
        (True, False, False)
        >>> len(space.sample()) <= 16
        True

    :param max_length: most characters
    :param min_length: fewest characters
    :param seed: of the samples
    """

    def __init__(self, max_length: int, min_length: int = 0, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length, min_length=min_length, charset=SAMPLED, seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A random short text.

        :param mask: ``(length, None)`` fixes the number of characters
        :param probability: the same
        :raises ValueError: for a mask or probabilities of characters: a text may have any
        """
        length = None
        for name, value in (("mask", mask), ("probability", probability)):
            if value is not None:
                length, characters = value
                if characters is not None:
                    raise ValueError(f"{name}[1] must be None: a mask over all characters of Unicode is not available")
        if length is None:
            low, high = self.min_length, min(self.max_length, max(self.min_length, LONGEST_SAMPLE))
            length = int(self.np_random.integers(low, high + 1))
        elif not self.min_length <= length <= self.max_length:
            raise ValueError(f"a length of {length} is not between {self.min_length} and {self.max_length}")
        return "".join(self.np_random.choice(list(SAMPLED), size=length))

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a text of a length that fits; half a surrogate pair is not a text."""
        if not isinstance(x, str) or not self.min_length <= len(x) <= self.max_length:
            return False
        return not any("\ud800" <= character <= "\udfff" for character in x)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, UnicodeText)
            and (self.min_length, self.max_length) == (other.min_length, other.max_length)
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"UnicodeText({self.max_length}, min_length={self.min_length})"

    # What Gymnasium flattens texts by.

    @property
    def character_set(self) -> Any:
        """All characters."""
        return _ALL

    @property
    def character_list(self) -> Any:
        """All characters, by code point."""
        return _ALL

    @property
    def characters(self) -> str:
        """The characters that samples consist of."""
        return super().characters

    def character_index(self, char: str) -> np.int32:
        """The code point of a character."""
        return np.int32(ord(char))


class _AllCharacters(Set[str], Sequence[str]):
    """Unicode, without a table of it."""

    def __contains__(self, character: object) -> bool:
        return isinstance(character, str) and len(character) == 1

    def __len__(self) -> int:
        return sys.maxunicode + 1

    def __iter__(self) -> Iterator[str]:
        return map(chr, range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return chr(index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AllCharacters)

    def __hash__(self) -> int:
        return hash(_AllCharacters)


_ALL = _AllCharacters()
