"""Runs commands of RL Baselines3 Zoo, each in a process of its own that has imported what is large already.

``python zoo_commands.py FOLDER`` reads ``FOLDER/commands.json``, a list of commands: ``folder`` to run it in,
``module`` and ``arguments``. What each prints is in ``FOLDER/0.txt`` and so on. It stops at the first that fails.

The zoo takes seconds to import, and puts a ``TimeLimit`` of its own into Gymnasium: the tests' process can't have it.
Nothing of textgym is imported before a command has asked for it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

SCRIPTS = ("rl_zoo3.train", "rl_zoo3.enjoy")
LARGE = ("transformers.modeling_utils", *SCRIPTS)


def run(command: dict[str, Any], output: Path) -> int:
    """Its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            os.chdir(command["folder"])
            sys.argv = ["", *command["arguments"]]
            for name in SCRIPTS:
                del sys.modules[name]  # run_module would warn that it runs them a second time
            runpy.run_module(command["module"], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in LARGE:
        importlib.import_module(name)
    for number, command in enumerate(json.loads((folder / "commands.json").read_text())):
        if code := run(command, folder / f"{number}.txt"):
            print(f"{command} ended with exit code {code}:")
            print((folder / f"{number}.txt").read_text()[-4000:])
            sys.exit(code)
