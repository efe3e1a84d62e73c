"""Checkpoints from which training goes on exactly: the resumed run ends with the weights of one never stopped.

A checkpoint is taken between two rollouts and holds everything that the rest of the run depends on: weights,
optimizer, counters, the random state of every generator, β, where each episode stands, running statistics, and what
callbacks remember. It is a folder of JSON and safetensors, so opening one never runs code. ::

    callback = [AdaptiveKLCallback(target=6.0, horizon=10_000), TrainingCheckpoints("checkpoints", every=16_384)]
    model.learn(100_000, callback=callback)

and after a stop, however sudden, with the same environment, agent and callbacks made anew::

    resume(model, "checkpoints", callback=callback)
    model.learn(100_000 - model.num_timesteps, callback=callback, reset_num_timesteps=False)

In several processes all of them make these calls. The first one writes, and the checkpoint has the environment, the
random state and the callbacks of each; training goes on in as many processes, each of which reads the folder.

A folder appears under its name only when it is complete, each file is listed with its SHA-256 in ``manifest.json``,
and a damaged checkpoint is passed over for the one before it.
"""

from __future__ import annotations

import inspect
import random
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from textgym.agents.callbacks.state_files import check_storable, read_state, write_state
from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.common.progress import TrainingProgress
from textgym.agents.common.text_environment import TextEnvironment
from textgym.checkpoint_folders import CheckpointError, check_manifest, superfluous, write_whole
from textgym.checks import check_int
from textgym.envs.sb3 import TextGenVecEnv, deferrable
from textgym.prompts.rows import PromptSource

_NAME = re.compile(r"checkpoint-(\d{12})")
# What each process has of its own; weights, optimizer and counters are the same in all.
_OWN = ("last_episode_starts", "held", "log", "env", "callbacks", "random")


def _check_columns(source: PromptSource) -> None:
    rows = source.rows
    if rows is None or rows.is_table:
        return
    for i, row in enumerate(rows):
        for name, value in row.columns.items():
            try:
                check_storable(value)
            except TypeError as error:
                raise TypeError(
                    f"prompts[{i}]: the column {name!r} has {value!r:.60}, which a checkpoint can't hold: give "
                    "numbers, texts, lists, dictionaries and arrays, or leave the column out"
                ) from error


# The state of a training


def training_state(model: TextOnPolicyAlgorithm, callback: Any = None) -> dict[str, Any]:
    """Everything that the rest of a training depends on, between two rollouts.

    :param model: the agent
    :param callback: the callback or callbacks of ``learn``; those with a ``state_dict`` are asked for it
    :raises CheckpointError: if wrappers around the environment keep a state of their own
    :raises DivergedError: if the weights are not finite; a checkpoint of them would be worse than none
    """
    env = _text_vec_env(model)
    if not model.has_begun:
        raise CheckpointError("training has not begun: there is no state to keep before the first rollout")
    model.check_finite()
    state = {
        **model.state_dict(),
        "env": env.state_dict(),
        "callbacks": [_state_of(part) for part in _callbacks(callback)],
        "random": _random_state(model),
    }
    own = model.processes.gather({name: state[name] for name in _OWN})
    return {**state, "other_processes": own[1:]}


def load_training_state(model: TextOnPolicyAlgorithm, state: dict[str, Any], callback: Any = None) -> None:
    """Put an agent, its environment and its callbacks into the state that :func:`training_state` gave.

    :param model: an agent made like the one that was saved, with an environment made like its
    :param state: the state
    :param callback: the callbacks, made like those of the saved training and in the same order
    :raises ValueError: if the state is of another agent, environment or set of callbacks
    """
    if state["agent"] != type(model).__name__:
        raise ValueError(f"the state is of the agent {state['agent']}, not of {type(model).__name__}")
    processes, saved = model.processes, 1 + len(state["other_processes"])
    if processes.world_size != saved:
        raise ValueError(
            f"the state is of a training in {saved} processes, and this is one in {processes.world_size}: go on with "
            f"{saved}, as with accelerate launch --num_processes {saved}"
        )
    if not processes.is_main:
        state = {**state, **state["other_processes"][processes.rank - 1]}
    parts = list(_callbacks(callback))
    names = [name for name, _ in state["callbacks"]]
    if names != [type(part).__name__ for part in parts]:
        raise ValueError(
            f"the state is of a training with the callbacks {names}, given were {[type(p).__name__ for p in parts]}: "
            "make the same ones in the same order"
        )
    env = _text_vec_env(model)
    model.load_state_dict(state, env.load_state_dict(state["env"]))
    for part, (_, part_state) in zip(parts, state["callbacks"], strict=True):
        if hasattr(part, "load_state_dict"):
            part.load_state_dict(part_state)
        else:
            vars(part).update(part_state)
    _set_random_state(model, state["random"])  # last: building and loading draw random numbers


def _text_vec_env(model: TextOnPolicyAlgorithm) -> TextGenVecEnv:
    env = model.env
    if env is None or deferrable(env) is None:
        raise CheckpointError(
            "an exact checkpoint needs the bare text vector environment, as gym.make_vec('TextGen-v0', num_envs=N) "
            f"makes it; wrappers and single environments keep states of their own. Here it is {env}"
        )
    assert isinstance(env, TextGenVecEnv)
    return env


def _callbacks(callback: Any) -> Iterator[BaseCallback]:
    """The single callbacks of what ``learn`` takes, inner ones after those around them; not the progress bar."""
    if isinstance(callback, CallbackList):
        callback = callback.callbacks
    for part in callback if isinstance(callback, Sequence) else [callback]:
        if isinstance(part, CallbackList):
            yield from _callbacks(part)
        elif isinstance(part, BaseCallback) and not isinstance(part, TrainingProgress):
            yield part
            yield from _callbacks(getattr(part, "callback", None))
            yield from _callbacks(getattr(part, "callback_on_new_best", None))


def _state_of(callback: BaseCallback) -> tuple[str, Any]:
    """A callback's name and what it remembers: what it says itself, else those of its attributes that are data.

    Not those that its constructor sets: who resumes with another limit or frequency means it.
    """
    if hasattr(callback, "state_dict"):
        return type(callback).__name__, callback.state_dict()
    given = inspect.signature(type(callback).__init__).parameters
    remembered = {name: v for name, v in vars(callback).items() if name not in given and _is_data(v)}
    return type(callback).__name__, remembered


def _is_data(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_data, value))
    return value is None or isinstance(value, bool | int | float | str | np.number | np.ndarray)


def _random_state(model: TextOnPolicyAlgorithm) -> dict[str, Any]:
    cuda: list[torch.Tensor] = []
    if torch.cuda.is_available():
        # Of several processes each has a device of its own, and must not touch the others'.
        alone = model.processes.world_size == 1
        cuda = torch.cuda.get_rng_state_all() if alone else [torch.cuda.get_rng_state()]
    algorithm, keys, *rest = np.random.get_state()  # noqa: NPY002 (the generator that SB3 seeds)
    return {
        "python": random.getstate(),
        "numpy": [algorithm, np.asarray(keys), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "actions": model.action_space.np_random.bit_generator.state,
    }


def _set_random_state(model: TextOnPolicyAlgorithm, state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        if model.processes.world_size == 1:
            torch.cuda.set_rng_state_all(state["cuda"])
        else:
            torch.cuda.set_rng_state(state["cuda"][0])
    model.action_space.np_random.bit_generator.state = state["actions"]


# Folders


def write_checkpoint(folder: str | Path, state: dict[str, Any], timesteps: int, keep: int | None = None) -> Path:
    """Write a state as ``folder/checkpoint-<timesteps>``, all or nothing, and delete older ones.

    :param folder: where the checkpoints are; made if it does not exist
    :param state: nested data, see :mod:`textgym.agents.callbacks.state_files`
    :param timesteps: names the checkpoint; one of that name is replaced
    :param keep: how many of the newest checkpoints stay; None for all
    :return: the checkpoint's folder
    :raises CheckpointError: if it can't be written, for example because the disk is full; older ones are untouched
    """
    folder = Path(folder)
    target = folder / f"checkpoint-{timesteps:012d}"
    write_whole(target, lambda partial: write_state(partial, state))
    if keep is not None:
        for old in superfluous([path for _, path in checkpoints_in(folder)], keep):
            shutil.rmtree(old)
    return target


def checkpoints_in(folder: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder as pairs of timesteps and path, oldest first; none if there is no such folder."""
    folder = Path(folder)
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in found if match)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read one checkpoint.

    :param path: ``checkpoint-<timesteps>``
    :raises CheckpointError: if a file of it is missing or not what was written
    """
    path = Path(path)
    check_manifest(path)
    try:
        state: dict[str, Any] = read_state(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error
    return state


def read_latest(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read the newest whole checkpoint; warns of newer ones that are damaged.

    :param folder: where the checkpoints are, or one checkpoint
    :return: its folder and the state
    :raises FileNotFoundError: if there is no checkpoint
    :raises CheckpointError: if none of them is whole
    """
    folder = Path(folder)
    if _NAME.fullmatch(folder.name):
        return folder, read_checkpoint(folder)
    found = checkpoints_in(folder)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {folder}: it has no folder named checkpoint-<timesteps>")
    problem: CheckpointError | None = None
    for _, path in reversed(found):
        try:
            state = read_checkpoint(path)
        except CheckpointError as error:
            problem = error
            warnings.warn(f"{error}; trying the one before it", UserWarning, stacklevel=2)
        else:
            return path, state
    raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is whole") from problem


def resume(model: TextOnPolicyAlgorithm, folder: str | Path, callback: Any = None) -> Path:
    """Bring an agent into the state of the newest whole checkpoint.

    :param model: an agent made like the one that was saved, with an environment made like its
    :param folder: where the checkpoints are, or one checkpoint
    :param callback: the callbacks that ``learn`` will get, made like those of the saved training
    :return: the checkpoint's folder
    :raises FileNotFoundError: if there is no checkpoint
    :raises CheckpointError: if none is whole
    :raises ValueError: if it is of another agent, environment or set of callbacks
    """
    path, state = read_latest(folder)
    found = model.processes.gather(path.name)
    if len(set(found)) > 1:
        raise CheckpointError(f"the processes found different checkpoints in {folder}, {found}: all must see one")
    load_training_state(model, state, callback)
    return path


class TrainingCheckpoints(BaseCallback):
    """Write a checkpoint every so many tokens, between two rollouts, and at the end of training.

    Put it last among the callbacks, so that it sees what the others remember.

    :param folder: where the checkpoints go
    :param every: tokens between two checkpoints, rounded up to whole rollouts
    :param keep: how many of the newest stay; None for all
    :param verbose: 1 says what was written
    """

    def __init__(self, folder: str | Path, every: int, keep: int | None = 3, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_int("every", every, low=1)
        if keep is not None:
            check_int("keep", keep, low=1)
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self._written: int | None = None  # timesteps of the newest checkpoint

    def _on_training_start(self) -> None:
        """:raises TypeError: if prompts have columns that a checkpoint can't hold; later, work would be lost by it"""
        assert isinstance(self.model, TextOnPolicyAlgorithm)
        _check_columns(TextEnvironment(_text_vec_env(self.model)).prompts)
        if self._written is None or self._written > self.num_timesteps:
            self._written = self.model.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        assert self._written is not None
        if self.model.num_timesteps - self._written >= self.every:
            self.write()

    def _on_training_end(self) -> None:
        self.write()

    def write(self) -> Path:
        """Write a checkpoint now; allowed between two rollouts."""
        assert isinstance(self.model, TextOnPolicyAlgorithm)
        self._written = self.model.num_timesteps
        callbacks = self.locals.get("callback")
        state = training_state(self.model, callbacks)
        steps, processes = self.model.num_timesteps, self.model.processes
        path = processes.on_main(lambda: write_checkpoint(self.folder, state, steps, self.keep))
        if self.verbose >= 1 and processes.is_main:
            print(f"Wrote {path}")
        return path

    def state_dict(self) -> dict[str, Any]:
        return {"written": self._written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._written = state["written"]
