"""Texts that are being written, many rows at once: prompt, turns and replies of each, and when and why it ended."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from textgym.chat.between_turns import BetweenTurns
from textgym.chat.reply_spans import ReplySpan
from textgym.continuation import continuation_ids
from textgym.episode_rules import EpisodeRules
from textgym.prompts.fitting import messages_of
from textgym.prompts.layouts import stored_tools
from textgym.prompts.rows import PromptRow, as_columns
from textgym.replies.base import Reply, ReplyResult, Transcript, ask
from textgym.replies.errors import ReplyError
from textgym.rewards import PrefixBatch


class Texts:
    """N rows of token ids, right-padded to a common width.

    ``ids`` is ``(N, L)``; ``lengths`` (of the whole text) and ``prompt_lengths`` are ``(N,)``; ``prompts`` has each
    row's prompt text and columns. ``replies`` has the spans of each row that others wrote; ``taken`` ``(N,)`` counts
    the tokens that the policy wrote. ``turn_starts`` and ``turn_numbers`` ``(N,)`` say where a row's newest turn began
    and which it is; ``turn_reasons`` why the newest token ended a turn, or None; ``cut`` ``(N,)`` whether the reply to
    it was too long.

    ``finish_reasons`` says why a text ended, None while it goes on, and ``done`` ``(N,)`` which have. Without replies a
    text ends with its turn: ``"eos"``, ``"stop"`` or ``"length"``. With replies: ``"reply"`` where the reply says so,
    ``"turns"`` after the last turn, ``"length"`` where there is no room for another token.

    :param num_rows: N
    :param context: L
    :param rules: when a turn and a text end
    :param reply: who speaks after each turn; None where a text is one turn
    """

    def __init__(self, num_rows: int, context: int, rules: EpisodeRules, reply: Reply | None = None) -> None:
        self.context = context
        self.rules = rules
        self.reply = reply
        self.vocabulary = rules.vocabulary
        self.ids = np.full((num_rows, context), self.vocabulary.pad_token_id, dtype=np.int64)
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.prompt_lengths = np.zeros(num_rows, dtype=np.int64)
        self.taken = np.zeros(num_rows, dtype=np.int64)
        self.prompts = [PromptRow("", {}) for _ in range(num_rows)]
        self.replies: list[list[ReplySpan]] = [[] for _ in range(num_rows)]
        self.turn_starts = np.zeros(num_rows, dtype=np.int64)
        self.turn_numbers = np.zeros(num_rows, dtype=np.int64)
        self.turn_reasons: list[str | None] = [None] * num_rows
        self.finish_reasons: list[str | None] = [None] * num_rows
        self.done = np.zeros(num_rows, dtype=bool)
        self.cut = np.zeros(num_rows, dtype=bool)
        self._searched = np.zeros(num_rows, dtype=np.int64)  # characters of each turn without a stop string
        self._between = BetweenTurns(self.vocabulary.turns)
        # What was said to turns whose step failed afterwards: when it is taken again, nobody is asked twice.
        self._said: dict[tuple[int, bytes], ReplyResult] = {}

    @property
    def turn_tokens(self) -> np.ndarray:
        """``(N,)`` tokens of the newest turn so far."""
        return self.lengths - self.turn_starts

    def begin(self, row: int, prompt: PromptRow, ids: list[int]) -> None:
        """Put a prompt into a row; nothing follows it yet."""
        self.ids[row] = self.vocabulary.pad_token_id
        self.ids[row, : len(ids)] = ids
        self.lengths[row] = self.prompt_lengths[row] = self.turn_starts[row] = len(ids)
        self.taken[row] = self.turn_numbers[row] = self._searched[row] = 0
        self.prompts[row] = prompt
        self.replies[row] = []
        self.turn_reasons[row] = self.finish_reasons[row] = None
        self.done[row] = False

    def append(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Append a token of the policy to each of the rows and see which turns end.

        :param rows: ``(B,)``
        :param tokens: ``(B,)``
        """
        self.ids[rows, self.lengths[rows]] = tokens
        self.lengths[rows] += 1
        self.taken[rows] += 1
        self.cut[rows] = False
        stopped = None
        if self.rules.sampling.stop:
            stopped, self._searched[rows] = self.rules.stop_strings(self._newest_turns(rows), self._searched[rows])
        reasons = self.rules.finish_reasons(tokens, self.turn_tokens[rows], stopped)
        for row, reason in zip(rows.tolist(), reasons, strict=True):
            self.turn_reasons[row] = "length" if reason is None and not self._room(row) else reason
            if self.reply is None:
                self._finish(row, self.turn_reasons[row])
            elif self.taken[row] == self.rules.max_actions and self.turn_reasons[row] is None:
                self._finish(row, "length")  # Gymnasium's own limit, amid a turn

    def answer(self, rows: np.ndarray) -> list[ReplyResult]:
        """Let the reply speak after the turns that have ended in some rows, and begin the next ones.

        :param rows: ``(B,)``
        :raises ReplyError: if the reply fails; nothing has changed then
        """
        assert self.reply is not None
        keys = [(row, self.ids[row, : self.lengths[row]].tobytes()) for row in rows.tolist()]
        missing = [i for i, key in enumerate(keys) if key not in self._said]
        batch = self.batch(rows)
        transcripts = batch.transcripts
        if missing:
            columns = {name: [column[i] for i in missing] for name, column in batch.columns.items()}
            asked = [transcripts[i] for i in missing]
            said = ask(self.reply, rows[missing], [batch.prompts[i] for i in missing], asked, columns)
            self._said.update(zip((keys[i] for i in missing), said, strict=True))
        results = [self._said[key] for key in keys]
        spoken = [self._reply_ids(*one) for one in zip(rows.tolist(), results, transcripts, strict=True)]
        for row, (ids, content), result, transcript in zip(rows.tolist(), spoken, results, transcripts, strict=True):
            start = int(self.lengths[row])
            self.ids[row, start : start + len(ids)] = ids
            self.lengths[row] += len(ids)
            if content is not None:
                span = ReplySpan(start, start + len(ids), self.reply.role, content, transcript[-1]["content"])
                self.replies[row] = [*self.replies[row], span]
            self.turn_starts[row] = self.lengths[row]
            self.turn_numbers[row] += 1
            self._searched[row] = 0
            self._finish(row, self._end_of(row, result))
        return results

    def keep(self) -> None:
        """The newest tokens stay: there is no :meth:`take_back` after them."""
        self._said = {}

    def mark(self, rows: np.ndarray) -> dict[str, Any]:
        """Where some rows stand, for :meth:`take_back`."""
        names = ("lengths", "taken", "turn_starts", "turn_numbers", "_searched")
        return {name: getattr(self, name)[rows].copy() for name in names} | {
            "replies": [self.replies[row] for row in rows.tolist()]
        }

    def take_back(self, rows: np.ndarray, mark: dict[str, Any]) -> None:
        """Remove what was written since :meth:`mark` from rows that were not done then."""
        for i, row in enumerate(rows.tolist()):
            self.ids[row, mark["lengths"][i] :] = self.vocabulary.pad_token_id
            self.replies[row] = mark["replies"][i]
            self.turn_reasons[row] = self.finish_reasons[row] = None
            self.done[row] = False
        for name, values in mark.items():
            if name != "replies":
                getattr(self, name)[rows] = values

    def batch(self, rows: np.ndarray) -> PrefixBatch:
        """Rows in the form that rewards score."""
        return PrefixBatch(
            input_ids=self.ids[rows],
            lengths=self.lengths[rows],
            prompt_lengths=self.prompt_lengths[rows],
            finished=np.array([self.is_finished(row) for row in rows.tolist()], dtype=bool),
            rows=rows,
            prompts=[self.prompts[row].prompt for row in rows],
            columns=as_columns([self.prompts[row].columns for row in rows]),
            tokenizer=self.vocabulary.tokenizer,
            turns=self.vocabulary.turns,
            replies=None if self.reply is None else [self.replies[row] for row in rows],
        )

    def is_finished(self, row: int) -> bool:
        """Whether a text's last token ended a turn."""
        spans = self.replies[row]
        spoken = bool(spans) and spans[-1].end == self.lengths[row] > spans[-1].start
        return self.turn_reasons[row] == "eos" and not spoken

    def _newest_turns(self, rows: np.ndarray) -> PrefixBatch:
        """Rows in which all that was written before the newest turn is the prompt."""
        return PrefixBatch(
            input_ids=self.ids[rows],
            lengths=self.lengths[rows],
            prompt_lengths=self.turn_starts[rows],
            finished=np.zeros(len(rows), dtype=bool),
            rows=rows,
            prompts=[""] * len(rows),
            columns={},
            tokenizer=self.vocabulary.tokenizer,
            turns=self.vocabulary.turns,
        )

    def _room(self, row: int) -> int:
        """Tokens that there is room for after a text."""
        most = min(int(self.prompt_lengths[row]) + self.rules.max_total_tokens, self.context)
        return most - int(self.lengths[row])

    def _finish(self, row: int, reason: str | None) -> None:
        self.finish_reasons[row] = reason
        self.done[row] = reason is not None

    def _end_of(self, row: int, result: ReplyResult) -> str | None:
        """Why a text ends with a reply."""
        assert self.rules.turns is not None
        if result.done:
            return "reply"
        if self.turn_numbers[row] == self.rules.turns.max_turns:
            return "turns"
        return "length" if not self._room(row) or self.taken[row] >= self.rules.max_actions else None

    def _reply_ids(self, row: int, result: ReplyResult, transcript: Transcript) -> tuple[list[int], str | None]:
        """The tokens that a reply adds to a row, and what of its text they say; None where it says nothing."""
        limits = self.rules.turns
        assert self.reply is not None
        assert limits is not None
        if result.text is None and result.done:
            return [], None
        content = result.text or ""
        whole = self.vocabulary.turns.pieces(content)
        if len(whole) > limits.max_reply_tokens:
            self._too_long(row, len(whole), f"max_reply_tokens={limits.max_reply_tokens}")
            content = "".join(whole[: limits.max_reply_tokens])
        so_far = self.ids[row, : self.lengths[row]].tolist()
        messages = messages_of(self.prompts[row], self.vocabulary)
        if messages is None:
            ids = self._plain_ids(row, content)
        else:
            opens = not result.done and self.turn_numbers[row] + 1 < limits.max_turns
            tools = stored_tools(self.prompts[row].columns.get("tools"))
            reply = {"role": self.reply.role, "content": content}
            try:
                closing = self._between.closing([*messages, *transcript[:-1]], reply, tools, opens)
            except ValueError as error:
                raise ReplyError(self.reply.name, str(error), row=row) from error
            ids = self._between.ids(closing, so_far[-1])
        if len(ids) > self._room(row):
            self._too_long(row, len(ids), f"the {self._room(row)} tokens that are left of the episode")
            ids = ids[: self._room(row)]
            if messages is None:
                content = "".join(whole[: len(ids)])
        return ids, content

    def _plain_ids(self, row: int, content: str) -> list[int]:
        """A reply's tokens where no template writes around them."""
        assert self.reply is not None
        so_far = self.ids[row, : self.lengths[row]].tolist()
        try:
            return continuation_ids(self.vocabulary, so_far, content)
        except ValueError:
            pass  # a turn may end within a character: what follows it is what follows the text before
        try:
            return continuation_ids(self.vocabulary, so_far[: int(self.turn_starts[row])], content)
        except ValueError as error:
            raise ReplyError(self.reply.name, str(error), row=row) from error

    def _too_long(self, row: int, tokens: int, limit: str) -> None:
        assert self.reply is not None
        assert self.rules.turns is not None
        self.cut[row] = True
        if self.rules.turns.reply_overflow == "error":
            raise ReplyError(
                self.reply.name,
                f"said {tokens} tokens, more than {limit}; say less, raise the limit, or cut replies with "
                "reply_overflow='truncate'",
                row=row,
            )


def token_texts(batch: PrefixBatch, row: int) -> list[str]:
    """What each token of a completion adds to its text; together they are the completion.

    Where several tokens make one character, the last of them adds it and the others add ``""``.

    :param batch: complete texts
    :param row: which of them
    """
    count = int(batch.completion_lengths[row])
    completion = batch.continuations[row]
    ends = [0]
    for text in batch.at([row] * count, range(1, count + 1)).continuations:
        common = next(
            (i for i, (a, b) in enumerate(zip(text, completion, strict=False)) if a != b),
            min(len(text), len(completion)),
        )
        ends.append(max(common, ends[-1]))
    ends[-1] = len(completion)
    return [completion[start:end] for start, end in itertools.pairwise(ends)]
