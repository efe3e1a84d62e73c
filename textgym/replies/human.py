"""A person who replies, in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from textgym.replies.base import Reply, Transcript


class HumanReply(Reply):
    """Asks a person what is said to each turn; an empty line ends the episode.

    :param ask: given what the person is to see, returns what they say; by default in the terminal
    """

    def __init__(self, ask: Callable[[str], str] = input) -> None:
        self.ask = ask

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> list[str | None]:
        said = []
        for row, prompt, transcript in zip(rows.tolist(), prompts, transcripts, strict=True):
            earlier = f"\n[{row}] {prompt}\n" if len(transcript) == 1 else ""
            said.append(self.ask(f"{earlier}[{row}] {transcript[-1]['content'].strip()}\n> ") or None)
        return said
