"""The replies that ship: scripts, tools, people."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_agents import tiny_vector_env

from textgym.replies import (
    HumanReply,
    ReplyError,
    ScriptedReply,
    ToolReply,
    calculate,
    lookup,
)
from textgym.replies.base import ask


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def answer(reply: Any, turn: str, **columns: Any) -> Any:
    return ask(reply, np.arange(1), ["p"], [[said(turn)]], {name: [value] for name, value in columns.items()})[0].text


# --- tools

numbers = st.integers(0, 99).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(" ".join), inner.map(lambda text: f"({text})")
    ),
    max_leaves=12,
)


@given(expressions)
def test_the_calculator_agrees_with_python(expression):
    assert calculate(expression) == str(eval(expression))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7 / 2", "3.5"),
        ("2 ** 3 ** 2", "512"),
        ("-2 ** 2", "-4"),
        ("2 ^ -1", "0.5"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        (" .5 + 1. ", "1.5"),
        ("1 / 3", "0.3333333333"),
    ],
)
def test_operators_mean_what_they_mean_in_arithmetic(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("", "ends too early"),
        ("1 +", "ends too early"),
        ("(1", "ends too early"),
        ("1 2", "expected an operator before '2'"),
        ("* 2", "expected a number before"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("__import__", "can't read '__import__'"),
        ("9 ** 65", "an exponent must be a whole number of at most 64"),
        ("9 ** 64 * 9 ** 64", "too large"),
        ("1" * 201, "longer than 200"),
        ("(" * 60 + "1" + ")" * 60, "within each other"),
    ],
)
def test_what_the_calculator_refuses_is_said(expression, complaint):
    with pytest.raises(ValueError, match=complaint):
        calculate(expression)


def test_a_tool_is_called_by_its_tag_and_the_last_call_counts():
    tools = ToolReply({"calculate": calculate, "find": lookup({"Paris": "France"})})
    assert answer(tools, "so <calculate>2 * 21</calculate>") == "<result>42</result>"
    assert answer(tools, "<calculate>1</calculate> or <find> paris </find>") == "<result>France</result>"
    assert answer(tools, "it is 42") is None
    assert answer(tools, "<calculate>2 *</calculate>") == "<result>error: the expression ends too early</result>"
    assert answer(tools, "<find>Rome</find>") == "<result>not found</result>"


def test_calls_in_json_are_those_that_chat_models_write():
    tools = ToolReply({"add": lambda a, b: a + b}, calls="json", result="{}")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
    assert answer(tools, call) == "5"
    assert answer(tools, call.replace('{"a": 2, "b": 3}', '"{\\"a\\": 2, \\"b\\": 3}"')) == "5"
    assert answer(tools, call.replace("add", "sub")) == "error: there is no tool 'sub'; there are add"
    assert answer(tools, "<tool_call>add(2, 3)</tool_call>").startswith("error: a call is")
    assert answer(tools, call.replace('"b": 3', '"c": 3')).startswith("error: ")


def test_whatever_a_policy_calls_and_a_tool_does_becomes_text():
    def leave(**arguments: Any) -> str:
        raise SystemExit(3)

    tools = ToolReply({"leave": leave, "echo": lambda text: text}, calls="json", result="{}")
    calls = {
        '{"name": ["leave"]}': "error: there is no tool ['leave']; there are leave, echo",
        '{"name": {}}': "error: there is no tool {}; there are leave, echo",
        '{"name": "leave"}': "error: 3",
        '{"name": "leave", "arguments": [1]}': "error: arguments must be an object",
        '{"name": "echo", "arguments": {"text": "\\ud800"}}': "\ufffd",
        '[1, 2]': 'error: a call is {"name": ..., "arguments": {...}}',
    }  # fmt: skip
    assert {call: answer(tools, f"<tool_call>{call}</tool_call>") for call in calls} == calls


def test_a_tool_that_never_returns_and_one_that_says_too_much_end():
    assert answer(ToolReply({"shout": lambda text: "a" * 5000}, max_characters=9), "<shout>x</shout>") == (
        "<result>aaaaaaaaa</result>"
    )
    sleeping = ToolReply({"sleep": lambda text: time.sleep(600)}, time_limit=0.05)
    assert answer(sleeping, "<sleep>x</sleep>") == "<result>error: sleep took longer than 0.05 s</result>"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"tools": {}}, "tools={} must be a dict of names and functions"),
        ({"tools": {"a": 3}}, "must be a dict of names and functions"),
        ({"tools": {"a": str}, "calls": "xml"}, "calls='xml' must be"),
        ({"tools": {"a": str}, "result": "none"}, "must have {} where the result goes"),
        ({"tools": {"a": str}, "time_limit": 0}, "time_limit=0"),
    ],
)
def test_impossible_tools_are_named(arguments, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        ToolReply(**arguments)


# --- scripts and people


def test_a_script_of_the_prompts_own_column_is_said_line_by_line():
    rows = [{"prompt": "the film", "lines": [" good", " bad"]}]
    env = tiny_vector_env(1, prompts=rows, reply=ScriptedReply("lines"), max_turns=5, max_new_tokens=1, kl_coef=0.0)
    env.reset(seed=0)
    heard, ended = [], []
    for _ in range(3):
        _, _, terminated, _, info = env.step(np.array([9]))
        final = info.get("final_info", info)
        heard.append(final["reply"][0])
        ended.append(bool(terminated[0]))
    assert (heard, ended) == ([" good", " bad", None], [False, False, True])
    with pytest.raises(ReplyError, match="needs a column 'lines'"):
        answer(ScriptedReply("lines"), "hm", other=[])


def test_a_person_sees_the_turn_and_ends_with_an_empty_line():
    shown = []

    def asked(text: str) -> str:
        shown.append(text)
        return "" if len(shown) > 1 else "go on"

    human = HumanReply(asked)
    assert answer(human, " hello") == "go on"
    assert "p" in shown[0]
    assert "hello" in shown[0]
    assert answer(human, " well") is None


def test_an_environment_with_a_tool_has_the_result_in_its_next_observation():
    env = gym.make(
        "TextGen-v0",
        prompts=["2 + 2 is"],
        reply=ToolReply({"sum": lambda text: "4"}),
        reward=lambda completions: [0.0] * len(completions),
        kl_coef=0.0,
        stop="</sum>",
        max_new_tokens=16,
    )
    env.reset(seed=0)
    vocabulary = env.unwrapped.vocabulary
    from textgym.continuation import continuation_ids

    for token in continuation_ids(vocabulary, vocabulary.encode("2 + 2 is"), "<sum>2 + 2</sum>"):
        observation, *_, info = env.step(token)
    assert info["reply"] == "<result>4</result>"
    text = vocabulary.decode(observation["input_ids"][: observation["attention_mask"].sum()].tolist())
    assert text == "2 + 2 is<sum>2 + 2</sum><result>4</result>"
