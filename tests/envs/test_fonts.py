"""Pictures have a font for every script that an installed font has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from textgym.envs import fonts
from textgym.envs.rendering import RenderedEpisode, render_rgb

EPISODE = RenderedEpisode("今天", [" good", "天"], [0.5, -0.5], 0.5, None, 0.0, "eos")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What one test found of fonts is nothing to the next."""
    found = (fonts._other_font, fonts._warn_of_boxes)
    for cached in found:
        cached.cache_clear()
    yield
    for cached in found:
        cached.cache_clear()


@pytest.fixture
def chinese_font(tmp_path: Path) -> str:
    """A font that has a full block for 今 and 天, and nothing for other characters."""
    builder = FontBuilder(1000, isTTF=True)
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    block = pen.glyph()
    names = [".notdef", "a", "jin", "tian"]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord("a"): "a", ord("今"): "jin", ord("天"): "tian"})
    builder.setupGlyf(dict.fromkeys(names, block))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "test.ttf")
    return str(tmp_path / "test.ttf")


def test_a_text_is_drawn_with_the_fonts_that_have_its_characters(monkeypatch, chinese_font):
    monkeypatch.setattr(fonts, "_installed", lambda: [chinese_font])
    parts = fonts.runs("good 今天 film", 16)
    assert [text for text, _ in parts] == ["good ", "今天", " film"]
    assert parts[0][1].path != parts[1][1].path == chinese_font
    assert parts[2][1].path == parts[0][1].path


def test_without_such_a_font_boxes_are_drawn_and_one_warning_names_a_package(monkeypatch):
    monkeypatch.setattr(fonts, "_installed", list)
    with pytest.warns(UserWarning, match="fonts-wqy-microhei"):
        first = render_rgb(EPISODE)
    np.testing.assert_array_equal(render_rgb(EPISODE), first)  # a second warning would be an error


def test_a_picture_of_what_the_own_font_has_asks_no_other(monkeypatch):
    def never() -> list[str]:
        raise AssertionError("looked for other fonts")

    monkeypatch.setattr(fonts, "_installed", never)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render_rgb(RenderedEpisode("the film", [" très", " хороший"], [0.1, 0.2], 0.5, None, 0.0, "eos"))


def test_a_font_for_all_characters_that_only_has_boxes_is_not_taken():
    assert not [path for path in fonts._installed() if "LastResort" in path]
