"""The directory of a run: what is in it, and whether a run may start or go on there."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textgym.checkpoint_folders import (
    LOCK,
    PARTIAL,
    CheckpointError,
    check_manifest,
    is_whole,
    remove_partial,
    superfluous,
    write_text_whole,
)
from textgym.model_sources import quiet_progress
from textgym.rewards.models.headed_model import HeadedRewardModel
from textgym.rewards.reward_directory import ENSEMBLE_FILE

from .report import RewardReport

OPTIONS_FILE, TRAINER_STATE = "training.json", "trainer_state.json"
_OPENED_BY_TEXTGYM = """\
from textgym.rewards import as_reward

reward = as_reward("path/to/this/directory")
reward(prompts=["the film"], completions=[" is good"])
"""
_OPENED_BY_TRANSFORMERS = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("path/to/this/directory")
"""


def check_free(folder: Path) -> None:
    """:raises ValueError: if there is anything in the folder that would be lost"""
    if folder.exists() and not (folder.is_dir() and holds_nothing(folder)):
        raise ValueError(f"output={str(folder)!r} is there and not empty; name another folder, or pass resume=True")


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is empty, or of a run that ended before its first checkpoint."""
    for path in folder.iterdir():
        if path.name == "checkpoints" or re.fullmatch(r"member_\d+", path.name):
            if not path.is_dir() or not holds_nothing(path):
                return False
        elif path.name not in (OPTIONS_FILE, LOCK) and not path.name.startswith(PARTIAL):
            return False
    return True


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Note what a run is, by which it is known when it is resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(folder / OPTIONS_FILE, json.dumps(record, indent=1))


def is_finished(folder: Path) -> bool:
    return (folder / "report.json").exists()


def forget_empty(folder: Path, is_new: bool) -> None:
    """Leave no trace of a run that could not even begin.

    :param is_new: whether the folder was made for it
    """
    if [path.name for path in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()
        if is_new:
            folder.rmdir()


def check_begun(folder: Path) -> None:
    """:raises ValueError: if the folder holds no run"""
    if not (folder / OPTIONS_FILE).is_file():
        raise ValueError(f"resume=True: {str(folder)!r} has no {OPTIONS_FILE}, so it holds no run to go on with")


def check_resumable(folder: Path, record: Mapping[str, Any]) -> None:
    """:raises ValueError: if the folder holds no unfinished run, or another one"""
    check_begun(folder)
    if is_finished(folder):
        raise ValueError(f"resume=True: the run in {str(folder)!r} is finished")
    check_same_run(folder, record)


def check_same_run(folder: Path, record: Mapping[str, Any]) -> None:
    """:raises ValueError: if the run in the folder has other options or data"""
    path = folder / OPTIONS_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"resume=True: {path} is broken JSON: {error}") from error
    now = json.loads(json.dumps(record))
    for name in now:
        if before.get(name) == now[name]:
            continue
        if name != "options":
            raise ValueError(f"resume=True: the run in {str(folder)!r} has other {name.replace('_', ' ')}")
        old = before.get(name) or {}
        option = next(key for key, value in now[name].items() if old.get(key) != value)
        raise ValueError(
            f"resume=True: the run in {str(folder)!r} has {option}={old.get(option)!r}, not {now[name][option]!r}"
        )


def checkpoint_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after some optimizer steps."""
    return checkpoints / f"checkpoint-{step}"


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a run that is whole, and whose best one is; None if the run ended before its first.

    Warns of newer ones, and removes what a killed process left half-written.

    :raises CheckpointError: if there are checkpoints, but none that can be gone on from
    """
    checkpoints = folder / "checkpoints"
    remove_partial(checkpoints)
    found = _checkpoints(checkpoints)
    for path in reversed(found):
        try:
            check_manifest(path)
            best = checkpoint_of(checkpoints, _best_step(path))
            if best != path:
                check_manifest(best)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before {path.name}", UserWarning, stacklevel=2)
        else:
            return str(path)
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {checkpoints} can be gone on from")
    return None


def remove_superfluous(checkpoints: Path) -> None:
    """Remove all checkpoints but the newest two that are whole, and those that were the best when they were written."""
    found = _checkpoints(checkpoints)
    old = superfluous(found, 2)
    kept = [path for path in found if path not in old]
    best = {checkpoint_of(checkpoints, _best_step(path)) for path in kept if is_whole(path)}
    for path in old:
        if path not in best:
            shutil.rmtree(path)


def _checkpoints(checkpoints: Path) -> list[Path]:
    """Oldest first."""
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in checkpoints.glob("checkpoint-*")]
    return [checkpoint_of(checkpoints, step) for step in sorted(int(match[1]) for match in found if match)]


def _best_step(checkpoint: Path) -> int:
    """Optimizer steps after which the validation loss was the smallest, as a whole checkpoint says."""
    state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    return int(state["best_global_step"] or state["global_step"])


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: RewardReport) -> None:
    """Write a model, its tokenizer, its card and its report, the report last: it says that a run is finished."""
    model.eval()
    with quiet_progress():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(model, report), encoding="utf-8")
    report.save(folder)


def save_ensemble(folder: Path, members: int, report: RewardReport) -> None:
    """Write what says that a directory's members are an ensemble, its card and its report."""
    names = [f"member_{i}" for i in range(members)]
    (folder / ENSEMBLE_FILE).write_text(json.dumps({"members": names}, indent=1), encoding="utf-8")
    text = f"{members} reward models, trained by textgym; each is in a directory of its own.\n\n"
    text += f"```python\n{_OPENED_BY_TEXTGYM}```\n\nThat is the mean of the members. `open_reward` has the others.\n"
    (folder / "README.md").write_text("# A reward model ensemble\n\n" + text + _figures(report), encoding="utf-8")
    report.save(folder)


def model_card(model: PreTrainedModel, report: RewardReport) -> str:
    """What a reader of the directory should know first: what opens it."""
    config = model.config
    text = "# A reward model\n\n"
    if isinstance(model, HeadedRewardModel):
        text += (
            f"Trained by textgym. It has a custom head (`{config.head}`), which transformers alone does not know: the "
            f"model type in `config.json` is `{config.model_type}`, and "
            "`import textgym.rewards.models.headed_model` is what makes the Auto classes open "
            f"it.\n\n```python\n{_OPENED_BY_TEXTGYM}```\n"
        )
    else:
        text += (
            f"Trained by textgym; a `{type(model).__name__}` with the head that transformers gives it.\n\n"
            f"```python\n{_OPENED_BY_TRANSFORMERS}```\n\nAs a reward:\n\n```python\n{_OPENED_BY_TEXTGYM}```\n"
        )
    outputs = ", ".join(f"{i} `{name}`" for i, name in sorted(config.id2label.items()))
    return f"{text}\nOutputs: {outputs}.\n{_figures(report)}"


def _figures(report: RewardReport) -> str:
    rows = "".join(f"| {name.replace('_', ' ')} | {value:.4f} |\n" for name, value in report.metrics.items())
    held_out = report.rows.get("validation", "?")
    where = f"{held_out} validation rows" if held_out else f"its {report.rows['training']} training rows"
    return f"\nOn {where}:\n\n| | |\n|---|---|\n{rows}"
