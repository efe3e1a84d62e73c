"""What users may pass as ``reward=`` or name with ``--reward``, opened: objects, formulas, directories, code."""

from __future__ import annotations

import inspect
import re
from os import PathLike
from pathlib import Path
from typing import Any

from textgym.named_objects import object_named
from textgym.rewards.base import Reward
from textgym.rewards.code_names import QUOTED_OR_CODE
from textgym.rewards.expressions import embedded_reward, parse_reward, reward_named
from textgym.rewards.function_reward import check_reward
from textgym.rewards.scores import described


def as_reward(obj: Any) -> Reward:
    """Turn what a user may pass as ``reward=`` into a :class:`Reward`.

    :param obj: a :class:`Reward`; a callable with TRL's signature; a directory or hub id of a reward model or
        classifier, causal or encoder, or of an ensemble of them, see
        :func:`~textgym.rewards.reward_directory.open_reward`; a formula such as ``"0.5*coherence + 0.5*grammar"``, see
        :func:`~textgym.rewards.expressions.parse_reward`; or None for the embedded reward model
    :raises TypeError: for anything else
    :raises FileNotFoundError: if a path is not a directory
    :raises ValueError: if a directory holds no reward model, or a formula can't be read
    """
    if isinstance(obj, Reward) or callable(obj):
        return check_reward("reward", obj)
    if obj is None:
        return embedded_reward()
    if isinstance(obj, str):
        return reward_named(obj)
    if isinstance(obj, PathLike):
        from textgym.rewards.reward_directory import open_reward  # loads transformers

        return open_reward(obj)
    several = isinstance(obj, (list, tuple))
    raise TypeError(
        "reward must be a callable reward(prompts, completions, **columns) -> list[float | None], a textgym "
        "Reward, a path or hub id of a reward model, or None for the embedded one; got "
        + described(obj)
        + ("; several rewards combine by arithmetic: 0.5 * a + 0.5 * b" if several else "")
    )


def load_reward(text: str, trust_remote_code: bool = False) -> Reward:
    """The reward that an option names.

    ================================================== =============================================================
    ``embedded``                                       the sentiment model that ships with textgym
    ``0.5*coherence + 0.5*grammar``                    a formula of the package's rewards, see
                                                       :func:`~textgym.rewards.expressions.parse_reward`
    ``my_reward.py:score``, ``package.module:score``   a function or reward object in a file or a module, or a class
                                                       that needs no arguments; also inside a formula
    ``runs/my-reward-model``                           a directory with a reward model
    ``organisation/model``                             a reward model on the hub
    ================================================== =============================================================

    A Python file finds what lies beside it, and a module is also looked for in the current folder.

    :param trust_remote_code: run Python code that comes with a reward model in a directory or on the hub
    :raises ValueError: if there is no such file, module, object or reward, or its code fails while it is imported
    :raises FileNotFoundError: if it is written as a path and nothing is there
    """
    text = text.strip()
    where, _, name = text.rpartition(":")
    if where.endswith(".py") and Path(where).expanduser().is_file():  # may have spaces in its path
        return _object_in(where, name, text)
    given: dict[str, Reward] = {}

    def remember(match: re.Match[str]) -> str:
        if match["quoted"]:
            return match["quoted"]
        where, _, name = match["code"].rpartition(":")
        placeholder = f"_code_{len(given)}"
        given[placeholder] = _object_in(where, name, text)
        return placeholder

    formula = QUOTED_OR_CODE.sub(remember, text)
    if formula in given:
        return given[formula]
    return parse_reward(formula, given) if given else reward_named(text, trust_remote_code)


def _object_in(where: str, name: str, text: str) -> Reward:
    """The reward called ``name`` in a Python file or a module."""
    found: Any = object_named(where, name, f"reward={text!r}")
    if inspect.isclass(found):
        found = _instance_of(found, text)
    try:
        return as_reward(found)
    except TypeError as error:
        raise ValueError(f"reward={text!r}: {name} in {where} can't be used: {error}") from error


def _instance_of(kind: Any, text: str) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise ValueError(
            f"reward={text!r} is the class {kind.__name__}, which needs arguments ({error}); name an instance of it"
        ) from error
