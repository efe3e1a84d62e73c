"""Episodes as coloured text and as pictures."""

from __future__ import annotations

import builtins
import re
import unicodedata

import numpy as np
import pytest

from textgym.envs.rendering import RenderedEpisode, render_ansi, render_rgb

ESCAPE = re.compile(r"\x1b\[([0-9;]*)m")
BACKGROUND = re.compile(r"48;2;(\d+);(\d+);(\d+)")
CONTROLS = [chr(code) for code in (*range(32), *range(0x7F, 0xA0))]
DIRECTION_OVERRIDES = [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]
LINE_BREAKERS = ["\u2028", "\u2029"]
LONE_SURROGATE = ["\ud83d"]


def episode(tokens=(" is", " great", "."), rewards=(0.0, 0.5, -0.25), **changes) -> RenderedEpisode:
    fields = {"prompt": "the film", "score": 0.5, "kl": 1.25, "ret": 0.25, "finish_reason": "eos", **changes}
    return RenderedEpisode(tokens=list(tokens), rewards=list(rewards), **fields)


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def no_colours(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")


def backgrounds(rendering: str) -> list[tuple[int, ...]]:
    """The (red, green, blue) background of every coloured token."""
    return [tuple(map(int, found)) for found in BACKGROUND.findall(rendering)]


def has_colour(picture: np.ndarray, colour: str) -> bool:
    """Whether some of a picture is clearly blue or clearly orange."""
    red, blue = picture[..., 0].astype(int), picture[..., 2].astype(int)
    return bool(((blue - red if colour == "blue" else red - blue) > 60).any())


def luminance(colour) -> float:
    """Relative luminance, close to WCAG 2.1's: a plain gamma of 2.2."""
    return float(np.dot((np.array(colour) / 255) ** 2.2, [0.2126, 0.7152, 0.0722]))


# The text.


@pytest.mark.usefixtures("colours")
def test_the_text_without_its_colours_is_the_prompt_the_completion_and_the_status():
    text, status = ESCAPE.sub("", render_ansi(episode())).split("\n")
    assert text == "the film is great."
    assert status == "score +0.50 · KL 1.25 nats · return +0.25 · 3 tokens · eos"


@pytest.mark.usefixtures("colours")
def test_a_positive_reward_is_blue_a_negative_one_orange_and_zero_has_no_colour():
    (positive, negative) = backgrounds(render_ansi(episode()))
    assert positive[2] > positive[0] + 60  # more blue than red
    assert negative[0] > negative[2] + 60


@pytest.mark.usefixtures("colours")
def test_larger_rewards_have_stronger_colours_on_a_scale_symmetric_around_zero():
    strengths = [max(c) - min(c) for c in backgrounds(render_ansi(episode("abc", [0.2, 0.6, 1.0])))]
    assert strengths == sorted(set(strengths))
    of_half = backgrounds(render_ansi(episode("ab", [0.5, -1.0])))[0]
    also_of_half = backgrounds(render_ansi(episode("ab", [5.0, 10.0])))[0]
    assert of_half == also_of_half


@pytest.mark.usefixtures("colours")
def test_an_episode_of_tiny_rewards_is_pale():
    assert backgrounds(render_ansi(episode("ab", [0.001, -0.002]))) == []


@pytest.mark.usefixtures("colours")
def test_text_is_legible_on_every_colour():
    rewards = [reward / 50 for reward in range(-50, 51)]
    for colours in ESCAPE.findall(render_ansi(episode(["x"] * 101, rewards))):
        if "48;2;" in colours:
            _, _, *foreground, _, _, red, green, blue = map(int, colours.split(";"))
            ink, paper = sorted(map(luminance, [foreground, (red, green, blue)]))
            assert (paper + 0.05) / (ink + 0.05) > 4  # WCAG 2.1 asks for 3 for large text and 4.5 for small


@pytest.mark.usefixtures("colours")
def test_every_colour_is_switched_off_before_the_line_ends():
    text = render_ansi(episode()).split("\n")[0]
    codes = ESCAPE.findall(text)
    assert codes[-1] == "0"
    assert codes.count("0") * 2 == len(codes)


def test_no_color_leaves_no_escape_sequence_and_marks_the_rewards(no_colours):
    assert render_ansi(episode()).split("\n")[0] == "the film| is great[+0.50].[-0.25]"


@pytest.mark.usefixtures("colours")
def test_an_empty_no_color_is_as_if_it_were_not_set(monkeypatch):
    coloured = render_ansi(episode())
    monkeypatch.setenv("NO_COLOR", "")
    assert render_ansi(episode()) == coloured != ESCAPE.sub("", coloured)


@pytest.mark.parametrize("character", CONTROLS + DIRECTION_OVERRIDES + LINE_BREAKERS + LONE_SURROGATE)
@pytest.mark.parametrize("setting", ["colours", "no_colours"])
def test_no_control_character_of_a_text_reaches_the_terminal(character, setting, request):
    request.getfixturevalue(setting)
    hostile = f"a{character}b"
    rendering = render_ansi(episode([hostile, character], [1.0, 0.0], prompt=hostile, finish_reason=hostile))
    rendering.encode()  # a lone surrogate would fail here
    text = ESCAPE.sub("", rendering)
    assert text.count("\n") == 1  # our own, before the status
    categories = {unicodedata.category(c) for c in text.replace("\n", "")}
    assert not categories & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert "ab" not in text  # something visible stands between the two


def test_line_breaks_and_tabs_have_signs_and_joiners_are_kept(no_colours):
    text = render_ansi(episode(["\n\t", "👩\u200d🚀"], [0.0, 0.0])).split("\n")[0]
    assert text == "the film|⏎⇥👩\u200d🚀"


def test_a_token_without_text_shows_its_reward_at_a_dot(no_colours):
    assert render_ansi(episode(["", ""], [0.0, 1.0])).split("\n")[0] == "the film|··[+1.00]"


def test_what_is_not_known_is_a_dash(no_colours):
    status = render_ansi(episode([" is"], [0.0], score=None, kl=None, finish_reason=None)).split("\n")[1]
    assert status == "score – · KL – · return +0.25 · 1 token · running"


def test_numbers_keep_their_width_and_zero_has_no_minus(no_colours):
    status = render_ansi(episode(score=-0.001, kl=-1e-7, ret=-123456.0)).split("\n")[1]
    assert status.startswith("score +0.00 · KL 0.00 nats · return -1.23e+05 · ")


def test_an_episode_before_its_first_token_can_be_shown(no_colours):
    assert render_ansi(episode([], [], ret=0.0)).startswith("the film|\n")
    assert render_rgb(episode([], [], ret=0.0)).shape == (240, 640, 3)


def test_every_token_needs_a_reward():
    with pytest.raises(ValueError, match="2 tokens do not fit 1 rewards"):
        episode(["a", "b"], [0.0])


# The picture.


@pytest.mark.parametrize("size", [(640, 240), (400, 120), (1280, 720)])
def test_a_picture_has_the_size_asked_for_whatever_the_text(size):
    width, height = size
    for count in (0, 1, 500):
        picture = render_rgb(episode([" token"] * count, [0.1] * count), width, height)
        assert picture.shape == (height, width, 3)
        assert picture.dtype == np.uint8
        assert picture.flags.writeable


@pytest.mark.parametrize(("reward", "seen", "unseen"), [(1.0, "blue", "orange"), (-1.0, "orange", "blue")])
def test_a_picture_has_the_colour_of_its_rewards(reward, seen, unseen):
    text = render_rgb(episode([" token"], [reward]))[:150]  # above the status bar with its legend
    assert has_colour(text, seen)
    assert not has_colour(text, unseen)


def test_the_newest_tokens_stay_in_the_picture():
    old, new = [" old"] * 400, [" new"] * 3
    text = render_rgb(episode(old + new, [-1.0] * 400 + [1.0] * 3))[:180]
    assert has_colour(text, "blue")
    pictures = [render_rgb(episode(["x", *old], [reward] + [0.0] * 400))[:180] for reward in (-1.0, 1.0)]
    assert np.array_equal(*pictures)  # the first token has scrolled out


def test_a_picture_shows_the_status():
    same = render_rgb(episode())
    assert np.array_equal(same, render_rgb(episode()))
    for change in ({"score": -0.5}, {"kl": None}, {"ret": 9.0}, {"finish_reason": None}):
        assert not np.array_equal(same, render_rgb(episode(**change)))


@pytest.mark.filterwarnings("ignore:no installed font has:UserWarning")
@pytest.mark.parametrize("token", ["w" * 500, "电影" * 100, " " * 300, "\n" * 200, "a b " * 100])
def test_no_token_runs_over_the_margin_of_a_picture(token):
    text = render_rgb(episode([token], [1.0]))[:180]
    assert (text[:, -10:] == 255).all()
    assert has_colour(text, "blue")


def test_a_word_of_several_tokens_moves_to_the_next_line_in_one_piece():
    start = ["word "] * 12  # leaves room for "un" on the first line, and not for the whole word
    first_line, second_line = slice(0, 34), slice(36, 60)
    before = render_rgb(episode([*start], [0.0] * 12, prompt=""))
    after = render_rgb(episode([*start, "un", "believ", "ably"], [0.0] * 15, prompt=""))
    assert np.array_equal(before[first_line], after[first_line])
    assert (before[second_line] == 255).all()
    assert (after[second_line] < 128).any()


@pytest.mark.parametrize("size", [(399, 240), (640, 119), (0, 0)])
def test_a_size_without_room_for_the_status_is_refused(size):
    with pytest.raises(ValueError, match="too small: width must be at least 400 and height at least 120"):
        render_rgb(episode(), *size)


@pytest.mark.parametrize("missing", ["PIL", "matplotlib"])
def test_without_the_drawing_packages_the_error_names_the_extra(missing, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"textgym\[extra\]"):
        render_rgb(episode())
