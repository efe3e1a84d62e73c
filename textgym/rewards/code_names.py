"""Names of rewards that are Python code: a function in a file or a module."""

from __future__ import annotations

import re
from pathlib import Path

# A quoted text, or a function in a file or module, as in my_reward.py:score and package.module:score.
QUOTED_OR_CODE = re.compile(
    r"""(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    | (?<![\w.])(?P<code>(?:[A-Za-z]:[\\/]|~?/|\.{1,2}/)?[A-Za-z_][\w./\\-]*:[A-Za-z_]\w*)""",
    re.VERBOSE,
)


def code_in(text: str) -> list[str]:
    """The Python code that is run when a reward of that name is loaded. ::

    >>> code_in("0.5 * my_reward.py:score + router('a:b', {}) - package.module:thing")
    ['my_reward.py:score', 'package.module:thing']
    """
    where, _, _ = text.strip().rpartition(":")
    if where.endswith(".py") and Path(where).expanduser().is_file():
        return [text.strip()]
    return [match["code"] for match in QUOTED_OR_CODE.finditer(text) if match["code"]]


def names_code(text: str) -> bool:
    """Whether loading a reward of that name runs a Python file or imports a module."""
    return bool(code_in(text))
