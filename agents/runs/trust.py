"""Whose code a run names, and when it is run without a question.

A run's configuration may name Python code, such as ``my_reward.py:reward``. For a run of your own it is your code; a
folder from somebody else may name anything. What tells the two apart can't stand in the folder, which its maker writes:
a run that begins here puts a seal into ``run.json``, made with a key that never leaves your state directory
(``$XDG_STATE_HOME/textgym`` or ``~/.local/state/textgym``). It covers where the code lies and what the file holds.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.machinery
import json
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from textgym.replies.opening import code_of_reply, is_address
from textgym.rewards.code_names import code_in, names_code
from textgym.rewards.expressions import reaches_out

if TYPE_CHECKING:
    from textgym.agents.runs.config import RunConfig

KEY_BYTES = 32


class UntrustedCodeError(ValueError):
    """A run names code that was not yours when the run began, or isn't what it was then."""


def code_of(config: RunConfig, algorithm: str) -> list[str]:
    """What a run's options name that may be code: its reward, its agent, and who replies in it."""
    return [config.reward, algorithm, *code_in_reply(config.reply)]


def code_in_reply(reply: str | None) -> list[str]:
    """The code that a reply's name has in it, and the server that it is sent to."""
    if reply is None:
        return []
    return [reply] if is_address(reply) else code_of_reply(reply)


def seals(names: Iterable[str]) -> list[str]:
    """Seals of the code that options name, for ``run.json``.

    :param names: what options name; ``file.py:object`` and ``module:object`` in them get a seal, and so do rewards that
        write files or send texts to other machines
    :return: none where the state directory can't be written to
    """
    code = _to_be_trusted(names)
    if not code:
        return []
    try:
        key = _key()
    except OSError:
        return []
    return [_seal(key, name) for name in code]


def check_code(names: Iterable[str], run: str | Path, trusted: bool) -> None:
    """To be asked before a run's code is run.

    :param names: what the run's options name
    :param run: its folder, with ``run.json``
    :param trusted: whether the user has said that the code may run
    :raises UntrustedCodeError: if one of them is code that the run wasn't begun with by this user, or has changed
    """
    code = _to_be_trusted(names)
    if trusted or not code:
        return
    begun_with = _sealed(Path(run) / "run.json")
    for name, seal in zip(code, seals(code) or [""] * len(code), strict=True):
        if not any(hmac.compare_digest(seal, known) for known in begun_with):
            does = "is Python code" if names_code(name) else "writes files or sends texts to other machines"
            raise UntrustedCodeError(
                f"the run {run} names {name}, which {does} and would be used now, and either the run was not begun by "
                "you on this machine, or the code has changed or moved since. Look at it, then give --trust-code; or "
                "name others with --reward and --reply"
            )


def _to_be_trusted(names: Iterable[str]) -> list[str]:
    """The parts of what options name that run code, write files or reach other machines."""
    found = []
    for name in names:
        found += [] if is_address(name) else code_in(name)
        found += [name] if is_address(name) or reaches_out(name) else []
    return found


def check_model_code(config: RunConfig, run: str | Path, trusted: bool) -> None:
    """To be asked before the model of a run is opened, whose checkpoint may have come with Python code.

    :param config: of the run
    :param run: its folder, for messages
    :param trusted: whether the user has said that the code may run
    :raises UntrustedCodeError: if the run has ``trust_remote_code`` and the user hasn't said so again
    """
    if config.trust_remote_code and not trusted:
        raise UntrustedCodeError(
            f"the run {run} has trust_remote_code, and Python code that comes with its model, {config.model}, would be "
            "run now. Look at it, then give --trust-code"
        )


def _sealed(path: Path) -> list[str]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return [seal for seal in known["code"] if isinstance(seal, str) and seal.isascii()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _seal(key: bytes, name: str) -> str:
    where, _, attribute = name.rpartition(":") if names_code(name) else (name, "", "")
    file = _file_of(where) if attribute else None
    contents = hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else ""
    covered = json.dumps([where if file is None else str(file), attribute, contents])
    return hmac.new(key, covered.encode("utf-8", "surrogatepass"), "sha256").hexdigest()


def _file_of(where: str) -> Path | None:
    """Where a Python file or a module lies, without importing anything."""
    if where.endswith(".py"):
        return Path(where).expanduser().resolve()
    top, _, rest = where.partition(".")
    found = importlib.machinery.PathFinder.find_spec(top, [os.getcwd(), *sys.path])
    if found is None or found.origin is None:
        return None
    if not rest or not found.submodule_search_locations:
        return Path(found.origin).resolve()
    inside = Path(found.submodule_search_locations[0], *rest.split("."))
    return (inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")).resolve()


def _key() -> bytes:
    """The user's key, made when it is first wanted.

    :raises OSError: if it can't be read or made
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "textgym"
    path = state / "key"
    if not path.is_file():
        state.mkdir(parents=True, exist_ok=True)
        new = state / f".key-{os.getpid()}-{secrets.token_hex(4)}"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(new, path)  # whole at once, and never in the place of one that another process has made
        except FileExistsError:
            pass
        finally:
            new.unlink()
    key = path.read_bytes()
    if len(key) < KEY_BYTES:
        raise OSError(f"{path} is not a key of textgym: remove it")
    return key
