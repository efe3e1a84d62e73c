"""Imports point one way: from agents to envs to textgym, and inside of each from the top floor down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT, TESTS

PACKAGES = {"agents": "textgym.agents", "envs": "textgym.envs", "textgym": "textgym"}
# From the top floor down; a room's modules may use their own floor and those below it.
FLOORS = [
    ["textgym.agents.cli"],
    ["textgym.agents.runs"],
    ["textgym.agents", "textgym.agents.callbacks"],
    ["textgym.agents.common"],
    ["textgym.agents.distributed"],
    ["textgym.agents.policy"],
    ["textgym.agents.buffers"],
    ["textgym.envs"],
    ["textgym", "textgym.hyperparams", "textgym.replies", "textgym.reward_training", "textgym.tasks"],
    [
        "textgym.rewards",
        "textgym.rewards.combining",
        "textgym.rewards.learned",
        "textgym.rewards.models",
        "textgym.rewards.outside",
        "textgym.rewards.text",
    ],
    ["textgym.prompts"],
    ["textgym.engine"],
    ["textgym.chat", "textgym.embedded", "textgym.packaged"],
]
# At the top of textgym stand things of several floors: what rooms below use of it, and nothing else of it.
FOUNDATIONS = {
    "textgym.checks",
    "textgym.decoding",
    "textgym.divergence",
    "textgym.encodable_text",
    "textgym.extras",
    "textgym.handed_on",
    "textgym.json_client",
    "textgym.json_server",
    "textgym.named_objects",
    "textgym.text_units",
    "textgym.waiting",
    "textgym.vocabulary",
    "textgym.language_model",
    "textgym.model_sources",
    "textgym.checkpoint_folders",
}


def module_files() -> dict[str, Path]:
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if "build" not in parts:
                found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


FILES = module_files()


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """What is run when a module is imported or its functions are called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from nodes(node)


def imports_of(module: str) -> set[str]:
    found = set()
    for node in nodes(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in FILES else str(node.module))
    return (found & set(FILES)) - {module}


def floor_of(module: str) -> int:
    """The number of the floor from the top; packages themselves only hand names on."""
    room = module if module in ROOMS else module.rpartition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


ROOMS = {room for rooms in FLOORS for room in rooms}


def test_every_room_is_on_a_floor_and_says_what_lives_there():
    rooms = {module for module, path in FILES.items() if path.name == "__init__.py"}
    assert rooms == ROOMS
    for room in rooms:
        assert ast.get_docstring(ast.parse(FILES[room].read_text(encoding="utf-8"))), room


def test_no_import_goes_to_a_higher_floor():
    lazy = {"textgym", "textgym.agents", "textgym.rewards"}  # they hand on names that are looked up when used
    upwards = {
        (module, imported)
        for module in FILES
        for imported in imports_of(module)
        if imported not in lazy | FOUNDATIONS | {"textgym.agents.names"} and floor_of(imported) < floor_of(module)
    }
    assert upwards == set()


def test_no_modules_import_each_other_in_a_circle():
    """Not in their functions either, but for rewards, whose operators make rewards of rewards."""
    graph = {module: imports_of(module) for module in FILES}
    graph["textgym.rewards.base"].remove("textgym.rewards.arithmetic")
    left = dict(graph)
    while leaves := [module for module, imported in left.items() if not imported & set(left)]:
        for leaf in leaves:
            del left[leaf]
    assert left == {}


@pytest.mark.parametrize("folder", sorted({path.parent for path in TESTS.rglob("test_*.py")} - {TESTS}))
def test_the_tests_have_the_rooms_of_the_package(folder):
    room = "textgym." + ".".join(folder.relative_to(TESTS).parts)
    assert room in ROOMS or (ROOT / folder.relative_to(TESTS)).is_dir()
