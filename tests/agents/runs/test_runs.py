"""Training runs: what a run leaves behind, stopping and resuming, and the command line."""

from __future__ import annotations

import csv
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from textgym.agents import PPO
from textgym.agents.cli.main import app
from textgym.agents.runs import Run, RunConfig, RunFolder, read_config
from textgym.agents.runs.agents import AGENTS, options_of, resolved
from textgym.agents.runs.config import ALGORITHM, sections
from textgym.agents.runs.paths import with_absolute_paths
from textgym.agents.runs.plots import plot_runs
from textgym.agents.runs.prompts import load_prompts
from textgym.agents.runs.training import load_reward, make_agent, make_envs
from textgym.agents.runs.trust import UntrustedCodeError, check_code, seals

pytestmark = pytest.mark.usefixtures("runs_without_pictures")


# A reward that sends its process a signal, once, when there is a certain file.
REWARD = """
import os, signal
from pathlib import Path


def score(prompts, completions, **columns):
    after = os.environ.get("SIGNAL_AFTER")
    if after is not None and Path(after).exists():
        del os.environ["SIGNAL_AFTER"]
        signal.raise_signal(signal.Signals[os.environ["SIGNAL"]])
    return [len(set(text.split())) / 6 for text in completions]
"""


@pytest.fixture(scope="module")
def small(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run of ten rollouts."""
    reward = tmp_path_factory.mktemp("reward") / "mine.py"
    reward.write_text(REWARD)
    return {
        "model": str(tiny_directory),
        "reward": f"{reward}:score",
        "rows": 4,
        "max_new_tokens": 6,
        "timesteps": 240,  # ten rollouts
        "eval_every": 96,
        "eval_prompts": 4,
        "samples": 2,
        "checkpoint_every": 48,
        "device": "cpu",
        "threads": 1,
        "kl_target": 2.0,
        "lr_schedule": "linear",
    }


@pytest.fixture(scope="module")
def finished(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """That run, trained to its end, with its picture."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    run = Run("ppo", RunConfig(**small), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textgym.agents.runs.training.plot_runs", plot_runs)
        assert run.train()
    return run.folder


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what depends on the clock."""
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    clock = ("time/fps", "time/time_elapsed", "time/iterations")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    for part in ("model", "best"):
        for name in ("model.safetensors", "value_head.safetensors"):
            left, right = (load_file(getattr(folder, part) / name) for folder in (one, other))
            assert all(torch.equal(left[key], right[key]) for key in left), (part, name)
    assert metrics(one) == metrics(other)
    assert one.samples.read_text() == other.samples.read_text()
    assert one.samples_table.read_text() == other.samples_table.read_text()


def test_a_run_leaves_its_folder_complete(small: dict[str, Any], finished: RunFolder) -> None:
    names = {path.name for path in finished.path.iterdir()}
    assert names == {
        "config.yaml", "run.json", "metrics.jsonl", "metrics.csv", "samples.jsonl", "samples.md", "checkpoints",
        "tensorboard", "best", "model", "curves.png", "held_out.json", ".lock",
    }  # fmt: skip
    written = {name: value for name, value in read_config(finished.config).items() if name != "algorithm"}
    assert RunConfig.from_mapping(written) == resolved("ppo", RunConfig(**small))
    assert written["clip_range"] == 0.2  # what the agent's own default was when the run began
    facts = json.loads(finished.run.read_text())
    assert facts["status"] == "finished"
    assert facts["versions"]["torch"] == torch.__version__
    rows = metrics(finished)
    evaluated = [row["time/total_timesteps"] for row in rows if "eval/score_mean" in row]
    assert evaluated == [0, 96, 192, 240]
    assert [row["time/total_timesteps"] for row in rows if "rollout/score_mean" in row] == list(range(24, 241, 24))
    assert [row["time/total_timesteps"] for row in rows if "train/loss" in row] == list(range(24, 241, 24))
    with finished.metrics_csv.open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["eval/kl"]) for row in table if row["eval/kl"]] == [r["eval/kl"] for r in rows if "eval/kl" in r]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-4)
    assert len(list(finished.checkpoints.iterdir())) == 2
    assert finished.curves.read_bytes()[:4] == b"\x89PNG"
    assert "| prompt | after 0 tokens |" in finished.samples_table.read_text()


def test_what_a_run_wrote_opens_as_agent_and_as_hugging_face_model(finished: RunFolder) -> None:
    agent = PPO.from_pretrained(finished.model, device="cpu")
    opened = AutoModelForCausalLM.from_pretrained(finished.model)
    ids = torch.tensor([[1, 50, 60]])
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, agent.policy.transformer(ids).logits)
    assert agent.num_timesteps == 240


def test_tensorboard_has_the_same_figures(finished: RunFolder) -> None:
    events = EventAccumulator(str(finished.tensorboard)).Reload()
    logged = {event.step: event.value for event in events.Scalars("eval/score_mean")}
    rows = {r["time/total_timesteps"]: r["eval/score_mean"] for r in metrics(finished) if "eval/score_mean" in r}
    assert logged == pytest.approx(rows)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_run_resumes_to_the_same_end(small: dict[str, Any], finished: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small))
    folder = RunFolder(tmp_path / "killed")
    checkpoint = folder.checkpoints / "checkpoint-000000000144"
    command = ("train", "-c", str(tmp_path / "config.yaml"), "-o", str(folder.path), "--no-progress")
    done = subprocess.run(
        [sys.executable, "-m", "textgym.agents.cli", *command],
        env={**os.environ, "SIGNAL": "SIGKILL", "SIGNAL_AFTER": str(checkpoint)},
        stdout=subprocess.DEVNULL,
    )
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.is_dir()
    assert not folder.model.exists()
    assert Run.resumed(folder.path).train()
    assert_same_run(finished, folder)


def test_an_interrupted_run_saves_stops_and_resumes_to_the_same_end(
    small: dict[str, Any], finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small))
    folder = RunFolder(tmp_path / "interrupted")
    monkeypatch.setenv("SIGNAL", "SIGINT")
    monkeypatch.setenv("SIGNAL_AFTER", str(folder.checkpoints / "checkpoint-000000000048"))
    result = invoke("train", "-c", str(tmp_path / "config.yaml"), "-o", str(folder.path), "--no-progress")
    assert result.exit_code == 0, result.output
    assert "Stopping after this rollout" in result.stderr
    assert "Stopped at 72 tokens; go on with: textgym train --resume" in result.stdout
    assert json.loads(folder.run.read_text())["status"] == "stopped"
    assert (folder.checkpoints / "checkpoint-000000000072").is_dir()
    assert Run.resumed(folder.path).train()
    assert_same_run(finished, folder)


def test_a_finished_run_can_be_trained_further(small: dict[str, Any], finished: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "further")
    config = RunConfig(**{**small, "timesteps": 48, "tensorboard": False})
    assert Run("ppo", config, folder.path).train()
    result = invoke("train", "--resume", str(folder.path), "--timesteps", "96", "--no-progress")
    assert result.exit_code == 0, result.output
    assert "from checkpoint-000000000048" in result.output
    assert metrics(folder)[-1]["time/total_timesteps"] == 96


# The command line


def test_every_option_is_a_flag_and_a_flag_wins_over_the_file(small: dict[str, Any], tmp_path: Path) -> None:
    text = invoke("train", "--help").output
    for name in RunConfig().as_dict():
        assert ("--set" if name == "agent_options" else f"--{name.replace('_', '-')}") in text
    (tmp_path / "c.json").write_text(json.dumps({**small, "timesteps": 24, "kl_coef": 0.3, "vf_coef": 0.2}))
    result = invoke(
        "train", "ppo", "-c", str(tmp_path / "c.json"), "-o", str(tmp_path / "run"), "--kl-coef", "0.1",
        "--no-tensorboard", "--no-progress", "--stop", "!", "--stop", "the end",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    options = read_config(tmp_path / "run" / "config.yaml")
    assert (options["kl_coef"], options["vf_coef"], options["tensorboard"]) == (0.1, 0.2, False)
    assert options["stop"] == ["!", "the end"]


def test_generate_evaluate_and_plot_read_a_run(tiny_directory: Path, finished: RunFolder, tmp_path: Path) -> None:
    result = invoke("generate", str(finished.path), "-p", "the film is", "-p", "this story", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "the film is" in result.output
    assert "KL" in result.output
    result = invoke("generate", str(finished.path), "-n", "3", "--json")
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert len(rows) == 3
    assert all(len(row["token_rewards"]) == len(row["tokens"]) > 0 for row in rows)

    result = invoke("evaluate", str(finished.model), str(finished.best), "-n", "6", "-o", str(tmp_path / "e"))
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert {str(tiny_directory), str(finished.model), str(finished.best)} <= set(str(data).replace("'", " ").split())
    assert (tmp_path / "e" / "evaluation.md").read_text().count("\n") > 8
    assert (tmp_path / "e" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"

    result = invoke("plot", str(finished.path), "-o", str(tmp_path / "c.png"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_envs_lists_the_ids_and_options() -> None:
    result = invoke("envs")
    assert "TextGen-v0" in result.output
    assert "missing_eos_penalty" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "100000"], r"batch_size=100000 is more than the rollout has, n_steps \* num_envs = 2048"),
        (["--bach-size", "3"], "No such option: --bach-size.*--batch-size"),
        (["-c", "nowhere.yaml"], "config='nowhere.yaml' is not a file"),
        (["--reward", "nowhere.py:f"], "there is no file nowhere.py"),
        (["--reward", "json:nothing"], "json has nothing named 'nothing'"),
        (["--prompts", "nowhere.jsonl"], "there is no file or folder 'nowhere.jsonl'"),
        (["--held-out", "1.5"], "held_out"),
        (["--learning-rate", "-1"], "learning_rate=-1.0 must be a finite number at least 0"),
        (["--kl-target", "3", "--kl-coef", "0"], "kl_target=3.0 adapts kl_coef by factors"),
        (["--lora-alpha", "3"], "they need lora_rank"),
        (["--lora-rank", "2", "--lora-target-modules", "nowhere"], "nowhere"),
        (["--reward-every", "0"], "reward_every='0' must be a whole number"),
        (["--model", "nowhere/nothing"], "nowhere/nothing"),
        (["a2c", "--clip-range", "0.1"], r"clip_range=0.1 is not an option of a2c; its own are learning_rate, n_steps"),
        (["grpo", "--rows", "6"], r"num_envs=6 must be a multiple of group_size=4, or episodes= be given"),
        (["--resume", "nowhere"], "holds no config.yaml"),
        (["--top-k", "3"], "action_masking"),
    ],
)
def test_bad_options_are_said_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("train", *arguments)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.output.split()))
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = invoke("train", "-o", str(tmp_path))
    assert result.exit_code == 2
    assert "holds files already" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_resume_changes_nothing_but_the_timesteps(finished: RunFolder) -> None:
    result = invoke("train", "--resume", str(finished.path), "--kl-coef", "0.2")
    assert result.exit_code == 2
    assert "--kl-coef can't be changed" in result.output


# The configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coeff": 0.1}, "unknown option 'kl_coeff'; did you mean kl_coef"),
        ({"rows": 2.5}, "rows=2.5 must be a whole number"),
        ({"rows": "many"}, "rows='many' must be a whole number"),
        ({"kl_coef": True}, "kl_coef=True must be a finite number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"dtype": "int8"}, "dtype='int8' must be one of 'float32'"),
        ({"whiten_rewards": "yes"}, "whiten_rewards='yes' must be true or false"),
        ({"stop": [1]}, "must be a list of texts"),
        ({"timesteps": 0}, "timesteps=0 must be a whole number, at least 1"),
    ],
)
def test_wrong_options_of_a_file_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_mapping(options, "c.yaml")


def test_numbers_that_yaml_reads_as_texts_are_numbers() -> None:
    assert RunConfig.from_mapping(yaml.safe_load("learning_rate: 1e-4\nkl_coef: 1")).learning_rate == 1e-4


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {i % 40}" for i in range(60)) + "\n")
    train, held_out = load_prompts(RunConfig(prompts=str(file), held_out="0.25"))
    texts = {row.prompt for row in train}, {row.prompt for row in held_out}
    assert not texts[0] & texts[1]
    assert (len(texts[0]), len(texts[1])) == (30, 10)
    other = tmp_path / "other.txt"
    other.write_text("prompt 3\nnew\n")
    with pytest.raises(ValueError, match="1 of the prompts in held_out=.* such as 'prompt 3'"):
        load_prompts(RunConfig(prompts=str(file), held_out=str(other)))


def test_a_reward_is_a_function_in_a_file_or_an_object_in_a_module(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def short(prompts, completions, **columns):\n    return [1 / (1 + len(c)) for c in completions]\n")
    reward = load_reward(f"{file}:short")
    assert reward(prompts=["a"], completions=["abc"]) == [0.25]


@pytest.fixture
def run_with_code(small: dict[str, Any], tmp_path: Path) -> tuple[Path, Path]:
    """A run with a reward file of its own, and the file that this code writes when it runs."""
    file, ran = tmp_path / "mine.py", tmp_path / "ran"
    file.write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "def short(prompts, completions, **columns):\n    return [1 / (1 + len(c)) for c in completions]\n"
    )
    path = tmp_path / "run"
    assert Run("ppo", RunConfig(**{**small, "timesteps": 24, "reward": f"{file}:short"}), path).train()
    ran.unlink()
    return path, ran


def test_the_code_of_ones_own_run_needs_no_question(run_with_code: tuple[Path, Path]) -> None:
    path, ran = run_with_code
    result = invoke("generate", str(path), "-n", "1")
    assert result.exit_code == 0, result.output
    assert ran.exists()
    with (path.parent / "mine.py").open("a") as file:
        file.write("changed = True\n")
    result = invoke("evaluate", str(path), "-n", "2")
    assert result.exit_code == 2
    assert "the code has changed" in result.output


def test_somebody_elses_run_runs_no_code_unless_it_is_trusted(
    run_with_code: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ran = run_with_code
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    for arguments in (("generate", str(path), "-n", "1"), ("evaluate", str(path), "-n", "2")):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "is Python code" in result.output
        assert not ran.exists()
        assert invoke(*arguments, "--reward", "embedded").exit_code == 0
        assert not ran.exists()
    result = invoke("generate", str(path), "-n", "1", "--trust-code")
    assert result.exit_code == 0, result.output
    assert ran.exists()
    for folder in (RunFolder(path).model, RunFolder(path).best):  # as after a run that was stopped early
        shutil.rmtree(folder, ignore_errors=True)
    ran.unlink()
    assert invoke("generate", str(path), "-n", "1", "--reward", "embedded").exit_code == 2
    assert not ran.exists()


def test_a_seal_covers_the_file_its_place_and_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("a = b = 1\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"code": seals(["embedded", "mine.py:a", "mine:a"])}))
    check_code([str(tmp_path / "mine.py") + ":a", "mine:a", "embedded"], run, trusted=False)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy("mine.py", "elsewhere")
    for name in ("mine.py:b", "elsewhere/mine.py:a", "os:system", "nowhere:a"):
        with pytest.raises(UntrustedCodeError, match=re.escape(name)):
            check_code([name], run, trusted=False)
    for forged in ("", "{", "[]", '{"code": [3, "00"]}'):
        (run / "run.json").write_text(forged)
        with pytest.raises(UntrustedCodeError):
            check_code(["mine.py:a"], run, trusted=False)
    check_code(["mine.py:a"], run, trusted=True)


def test_the_command_line_knows_every_agent_and_every_option_of_theirs() -> None:
    fields = {field.name for field in sections()[ALGORITHM]} - {"lr_schedule"}
    assert set().union(*(options_of(algorithm) for algorithm in AGENTS)) == fields
    # What an agent has besides these is the place or the session, general, or no number.
    elsewhere = {
        "self",
        "policy",
        "env",
        "tensorboard_log",
        "policy_kwargs",
        "verbose",
        "seed",
        "device",
        "exploration",
    }
    for algorithm, agent in AGENTS.items():
        parameters = set(inspect.signature(agent).parameters) - elsewhere - {"_init_setup_model"}
        assert parameters == set(options_of(algorithm)), algorithm


@pytest.mark.parametrize("algorithm", AGENTS)
def test_the_defaults_of_a_run_are_those_of_the_agent(algorithm: str, tiny_directory: Path) -> None:
    config = RunConfig(model=str(tiny_directory), rows=4, max_new_tokens=8)
    agent = make_agent(algorithm, config, make_envs(config, ["the film is"]))
    plain = AGENTS[algorithm]("LanguageModelPolicy", make_envs(config, ["the film is"]))
    for name in options_of(algorithm):
        if name not in ("n_steps", "batch_size", "stats_window_size"):  # follow the length of the episodes
            ours, theirs = ((getattr(a, name) if hasattr(a, name) else getattr(a, f"_{name}")) for a in (agent, plain))
            assert ours == theirs or callable(ours), name


# ---------------------------------------------------------------------------------------------- the data of a run


def test_a_handful_of_prompts_is_trained_and_evaluated_on(tmp_path):
    file = tmp_path / "few.txt"
    file.write_text("the film\na story\n")
    with pytest.warns(UserWarning, match="2 different prompts are too few to hold some out"):
        train, held_out = load_prompts(RunConfig(prompts=str(file)))
    assert held_out is train
    for nothing in ("0", "none"):
        train, held_out = load_prompts(RunConfig(prompts=str(file), held_out=nothing))
        assert held_out is train
        assert len(train) == 2


def test_a_run_chooses_the_split_and_the_columns_of_its_prompts(tmp_path):
    rows = [{"prompt": f"film {i}", "completions": "x", "when": i} for i in range(12)]
    (tmp_path / "a.json").write_text(json.dumps({"train": rows, "test": rows[:1]}))
    options = {"prompts": str(tmp_path / "a.json"), "split": "train", "held_out": "none"}
    train, _ = load_prompts(RunConfig(**options, drop_column=["when"], rename_column=["completions=others"]))
    assert (len(train), train[0].columns) == (12, {"others": "x"})
    with pytest.raises(ValueError, match="rename_column='completions' must be OLD=NEW"):
        load_prompts(RunConfig(**options, rename_column=["completions"]))


def test_dpo_refuses_stored_pairs_before_there_is_a_folder(tmp_path):
    rows = [{"prompt": f"film {i}", "chosen": "b", "rejected": "c"} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"DPO learns from pairs of texts that a model writes.*textgym train-reward"):
        Run("dpo", RunConfig(prompts=str(tmp_path / "a.json"), held_out="none"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_paths_of_a_configuration_mean_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "more.txt", "mine.py"):
        Path(name).write_text("a")
    Path("judge").mkdir()
    given = RunConfig(prompts="prompts.txt", held_out="./more.txt", reward="mine.py:score")
    there = with_absolute_paths(given)
    assert there.prompts == str(tmp_path / "prompts.txt")
    assert Path(there.held_out).samefile(tmp_path / "more.txt")
    assert there.reward == f"{tmp_path / 'mine.py'}:score"
    assert with_absolute_paths(RunConfig(reward="./judge")).reward == str(tmp_path / "judge")
    assert with_absolute_paths(there) == there
    assert with_absolute_paths(RunConfig(prompts="owner/name")) == RunConfig(prompts="owner/name")


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff{"rows": 3}', encoding="utf-8")
    assert read_config(tmp_path / "a.json") == {"rows": 3}
