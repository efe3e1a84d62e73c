"""Rewards by name: what ``--reward`` and configurations hold, from a formula to a function in a Python file."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

from textgym.named_objects import object_named
from textgym.rewards.base import Reward, as_reward
from textgym.rewards.expressions import EMBEDDED, parse_reward
from textgym.rewards.reward_directory import open_reward

# A quoted text, or a function in a file or module, as in my_reward.py:score and package.module:score.
_QUOTED_OR_CODE = re.compile(
    r"""(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    | (?<![\w.])(?P<code>(?:[A-Za-z]:[\\/]|~?/|\.{1,2}/)?[A-Za-z_][\w./\\-]*:[A-Za-z_]\w*)""",
    re.VERBOSE,
)
_HUB_ID = re.compile(r"[A-Za-z_][\w.-]*/[A-Za-z_][\w.-]*")


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

    formula = _QUOTED_OR_CODE.sub(remember, text)
    if formula in given:
        return given[formula]
    return parse_reward(formula, given) if given else reward_named(text, trust_remote_code)


def reward_named(text: str, trust_remote_code: bool = False) -> Reward:
    """The same, but for what would run code.

    :raises ValueError: as :func:`load_reward`, and if it names code
    """
    text = text.strip()
    if text == EMBEDDED:
        return as_reward(None)
    if os.path.isdir(text) or text.startswith((".", "~", os.sep)):
        return open_reward(text, trust_remote_code=trust_remote_code)
    if _HUB_ID.fullmatch(text):
        if os.path.isdir(text.partition("/")[0]):
            raise FileNotFoundError(f"reward={text!r}: there is no such directory")
        return open_reward(text, trust_remote_code=trust_remote_code)
    if names_code(text):
        raise ValueError(f"reward={text!r} is Python code: import it, and pass the function or object itself")
    return parse_reward(text)


def code_in(text: str) -> list[str]:
    """The Python code that is run when a reward of that name is loaded. ::

    >>> code_in("0.5 * my_reward.py:score + router('a:b', {}) - package.module:thing")
    ['my_reward.py:score', 'package.module:thing']
    """
    where, _, _ = text.strip().rpartition(":")
    if where.endswith(".py") and Path(where).expanduser().is_file():
        return [text.strip()]
    return [match["code"] for match in _QUOTED_OR_CODE.finditer(text) if match["code"]]


def names_code(text: str) -> bool:
    """Whether loading a reward of that name runs a Python file or imports a module."""
    return bool(code_in(text))


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
