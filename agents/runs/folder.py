"""The folder of a training run: what lies where, and the files that grow while it trains."""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import KVWriter, TensorBoardOutputFormat

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

    def create(self) -> None:
        """Make the folder.

        :raises FileExistsError: if something is in it
        :raises OSError: if it can't be made or written to
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            raise FileExistsError(
                f"output={str(self.path)!r} holds files already: choose another, or --resume {self.path} to go on"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OSError(f"output={str(self.path)!r} can't be written to: {error}") from error


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
        """Write one line, and make sure that it is out of this process."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

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
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


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
