"""What becomes of a run that fails, is killed, is begun twice, or is changed while it rests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_agents import tiny_language_model
from typer.testing import CliRunner

from textgym.agents import AdaptiveKLCallback, CheckpointError, DivergedError, LearningRewards
from textgym.agents.callbacks.checkpoints import checkpoints_in, read_checkpoint, write_checkpoint
from textgym.agents.cli.main import app
from textgym.agents.runs import Run, RunConfig, RunFolder
from textgym.agents.runs.training import policy_of
from textgym.rewards import RewardError

pytestmark = pytest.mark.usefixtures("runs_without_pictures")


@pytest.fixture(scope="module")
def small(tiny_directory: Path) -> dict[str, Any]:
    """Options of a run of three rollouts."""
    return {
        "model": str(tiny_directory),
        "rows": 4,
        "max_new_tokens": 6,
        "timesteps": 72,  # three rollouts
        "eval_every": 48,
        "eval_prompts": 2,
        "samples": 2,
        "checkpoint_every": 24,
        "device": "cpu",
        "threads": 1,
        "tensorboard": False,
        "n_epochs": 1,
    }


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def facts(folder: RunFolder) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(folder.run.read_text())
    return known


@pytest.fixture(scope="module")
def stopped(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rollouts, to be gone on with."""
    path = tmp_path_factory.mktemp("runs") / "stopped"
    assert Run("ppo", RunConfig(**{**small, "timesteps": 48}), path).train()
    return path


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> RunFolder:
    """A copy of that run, to be damaged."""
    return RunFolder(shutil.copytree(stopped, tmp_path / "copied"))


def change(folder: RunFolder, **options: Any) -> None:
    """Edit the configuration of a run."""
    written = yaml.safe_load(folder.config.read_text())
    folder.config.write_text(yaml.safe_dump({**written, **options}))


# Divergence


@pytest.mark.parametrize("agent", ["ppo", "trpo", "q"])
def test_a_run_that_diverges_fails_and_keeps_what_was_good(small: dict[str, Any], agent: str, tmp_path: Path) -> None:
    options = {**small, "eval_every": 10_000}
    options.pop("n_epochs")
    if agent == "trpo":
        options.update(cg_max_steps=1, n_critic_updates=1, line_search_max_iter=1)
    run = Run(agent, RunConfig(**options), tmp_path / "run")
    learn = run.agent.train

    def once_then_explode() -> None:
        learn()
        if run.agent.num_timesteps > 24:
            with torch.no_grad():
                for parameter in run.agent.policy.parameters():
                    parameter.mul_(torch.nan)

    run.agent.train = once_then_explode  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match=r"diverged at step \d+: "):
        run.train()
    assert facts(run.folder)["status"] == "failed"
    assert "diverged at step" in facts(run.folder)["reason"]
    assert not run.folder.model.exists()
    assert [steps for steps, _ in checkpoints_in(run.folder.checkpoints)] == [24]
    assert "checkpoint-000000000024" in run.remains
    again = Run.resumed(run.folder.path)
    again.agent.check_finite()
    assert again.train()
    assert facts(run.folder)["status"] == "finished"
    assert "reason" not in facts(run.folder)


def test_the_command_says_in_a_line_that_a_run_diverged(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({**small, "learning_rate": 1e9, "timesteps": 240}))
    result = invoke("train", "-c", str(tmp_path / "c.json"), "-o", str(tmp_path / "run"), "--no-progress")
    assert result.exit_code == 2
    assert "diverged at step" in result.output
    assert "--resume" in result.output
    assert "Traceback" not in result.output


# Failures


def test_a_reward_that_fails_marks_the_run_and_the_folder_can_be_used_again(
    small: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def reward(prompts, completions, **columns):\n    return [len(c) / 0 for c in completions]\n")
    options = {**small, "timesteps": 24, "reward": f"{file}:reward"}
    run = Run("ppo", RunConfig(**options), tmp_path / "run")
    with pytest.raises(RewardError):
        run.train()
    assert facts(run.folder)["status"] == "failed"
    assert "division by zero" in facts(run.folder)["reason"]
    assert "begins anew" in run.remains
    file.write_text("def reward(prompts, completions, **columns):\n    return [len(c) / 9 for c in completions]\n")
    assert Run("ppo", RunConfig(**options), tmp_path / "run").train()
    with pytest.raises(FileExistsError, match="holds files already"):
        Run("ppo", RunConfig(**options), tmp_path / "run")


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(small: dict[str, Any], tmp_path: Path) -> None:
    whole = Run("ppo", RunConfig(**small), tmp_path / "whole")
    assert whole.train()
    run = Run("ppo", RunConfig(**small), tmp_path / "run")

    def interrupt() -> None:
        raise KeyboardInterrupt

    run.agent.train = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert facts(run.folder)["status"] == "stopped"
    result = invoke("train", "--resume", str(run.folder.path), "--no-progress")
    assert result.exit_code == 0, result.output
    assert "from the beginning" in result.output
    assert run.folder.samples.read_text() == whole.folder.samples.read_text()
    assert run.folder.metrics.read_text().count("\n") == whole.folder.metrics.read_text().count("\n")
    one, other = (load_file(folder.model / "model.safetensors") for folder in (whole.folder, run.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_model_is_kept_when_the_last_checkpoint_cannot_be(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("textgym.agents.callbacks.state_files.safetensors.torch.save_file", full)
    run = Run("ppo", RunConfig(**{**small, "timesteps": 24, "checkpoint_every": 48}), tmp_path / "run")
    monkeypatch.setattr(
        "textgym.agents.common.pretrained.safetensors.torch.save_file", lambda tensors, path: path.touch()
    )
    monkeypatch.setattr("textgym.agents.callbacks.checkpoints.write_state", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run.train()
    assert (run.folder.model / "model.safetensors").exists()
    assert facts(run.folder)["status"] == "failed"


# Two at once


@pytest.mark.skipif(os.name == "nt", reason="the other process locks as POSIX does")
def test_one_process_at_a_time_works_in_a_folder(copied: RunFolder) -> None:
    holds = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(copied.path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FileExistsError, match="another process is at work"):
            Run.resumed(copied.path)
        policy_of(copied.path)  # looking is allowed
        other.kill()  # what a killed process held is free
    Run.resumed(copied.path)._unlock()


def test_two_new_runs_share_no_folder(tmp_path: Path) -> None:
    lock = RunFolder(tmp_path / "run").create()
    with pytest.raises(FileExistsError, match="another process is at work"):
        RunFolder(tmp_path / "run").create()
    lock.release()
    RunFolder(tmp_path / "run").create().release()


# A changed configuration


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 3), ("temperature", 0.5), ("kl_coef", 0.2), ("rows", 8), ("reward", "grammar"), ("prompts", "test"),
     ("batch_size", 8), ("learning_rate", 0.1)],
)  # fmt: skip
def test_options_that_make_another_run_are_refused_by_name(copied: RunFolder, name: str, value: Any) -> None:
    change(copied, **{name: value})
    with pytest.raises(ValueError, match=rf"{name} was .* and is {value!r} now"):
        Run.resumed(copied.path)


def test_options_that_may_change_are_applied(copied: RunFolder) -> None:
    change(copied, timesteps=72, checkpoint_every=1000, keep_checkpoints=1, samples=1, threads=None)
    with pytest.warns(UserWarning, match="threads was 1 and is None now"):
        run = Run.resumed(copied.path)
    assert run.train()
    assert [steps for steps, _ in checkpoints_in(copied.checkpoints)] == [72]
    assert "threads" in facts(copied)


def test_fewer_timesteps_than_were_done_are_told(copied: RunFolder) -> None:
    result = invoke("train", "--resume", str(copied.path), "--timesteps", "24", "--no-progress")
    assert result.exit_code == 2
    assert "timesteps=24 is less than the 48" in " ".join(result.output.split())


# Damaged and half-written files


@pytest.mark.parametrize("manifest", ["[]", "null", "{}", '{"state.json": 3}', "", "\x00"])
def test_a_checkpoint_with_a_damaged_manifest_is_passed_over(copied: RunFolder, manifest: str) -> None:
    newest = checkpoints_in(copied.checkpoints)[-1][1]
    (newest / "manifest.json").write_text(manifest)
    with pytest.warns(UserWarning, match="damaged"):
        run = Run.resumed(copied.path)
    assert run.agent.num_timesteps == 24
    run._unlock()


def test_what_killed_processes_left_is_removed(copied: RunFolder) -> None:
    for left in (copied.checkpoints / ".partial-x", copied.path / ".partial-best-new"):
        left.mkdir()
        (left / "state.safetensors").touch()
    (copied.path / ".partial-run.json-17").touch()
    Run.resumed(copied.path)._unlock()
    assert not [path for path in copied.path.rglob("*") if ".partial" in path.name]


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_broken_run_json_stops_nothing(copied: RunFolder, content: str) -> None:
    copied.run.write_text(content)
    Run.resumed(copied.path)._unlock()
    assert facts(copied)["status"] == "running"
    assert "versions" in facts(copied)


def test_a_broken_line_of_the_metrics_is_named(copied: RunFolder) -> None:
    data = bytearray(copied.metrics.read_bytes())
    data[3] = 0xFF
    copied.metrics.write_bytes(data)
    run = Run.resumed(copied.path, timesteps=72)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is damaged"):
        run.train()
    assert facts(copied)["status"] == "failed"
    assert copied.model.exists()


def test_damaged_checkpoints_are_not_counted_as_kept(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        write_checkpoint(tmp_path, {"steps": steps}, steps)
    (tmp_path / "checkpoint-000000000003" / "state.json").write_text("{}")
    write_checkpoint(tmp_path, {"steps": 2}, 2, keep=1)
    kept = checkpoints_in(tmp_path)
    assert [steps for steps, _ in kept] == [2, 3]
    assert read_checkpoint(kept[0][1]) == {"steps": 2}


# Rewards that learn


def test_rewards_that_learn_do_so_in_runs_and_resume_where_they_were(small: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from textgym.rewards import Ensemble, FunctionReward, NoveltyReward, RunningNormalized\n"
        "def length(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
        "reward = 0.5 * NoveltyReward() + Ensemble([RunningNormalized(FunctionReward(length)), length])\n"
    )
    options = {**small, "reward": f"{file}:reward", "kl_target": 2.0}
    whole = Run("ppo", RunConfig(**options), tmp_path / "whole")
    before = str(whole.envs.reward.state_dict())
    assert [type(part) for part in whole.callbacks[:2]] == [LearningRewards, AdaptiveKLCallback]
    assert whole.train()
    after = str(whole.envs.reward.state_dict())
    assert before != after
    assert Run("ppo", RunConfig(**{**options, "timesteps": 24}), tmp_path / "part").train()
    part = Run.resumed(tmp_path / "part", timesteps=72)
    assert part.train()
    assert str(part.envs.reward.state_dict()) == after


# Code that a run names


def test_resuming_asks_for_trust_where_generating_does(small: dict[str, Any], tmp_path: Path) -> None:
    file, ran = tmp_path / "mine.py", tmp_path / "ran"
    text = "def reward(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    file.write_text(text)
    folder = RunFolder(tmp_path / "run")
    assert Run("ppo", RunConfig(**{**small, "timesteps": 24, "reward": f"{file}:reward"}), folder.path).train()
    file.write_text(f"open({str(ran)!r}, 'w').close()\n{text}")  # it is not what the run began with
    resume = ("train", "--resume", str(folder.path), "--timesteps", "48", "--no-progress")
    result = invoke(*resume)
    assert result.exit_code == 2
    assert "--trust-code" in result.output
    assert not ran.exists()
    result = invoke(*resume, "--trust-code")
    assert result.exit_code == 0, result.output
    assert ran.exists()


def test_resuming_asks_before_it_runs_code_of_the_model(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    tiny_language_model().save_pretrained(own)
    config = json.loads((own / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"})
    (own / "config.json").write_text(json.dumps(config))
    (own / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n"
    )
    (tmp_path / "p.txt").write_text("the film\na story\n")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked on the terminal"))
    options = {**small, "timesteps": 24, "model": str(own), "prompts": str(tmp_path / "p.txt"), "held_out": "none"}
    folder = RunFolder(tmp_path / "run")
    assert Run("ppo", RunConfig(**options, trust_remote_code=True), folder.path).train()

    opened: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.dynamic_module_utils.get_class_from_dynamic_module", lambda *a, **k: opened.append(a)
        )
        for command in (["train", "--resume", str(folder.path)], ["generate", str(folder.path), "-p", "the"]):
            result = invoke(*command)
            assert result.exit_code == 2
            assert "has trust_remote_code, and Python code that comes with its model" in result.output
            assert "--trust-code" in result.output
    assert not opened
    go_on = ("train", "--resume", str(folder.path), "--timesteps", "48", "--no-progress", "--trust-code")
    assert invoke(*go_on).exit_code == 0
