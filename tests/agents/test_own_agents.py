"""Agents of one's own in runs: by class, by file, from the command line; the example of CONTRIBUTING is one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import ROOT
from typer.testing import CliRunner

from textgym.agents import PPO
from textgym.agents.cli.main import app
from textgym.agents.runs import Run, RunConfig
from textgym.agents.runs.agents import agent_class, agent_name
from textgym.agents.runs.training import run_config

pytestmark = pytest.mark.usefixtures("narrow_embedded_models_throughout", "runs_without_pictures")

SMALL: dict[str, Any] = {
    "timesteps": 16,
    "rows": 4,
    "max_new_tokens": 2,
    "eval_prompts": 2,
    "tensorboard": False,
    "kl_coef": 0.0,
    "reward": "length(8)",
}


@pytest.fixture(scope="module")
def awr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent that CONTRIBUTING shows, in a file as a reader would have it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "class AWR" in block]
    path = tmp_path_factory.mktemp("own") / "awr.py"
    path.write_text(block.partition("\nvec = ")[0], encoding="utf-8")
    return path


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def run(awr: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of it, from its class."""
    config = RunConfig(**SMALL, agent_options=["temperature=0.5"])
    run = Run(agent_class(f"{awr}:AWR"), config, tmp_path_factory.mktemp("runs") / "awr")
    assert run.train()
    return run


def test_a_class_of_ones_own_trains_with_its_own_arguments(run, awr):
    assert type(run.agent).__name__ == "AWR"
    assert (run.agent.temperature, run.agent.largest_weight) == (0.5, 20.0)
    algorithm, config = run_config(run.folder.path)
    assert algorithm == f"{awr}:AWR"
    assert config.agent_arguments() == {"temperature": 0.5}
    assert json.loads((run.folder.model / "agent.json").read_text())["agent"] == "AWR"


def test_its_run_goes_on_and_its_model_is_opened(run):
    resumed = Run.resumed(run.folder.path, timesteps=24)
    assert resumed.agent.temperature == 0.5
    assert resumed.train()
    assert resumed.agent.num_timesteps >= 24
    result = invoke("generate", str(run.folder.path), "--prompt", "the film is", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output.splitlines()[-1])["prompt"] == "the film is"


def test_the_command_line_trains_it_from_its_file(awr, tmp_path, monkeypatch):
    monkeypatch.chdir(awr.parent)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "tensorboard"]
    output = tmp_path / "run"
    command = ["train", "awr.py:AWR", *options, "--no-tensorboard", "--no-progress", "--output", str(output)]
    result = invoke(*command, "--set", "temperature=0.25", "--set", "largest_weight=1e1")
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert written["algorithm"] == f"{awr}:AWR"  # found from any folder
    arguments = json.loads((output / "model" / "agent.json").read_text())["arguments"]
    assert (arguments["temperature"], arguments["largest_weight"]) == (0.25, 10.0)


def test_a_run_of_somebody_elses_agent_asks_before_its_code_runs(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # another user, with another key
    result = invoke("train", "--resume", str(run.folder.path), "--timesteps", "32")
    assert result.exit_code == 2
    assert "--trust-code" in result.output


@pytest.mark.parametrize(
    ("algorithm", "kind", "message"),
    [
        ("pppo", ValueError, r"algorithm='pppo' must be one of ppo, .*; did you mean 'ppo'\?"),
        ("nowhere.py:AWR", ValueError, "algorithm='nowhere.py:AWR': there is no file nowhere.py"),
        ("json:AWR", ValueError, "algorithm='json:AWR': json has nothing named 'AWR'"),
        ("json:dumps", TypeError, "must be the name of an agent or a class that derives from TextOnPolicyAlgorithm"),
        (int, TypeError, "algorithm=<class 'int'> must be the name of an agent or a class"),
        (3, TypeError, "algorithm=3 must be the name of an agent or a class"),
    ],
)
def test_what_is_no_agent_is_an_error(algorithm, kind, message):
    with pytest.raises(kind, match=message):
        agent_class(algorithm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["temprature=0.5"], r"agent_options has 'temprature', which .*AWR doesn't take; did you mean 'temperature'\?"),
        (["learning_rate=0.5"], "agent_options has 'learning_rate', which is an option of the run"),
        (["seed=1"], "agent_options has 'seed', which is an option of the run"),
        (["temperature"], "agent_options='temperature' must be name=value, such as temperature=0.5"),
        (["temperature=1", "temperature=2"], "agent_options='temperature=2' names one twice"),
    ],
)
def test_arguments_that_the_constructor_does_not_take_are_errors(options, message, awr, tmp_path):
    with pytest.raises(ValueError, match=message):
        Run(f"{awr}:AWR", RunConfig(**SMALL, agent_options=options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_agents_of_the_package_keep_their_names():
    assert agent_name(PPO) == agent_name("ppo") == "ppo"
