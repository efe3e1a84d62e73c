"""The texts that are being written: prompt and completion of every row, and when and why a completion ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from textgym.envs.options import TextGenOptions
from textgym.generation import token_texts
from textgym.prompts.rows import PromptRow, as_columns
from textgym.rewards import PrefixBatch
from textgym.vocabulary import Vocabulary

# What a state is made of besides the prompts and the reasons of ending.
_ARRAYS = ("ids", "lengths", "prompt_lengths", "done", "started", "token_rewards", "token_kl", "_searched")


class Texts:
    """N rows of token ids, right-padded to a common width.

    ``ids`` is ``(N, L)``; ``lengths`` (prompt and completion) and ``prompt_lengths`` are ``(N,)``; ``prompts`` has each
    row's prompt text and columns; ``finish_reasons`` has ``"eos"``, ``"stop"``, ``"length"``, or None while a text goes
    on, and ``done`` ``(N,)`` says which have ended.

    :param num_rows: N
    :param context: L
    :param vocabulary: of the language model
    :param options: of the environment
    :param max_new_tokens: after how many tokens a completion is cut off; at most the option of that name
    """

    def __init__(
        self, num_rows: int, context: int, vocabulary: Vocabulary, options: TextGenOptions, max_new_tokens: int
    ) -> None:
        self.context = context
        self.vocabulary = vocabulary
        self.options = options
        self.max_new_tokens = max_new_tokens
        self._stop_turns = vocabulary.turns.showing(options.stop_strings)  # a stop string may be a special token
        self.ids = np.full((num_rows, context), vocabulary.pad_token_id, dtype=np.int64)
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.prompt_lengths = np.zeros(num_rows, dtype=np.int64)
        self.prompts = [PromptRow("", {}) for _ in range(num_rows)]
        self.finish_reasons: list[str | None] = [None] * num_rows
        self.done = np.zeros(num_rows, dtype=bool)
        self.started = np.zeros(num_rows, dtype=bool)
        # What each token of the running completions has earned, and its KL in nats: (N, T).
        self.token_rewards = np.zeros((num_rows, options.max_new_tokens))
        self.token_kl = np.zeros((num_rows, options.max_new_tokens))
        self._searched = np.zeros(num_rows, dtype=np.int64)  # characters of each completion without a stop string

    def state_dict(self) -> dict[str, Any]:
        """Everything above, as arrays and plain data."""
        return {
            **{name: getattr(self, name).copy() for name in _ARRAYS},
            "prompts": [{"prompt": row.prompt, "columns": row.columns} for row in self.prompts],
            "finish_reasons": list(self.finish_reasons),
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

    @property
    def taken(self) -> np.ndarray:
        """``(N,)`` completion tokens so far."""
        return self.lengths - self.prompt_lengths

    def begin(self, row: int, prompt: PromptRow, ids: list[int]) -> None:
        """Put a prompt into a row; its completion is empty."""
        self.ids[row] = self.vocabulary.pad_token_id
        self.ids[row, : len(ids)] = ids
        self.lengths[row] = self.prompt_lengths[row] = len(ids)
        self.prompts[row] = prompt
        self.finish_reasons[row] = None
        self.done[row] = False
        self.started[row] = True
        self._searched[row] = 0

    def append(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Append a token to each of the rows and see which of them end.

        :param rows: ``(B,)``
        :param tokens: ``(B,)``
        """
        self.ids[rows, self.lengths[rows]] = tokens
        self.lengths[rows] += 1
        stopped = self._stopped(rows)
        ends = self.vocabulary.end_ids
        for row, token, count, stop in zip(
            rows.tolist(), tokens.tolist(), self.taken[rows].tolist(), stopped, strict=True
        ):
            if token in ends and count > self.options.min_new_tokens:
                self.finish_reasons[row] = "eos"
            elif stop:
                self.finish_reasons[row] = "stop"
            elif count == self.max_new_tokens:
                self.finish_reasons[row] = "length"
            self.done[row] = self.finish_reasons[row] is not None

    def take_back(self, rows: np.ndarray) -> None:
        """Remove the newest token of each of the rows again."""
        self.lengths[rows] -= 1
        self.ids[rows, self.lengths[rows]] = self.vocabulary.pad_token_id
        self.done[rows] = False
        for row in rows.tolist():
            self.finish_reasons[row] = None
        if self.options.stop_strings:
            self._searched[rows] = [len(text) for text in self._texts_to_search(rows)]

    def _texts_to_search(self, rows: np.ndarray) -> list[str]:
        """Completions in which stop strings are looked for."""
        return dataclasses.replace(self.batch(rows), turns=self._stop_turns).completions

    def _stopped(self, rows: np.ndarray) -> list[bool]:
        """Whether the newest token completed a stop string."""
        if not self.options.stop_strings:
            return [False] * len(rows)
        texts = self._texts_to_search(rows)
        searched = self._searched[rows]
        self._searched[rows] = [len(text) for text in texts]
        return [
            count >= self.options.min_new_tokens
            and any(stop in text[max(0, start - len(stop) + 1) :] for stop in self.options.stop_strings)
            for text, start, count in zip(texts, searched.tolist(), self.taken[rows].tolist(), strict=True)
        ]

    def missing_eos_penalties(self, rows: np.ndarray) -> np.ndarray:
        """``(B,)`` what the newest step of each row costs because the budget ran out with it."""
        penalty = float(self.options.missing_eos_penalty)
        return np.array([penalty if self.finish_reasons[row] == "length" else 0.0 for row in rows])

    def batch(self, rows: np.ndarray) -> PrefixBatch:
        """Rows in the form that rewards score."""
        return PrefixBatch(
            input_ids=self.ids[rows],
            lengths=self.lengths[rows],
            prompt_lengths=self.prompt_lengths[rows],
            finished=np.array([self.finish_reasons[row] == "eos" for row in rows], dtype=bool),
            rows=rows,
            prompts=[self.prompts[row].prompt for row in rows],
            columns=as_columns([self.prompts[row].columns for row in rows]),
            tokenizer=self.vocabulary.tokenizer,
            turns=self.vocabulary.turns,
        )

    def observation(self, row: int | None = None) -> dict[str, np.ndarray]:
        """A fresh copy of the observation of all rows, or of one."""
        rows: Any = slice(None) if row is None else row
        lengths = np.asarray(self.lengths[rows])
        return {
            "input_ids": self.ids[rows].copy(),
            "attention_mask": (np.arange(self.context) < lengths[..., None]).astype(np.int8),
            "prompt_length": np.array(self.prompt_lengths[rows])[..., None],
        }

    def token_texts(self, row: int) -> list[str]:
        """What each token of a completion adds to the text."""
        return token_texts(self.batch(np.array([row])), 0)
