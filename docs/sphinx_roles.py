"""An extension of Griffe: docstrings are written as Sphinx reads them, and these pages are Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(?P<short>~?)(?P<path>[\w.]+)`")
LITERAL = re.compile(r"(?P<before>\S?)(?P<space> ?)::(?=\n|$)")


class SphinxRoles(griffe.Extension):
    """Turn roles such as ``:class:`~textgym.kl.AdaptiveKLController``` into links, and ``::`` into what it prints."""

    def on_package(self, *, pkg: griffe.Module, **arguments: Any) -> None:
        """Change the docstrings of a whole package, when base classes are known."""
        for obj in documented(pkg):
            obj.docstring.value = as_markdown(obj.docstring.value, lambda name, obj=obj: resolved(obj, name))


def documented(obj: griffe.Object) -> Iterator[griffe.Object]:
    """Everything in a module that has a docstring, itself included."""
    if obj.docstring is not None:
        yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from documented(member)


def resolved(obj: griffe.Object, name: str) -> str:
    """The path of what ``name`` means in an object's docstring: a member, also an inherited one, of the object or of
    what is around it; the name itself where nothing is called so."""
    first, *rest = name.split(".")
    scope: griffe.Object | None = obj
    while scope is not None:
        if first in scope.all_members:
            found = scope.all_members[first]
            try:
                for part in rest:
                    found = found.all_members[part]
                return found.final_target.path if found.is_alias else found.path
            except (KeyError, griffe.AliasResolutionError):  # of another package, or set when the code runs
                return name
        scope = scope.parent
    return name


def as_markdown(text: str, resolve: Callable[[str], str] = str) -> str:
    """A docstring with Markdown's links.

    :param resolve: the path that a role's text stands for

    >>> as_markdown("See :meth:`~a.b.C.d`::")
    'See <autoref identifier="a.b.C.d" optional><code>d</code></autoref>:'
    """

    def link(match: re.Match[str]) -> str:
        shown = match["path"].rpartition(".")[2] if match["short"] else match["path"]
        return f'<autoref identifier="{resolve(match["path"])}" optional><code>{shown}</code></autoref>'

    # "as in ::" and "as in::" both announce an indented block; only the second prints a colon.
    text = LITERAL.sub(lambda match: match["before"] + ("" if match["space"] else ":"), text)
    return ROLE.sub(link, text)
