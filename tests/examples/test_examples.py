"""The example scripts run from start to end and leave behind what they say, on a small budget of tokens."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from places import EXAMPLES
from transformers import AutoModelForCausalLM, AutoTokenizer

from textgym.agents.runs.agents import AGENTS

pytestmark = pytest.mark.usefixtures("runs_without_pictures")


def run(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.slow
def test_quickstart_leaves_a_table_a_plot_and_an_ordinary_checkpoint(
    tmp_path: Path,
    narrow_embedded_models: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("quickstart.py", "--timesteps", "1536", "--output", str(tmp_path), monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    for word in ("before", "after", "KL to the reference", "distinct-2", "word judge", "learning_curve.png"):
        assert word in shown
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["before"]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert results["after"]["kl"] > 0.01  # it has moved
    with Image.open(tmp_path / "learning_curve.png") as picture:
        assert picture.size[0] > 600
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) <= model.config.vocab_size


def test_custom_reward_trains_on_a_function(
    narrow_embedded_models: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("custom_reward.py", "--timesteps", "1536", monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    for word in ("before:", "after:", "reward on held-out prompts"):
        assert word in shown


@pytest.mark.parametrize("algorithm", AGENTS)
def test_every_agent_has_a_script_of_some_25_lines_that_trains_it_and_shows_what_it_learned(
    algorithm: str,
    narrow_embedded_models: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = f"train_{algorithm}.py"
    if algorithm == "trpo":
        pytest.importorskip("sb3_contrib")
    run(script, "256", monkeypatch=monkeypatch)
    assert capsys.readouterr().out.strip()
    lines = (EXAMPLES / script).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert f"{AGENTS[algorithm].__name__}(" in "".join(lines)


@pytest.mark.parametrize("algorithm", AGENTS)
def test_the_shell_trains_every_agent(algorithm: str, tmp_path: Path, narrow_embedded_models: None) -> None:
    typer = pytest.importorskip("typer.testing")
    from textgym.agents.cli.main import app

    options = ["--timesteps", "64", "--rows", "4", "--max-new-tokens", "8", "--eval-prompts", "2", "--no-progress"]
    done = typer.CliRunner().invoke(app, ["train", algorithm, *options, "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    agent = json.loads((tmp_path / "run" / "model" / "agent.json").read_text(encoding="utf-8"))
    assert agent["agent"] == AGENTS[algorithm].__name__
    assert f"algorithm: {algorithm}" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
