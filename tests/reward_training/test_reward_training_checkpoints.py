"""Checkpoints of reward training: whatever happens to them, a resumed run ends as if nothing had, or says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_reward_training import QUICK, TOKENIZER, scored, tiny_causal
from transformers import AutoModelForSequenceClassification

from textgym.agents import CheckpointError, DivergedError
from textgym.checkpoint_folders import FolderLock
from textgym.reward_training import train_reward
from textgym.reward_training import trainer as trainer_module

pytestmark = pytest.mark.usefixtures("frozen_garbage", "no_pictures")

OPTIONS: dict[str, Any] = {**QUICK, "epochs": 3, "batch_size": 8, "patience": None}


class Killed(Exception):
    pass


def run(folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    model = more.pop("model", None) or tiny_causal(1)
    train_reward(scored(40), folder, model=model, tokenizer=TOKENIZER, **{**OPTIONS, **more})
    return model.state_dict()


def run_killed_in_epoch(number: int, folder: Path, **more: Any) -> None:
    evaluate = trainer_module.RewardTrainer.evaluate
    calls = []

    def dies(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return evaluate(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.RewardTrainer, "evaluate", dies)
        with pytest.raises(Killed):
            run(folder, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textgym.reward_training.report.draw_report", lambda report, path: None)
        return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its third epoch, after two checkpoints."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    run_killed_in_epoch(3, folder)
    return folder


@pytest.fixture
def copied(killed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged; that it lies elsewhere changes nothing."""
    return Path(shutil.copytree(killed, tmp_path / "copied"))


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trained.safetensors", flip),
        ("optimizer.pt", flip),
        ("optimizer.pt", Path.unlink),
        ("scheduler.pt", Path.unlink),
        ("rng_state.pth", Path.unlink),
        ("trainer_state.json", truncate),
        ("manifest.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    name: str, damage: Callable[[Path], None], copied: Path, whole: dict[str, torch.Tensor]
) -> None:
    damage(newest(copied) / name)
    with pytest.warns(UserWarning, match=r"checkpoint-\d+ is damaged: .*trying the one before"):
        resumed = run(copied, resume=True)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_a_kill_while_a_checkpoint_is_written_leaves_nothing_that_counts(
    copied: Path, whole: dict[str, torch.Tensor]
) -> None:
    left = copied / "checkpoints" / ".partial-x"
    left.mkdir()
    (left / "trained.safetensors").write_bytes(b"half")
    resumed = run(copied, resume=True)
    assert not left.exists()
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_a_run_without_a_whole_checkpoint_says_so(copied: Path) -> None:
    for checkpoint in (copied / "checkpoints").iterdir():
        flip(checkpoint / "trained.safetensors")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        run(copied, resume=True)


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(trainer_module.RewardTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(CheckpointError, match="can't write the checkpoint .*PytorchStreamWriter"):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    monkeypatch.setattr("textgym.reward_training.report.draw_report", lambda report, path: None)
    run(tmp_path / "run", epochs=1)  # nothing would be lost with what is there


def test_one_process_at_a_time_trains_in_a_folder(copied: Path) -> None:
    lock = FolderLock(copied)
    with pytest.raises(FileExistsError, match="another process is at work"):
        run(copied, resume=True)
    lock.release()


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss"):
        run(tmp_path / "run", loss="bradley_terry")
    assert not (tmp_path / "run").exists()


def test_weights_that_diverged_become_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"diverged at step \d+: the loss"):
        run(tmp_path / "run", learning_rate=1e30, prefixes="none")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("part", [{"freeze_backbone": True}, {"lora_rank": 2}])
def test_a_frozen_backbone_is_in_no_checkpoint_and_in_the_finished_model(part: dict[str, Any], tmp_path: Path) -> None:
    if "lora_rank" in part:
        pytest.importorskip("peft")
    expected = run(tmp_path / "whole", **part)
    run_killed_in_epoch(3, tmp_path / "killed", **part)
    kept = load_file(newest(tmp_path / "killed") / "trained.safetensors")
    assert {name for name in kept if "lora_" not in name} == {"score.weight"}
    assert any("lora_" in name for name in kept) == ("lora_rank" in part)

    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    resumed = run(tmp_path / "killed", resume=True, **part)
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "killed").state_dict()
    assert all(torch.equal(opened[name], weight) for name, weight in expected.items())

    other = tiny_causal(1)
    with torch.no_grad():
        other.model.norm.weight += 1
    with pytest.raises(CheckpointError, match="frozen weights are not those that training began with"):
        run(tmp_path / "other", resume=True, model=other, **part)
