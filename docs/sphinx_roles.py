"""An extension of Griffe: docstrings are written as Sphinx reads them, and these pages are Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(?P<short>~?)(?P<path>[\w.]+)`")
LITERAL = re.compile(r"(?P<before>\S?)(?P<space> ?)::(?=\n|$)")


class SphinxRoles(griffe.Extension):
    """Turn roles such as ``:class:`~textgym.kl.AdaptiveKLController``` into links, and ``::`` into what it prints."""

    def on_object(self, *, obj: griffe.Object, **arguments: Any) -> None:
        """Change a docstring before it is rendered."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with Markdown's links.

    >>> as_markdown("See :meth:`~a.b.C.d`::")
    'See <autoref identifier="a.b.C.d" optional><code>d</code></autoref>:'
    """

    def link(match: re.Match[str]) -> str:
        path = match["path"]
        shown = path.rpartition(".")[2] if match["short"] else path
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    # "as in ::" and "as in::" both announce an indented block; only the second prints a colon.
    text = LITERAL.sub(lambda match: match["before"] + ("" if match["space"] else ":"), text)
    return ROLE.sub(link, text)
