"""The texts of an environment's rows: what they look like to an agent, what their tokens earned, and their state."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from textgym.chat.reply_spans import action_positions, as_data, from_data
from textgym.episode_rules import EpisodeRules
from textgym.prompts.rows import PromptRow
from textgym.replies.base import Reply
from textgym.texts import Texts, token_texts

# What a state is made of besides the prompts and the reasons of ending.
_ARRAYS = (
    "ids", "lengths", "prompt_lengths", "taken", "turn_starts", "turn_numbers", "done", "started", "token_rewards",
    "token_kl", "_searched",
)  # fmt: skip


class EpisodeTexts(Texts):
    """N texts, each with what its tokens earned.

    ``token_rewards`` and ``token_kl`` (nats) are ``(N, T)``, of the running completions; ``started`` ``(N,)`` says
    which rows have had a prompt.

    :param num_rows: N
    :param context: L
    :param rules: when a text ends
    :param max_actions: T, for which there is room; the rules may end texts earlier
    :param missing_eos_penalty: what the token costs with which the budget of a turn is used up
    :param reply: who speaks after each turn; None where a text is one turn
    """

    def __init__(
        self,
        num_rows: int,
        context: int,
        rules: EpisodeRules,
        max_actions: int,
        missing_eos_penalty: float = 0.0,
        reply: Reply | None = None,
    ) -> None:
        super().__init__(num_rows, context, rules, reply)
        self.missing_eos_penalty = missing_eos_penalty
        self.started = np.zeros(num_rows, dtype=bool)
        self.token_rewards = np.zeros((num_rows, max_actions))
        self.token_kl = np.zeros((num_rows, max_actions))

    def begin(self, row: int, prompt: PromptRow, ids: list[int]) -> None:
        super().begin(row, prompt, ids)
        self.started[row] = True

    def missing_eos_penalties(self, rows: np.ndarray) -> np.ndarray:
        """``(B,)`` what the newest step of each row costs because the turn's budget ran out with it."""
        return np.array([self.missing_eos_penalty if self.turn_reasons[row] == "length" else 0.0 for row in rows])

    def observation_space(self) -> spaces.Dict:
        """Of the observation of one row."""
        space = spaces.Dict(
            {
                "input_ids": spaces.Box(0, self.vocabulary.size - 1, (self.context,), np.int64),
                "attention_mask": spaces.Box(0, 1, (self.context,), np.int8),
                "prompt_length": spaces.Box(0, self.context, (1,), np.int64),
            }
        )
        if self.reply is not None:
            space["completion_mask"] = spaces.Box(0, 1, (self.context,), np.int8)
        return space

    def observation(self, row: int | None = None) -> dict[str, np.ndarray]:
        """A fresh copy of the observation of all rows, or of one."""
        rows: Any = slice(None) if row is None else row
        lengths = np.asarray(self.lengths[rows])
        return {
            "input_ids": self.ids[rows].copy(),
            "attention_mask": (np.arange(self.context) < lengths[..., None]).astype(np.int8),
            "prompt_length": np.array(self.prompt_lengths[rows])[..., None],
            **({} if self.reply is None else {"completion_mask": self._completion_mask()[rows]}),
        }

    def _completion_mask(self) -> np.ndarray:
        """``(N, L)`` int8, 1 where the policy wrote a token and 0 for prompt, reply and padding."""
        mask = np.zeros((len(self.lengths), self.context), dtype=np.int8)
        for row, spans in enumerate(self.replies):
            mask[row, action_positions(spans, int(self.prompt_lengths[row]), int(self.lengths[row]))] = 1
        return mask

    def token_texts(self, row: int) -> list[str]:
        """What each token of a completion adds to the text."""
        return token_texts(self.batch(np.array([row])), 0)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as arrays and plain data."""
        return {
            **{name: getattr(self, name).copy() for name in _ARRAYS},
            "prompts": [{"prompt": row.prompt, "columns": row.columns} for row in self.prompts],
            "finish_reasons": list(self.finish_reasons),
            "turn_reasons": list(self.turn_reasons),
            "replies": [as_data(spans) for spans in self.replies],
            "reply": None if self.reply is None else self.reply.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the texts that :meth:`state_dict` gave.

        :raises ValueError: if the texts are of another shape
        """
        for name in _ARRAYS:
            here, given = getattr(self, name), np.asarray(state[name])
            if here.shape != given.shape:
                raise ValueError(
                    f"the state's {name} has shape {given.shape}, this environment's {here.shape}: make the "
                    "environment with the same number of rows and the same token limits"
                )
            here[...] = given
        self.prompts = [PromptRow(row["prompt"], row["columns"]) for row in state["prompts"]]
        self.finish_reasons = list(state["finish_reasons"])
        self.turn_reasons = list(state["turn_reasons"])
        self.replies = [from_data(spans) for spans in state["replies"]]
        if self.reply is not None:
            self.reply.load_state_dict(state["reply"] or {})
        self.keep()
