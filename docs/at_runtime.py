"""An extension of Griffe, which reads sources: what the package says of itself only when it runs.

A constructor's ``**arguments: Unpack[...]`` is shown as the arguments that it stands for, and ``textgym.agents`` with
the public names of its table.
"""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Iterator
from typing import Any

import griffe

import textgym.agents
from textgym.handed_on import takers


class AtRuntime(griffe.Extension):
    """Put in the place of ``**arguments`` what the constructors that take them say about each, and of a computed
    ``__all__`` its names."""

    def on_package(self, *, pkg: griffe.Module, **arguments: Any) -> None:
        """Change a whole package, when the base classes are known."""
        pkg["agents"].exports = list(textgym.agents.__all__)
        changed = {init: list(expanded(cls)) for cls, init in constructors(pkg)}
        for init, parameters in changed.items():
            init.parameters = griffe.Parameters(*parameters)


def constructors(module: griffe.Module) -> Iterator[tuple[griffe.Class, griffe.Function]]:
    """Classes of a package that hand arguments on, with their constructors."""
    for member in module.members.values():
        if member.is_alias:
            continue
        if member.is_module:
            yield from constructors(member)
        elif member.is_class and "__init__" in member.members:
            init = member.members["__init__"]
            if any(
                "Unpack" in str(p.annotation) for p in init.parameters if p.kind is griffe.ParameterKind.var_keyword
            ):
                yield member, init


def expanded(cls: griffe.Class) -> Iterator[griffe.Parameter]:
    """The parameters of a constructor, first its own and then those of other classes that it takes."""
    package, at_runtime = cls.package, pydoc.locate(cls.path)
    paths = [f"{taker.__module__}.{taker.__qualname__}".split(".") for taker in takers(at_runtime)]
    stated = [list(package[path[1:]].members["__init__"].parameters) for path in paths if path[0] == package.name]
    yield from (p for p in stated[0] if p.kind is not griffe.ParameterKind.var_keyword)
    own = {p.name for p in stated[0]}
    for name in inspect.signature(at_runtime).parameters:
        if name not in own:
            found = next(p for parameters in stated for p in parameters if p.name == name)
            yield griffe.Parameter(
                name, annotation=found.annotation, kind=griffe.ParameterKind.keyword_only, default=found.default
            )
