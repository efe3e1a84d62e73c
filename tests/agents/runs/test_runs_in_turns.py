"""Runs in which somebody replies: they are begun, stopped, resumed, evaluated and sampled from with who replies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from textgym.agents.callbacks.checkpoints import checkpoints_in, read_latest
from textgym.agents.cli.main import app
from textgym.agents.runs import Run, RunConfig, RunFolder
from textgym.agents.runs.agents import resolved
from textgym.agents.runs.trust import UntrustedCodeError, check_code, code_of

pytestmark = pytest.mark.usefixtures("runs_without_pictures")

MINE = """from textgym.replies import ReplyResult


def say(transcripts):
    '''Ends where something good was said, and pays for it.'''
    good = ["good" in transcript[-1]["content"] for transcript in transcripts]
    return [ReplyResult(" story", float(each), each) for each in good]


def score(completions):
    return [len(set(text.split())) / 6 for text in completions]


def shout(text):
    return text.upper()
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(MINE)
    return path


@pytest.fixture(scope="module")
def small(tiny_directory: Path, mine: Path) -> dict[str, Any]:
    """Options of a run of six rollouts, which end amid turns; a language model replies."""
    return {
        "model": str(tiny_directory), "reward": f"{mine}:score", "reply": f"model:{tiny_directory}", "max_turns": 3,
        "max_reply_tokens": 4, "reward_every": "turn", "rows": 4, "max_new_tokens": 3, "n_steps": 7, "timesteps": 168,
        "eval_every": 84, "eval_prompts": 4, "samples": 2, "checkpoint_every": 28, "keep_checkpoints": 9,
        "device": "cpu", "threads": 1, "tensorboard": False, "n_epochs": 1, "batch_size": 28,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = Run("ppo", RunConfig(**small), tmp_path_factory.mktemp("runs") / "whole")
    assert run.train()
    return run.folder


@pytest.fixture(scope="module")
def paid(small: dict[str, Any], mine: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run in which code of its user replies, and pays."""
    options = {**small, "reply": f"{mine}:say", "timesteps": 28}
    run = Run("ppo", RunConfig(**options), tmp_path_factory.mktemp("runs") / "paid")
    assert run.train()
    return run.folder


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "250"})


def text_of(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_was_stopped_between_turns_ends_with_the_same_weights(finished: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    shutil.copytree(finished.path, path)
    folder = RunFolder(path)
    for _, checkpoint in checkpoints_in(folder.checkpoints)[1:]:
        shutil.rmtree(checkpoint)
    shutil.rmtree(folder.model)
    texts = read_latest(folder.checkpoints)[1]["env"]["rows"]["texts"]
    assert any(texts["turn_numbers"])
    assert any(texts["lengths"] - texts["turn_starts"])
    assert Run.resumed(path).train()
    left, right = (load_file(each.model / "model.safetensors") for each in (finished, folder))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert finished.samples.read_text() == folder.samples.read_text()


def test_a_run_reports_turns_and_shows_who_spoke(finished: RunFolder, paid: RunFolder) -> None:
    logged = [row for row in rows(finished.metrics) if "eval/turns" in row]
    assert len(logged) == 3
    for row in logged:
        assert 1 <= row["eval/turns"] <= 3
        assert sum(row[f"eval/ended_by_{reason}"] for reason in ("reply", "turns", "length")) == pytest.approx(1)
        assert row["eval/return"] == row["eval/score_mean"]  # this reply pays nothing
        assert "eval/turn_1_reward" in row
        assert "eval/eos_rate" not in row
    rollouts = [row for row in rows(finished.metrics) if "rollout/ep_len_mean" in row]
    assert all(0 <= row["rollout/ended_by_reply"] <= 1 and "rollout/eos_rate" not in row for row in rollouts)
    assert rollouts
    sample = rows(finished.samples)[0]
    assert [message["role"] for message in sample["transcript"]][:2] == ["assistant", "user"]
    assert "**assistant** " in finished.samples_table.read_text()
    assert "<br>**user** " in finished.samples_table.read_text()
    [row] = [row for row in rows(paid.metrics) if row.get("time/total_timesteps") == 0 and "eval/turns" in row]
    assert row["eval/return"] == pytest.approx(row["eval/score_mean"] + row["eval/reply_reward"])


def test_generate_and_evaluate_use_the_reply_of_the_run_and_say_so(
    finished: RunFolder, mine: Path, tmp_path: Path
) -> None:
    def generated(*arguments: object) -> Any:
        result = invoke("generate", finished.path, "-p", "the film", "--json", *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    found = generated()
    assert found["settings"]["reply"].startswith("LanguageModelReply(")
    assert (found["settings"]["max_turns"], found["settings"]["max_new_tokens"]) == (3, 3)
    assert {message["role"] for message in found["transcript"]} == {"assistant", "user"}
    assert None in found["token_rewards"]
    assert len(generated("--max-turns", 1)["transcript"]) == 2
    alone = generated("--reply", "none")
    assert "transcript" not in alone
    assert alone["settings"]["max_turns"] is None
    said = generated("--reply", f"{mine}:say")["transcript"]
    assert said[1]["content"] == " story"
    assert generated("--reply", f"tool:{mine}:shout")["settings"]["reply"] == "ToolReply"
    assert "at most 3 tokens in each of at most 3 turns" in text_of(invoke("generate", finished.path, "-p", "a film"))

    output = text_of(invoke("evaluate", finished.path, "-n", 4, "-o", tmp_path, "--no-reference"))
    assert "; reply LanguageModelReply(" in output
    assert "Ended after the last turn" in output
    [evaluation] = json.loads((tmp_path / "evaluation.json").read_text())["evaluations"].values()
    assert evaluation["figures"]["turns"] > 1
    assert evaluation["texts"][0]["transcript"]
    assert "| Turn 1, what it earns" in (tmp_path / "evaluation.md").read_text()
    refused = invoke("generate", finished.path, "-p", "a", "--reply", "none", "--max-turns", 2)
    assert refused.exit_code == 2
    assert "give a reply, too" in refused.output


def test_code_that_replies_needs_trust_as_that_of_a_reward_does(paid: RunFolder, tmp_path: Path, mine: Path) -> None:
    config = RunConfig(reply=f"tool:calculate,{mine}:shout")
    assert code_of(config, "ppo")[2:] == [f"{mine}:shout"]
    facts = json.loads(paid.run.read_text())
    assert len(facts["code"]) == 2  # the reward's seal and the reply's
    shutil.copytree(paid.path, tmp_path / "given")
    (tmp_path / "given" / "run.json").write_text(json.dumps({**facts, "code": facts["code"][:1]}))
    result = invoke("generate", tmp_path / "given", "-p", "a film", "--reward", "embedded")
    assert result.exit_code == 2
    assert f"names {mine}:say, which is Python code" in " ".join(result.output.split())
    assert invoke("generate", paid.path, "-p", "a film").exit_code == 0
    with pytest.raises(UntrustedCodeError, match="sends texts to other machines"):
        check_code(code_of(RunConfig(reply="http://localhost:1/reply"), "ppo")[2:], tmp_path, trusted=False)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_turns": 2}, "max_turns=2 .* give a reply"),
        ({"reply": "tool:calculate", "max_turns": 0}, "max_turns=0"),
        ({"reward_every": "word"}, "reward_every='word' .* 'turn' or 'end'"),
    ],
)
def test_impossible_turns_are_said_at_once(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RunConfig(**options)


def test_a_rollout_and_the_target_of_the_kl_are_those_of_whole_episodes() -> None:
    config = resolved("ppo", RunConfig(model="some/model", reply="tool:calculate", max_turns=3, max_new_tokens=10))
    assert (config.n_steps, config.kl_target) == (30, pytest.approx(6.0))
    assert RunConfig(reply="tool:calculate", max_total_tokens=50).longest_episode == 50
