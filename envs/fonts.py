"""Fonts for pictures of texts: DejaVu Sans, and for what it lacks a font that is installed on this machine."""

from __future__ import annotations

import unicodedata
import warnings
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageFont

# Families that cover much of Unicode's letters in one file come first.
_PREFERRED = ("Noto Sans CJK", "Source Han Sans", "WenQuanYi", "Droid Sans Fallback", "Unifont")


def text_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has Latin, Greek, Cyrillic and more."""
    return _font(_dejavu(bold), size)


def runs(text: str, size: int, bold: bool = False) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """A text in parts, each with the font that has its characters.

    A character that no font has, such as Chinese where none is installed, is left to DejaVu Sans, which draws a box.
    Once a process, a warning says so and names what to install.

    :param size: in pixels
    :param bold: whether DejaVu Sans is bold; other fonts are as they are
    """
    own = _dejavu(bold)
    parts = groupby(text, key=lambda character: own if _has(own, character) else _other_font(character) or own)
    return [("".join(characters), _font(path, size)) for path, characters in parts]


@lru_cache(maxsize=2)
def _dejavu(bold: bool) -> str:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", name))


@lru_cache(maxsize=32)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(path, size)


@cache
def _characters(path: str) -> frozenset[int]:
    """The characters that a font has; none where it can't be drawn with, as fonts of coloured bitmaps can't."""
    from matplotlib.ft2font import FT2Font

    try:
        _font(path, 16).getlength("a")
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _has(path: str, character: str) -> bool:
    return ord(character) in _characters(path)


@lru_cache(maxsize=4096)
def _other_font(character: str) -> str | None:
    """The file of an installed font that has a character; None where there is none."""
    found = next((path for path in _installed() if _has(path, character)), None)
    if found is None and unicodedata.category(character)[0] == "L":
        _warn_of_boxes()
    return found


@lru_cache(maxsize=1)
def _installed() -> list[str]:
    """Files of the installed fonts, regular ones of preferred families first."""
    from matplotlib.font_manager import fontManager

    def order(font: tuple[str, str, str, int]) -> tuple[int, bool, bool, str]:
        path, name, style, weight = font
        rank = next((i for i, family in enumerate(_PREFERRED) if name.startswith(family)), len(_PREFERRED))
        return rank, style != "normal", weight != 400, path

    fonts = []
    for entry in fontManager.ttflist:
        if str(entry.name).startswith("Last Resort"):  # has a box for every character
            continue
        weight = entry.weight if isinstance(entry.weight, int) else 400
        fonts.append((str(entry.fname), str(entry.name), str(entry.style), weight))
    return list(dict.fromkeys(path for path, *_ in sorted(fonts, key=order)))


@lru_cache(maxsize=1)
def _warn_of_boxes() -> None:
    """Once a process."""
    warnings.warn(
        "no installed font has some characters of this text, such as Chinese ones: pictures show boxes for them. "
        "Install a font that has them, such as the Debian package fonts-wqy-microhei or fonts-noto-cjk",
        UserWarning,
        stacklevel=2,
    )
