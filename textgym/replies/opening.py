"""Who speaks in a run, by the names that options have for them: models, tools, scripts, servers, Python code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textgym.named_objects import object_named
from textgym.replies.base import FunctionReply, Reply
from textgym.rewards.code_names import code_in

KINDS = (
    "file.py:function or module:object, model:NAME (a language model), tool:calculate or tool:file.py:function (also "
    "several, with commas), script:FILE (a line after another), or http://... (a server of replies)"
)


def as_reply(obj: Any) -> Reply:
    """Turn what a user may pass as ``reply=`` into a :class:`Reply`.

    :param obj: a :class:`Reply`, a function ``reply(prompts, transcripts, **columns)``, or a name that runs no code,
        such as ``"model:smollm2"``, see :func:`load_reply`
    :raises TypeError: for anything else
    :raises ValueError: if there is no reply of that name
    """
    if isinstance(obj, Reply):
        return obj
    if isinstance(obj, str):
        return reply_named(obj)
    if callable(obj):
        return FunctionReply(obj)
    raise TypeError(
        "reply must be a function reply(prompts, transcripts, **columns) -> list[str | None], or a "
        f"textgym.replies.Reply; got {type(obj).__name__} {obj!r}"
    )


def load_reply(text: str, seed: int = 0, **model: Any) -> Reply:
    """The reply that an option names.

    ================================================ ===============================================================
    ``my_game.py:reply``, ``package.module:reply``   a function or reply object in a file or a module, or a class that
                                                     needs no arguments
    ``model:smollm2``                                a :class:`~textgym.replies.LanguageModelReply` of whatever
                                                     ``language_model=`` takes
    ``tool:calculate``, ``tool:mine.py:search``      a :class:`~textgym.replies.ToolReply` of the calculator, or of
                                                     functions of yours; several with commas between them
    ``script:lines.txt``                             a :class:`~textgym.replies.ScriptedReply` of a file's lines
    ``http://localhost:8701/reply``                  a :class:`~textgym.replies.RemoteReply`
    ================================================ ===============================================================

    A Python file finds what lies beside it, and a module is also looked for in the current folder.

    :param seed: of what a language model says
    :param model: how a language model is loaded, and ``max_new_tokens`` of what it says
    :raises ValueError: if there is no such file, module, object, model or tool, or its code fails while it is imported
    """
    text = text.strip()
    if code_of_reply(text) == [text]:
        return _reply_in(text)
    return reply_named(text, seed, _tool_in, **model)


def reply_named(
    text: str, seed: int = 0, tool: Callable[[str], tuple[str, Callable[..., Any]]] | None = None, **model: Any
) -> Reply:
    """The reply of a name that runs no code.

    :param tool: opens a tool that is code
    :raises ValueError: if there is none, or the name is that of code
    """
    text = text.strip()
    kind, _, what = text.partition(":")
    if kind in ("http", "https"):
        from textgym.replies.remote import RemoteReply

        return RemoteReply(text)
    if kind == "script" and what:
        from textgym.replies.scripted import ScriptedReply

        return ScriptedReply(_lines_of(what, text))
    if kind == "model" and what:
        return _model(what, seed, model)
    if kind == "tool" and what:
        from textgym.replies.tools import ToolReply

        return ToolReply(dict(_tool(part.strip(), text, tool) for part in what.split(",")))
    if code_of_reply(text):
        raise ValueError(f"reply={text!r} is Python code: import it, and pass the function or object itself")
    raise ValueError(f"reply={text!r} must be {KINDS}")


def code_of_reply(text: str) -> list[str]:
    """The Python code that is run when a reply of that name is loaded. ::

    >>> code_of_reply("my_game.py:reply"), code_of_reply("tool:calculate,mine.py:search")
    (['my_game.py:reply'], ['mine.py:search'])
    >>> code_of_reply("model:smollm2")
    []
    """
    kind, _, what = text.strip().partition(":")
    named = [part.strip() for part in what.split(",")] if kind == "tool" else [text.strip()]
    if kind in ("model", "script", "http", "https"):
        return []
    return [name for name in named if code_in(name) == [name]]


def is_address(text: str) -> bool:
    """Whether a reply of that name sends what is said to a server."""
    return text.strip().startswith(("http://", "https://"))


def _reply_in(text: str) -> Reply:
    where, _, name = text.rpartition(":")
    found = object_named(where, name, f"reply={text!r}")
    if inspect.isclass(found):
        try:
            found = found()
        except TypeError as error:
            raise ValueError(
                f"reply={text!r} is the class {name}, which needs arguments ({error}); name an instance of it"
            ) from error
    try:
        return as_reply(found)
    except TypeError as error:
        raise ValueError(f"reply={text!r}: {name} in {where} can't be used: {error}") from error


def _tool(
    part: str, text: str, code: Callable[[str], tuple[str, Callable[..., Any]]] | None
) -> tuple[str, Callable[..., Any]]:
    """A tool's name and function."""
    from textgym.replies.tools import calculate

    if part == "calculate":
        return part, calculate
    if code_in(part) == [part]:
        if code is not None:
            return code(part)
        raise ValueError(f"reply={text!r}: {part} is Python code: import it, and pass a ToolReply of it")
    raise ValueError(f"reply={text!r}: there is no tool {part!r}; give calculate, file.py:function or module:function")


def _tool_in(part: str) -> tuple[str, Callable[..., Any]]:
    where, _, name = part.rpartition(":")
    found = object_named(where, name, f"reply='tool:{part}'")
    if not callable(found):
        raise ValueError(f"reply='tool:{part}': {name} in {where} is a {type(found).__name__}, not a function")
    return name, found


def _lines_of(path: str, text: str) -> list[str]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"reply={text!r}: there is no file {path}")
    lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"reply={text!r}: {path} has no line with text")
    return lines


def _model(name: str, seed: int, options: dict[str, Any]) -> Reply:
    from textgym.language_model import load_language_model
    from textgym.replies.language_model import LanguageModelReply

    settings = {key: options.pop(key) for key in ("max_new_tokens",) if key in options}
    return LanguageModelReply(load_language_model(name, **options), seed=seed, **settings)
