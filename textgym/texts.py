"""Texts that are being written, many rows at once: prompt and completion of each, and when and why it ended."""

from __future__ import annotations

import itertools

import numpy as np

from textgym.episode_rules import EpisodeRules
from textgym.prompts.fitting import FittedPrompt
from textgym.prompts.rows import PromptRow, as_columns
from textgym.rewards import PrefixBatch


class Texts:
    """N rows of token ids, right-padded to a common width.

    ``ids`` is ``(N, L)``; ``lengths`` (prompt and completion) and ``prompt_lengths`` are ``(N,)``; ``prompts`` has each
    row's prompt text and columns; ``finish_reasons`` has ``"eos"``, ``"stop"``, ``"length"``, or None while a text goes
    on, and ``done`` ``(N,)`` says which have ended.

    :param num_rows: N
    :param context: L
    :param rules: when a text ends
    """

    def __init__(self, num_rows: int, context: int, rules: EpisodeRules) -> None:
        self.context = context
        self.rules = rules
        self.vocabulary = rules.vocabulary
        self.ids = np.full((num_rows, context), self.vocabulary.pad_token_id, dtype=np.int64)
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.prompt_lengths = np.zeros(num_rows, dtype=np.int64)
        self.prompts = [PromptRow("", {}) for _ in range(num_rows)]
        self.finish_reasons: list[str | None] = [None] * num_rows
        self.done = np.zeros(num_rows, dtype=bool)
        self._searched = np.zeros(num_rows, dtype=np.int64)  # characters of each completion without a stop string

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
        self._searched[row] = 0

    def append(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Append a token to each of the rows and see which of them end.

        :param rows: ``(B,)``
        :param tokens: ``(B,)``
        """
        self.ids[rows, self.lengths[rows]] = tokens
        self.lengths[rows] += 1
        stopped = None
        if self.rules.sampling.stop:
            stopped, self._searched[rows] = self.rules.stop_strings(self.batch(rows), self._searched[rows])
        reasons = self.rules.finish_reasons(tokens, self.taken[rows], stopped)
        for row, reason in zip(rows.tolist(), reasons, strict=True):
            self.finish_reasons[row] = reason
            self.done[row] = reason is not None

    def take_back(self, rows: np.ndarray) -> None:
        """Remove the newest token of each of the rows again."""
        self.lengths[rows] -= 1
        self.ids[rows, self.lengths[rows]] = self.vocabulary.pad_token_id
        self.done[rows] = False
        for row in rows.tolist():
            self.finish_reasons[row] = None
        if self.rules.sampling.stop:
            nothing = np.zeros(len(rows), dtype=np.int64)
            _, self._searched[rows] = self.rules.stop_strings(self.batch(rows), nothing)

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


def filled(rules: EpisodeRules, prompts: list[FittedPrompt]) -> Texts:
    """A row for each prompt, its completion empty, with room for the longest.

    :param rules: of the texts
    :param prompts: B of them
    """
    context = max(len(prompt.ids) for prompt in prompts) + rules.sampling.max_new_tokens
    texts = Texts(len(prompts), context, rules)
    for row, prompt in enumerate(prompts):
        texts.begin(row, *prompt)
    return texts


def token_texts(batch: PrefixBatch, row: int) -> list[str]:
    """What each token of a completion adds to its text; together they are the completion.

    Where several tokens make one character, the last of them adds it and the others add ``""``.

    :param batch: complete texts
    :param row: which of them
    """
    count = int(batch.completion_lengths[row])
    completion = batch.completions[row]
    ends = [0]
    for text in batch.at([row] * count, range(1, count + 1)).completions:
        common = next(
            (i for i, (a, b) in enumerate(zip(text, completion, strict=False)) if a != b),
            min(len(text), len(completion)),
        )
        ends.append(max(common, ends[-1]))
    ends[-1] = len(completion)
    return [completion[start:end] for start, end in itertools.pairwise(ends)]
