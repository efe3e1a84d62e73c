"""``textgym generate`` and ``evaluate``: the run's own settings, prompts that nobody learned from, references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_agents import tiny_language_model
from typer.testing import CliRunner

from textgym.agents.cli.main import app
from textgym.agents.runs import Run, RunConfig, RunFolder
from textgym.agents.runs.prompt_record import trained_on
from textgym.language_model import load_language_model

pytestmark = pytest.mark.usefixtures("narrow_embedded_models_throughout", "runs_without_pictures")

SMALL: dict[str, Any] = {
    "rows": 4, "max_new_tokens": 6, "timesteps": 24, "eval_prompts": 2, "samples": 1, "device": "cpu", "threads": 1,
    "tensorboard": False, "n_epochs": 1,
}  # fmt: skip
SCORE = """def score(prompts, completions, wanted, **columns):
    return [float(word in text) for word, text in zip(wanted, completions)]
"""


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "250"})


def text_of(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def trained(path: Path, **options: Any) -> RunFolder:
    run = Run("ppo", RunConfig(**{**SMALL, **options}), path)
    assert run.train()
    return run.folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of another vocabulary than the embedded one."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_language_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose mask leaves one text of each prompt, however far the learning rate takes the policy."""
    path = tmp_path_factory.mktemp("runs") / "masked"
    return trained(path, action_masking=True, top_k=1, learning_rate=1e-2, n_epochs=4, stop=["film"])


def test_what_is_evaluated_and_generated_is_the_only_text_that_the_mask_allows(masked: RunFolder, tmp_path: Path):
    rows = [json.loads(line) for line in masked.samples.read_text().splitlines()]
    before, after = (row for row in rows)
    assert (before["timesteps"], after["timesteps"]) == (0, 24)
    assert after["completion"] == before["completion"]
    assert after["kl"] == pytest.approx(0, abs=1e-6)

    only = json.loads(invoke("generate", masked.path, "-p", before["prompt"], "--json", "--seed", 5).stdout)
    assert only["completion"] == before["completion"]
    assert only["kl"] == pytest.approx(0, abs=1e-6)
    settings = only["settings"]
    assert (settings["top_k"], settings["stop"], settings["max_new_tokens"]) == (1, ["film"], 6)
    assert (settings["model"], settings["reference"]) == (str(masked.path), "embedded")
    free = ("--no-action-masking", "--temperature", 2)
    free_text = invoke("generate", masked.path, "-p", before["prompt"], "--json", "--seed", 5, *free)
    assert json.loads(free_text.stdout)["completion"] != before["completion"]

    said = text_of(invoke("evaluate", masked.path, "-n", 2, "-o", tmp_path, "--reward", "embedded"))
    assert "temperature 1, stop at 'film', special tokens masked, top-k 1 of the reference" in said
    for evaluation in json.loads((tmp_path / "evaluation.json").read_text())["evaluations"].values():
        assert evaluation["texts"][0]["completion"] == before["completion"]
        assert evaluation["settings"]["top_k"] == 1


def test_a_saved_agent_that_left_its_run_keeps_its_settings_and_asks_for_the_reference(
    masked: RunFolder, tmp_path: Path
):
    alone = tmp_path / "alone"
    masked.model.rename(alone)
    try:
        result = invoke("generate", alone, "-p", "the film is")
        assert result.exit_code == 2
        assert "give --reference MODEL, or --no-action-masking" in " ".join(result.output.split())
        given = json.loads(invoke("generate", alone, "-p", "the film is", "--reference", "embedded", "--json").stdout)
        ours = json.loads(invoke("generate", masked.path, "-p", "the film is", "--json").stdout)
        assert given["completion"] == ours["completion"]
    finally:
        alone.rename(masked.model)


def test_a_model_of_no_run_is_its_own_reference(tiny: Path, tmp_path: Path):
    row = json.loads(invoke("generate", tiny, "-p", "the film is", "--json").stdout)
    assert row["kl"] is None
    assert row["settings"]["reference"] is None
    assert "no reference" in text_of(invoke("generate", tiny, "-p", "the film is"))
    (tmp_path / "p.txt").write_text("the film\na story\n")
    said = text_of(invoke("evaluate", tiny, "--prompts", tmp_path / "p.txt", "-o", tmp_path / "e"))
    assert "embedded" not in said.replace("reward embedded", "")
    [evaluation] = json.loads((tmp_path / "e" / "evaluation.json").read_text())["evaluations"].values()
    assert all(text["kl"] == 0 for text in evaluation["texts"])


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_vocabularies_are_compared_before_any_text_is_written(tiny: Path, command: str, tmp_path: Path):
    (tmp_path / "p.txt").write_text("the film\n")
    prompts = ("-p", "the film") if command == "generate" else ("--prompts", tmp_path / "p.txt")
    for model, reference in ((tiny, "embedded"), ("embedded", tiny)):
        result = invoke(command, model, *prompts, "--reference", reference)
        assert result.exit_code == 2
        assert f"the reference {reference} has another vocabulary than the model {model}" in result.output
    other = tmp_path / "other"
    tiny_language_model(seed=1).save_pretrained(other)
    assert f"against {other}" in text_of(invoke(command, tiny, *prompts, "--reference", other))


def test_columns_that_the_reward_reads_can_be_given(tmp_path: Path):
    (tmp_path / "r.py").write_text(SCORE)
    reward = f"{tmp_path / 'r.py'}:score"
    asked = ("generate", "embedded", "-p", "the film is", "--reward", reward, "--json", "--deterministic")
    text = json.loads(invoke(*asked, "--column", "wanted=zzz").stdout)
    assert text["score"] == 0.0
    word = text["completion"].split()[0]
    assert json.loads(invoke(*asked, "--column", f"wanted={word}").stdout)["score"] == 1.0
    assert "wanted" in invoke(*asked).output
    assert "must be name=value" in invoke(*asked, "--column", "wanted").output
    (tmp_path / "p.csv").write_text("question,wanted\nthe film is,z\nthis story,z\n")
    asked = ("evaluate", "embedded", "--prompts", tmp_path / "p.csv", "--reward", reward)
    text_of(invoke(*asked, "--prompt-column", "question"))
    text_of(invoke(*asked, "--prompt-column", "question", "--column", "wanted=a"))
    assert invoke(*asked).exit_code == 2


def test_evaluate_reads_prompts_from_the_column_of_the_run(tiny: Path, tmp_path: Path):
    lines = [json.dumps({"question": f"film number {i}"}) for i in range(20)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    run = trained(tmp_path / "run", model=str(tiny), prompts=str(tmp_path / "p.jsonl"), prompt_column="question")
    (tmp_path / "new.jsonl").write_text(json.dumps({"question": "a new one"}))
    text_of(invoke("evaluate", run.path, "--prompts", tmp_path / "new.jsonl"))


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_files_of_prompts_are_read_as_train_reads_them(tiny: Path, command: str, tmp_path: Path):
    (tmp_path / "r.py").write_text(SCORE)
    splits = {
        "train": [{"q": "a", "aim": "zzz", "completions": "x"}],
        "test": [{"q": "the film", "aim": "z", "completions": "x"}],
    }
    (tmp_path / "p.json").write_text(json.dumps(splits))
    asked = (command, tiny, "--reward", f"{tmp_path / 'r.py'}:score", "--max-new-tokens", 2)
    named = ("--prompt-column", "q", "--rename-column", "aim=wanted", "--drop-column", "completions")
    text_of(invoke(*asked, "--prompts", tmp_path / "p.json", "--split", "test", *named))
    if command == "generate":
        printed = invoke(*asked, "--prompts", tmp_path / "p.json", "--split", "test", *named, "--json").stdout
        assert [json.loads(line)["prompt"] for line in printed.splitlines()] == ["the film"]
    for wrong, told in (
        (("--prompts", tmp_path / "p.json", *named), "splits"),
        (("--prompts", tmp_path / "p.json", "--split", "test", "--drop-column", "nothing"), "'nothing'"),
        (
            ("--split", "test", "--drop-column", "aim"),
            "--split, --drop-column: how --prompts is read, which isn't given",
        ),
    ):
        result = invoke(*asked, *wrong)
        assert result.exit_code == 2
        assert told in " ".join(result.output.split())


@pytest.fixture(scope="module")
def two_runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, RunFolder]]:
    """Runs of one file of prompts: two seeds of training, and one with another split."""
    path = tmp_path_factory.mktemp("split")
    (path / "p.txt").write_text("\n".join(f"film number {i}" for i in range(20)))
    options = {"model": str(tiny), "prompts": str(path / "p.txt"), "held_out": "6"}
    runs = {
        0: trained(path / "zero", seed=0, **options),
        1: trained(path / "one", seed=1, **options),
        2: trained(path / "other", split_seed=1, **options),
    }
    return path, runs


def test_seeds_of_one_data_set_hold_out_the_same_prompts(two_runs: tuple[Path, dict[int, RunFolder]]):
    _, runs = two_runs
    records = {seed: json.loads(run.held_out.read_text()) for seed, run in runs.items()}
    assert records[0] == records[1]
    assert records[0]["held_out"] != records[2]["held_out"]
    assert (len(records[0]["held_out"]), len(records[0]["trained_on"])) == (6, 14)
    assert not set(records[0]["held_out"]) & trained_on(runs[0].held_out)


def test_models_are_measured_on_prompts_that_none_was_trained_on(two_runs: tuple[Path, dict[int, RunFolder]]):
    path, runs = two_runs
    both = text_of(invoke("evaluate", runs[0].path, runs[1].path, "-n", 256))
    assert "6 completions of 6 different prompts" in both
    assert "6 prompts, fewer than the 256 asked for" in both
    assert "Left out" not in both
    common = set(json.loads(runs[0].held_out.read_text())["held_out"]) - trained_on(runs[2].held_out)
    result = invoke("evaluate", runs[0].path, runs[2].path)
    left_out = f"Left out {6 - len(common)} of the 6 held-out prompts: {runs[2].path} was trained on them"
    assert left_out in " ".join(result.output.split())
    if not common:
        assert result.exit_code == 2
        assert "there is no held-out prompt" in result.output
    warned = text_of(invoke("evaluate", runs[0].path, "--prompts", path / "p.txt"))
    assert "was trained on 14 of the 20 prompts" in warned


def test_impossible_numbers_are_refused(tiny: Path):
    for command in ("generate", "evaluate"):
        result = invoke(command, tiny, "-n", -1)
        assert result.exit_code == 2
        assert "--number" in result.output


def test_a_larger_model_than_the_embedded_one_generates(tmp_path: Path):
    larger = load_language_model("embedded")
    model = larger.model
    model.resize_token_embeddings(larger.vocab_size + 64, mean_resizing=False)
    model.save_pretrained(tmp_path / "larger")
    larger.tokenizer.save_pretrained(tmp_path / "larger")
    text_of(invoke("generate", tmp_path / "larger", "-p", "the film is"))
