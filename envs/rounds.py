"""A round of episodes: a fixed number of them, each row taking the next one when it is free."""

from __future__ import annotations

from typing import Any

import numpy as np

from textgym.prompts.rows import PromptRow


class EpisodeRound:
    """E episodes that N rows write, with the same prompt for each ``group_size`` of them in a row.

    Episode e has the prompt of group ``e // group_size``. A row that finishes takes the next episode; where none is
    left, it waits.

    :param prompts: one for each group
    :param group_size: completions of each prompt
    :param num_rows: N
    """

    def __init__(self, prompts: list[PromptRow], group_size: int, num_rows: int) -> None:
        self.prompts = prompts
        self.group_size = group_size
        self.next = 0
        self.numbers = np.full(num_rows, -1, dtype=np.int64)  # (N,) the episode of each row

    def __len__(self) -> int:
        """Episodes, E."""
        return len(self.prompts) * self.group_size

    @property
    def left(self) -> int:
        """Episodes that have not begun."""
        return len(self) - self.next

    def take(self, row: int) -> PromptRow:
        """The prompt of the next episode, which begins in ``row``."""
        self.numbers[row] = self.next
        self.next += 1
        return self.prompts[int(self.numbers[row]) // self.group_size]

    def state_dict(self) -> dict[str, Any]:
        """The round as plain data."""
        return {
            "prompts": [{"prompt": row.prompt, "columns": row.columns} for row in self.prompts],
            "group_size": self.group_size,
            "next": self.next,
            "numbers": self.numbers.copy(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> EpisodeRound:
        """What :meth:`state_dict` gave."""
        prompts = [PromptRow(row["prompt"], row["columns"]) for row in state["prompts"]]
        episodes = cls(prompts, state["group_size"], len(state["numbers"]))
        episodes.next = state["next"]
        episodes.numbers = np.asarray(state["numbers"], dtype=np.int64).copy()
        return episodes
