"""Options that commands share: those of runs are made of the fields of ``RunConfig``, each in one place."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Optional, get_type_hints

import typer

from textgym.agents.runs.config import RunConfig


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of :class:`RunConfig`; those that are not given are None.

    :param command: takes them as ``**options``
    """
    return _with_options(command, "options", [field.name for field in dataclasses.fields(RunConfig)])


@dataclass(frozen=True)
class FileOptions:
    """How a file of prompts is read, as ``train`` reads its own; see :class:`RunConfig`."""

    prompt_column: str | None = None
    split: str | None = None
    drop_column: list[str] | None = None
    rename_column: list[str] | None = None

    def given(self) -> list[str]:
        """The flags that were given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]


def with_file_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of how a file of prompts is read.

    :param command: takes them as ``file``, a :class:`FileOptions`
    """
    names = [field.name for field in dataclasses.fields(FileOptions)]

    def with_file(**arguments: Any) -> None:
        file = FileOptions(**{name: arguments.pop(name) for name in names})
        command(**arguments, file=file)

    with_file.__name__, with_file.__doc__ = command.__name__, command.__doc__
    return _with_options(with_file, "file", names, command)


def _with_options(
    command: Callable[..., None], taken_as: str, names: Sequence[str], like: Callable[..., None] | None = None
) -> Callable[..., None]:
    """A command with the options of some fields in the place of one parameter.

    :param like: whose other parameters it has; by default its own
    """
    like = like or command
    kinds, fields = get_type_hints(RunConfig), {field.name: field for field in dataclasses.fields(RunConfig)}
    hints = {name: hint for name, hint in get_type_hints(like, include_extras=True).items() if name != taken_as}
    own = [p for name, p in inspect.signature(like).parameters.items() if name != taken_as]
    parameters = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in own]
    for name in names:
        field, kind = fields[name], kinds[name]
        if type(None) not in getattr(kind, "__args__", ()):
            kind = Optional[kind]  # noqa: UP045  the type is an object here
        default = field.default
        shown = False if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        flags = ("--set",) if name == "agent_options" else ()
        text, panel = field.metadata["help"], field.metadata["section"]
        if name == "prompt_column" and taken_as == "file":
            text, shown = f"{text}; default the run's, else prompt", False
        option = typer.Option(*flags, help=text, rich_help_panel=panel, show_default=shown)
        hints[name] = Annotated[kind, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[name]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints
    return command
