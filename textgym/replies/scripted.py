"""Replies that are written down beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from textgym.checks import check_text, check_texts
from textgym.replies.base import Reply, Transcript
from textgym.replies.errors import ReplyError


class ScriptedReply(Reply):
    """Says one line after another, whatever the policy says; after the last one the episode ends. ::

        >>> reply = ScriptedReply(["Why?", "And then?"])
        >>> turn = {"role": "assistant", "content": "Because."}
        >>> reply.reply(np.arange(1), ["Hello"], [[turn]], {})
        ['Why?']
        >>> reply.reply(np.arange(1), ["Hello"], [[turn, {"role": "user", "content": "Why?"}, turn] * 3], {})
        [None]

    :param lines: for all episodes; or the name of the column of the prompt rows that has a list of them
    :param role: whose message it is in a chat template
    :raises ValueError: if there are none
    """

    def __init__(self, lines: Sequence[str] | str, role: str = "user") -> None:
        self.lines = lines if isinstance(lines, str) else check_texts("lines", lines, least=1)
        self.role = check_text("role", role, empty=False)

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> list[str | None]:
        said = []
        for i, transcript in enumerate(transcripts):
            lines = self.lines
            if isinstance(lines, str):
                if lines not in columns:
                    raise ReplyError(self.name, f"needs a column {lines!r} of the prompts; there are {list(columns)}")
                lines = columns[lines][i] or []
            before = sum(message["role"] != "assistant" for message in transcript)
            said.append(lines[before] if before < len(lines) else None)
        return said
