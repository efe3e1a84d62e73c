"""Texts that can be written down: every encoding refuses lone surrogates."""

from __future__ import annotations

import re

_SURROGATES = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """The text with lone surrogates, which no encoding can write, as U+FFFD.

    >>> well_formed("a\\ud800b")
    'a\ufffdb'
    """
    return _SURROGATES.sub("\ufffd", text)
