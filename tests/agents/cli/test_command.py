"""The console command before it does anything: what it imports, and Ctrl-C meanwhile."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from textgym.agents.cli import command
from textgym.agents.cli.main import app


class CtrlC:
    """Interrupts the import of a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == self.name:
            raise KeyboardInterrupt


def interrupted_import(patch: pytest.MonkeyPatch, name: str) -> None:
    patch.delitem(sys.modules, name, raising=False)
    patch.setattr(sys, "meta_path", [CtrlC(name), *sys.meta_path])


def test_ctrl_c_while_the_command_is_imported_is_one_line(monkeypatch, capsys):
    interrupted_import(monkeypatch, "textgym.agents.cli.main")
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted\n"


@pytest.mark.parametrize("module", ["textgym.agents.runs.plots", "textgym.agents.distributed.processes"])
def test_ctrl_c_while_a_command_imports_what_it_needs_is_one_line(module, monkeypatch):
    interrupted_import(monkeypatch, module)
    result = CliRunner().invoke(app, ["plot", "runs/none"])
    assert (result.exit_code, result.output) == (130, "Interrupted\n")
