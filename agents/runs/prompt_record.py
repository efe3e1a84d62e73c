"""Which prompts a run learns from and which it holds out, kept in its folder as hashes.

Whoever evaluates a model later can then tell what it has been trained on, whatever became of the file of prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from textgym.checkpoint_folders import write_text_whole
from textgym.prompts.rows import PromptRow


def prompt_hash(prompt: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def write_prompt_record(path: Path, trained_on: Iterable[PromptRow], held_out: Iterable[PromptRow]) -> None:
    """Write the hashes of a run's prompts, each once and in order."""
    record = {"hash": "blake2b-64 of the prompt", **_hashes(trained_on, held_out)}
    write_text_whole(path, json.dumps(record) + "\n")


def check_same_prompts(path: Path, trained_on: Iterable[PromptRow], held_out: Iterable[PromptRow]) -> None:
    """To be asked before a run goes on: the file of its prompts may have changed since it began.

    :param path: what :func:`write_prompt_record` wrote; where there is no such file nothing is known
    :raises ValueError: if the prompts are others, or the record is broken
    """
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = {name: set(record[name]) for name in ("trained_on", "held_out")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken, so nobody knows what the run was trained on: {error}") from error
    for name, hashes in _hashes(trained_on, held_out).items():
        new, gone = len(set(hashes) - before[name]), len(before[name] - set(hashes))
        if new or gone:
            raise ValueError(
                f"the prompts {name.replace('_', ' ')} are not those that the run began with: {new} are new and {gone} "
                f"are gone. Put them back, or begin a new run ({path} has their hashes)"
            )


def _hashes(trained_on: Iterable[PromptRow], held_out: Iterable[PromptRow]) -> dict[str, list[str]]:
    parts = {"trained_on": trained_on, "held_out": held_out}
    return {name: sorted({prompt_hash(row.prompt) for row in rows}) for name, rows in parts.items()}


def trained_on(path: Path) -> frozenset[str] | None:
    """Hashes of the prompts that a run learns from.

    :param path: what :func:`write_prompt_record` wrote
    :return: None if there is no such file
    :raises ValueError: if it is broken
    """
    if not path.is_file():
        return None
    try:
        return frozenset(json.loads(path.read_text(encoding="utf-8"))["trained_on"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken, so nobody knows what the run was trained on: {error}") from error
