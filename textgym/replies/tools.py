"""Tools: functions that the policy calls in its turns, and whose results it reads."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from textgym.checks import check_choice, check_int, check_number, check_text
from textgym.encodable_text import well_formed
from textgym.replies.base import Reply, Transcript
from textgym.replies.calculator import calculate

CALL_STYLES = ("tag", "json")
_JSON_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class ToolReply(Reply):
    """Runs the last tool call of a turn and says its result; a turn without a call ends the episode.

    With ``calls="tag"`` a call is ``<name>text</name>``, and the tool gets the text. With ``calls="json"`` it is what
    chat models write, ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, and the tool gets the arguments.
    What goes wrong, an unknown tool or an exception, becomes the result, so that the model sees it. ::

        >>> reply = ToolReply({"calculate": calculate})
        >>> turn = {"role": "assistant", "content": "That is <calculate>12 * 12</calculate>"}
        >>> reply.reply(np.arange(1), ["What is 12 times 12?"], [[turn]], {})
        ['<result>144</result>']

    :param tools: functions by their names; what they return is written as text
    :param calls: ``"tag"`` or ``"json"``
    :param result: how a result is written, ``{}`` being the result
    :param time_limit: seconds that a call may take
    :param max_characters: of a result; the rest is cut off
    :param role: whose message it is in a chat template
    :raises ValueError: if there are no tools, or an option is impossible
    """

    def __init__(
        self,
        tools: Mapping[str, Callable[..., Any]],
        calls: str = "tag",
        result: str = "<result>{}</result>",
        time_limit: float = 5.0,
        max_characters: int = 1000,
        role: str = "tool",
    ) -> None:
        if not isinstance(tools, Mapping) or not tools or not all(callable(tool) for tool in tools.values()):
            raise ValueError(f"tools={tools!r} must be a dict of names and functions, at least one")
        self.tools = dict(tools)
        self.calls = check_choice("calls", calls, CALL_STYLES)
        self.result = check_text("result", result, empty=False)
        if "{}" not in result:
            raise ValueError(f"result={result!r} must have {{}} where the result goes")
        self.time_limit = check_number("time_limit", time_limit, low=0.0, open_low=True)
        self.max_characters = check_int("max_characters", max_characters, low=1)
        self.role = check_text("role", role, empty=False)
        names = "|".join(re.escape(name) for name in self.tools)
        self._tag = re.compile(rf"<({names})>(.*?)</\1>", re.DOTALL)

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> list[str | None]:
        return [self._said(str(transcript[-1]["content"])) for transcript in transcripts]

    def _said(self, turn: str) -> str | None:
        found = (self._tag if self.calls == "tag" else _JSON_CALL).findall(turn)
        if not found:
            return None
        if self.calls == "tag":
            name, text = found[-1]
            output = self._run(name, (text.strip(),), {})
        else:
            output = self._called(found[-1])
        return self.result.replace("{}", well_formed(output[: self.max_characters]))

    def _called(self, text: str) -> str:
        """The result of a call in JSON."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return 'error: a call is {"name": ..., "arguments": {...}}'
        if not isinstance(name, str) or name not in self.tools:
            return f"error: there is no tool {name!r:.60}; there are {', '.join(self.tools)}"
        if not isinstance(arguments, dict):
            return "error: arguments must be an object"
        return self._run(name, (), arguments)

    def _run(self, name: str, positional: tuple[Any, ...], named: dict[str, Any]) -> str:
        """What a tool returns, as text. One that takes too long is left behind in a thread of its own."""
        outcome: list[str] = []

        def run() -> None:
            try:
                outcome.append(str(self.tools[name](*positional, **named)))
            except BaseException as error:  # SystemExit, too, is of the tool and not of the training
                outcome.append(f"error: {error}" if str(error) else f"error: {type(error).__name__}")

        thread = threading.Thread(target=run, name=f"tool-{name}", daemon=True)
        thread.start()
        thread.join(self.time_limit)
        return outcome[0] if outcome else f"error: {name} took longer than {self.time_limit:g} s"


def lookup(table: Mapping[str, Any]) -> Callable[[str], str]:
    """A tool that looks things up, without regard to case. ::

        >>> lookup({"Paris": "France"})("paris")
        'France'

    :param table: what there is to find, by its name
    """
    entries = {name.casefold(): str(value) for name, value in table.items()}

    def find(name: str) -> str:
        return entries.get(name.strip().casefold(), "not found")

    return find


__all__ = ["ToolReply", "calculate", "lookup"]
