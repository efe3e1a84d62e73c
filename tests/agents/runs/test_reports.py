"""Evaluations side by side and coloured completions: what is shown is what was measured."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from textgym.agents.runs.reports import (
    FIGURES,
    coloured_completion,
    comparison_json,
    comparison_markdown,
    comparison_table,
    draw_comparison,
)
from textgym.envs.rendering import RenderedEpisode, render_ansi
from textgym.evaluation import Evaluation, ScoredCompletion


def evaluation(seed: int, shift: float = 0.0, size: int = 30) -> Evaluation:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 12, size=size)
    return Evaluation(
        prompts=[f"prompt {i}" for i in range(size)],
        completions=[" ".join(rng.choice(list("abcdefgh"), n)) for n in lengths],
        scores=rng.normal(shift, 0.3, size),
        kl=rng.normal(3 + shift, 1, size),
        ref_log_prob=-3.0 * lengths + rng.normal(size=size),
        lengths=lengths,
        finish_reasons=["eos" if n < 9 else "length" for n in lengths],
        settings={"seed": seed},
    )


@pytest.fixture
def evaluations() -> dict[str, Evaluation]:
    return {"before": evaluation(0), "runs/a|b [red]$x$": evaluation(1, 0.5)}


def shown(renderable: object, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_the_table_has_every_figure_of_every_evaluation_with_its_interval(evaluations):
    text = shown(comparison_table(evaluations))
    assert "runs/a|b [red]$x$" in text  # a name is not markup
    assert "30 completions of 30 different prompts; brackets are 95% confidence intervals" in text
    summaries = [result.summary() for result in evaluations.values()]
    for key, figure in FIGURES.items():
        line = next(line for line in text.splitlines() if line.startswith(f"│ {figure.label} "))
        for summary in summaries:
            value, low, high = (f"{number:{figure.form}}" for number in summary[key])
            assert f"{value} [{low},\xa0{high}]" in line


def test_a_narrow_terminal_keeps_each_interval_in_one_piece(evaluations):
    assert len(re.findall(r"\[[^\s,\]]+,\xa0[^\s\]]+\]", shown(comparison_table(evaluations), width=80))) == 18


def test_the_markdown_table_has_the_same_cells(evaluations):
    lines = comparison_markdown(evaluations).splitlines()
    assert lines[0] == r"| | before | runs/a\|b [red]$x$ |"
    assert lines[1] == "|---|---:|---:|"
    assert len(lines) == 2 + len(FIGURES) + 2
    score = evaluations["before"].summary()["score"]
    assert f"| {score.value:+.3f} [{score.low:+.3f},\xa0{score.high:+.3f}] |" in lines[2]


def test_the_json_has_intervals_and_gives_each_evaluation_back(evaluations):
    data = json.loads(comparison_json(evaluations, 0.9))
    assert data["confidence"] == 0.9
    for name, result in evaluations.items():
        entry = data["evaluations"][name]
        assert entry["intervals"]["kl"] == result.summary(0.9)["kl"]._asdict()
        assert Evaluation.from_dict(entry).to_json() == result.to_json()


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_picture_grows_with_the_number_of_evaluations(tmp_path, count):
    names = [f"runs/$a_{i}/a rather long name of a checkpoint" for i in range(count)]
    path = tmp_path / "new" / "comparison.png"
    draw_comparison({name: evaluation(i, 0.1 * i, 12) for i, name in enumerate(names)}, path)
    with Image.open(path) as picture:
        assert picture.width == 1560
        assert picture.height > 600 + 100 * (count > 2)
        colours = picture.convert("RGB").getcolors(2**20)
    blue = (0, 114, 178)
    assert (blue in [colour for _, colour in colours]) == (count <= 7)  # the first colour of the palette


def test_evaluations_of_different_sizes_can_be_compared(evaluations):
    evaluations["small"] = evaluation(3, size=5)
    assert "Different numbers of completions" in comparison_markdown(evaluations)


def test_nothing_to_compare_is_an_error(tmp_path):
    for make in (comparison_table, comparison_markdown, comparison_json):
        with pytest.raises(ValueError, match="evaluations is empty"):
            make({})
    with pytest.raises(ValueError, match="evaluations is empty"):
        draw_comparison({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.xyz' must end in one of .*\.png, .*\.svg"):
        draw_comparison({"a": evaluation(0)}, tmp_path / "a.xyz")


SCORED = ScoredCompletion(
    prompt="the film",
    token_ids=[5, 6, 7, 2],
    tokens=[" is", " [bold]great", "\x1b[31m", ""],
    rewards=np.array([0.0, 0.5, -0.25, 0.1]),
    kl=np.array([0.5, 0.25, 0.25, 0.0]),
    prompt_score=0.1,
    score=0.45,
    finish_reason="eos",
)


def test_tokens_stand_on_the_colours_that_the_environment_gives_their_rewards(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = coloured_completion(SCORED)
    assert (
        text.plain == "the film is [bold]great<U+001B>[31m·\nscore +0.45 · KL 1.00 nats · return +0.35 · 4 tokens · eos"
    )
    episode = RenderedEpisode("the film", SCORED.tokens, [0.0, 0.5, -0.25, 0.1], 0.45, 1.0, 0.35, "eos")
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
    console.print(text)
    backgrounds = re.findall(r"48;2;[\d;]+(?=m)", console.file.getvalue())
    assert backgrounds == re.findall(r"48;2;[\d;]+(?=m)", render_ansi(episode))
    assert len(backgrounds) == 3
    assert backgrounds[0] == "48;2;33;102;172"  # the largest reward is full blue


def test_without_colours_rewards_are_numbers_and_without_a_reference_kl_is_a_dash(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    without = ScoredCompletion(**{**vars(SCORED), "kl": None})
    lines = coloured_completion(without).plain.splitlines()
    assert lines[0] == "the film| is [bold]great[+0.50]<U+001B>[31m[-0.25]·[+0.10]"
    assert "KL – ·" in lines[1]
