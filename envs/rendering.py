"""Episodes as text for a terminal and as pictures: the completion with every token coloured by its reward.

Blue is a positive reward, orange a negative one, and the stronger the colour, the larger the reward. People
with the common forms of colour blindness tell these two apart, unlike green and red. The scale is symmetric
around 0 and reaches to the episode's largest |reward|, but at least to ``SMALLEST_SCALE``.

What a language model writes is not trusted here: control characters, escape sequences, text-direction
overrides and line breaks are shown as visible signs and never reach the terminal.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from textgym.envs.fonts import runs, text_font

if TYPE_CHECKING:
    from PIL import ImageDraw

Colour = tuple[int, int, int]

SMALLEST_SCALE = 0.1  # in the unit of the reward: an episode of tiny rewards looks as pale as it is
SMALLEST_WIDTH, SMALLEST_HEIGHT = 400, 120  # pixels: a smaller picture has no room for its status bar

NEUTRAL: Colour = (247, 247, 247)
POSITIVE: Colour = (33, 102, 172)  # blue
NEGATIVE: Colour = (214, 96, 0)  # orange
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (26, 26, 26)
_GREY: Colour = (118, 118, 118)
_PALE: Colour = (221, 221, 221)


@dataclass
class RenderedEpisode:
    """What there is to show of an episode, finished or not.

    :param prompt: the prompt as text
    :param tokens: completion tokens as text, in order: ``"".join(tokens)`` is the completion. A token without
        text of its own (end of sequence, part of a character) is ``""`` and shown as a dot
    :param rewards: reward of each token; None for one that somebody else said in a reply
    :param score: reward-model score of the text so far, None where it is not known yet
    :param kl: sum of the KL estimates so far in nats, None where there is none or it is not known yet
    :param ret: return so far
    :param finish_reason: ``"eos"``, ``"stop"``, ``"length"``, or None while the episode runs
    """

    prompt: str
    tokens: list[str]
    rewards: list[float | None]
    score: float | None
    kl: float | None
    ret: float
    finish_reason: str | None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.rewards):
            raise ValueError(f"{len(self.tokens)} tokens do not fit {len(self.rewards)} rewards")

    @property
    def scale(self) -> float:
        """The |reward| that is shown in full colour."""
        return max([SMALLEST_SCALE, *(abs(reward) for reward in self.rewards if reward is not None)])

    @property
    def written(self) -> int:
        """Tokens that the policy wrote."""
        return sum(reward is not None for reward in self.rewards)


def render_ansi(episode: RenderedEpisode) -> str:
    """Two lines for a terminal: the text, and score, KL, return, length and finish reason.

    The prompt is bold and the tokens stand on backgrounds in 24-bit colour. Where the environment variable
    ``NO_COLOR`` is set (https://no-color.org), there are no escape sequences: a bar ends the prompt, and
    rewards follow their tokens as numbers. What others say in replies is pale, or in braces.

    >>> import os
    >>> os.environ["NO_COLOR"] = "1"
    >>> episode = RenderedEpisode("the film", [" is", " great", ""], [0.0, 0.5, -0.1], 0.5, 1.25, 0.4, "eos")
    >>> print(render_ansi(episode))
    the film| is great[+0.50]·[-0.10]
    score +0.50 · KL 1.25 nats · return +0.40 · 3 tokens · eos
    >>> del os.environ["NO_COLOR"]
    """
    plain = bool(os.environ.get("NO_COLOR"))
    prompt = visible(episode.prompt)
    parts = [f"{prompt}|" if plain else f"\x1b[1m{prompt}\x1b[0m"]
    for said, group in itertools.groupby(
        zip(episode.tokens, episode.rewards, strict=True), key=lambda token: token[1] is None
    ):
        if said:
            text = "".join("".join(_shown(token)) for token, _ in group)
            parts.append(f"{{{text}}}" if plain else f"\x1b[2m{text}\x1b[0m")
            continue
        for token, reward in group:
            parts.append(_coloured(token, reward or 0.0, episode.scale, plain))
    status = [f"{name} {value}" for name, value in _status(episode)[:3]]
    count = episode.written
    status += [f"{count} token{'' if count == 1 else 's'}", visible(episode.finish_reason or "running")]
    return f"{''.join(parts)}\n{' · '.join(status)}"


def _coloured(token: str, reward: float, scale: float, plain: bool) -> str:
    """A token for a terminal."""
    space, body = _shown(token)
    if plain:
        mark = _signed(reward)
        return space + body + ("" if mark == "+0.00" else f"[{mark}]")
    if background := _background(reward, scale):
        codes = f"38;2;{_joined(_foreground(background))};48;2;{_joined(background)}"
        return f"{space}\x1b[{codes}m{body}\x1b[0m"
    return space + body


def render_turn(tokens: Sequence[str], rewards: Sequence[float] | None) -> str:
    """What somebody wrote, for a terminal: line breaks as they are, tokens on the colours of their rewards.

    Without rewards, or where ``NO_COLOR`` is set, there are no colours.

    >>> render_turn(["Two", "\\n", "lines", ""], None)
    'Two\\nlines'

    :param tokens: S of them as text
    :param rewards: ``(S,)`` of them; None where there are none
    """
    plain = rewards is None or bool(os.environ.get("NO_COLOR"))
    given = [0.0] * len(tokens) if rewards is None else rewards
    scale = max([SMALLEST_SCALE, *map(abs, given)])
    parts = []
    for token, reward in zip(tokens, given, strict=True):
        lines = token.split("\n")
        parts.append(
            "\n".join(visible(line) if plain or not line else _coloured(line, reward, scale, False) for line in lines)
        )
    return "".join(parts)


def render_rgb(episode: RenderedEpisode, width: int = 640, height: int = 240) -> npt.NDArray[np.uint8]:
    """The same as a picture, of the same size for every episode, as videos need it.

    Where the text is longer than the picture, the beginning scrolls out of it. The font is DejaVu Sans; what
    it lacks, such as Chinese, is drawn with an installed font that has it. Where there is none, boxes are shown, and a
    warning names fonts to install.

    :param width: in pixels, at least 400
    :param height: in pixels, at least 120
    :return: the picture, of shape (height, width, 3) and dtype uint8
    :raises ValueError: if the size is too small
    :raises ImportError: if Pillow or matplotlib, which has the font, is missing
    """
    if width < SMALLEST_WIDTH or height < SMALLEST_HEIGHT:
        raise ValueError(
            f"a picture of {width} x {height} pixels is too small: "
            f"width must be at least {SMALLEST_WIDTH} and height at least {SMALLEST_HEIGHT}"
        )
    try:
        import matplotlib  # noqa: F401  the font is among its files
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError(
            'render_mode="rgb_array" draws with Pillow and a font of matplotlib: pip install "textgym[extra]"'
        ) from error

    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    status_top = height - _STATUS_HEIGHT
    _draw_text(draw, episode, width, status_top)
    _draw_status(draw, episode, width, status_top)
    return np.array(image, dtype=np.uint8)


# What both have in common: which characters, which colours, which numbers.

_SIGNS = {"\n": "⏎", "\t": "⇥"}
# Joiners are invisible, too, but harmless, and several scripts and emoji are spelt with them.
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    """The text with a visible sign in place of every character that controls how text is shown.

    >>> visible("two\\nlines, \\x1b[31mred, \\u202eturned")
    'two⏎lines, <U+001B>[31mred, <U+202E>turned'
    """
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    # Control, format, surrogate; line and paragraph separator.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS:
        return f"<U+{ord(character):04X}>"
    return character


def _shown(token: str) -> tuple[str, str]:
    """A token as the spaces before it, which are not coloured, and the rest, which is never empty."""
    text = visible(token) or "·"
    body = text.lstrip(" ") or text
    return text[: len(text) - len(body)], body


def _background(reward: float, scale: float) -> Colour | None:
    """The colour of a reward; None where it is too close to 0 to be told from it."""
    strength = min(abs(reward) / scale, 1.0)
    if strength < 0.05:
        return None
    return _between(NEUTRAL, POSITIVE if reward > 0 else NEGATIVE, strength)


def _between(start: Colour, end: Colour, share: float) -> Colour:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(start, end, strict=True))
    return red, green, blue


def _foreground(background: Colour) -> Colour:
    """Ink or paper, whichever has the higher contrast (WCAG 2.1) with the background."""
    luminance = _luminance(background)
    with_ink = (luminance + 0.05) / (_luminance(_INK) + 0.05)
    with_paper = (_luminance(_PAPER) + 0.05) / (luminance + 0.05)
    return _INK if with_ink > with_paper else _PAPER


def _luminance(colour: Colour) -> float:
    """Relative luminance as WCAG 2.1 defines it, from 0 for black to 1 for white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _joined(colour: Colour) -> str:
    return ";".join(map(str, colour))


def _status(episode: RenderedEpisode) -> list[tuple[str, str]]:
    """Names and values of the status line; a dash is what is not known."""
    return [
        ("score", "–" if episode.score is None else _signed(episode.score)),
        ("KL", "–" if episode.kl is None else f"{_rounded(episode.kl)} nats"),
        ("return", _signed(episode.ret)),
        ("tokens", f"{episode.written}"),
        ("finish", visible(episode.finish_reason or "running")),
    ]


def _rounded(number: float) -> str:
    """Two decimals, or three digits of a large number; never "-0.00"."""
    return f"{round(number, 2) + 0.0:.2f}" if abs(number) < 1000 else f"{number:.3g}"


def _signed(number: float) -> str:
    text = _rounded(number)
    return text if text[0] == "-" else f"+{text}"


# The picture.

_MARGIN = 18
_FONT_SIZE, _LINE_HEIGHT = 16, 27
_STATUS_HEIGHT = 56
_LEGEND_WIDTH = 130


class _Piece(NamedTuple):
    """A stretch of text within one line that belongs to one token, or to the prompt (token -1)."""

    text: str
    token: int
    x: float
    width: float


def _draw_text(draw: ImageDraw.ImageDraw, episode: RenderedEpisode, width: int, bottom: int) -> None:
    lines = _lines(episode, width - 2 * _MARGIN)
    room = (bottom - _MARGIN // 2) // _LINE_HEIGHT
    if len(lines) > room:
        lines = lines[-room:]
        draw.text((_MARGIN // 2, 4), "⋮", font=text_font(12), fill=_GREY, anchor="mt")
    for row, line in enumerate(lines):
        middle = _MARGIN // 2 + row * _LINE_HEIGHT + _LINE_HEIGHT // 2
        for piece in line:
            left, right = _MARGIN + piece.x, _MARGIN + piece.x + piece.width
            reward = episode.rewards[piece.token] if piece.token >= 0 else 0.0
            ink = _GREY if reward is None else _INK
            if reward is not None and (background := _background(reward, episode.scale)):
                ink = _foreground(background)
                box = (left - 1, middle - 11, right, middle + 11)
                draw.rounded_rectangle(box, radius=4, fill=background)
            for text, font in runs(piece.text, _FONT_SIZE, bold=piece.token < 0):
                draw.text((left, middle), text, font=font, fill=ink, anchor="lm")
                left += font.getlength(text)


def _lines(episode: RenderedEpisode, width: int) -> list[list[_Piece]]:
    """The prompt and the tokens broken into lines at spaces, or anywhere in a word longer than a line."""
    texts = [(-1, visible(episode.prompt))]
    texts += [(index, "".join(_shown(token))) for index, token in enumerate(episode.tokens)]
    # A word may be made of several tokens, and a token of several words.
    words: list[list[tuple[int, str]]] = [[]]
    for index, text in texts:
        for stretch in re.findall(" +|[^ ]+", text):
            if stretch[0] == " " or (words[-1] and words[-1][-1][1][0] == " "):
                words.append([])
            words[-1].append((index, stretch))
    lines: list[list[_Piece]] = [[]]
    x = 0.0
    for word in words:
        word_width = sum(_text_width(text, index) for index, text in word)
        if x > 0 and x + word_width > width:
            lines.append([])
            x = 0.0
            if word[0][1][0] == " " and not _is_whole_token(episode, word[0][0]):
                continue
        for index, text in word:
            rest = text
            while rest:
                part = _fitting(rest, index, width - x)
                if not part and x > 0:
                    lines.append([])
                    x = 0.0
                    continue
                part = part or rest[0]
                part_width = _text_width(part, index)
                # The spaces between words stay white; a token of nothing but spaces is coloured, too.
                if part[0] != " " or _is_whole_token(episode, index):
                    lines[-1].append(_Piece(part, index, x, part_width))
                x += part_width
                rest = rest[len(part) :]
    return lines


def _fitting(text: str, index: int, room: float) -> str:
    """As much of the beginning of the text as fits."""
    if _text_width(text, index) <= room:
        return text
    length = 0
    while _text_width(text[: length + 1], index) <= room:
        length += 1
    return text[:length]


def _is_whole_token(episode: RenderedEpisode, index: int) -> bool:
    """Whether the token is made of spaces only."""
    return index >= 0 and not episode.tokens[index].strip(" ") and episode.tokens[index] != ""


def _text_width(text: str, index: int) -> float:
    return sum(font.getlength(part) for part, font in runs(text, _FONT_SIZE, bold=index < 0))


def _draw_status(draw: ImageDraw.ImageDraw, episode: RenderedEpisode, width: int, top: int) -> None:
    draw.line((0, top, width, top), fill=_PALE)
    # The legend is left out where the picture is too narrow for both.
    has_legend = width >= 600
    entries = _status(episode)
    label, bold = text_font(11), text_font(14, bold=True)
    room = width - 2 * _MARGIN - (_LEGEND_WIDTH + _MARGIN if has_legend else 0)
    widths = [max(label.getlength(name), bold.getlength(value)) for name, value in entries]
    gap = max((room - sum(widths)) / len(entries), 8.0)
    x = float(_MARGIN)
    for (name, value), column_width in zip(entries, widths, strict=True):
        draw.text((x, top + 18), name, font=label, fill=_GREY, anchor="lm")
        draw.text((x, top + 37), value, font=bold, fill=_INK, anchor="lm")
        x += column_width + gap
    if has_legend:
        _draw_legend(draw, episode.scale, width - _MARGIN - _LEGEND_WIDTH, top)


def _draw_legend(draw: ImageDraw.ImageDraw, scale: float, left: int, top: int) -> None:
    for step in range(_LEGEND_WIDTH):
        share = 2 * step / (_LEGEND_WIDTH - 1) - 1  # from -1 to 1
        colour = _between(NEUTRAL, POSITIVE if share > 0 else NEGATIVE, abs(share))
        draw.line((left + step, top + 31, left + step, top + 42), fill=colour)
    right = left + _LEGEND_WIDTH
    font = text_font(11)
    draw.text((left, top + 18), _signed(-scale), font=font, fill=_GREY, anchor="lm")
    draw.text(((left + right) / 2, top + 18), "reward", font=font, fill=_GREY, anchor="mm")
    draw.text((right, top + 18), _signed(scale), font=font, fill=_GREY, anchor="rm")
