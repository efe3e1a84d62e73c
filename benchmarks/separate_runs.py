"""Runs in processes of their own, with one thread each, whose results are kept in files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def path_of(work: Path, *names: Any) -> Path:
    """The file of a run.

    :param work: the folder
    :param names: what tells the run from others
    """
    plain = ["".join(c if c.isalnum() or c in ".+-" else "_" for c in str(name).lower()) for name in names]
    return work / f"{'-'.join(plain)}.json"


def kept_result(script: str, work: Path, *names: Any) -> dict[str, Any]:
    """What a run gave: from its file, or from ``script --one NAMES --work WORK``, which writes it.

    :raises RuntimeError: with what the process said, if it failed
    """
    path = path_of(work, *names)
    if not path.is_file():
        command = [sys.executable, script, "--one", *map(str, names), "--work", str(work)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, names))}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def keep(result: dict[str, Any], work: Path, *names: Any) -> None:
    """Write a result, whole or not at all."""
    path = path_of(work, *names)
    path.with_suffix(".part").write_text(json.dumps(result), encoding="utf-8")
    path.with_suffix(".part").replace(path)
