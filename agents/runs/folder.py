"""The folder of a training run: what lies where, and the files that grow while it trains."""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from stable_baselines3.common.logger import KVWriter, TensorBoardOutputFormat

from textgym.agents.callbacks.checkpoints import checkpoints_in
from textgym.checkpoint_folders import (
    LOCK,
    PARTIAL,
    CheckpointError,
    FolderLock,
    remove_partial,
    write_text_whole,
)

PACKAGES = ("textgym", "gymnasium", "stable-baselines3", "torch", "transformers", "numpy")


class RunFolder:
    """Paths in a run's folder.

    - ``config.yaml``: the options as run; ``run.json``: versions, command, machine, seconds
    - ``held_out.json``: hashes of the prompts that are held out and of those that are trained on
    - ``metrics.jsonl`` and ``metrics.csv``: a line per rollout and per evaluation; ``tensorboard/`` has the same
    - ``samples.jsonl`` and ``samples.md``: completions of held-out prompts at every evaluation
    - ``checkpoints/``: what the run can be resumed from
    - ``best/`` and ``model/``: the agent with the best held-out score, and the last one, as ``save_pretrained`` writes
    - ``curves.png``

    :param path: the folder
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __getattr__(self, name: str) -> Path:
        if name not in _FILES:
            raise AttributeError(name)
        return self.path / _FILES[name]

    def create(self) -> FolderLock:
        """Make the folder; what a run left there that ended before its first checkpoint is removed.

        :return: held by the run until it ends
        :raises FileExistsError: if something is in it that may be worth keeping, or another process is at work there
        :raises OSError: if it can't be made or written to
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OSError(f"output={str(self.path)!r} can't be written to: {error}") from error
        if not self.holds_nothing():  # before a lock is written beside what isn't ours
            raise FileExistsError(
                f"output={str(self.path)!r} holds files already: choose another, or --resume {self.path} to go on"
            )
        lock = FolderLock(self.path)
        if not self.holds_nothing():
            lock.release()
            raise FileExistsError(f"output={str(self.path)!r} holds files by now: another run has begun there")
        self.clear()
        return lock

    def holds_nothing(self) -> bool:
        """Whether nothing would be lost with the folder: it is empty, or of a run without checkpoint and model."""
        ours = {*_FILES.values(), LOCK}
        names = {path.name for path in self.path.iterdir() if PARTIAL not in path.name}
        return names <= ours and not (self.best.exists() or self.model.exists() or checkpoints_in(self.checkpoints))

    def clear(self) -> None:
        """Remove everything but the lock."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def forget_progress(self) -> None:
        """Remove what a run has written by now, for it to begin anew."""
        for path in (self.metrics, self.samples):
            path.unlink(missing_ok=True)
        for path in (self.tensorboard, self.best, self.model, self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove what processes that were killed have left half-written."""
        remove_partial(self.path)
        remove_partial(self.checkpoints)

    def note(self, facts: dict[str, Any]) -> None:
        """Put facts into ``run.json``; one that is broken is begun anew."""
        try:
            known = json.loads(self.run.read_text(encoding="utf-8"))
            known = known if isinstance(known, dict) else environment_of_run()
        except (OSError, ValueError):
            known = environment_of_run()
        known = {name: fact for name, fact in {**known, **facts}.items() if fact is not None}
        write_text_whole(self.run, json.dumps(known, indent=2) + "\n")

    def replace(self, target: Path, write: Callable[[Path], None]) -> None:
        """Write one of its folders; whoever looks sees the old one or the new one.

        :param target: the folder
        :param write: is given a path at which to make it
        :raises CheckpointError: if it can't be written, for example because the disk is full
        """
        new, old = (self.path / f"{PARTIAL}{target.name}-{age}" for age in ("new", "old"))
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)
        try:
            write(new)
            if target.exists():
                os.rename(target, old)
            os.rename(new, target)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"can't write {target}: {error}") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)


_FILES = {
    "config": "config.yaml",
    "run": "run.json",
    "held_out": "held_out.json",
    "metrics": "metrics.jsonl",
    "metrics_csv": "metrics.csv",
    "samples": "samples.jsonl",
    "samples_table": "samples.md",
    "checkpoints": "checkpoints",
    "tensorboard": "tensorboard",
    "best": "best",
    "model": "model",
    "curves": "curves.png",
}


def next_free(parent: str | Path, name: str) -> Path:
    """``parent/name-1``, or the first number that is not taken."""
    number = 1
    while (Path(parent) / f"{name}-{number}").exists():
        number += 1
    return Path(parent) / f"{name}-{number}"


def environment_of_run() -> dict[str, Any]:
    """Versions, machine and command, for ``run.json``."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


class GrowingFile:
    """A file of JSON lines that a resumed run cuts back to where its checkpoint was.

    :param path: the file; made when the first line is written
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Write one line, and make sure that it is out of this process.

        :raises OSError: if it can't be written
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OSError(f"can't write to {self.path}: {error}") from error

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop what was written after the first ``size`` bytes.

        :raises OSError: if the file is shorter than that
        """
        if self.size < size:
            raise OSError(
                f"{self.path} has {self.size} bytes, the checkpoint was taken at {size}: it was changed since"
            )
        if self.size > size:
            os.truncate(self.path, size)

    def rows(self) -> list[dict[str, Any]]:
        """Every line."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # a text may have other line ends in it
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number} is damaged: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}, line {number} is damaged: it is not an object")
            rows.append(row)
        return rows


class JSONLines(KVWriter):
    """Stable-Baselines3's log as JSON lines.

    :param file: where they go
    """

    def __init__(self, file: GrowingFile) -> None:
        self.file = file

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        if not key_values:
            return
        row: dict[str, Any] = {"time/total_timesteps": step}
        for name, value in sorted(key_values.items()):
            if isinstance(value, np.generic):
                value = value.item()
            if isinstance(value, str | int | float | bool):
                row[name] = value
        self.file.append(row)

    def close(self) -> None:
        pass


class ResumableTensorBoard(TensorBoardOutputFormat):
    """TensorBoard's log; of a resumed run it shows what comes after the checkpoint once.

    :param folder: where the event files go
    :param from_step: tokens after which older entries no longer count
    """

    def __init__(self, folder: str, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=folder, purge_step=from_step + 1 if from_step else None)
        self._is_closed = False


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """The metrics as a table with a column for every name that occurs."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
