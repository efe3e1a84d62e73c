"""Names that options have for replies, and what they open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from textgym.replies import LanguageModelReply, Reply, ScriptedReply, ToolReply, as_reply
from textgym.replies.opening import code_of_reply, load_reply

TURN = {"role": "assistant", "content": "<calculate>2 * 21</calculate><shout>hm</shout>"}
MINE = """from textgym.replies import ScriptedReply


def say(transcripts):
    return ["yes"] * len(transcripts)


def shout(text):
    return text.upper()


ready = ScriptedReply(["ready"])
number = 3


class Needy:
    def __init__(self, what): ...
"""


def said(reply: Reply) -> object:
    return reply.reply(np.arange(1), ["p"], [[TURN]], {})[0]


def test_names_open_functions_objects_tools_scripts_and_models(tmp_path: Path, tiny_directory: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "lines.txt").write_text("Why?\n\nAnd then?\n")
    mine = tmp_path / "mine.py"
    assert said(load_reply(f"{mine}:say")) == "yes"
    assert said(load_reply(f"{mine}:ready")) == "ready"
    assert said(load_reply("tool:calculate")) is not None
    assert said(load_reply(f"tool:calculate, {mine}:shout")) == "<result>HM</result>"
    assert said(load_reply(f"script:{tmp_path / 'lines.txt'}")) == "Why?"
    assert isinstance(as_reply("tool:calculate"), ToolReply)
    assert isinstance(as_reply(f"script:{tmp_path / 'lines.txt'}"), ScriptedReply)
    model = load_reply(f"model:{tiny_directory}", seed=1, max_new_tokens=5, device="cpu")
    assert isinstance(model, LanguageModelReply)
    assert model.sampling.max_new_tokens == 5


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("calculate", "must be file.py:function"),
        ("tool:divine", "there is no tool 'divine'"),
        ("script:nowhere.txt", "no file nowhere.txt"),
        ("missing.py:say", "there is no file missing.py"),
        ("{mine}:nothing", "has nothing named 'nothing'"),
        ("{mine}:number", "number in .* can't be used: reply must be"),
        ("{mine}:Needy", "is the class Needy, which needs arguments"),
        ("tool:{mine}:number", "is a int, not a function"),
        ("1mine:say", "must be file.py:function"),
    ],
)
def test_names_of_nothing_are_refused_with_what_would_be_right(name: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises(ValueError, match=problem):
        load_reply(name.format(mine=tmp_path / "mine.py"))


def test_in_python_names_run_no_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('was run')")
    for name in (f"{tmp_path / 'mine.py'}:say", f"tool:{tmp_path / 'mine.py'}:shout"):
        assert code_of_reply(name)
        with pytest.raises(ValueError, match="is Python code: import it"):
            as_reply(name)
