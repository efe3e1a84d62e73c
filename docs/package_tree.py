"""A hook of MkDocs: lays out the repository's three folders as the one package that gets installed.

mkdocstrings reads the sources without importing them, and can't know that setuptools installs ``envs`` and ``agents``
inside of ``textgym``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_startup(**arguments: Any) -> None:
    """Make ``.cache/docs/textgym``, a folder of links."""
    package = ROOT / ".cache" / "docs" / "textgym"
    package.mkdir(parents=True, exist_ok=True)
    sources = [*(ROOT / "textgym").iterdir(), ROOT / "envs", ROOT / "agents"]
    wanted = {source.name: source for source in sources if not source.name.startswith(("__pycache__", "."))}
    for link in package.iterdir():
        if link.name not in wanted:
            link.unlink()
    for name, source in wanted.items():
        link = package / name
        if not link.is_symlink():
            link.symlink_to(source)
