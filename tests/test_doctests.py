"""The examples in docstrings are run, with warnings as errors like every other test.

pytest's own --doctest-modules would import envs/ and agents/ under those names, as second copies of
textgym.envs and textgym.agents; here every module is imported by its real name.
"""

from __future__ import annotations

import doctest
import importlib

import pytest
from places import ROOT

FOLDERS = {"textgym": "textgym", "envs": "textgym.envs", "agents": "textgym.agents"}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    names = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>>" in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join([package, *parts]).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_print_what_they_say(name, request):
    if name.startswith("textgym.agents."):  # which learn; elsewhere examples say what the embedded models make of texts
        request.getfixturevalue("narrow_embedded_models")
    results = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert results.attempted > 0, f"{name} has '>>>' but no example that doctest finds"
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples failed (shown above)"
