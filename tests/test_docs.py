"""The pages of docs/ and the README: their Python runs, their commands exist, and the site builds from them."""

from __future__ import annotations

import dataclasses
import doctest
import html
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from places import ROOT

import textgym.agents
from textgym.agents import PPO
from textgym.agents.runs import Run, RunConfig
from textgym.rewards import ClassifierReward, LogProbReward, RemoteReward

PAGES = [*sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
# What a page takes for granted: the reader's own reward.
MY_FUNCTION = "def my_function(prompts, completions, **columns): return [len(text) / 100 for text in completions]"
TAKEN_FOR_GRANTED = {"README.md": MY_FUNCTION, "README.zh.md": MY_FUNCTION}
SLOW = {"README.md", "runs.md"}

WITH_EMBEDDED_MODELS = {"README.md", "concepts.md"}  # elsewhere narrow ones of the same vocabulary take their place


class Block(NamedTuple):
    line: int
    language: str
    code: str
    skipped: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start("code")) + 1, match["language"], match["code"], bool(match["skip"]))
        for match in FENCE.finditer(text)
    ]


def pages_with(language: str) -> list[Any]:
    found = [page for page in PAGES if any(block.language == language for block in blocks(page))]
    marks = {page: [pytest.mark.slow] if page.name in SLOW else [] for page in found}
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix(), marks=marks[page]) for page in found]


@pytest.fixture
def one_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings that would take minutes end after one rollout and its update."""
    learn = PPO.learn

    def short(self: PPO, total_timesteps: int, *args: Any, **kwargs: Any) -> PPO:
        budget = self.n_steps * self.n_envs if total_timesteps > 1_000 else total_timesteps
        return learn(self, budget, *args, **kwargs)

    monkeypatch.setattr(PPO, "learn", short)


@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, request, tmp_path, monkeypatch, one_rollout):
    if page.name not in WITH_EMBEDDED_MODELS:
        request.getfixturevalue("narrow_embedded_models")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(TAKEN_FOR_GRANTED.get(page.name, ""), namespace)
    for block in blocks(page):
        if block.language == "python" and not block.skipped:
            # Line numbers in tracebacks are those of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


# Files that the commands of a page take for granted.
MY_FILES = {
    "my_reward.py": """
def reward(prompts, completions, **columns):
    return [min(len(text.split()), 20) / 20 for text in completions]


def mentions(prompts, completions, word, **columns):
    return [float(wanted in text) for wanted, text in zip(word, completions)]


score = reward
""",
    "my.jsonl": "\n".join(json.dumps({"prompt": f"film number {i} is"}) for i in range(40)),
    "test.csv": "question\n" + "\n".join(f"movie number {i} is" for i in range(4)),
    "train.csv": "question\n" + "\n".join(f"film number {i} is" for i in range(40)),
    "scores.jsonl": "\n".join(
        json.dumps({"prompt": f"film number {i} is", "completion": f" {word} {i}", "score": score})
        for i in range(12)
        for word, score in (("good", 0.9), ("bad", -0.9))
    ),
}
MY_FILES["prompts.jsonl"], MY_FILES["rows.jsonl"] = MY_FILES["my.jsonl"], MY_FILES["scores.jsonl"]
SHORT = {"rows": 8, "max_new_tokens": 6, "eval_prompts": 4, "samples": 2, "eval_every": 48, "checkpoint_every": 48}


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end after a rollout or two of few short texts."""
    begin = Run.__init__

    def short(self: Run, algorithm: str, config: RunConfig, *args: Any, **kwargs: Any) -> None:
        timesteps = 96 if kwargs.get("resume") else 48
        begin(self, algorithm, dataclasses.replace(config, **SHORT, timesteps=timesteps), *args, **kwargs)

    monkeypatch.setattr(Run, "__init__", short)


def commands_of(block: Block) -> list[list[str]]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", pages_with("bash"))
@pytest.mark.usefixtures("narrow_embedded_models", "runs_without_pictures")
def test_the_commands_of_a_page_run_as_they_stand(page, tmp_path, monkeypatch, short_runs):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from textgym.agents.cli.main import app

    monkeypatch.chdir(tmp_path)
    for name, text in MY_FILES.items():
        (tmp_path / name).write_text(text)
    for block in blocks(page):
        if block.language == "yaml":
            (tmp_path / "my.yaml").write_text(block.code)
    for block in blocks(page):
        if block.language != "bash" or block.skipped:
            continue
        for words in commands_of(block):
            if words[:2] == ["pip", "install"]:
                continue
            assert words[0] == "textgym", f"{page.name}, line {block.line}: say why {words[0]} is not run"
            done = CliRunner().invoke(app, words[1:], env={"COLUMNS": "200"})
            assert done.exit_code == 0, f"{page.name}: {shlex.join(words)}\n{done.output[-2000:]}"


@pytest.mark.parametrize("page", pages_with("bash"))
def test_the_commands_of_a_page_have_the_options_it_names(page):
    typer = pytest.importorskip("typer")
    from textgym.agents.cli.main import app

    commands = typer.main.get_command(app).commands
    for block in blocks(page):
        for words in commands_of(block) if block.language == "bash" else []:
            if words[0] != "textgym":
                continue
            known = {"--help"} | {option for parameter in commands[words[1]].params for option in parameter.opts}
            known |= {option for parameter in commands[words[1]].params for option in parameter.secondary_opts}
            assert {word for word in words if word.startswith("--")} <= known, f"{page.name}: {shlex.join(words)}"


def test_every_page_of_the_docs_is_in_the_navigation():
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted(pages)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as ``make docs`` builds it; a warning is an error there."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


NEEDS_MKDOCS = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs")


@NEEDS_MKDOCS
@pytest.mark.slow
def test_the_site_builds_and_takes_nothing_from_other_hosts(site):
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=\"?https?:|<link[^>]*rel=\"?(?:stylesheet|preconnect)\"?[^>]*https?:"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        assert not loads.search(page.read_text(encoding="utf-8")), page.name


@NEEDS_MKDOCS
@pytest.mark.slow
def test_the_reference_has_the_docstrings_of_all_three_folders_and_no_sphinx_roles(site):
    for page, name in {"envs": "TextGenEnv", "agents": "LanguageModelPolicy", "kl": "kl_estimate"}.items():
        text = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
        assert f'id="textgym.{page}.{name}"' in text
        assert ":class:" not in text
        assert ":param" not in text


@NEEDS_MKDOCS
@pytest.mark.slow
def test_names_in_docstrings_are_links_also_without_their_path_and_where_they_are_inherited(site):
    text = (site / "api" / "agents.html").read_text(encoding="utf-8")
    assert re.search(r'href="?#textgym.agents.TextOnPolicyAlgorithm"?><code>TextOnPolicyAlgorithm</code></a>', text)
    text = (site / "api" / "envs.html").read_text(encoding="utf-8")
    assert re.search(r'href="?#textgym.envs.TextGenVectorEnv.state_dict"?><code>\w*\.?state_dict</code></a>', text)


@NEEDS_MKDOCS
@pytest.mark.slow
def test_an_agents_page_lists_the_arguments_that_it_hands_on(site):
    for page, cls in {"grpo": "GRPO", "nlpo": "NLPO", "soft_q_learning": "SoftQLearning", "trpo": "TRPO"}.items():
        text = re.sub(r"<[^>]+>", "", (site / "agents" / f"{page}.html").read_text(encoding="utf-8"))
        for name in inspect.signature(getattr(textgym.agents, cls)).parameters:
            assert re.search(rf"\b{name}\b", text), name
        assert "**arguments" not in text


@NEEDS_MKDOCS
@pytest.mark.slow
def test_a_rewards_page_lists_the_arguments_that_it_hands_on_and_says_what_they_mean(site):
    source = (site / "api" / "rewards.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", source))
    assert "**arguments" not in text
    for reward in (RemoteReward, ClassifierReward, LogProbReward):
        signature = re.search(rf"\b{reward.__name__}\(\n(.*?)\n\)\n", text, re.DOTALL)[1]
        for name, parameter in inspect.signature(reward).parameters.items():
            assert re.search(rf"\b{name}: ", signature), name
            default = parameter.default
            if isinstance(default, int | float) and default < 1000:
                assert re.search(rf"\b{name}: .* = {default}\b", signature), name
    for taker in ("json_client.JsonClient", "rewards.models.text_forward.TextForward"):
        assert f'id="textgym.{taker}"' in source
    assert 'href="rewards.html#textgym.json_client.JsonClient"' in (site / "api" / "replies.html").read_text("utf-8")


@pytest.mark.skipif(importlib.util.find_spec("griffe") is None, reason="needs griffe, which comes with mkdocstrings")
def test_the_examples_of_the_griffe_extension_hold():
    path = ROOT / "docs" / "sphinx_roles.py"
    specification = importlib.util.spec_from_file_location("sphinx_roles", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
