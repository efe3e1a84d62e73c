"""What of a run's configuration may change between its checkpoint and its resumption."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from textgym.agents.runs.config import RunConfig

# How long the run goes on, and what it writes on its way.
FREE = ("timesteps eval_every checkpoint_every keep_checkpoints samples tensorboard patience process_timeout").split()
# What is computed stays the same but for its rounding, from which other tokens may come.
ROUNDED = "threads device compile gradient_checkpointing".split()


def recorded_configuration(state: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The algorithm and the options of the run that a checkpoint is of.

    :param state: what the checkpoint holds
    :raises ValueError: if it is the checkpoint of a script, not of a run
    """
    for name, remembered in state["callbacks"]:
        if name == "RunRecorder":
            return remembered["algorithm"], remembered["config"]
    raise ValueError("the checkpoint is not that of a run: it has no configuration; resume() goes on with a script's")


def check_changes(state: dict[str, Any], algorithm: str, config: RunConfig, run: Path) -> None:
    """Compare a configuration with that of the checkpoint from which it is to go on.

    Warns of options that change the rounding of results.

    :param state: what the checkpoint holds
    :param run: the run's folder
    :raises ValueError: naming the options that would make another run of it, with their old and new values
    """
    before_algorithm, before = recorded_configuration(state)
    now = {"algorithm": algorithm, **config.as_dict()}
    before = {"algorithm": before_algorithm, **before}
    changed = [name for name in now if name not in FREE and before.get(name) != now[name]]
    refused = [name for name in changed if name not in ROUNDED]
    if refused:
        values = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r} now" for name in refused)
        raise ValueError(
            f"the run {run} can't go on with another configuration than it was begun with: {values}. Set config.yaml "
            "back, or begin a new run"
        )
    for name in changed:
        warnings.warn(
            f"{name} was {before.get(name)!r} and is {now[name]!r} now: the run goes on, with results that differ from "
            "those of one that was never stopped",
            UserWarning,
            stacklevel=3,
        )
    done = int(state["counters"]["num_timesteps"])
    if config.timesteps != before["timesteps"] and config.timesteps < done:
        raise ValueError(
            f"timesteps={config.timesteps} is less than the {done} that the run {run} was trained on by its newest "
            "checkpoint: give more, or leave it as it was"
        )
