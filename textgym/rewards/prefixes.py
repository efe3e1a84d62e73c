"""The batch of prompt-plus-completion prefixes that rewards score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.chat.reply_spans import ReplySpan, action_positions, before, tokens_before_in_turn, turns_between
from textgym.chat.turns import TurnTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class PrefixBatch:
    """Prompt-plus-completion prefixes to be scored, one per row.

    :param input_ids: ``(B, L)`` int64 token ids of prompt and completion so far, right-padded
    :param lengths: ``(B,)`` tokens of prompt and completion so far
    :param prompt_lengths: ``(B,)`` tokens of the prompt
    :param finished: ``(B,)`` bool, whether the completion ended by itself: its last token ends a turn
    :param rows: ``(B,)`` the environment row each prefix comes from, which is its slot in a cache; rows may
        repeat only in what :meth:`at` returns
    :param prompts: B prompt texts
    :param columns: the extra columns of the prompt rows, each a list of length B
    :param tokenizer: what the ids are of
    :param turns: which of its tokens end a turn and what texts show; by default what the tokenizer alone says
    :param replies: where others than the policy spoke after the prompt; None where nobody did
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    finished: np.ndarray
    rows: np.ndarray
    prompts: list[str]
    columns: dict[str, list[Any]] = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    turns: TurnTokens | None = field(default=None, repr=False)
    replies: list[list[ReplySpan]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def completion_lengths(self) -> np.ndarray:
        """``(B,)`` tokens after each prompt so far, the policy's and others'."""
        return self.lengths - self.prompt_lengths

    def origin(self, prefix: int) -> tuple[int, str]:
        """The environment row that a prefix comes from, and its completion: what errors name."""
        return int(self.rows[prefix]), self.completions[prefix]

    @cached_property
    def completion_ids(self) -> list[list[int]]:
        """B lists of the token ids that the policy wrote."""
        if self.replies is not None:
            return [self.input_ids[row, self.action_positions(row)].tolist() for row in range(len(self))]
        bounds = zip(self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [ids[start:end].tolist() for ids, (start, end) in zip(self.input_ids, bounds, strict=True)]

    def action_positions(self, row: int) -> np.ndarray:
        """``(S,)`` where in a row the tokens stand that the policy wrote."""
        return action_positions(self._spans(row), int(self.prompt_lengths[row]), int(self.lengths[row]))

    def tokens_before_in_turn(self, row: int) -> np.ndarray:
        """``(S,)`` how many tokens its turn has before each token of a row that the policy wrote."""
        return tokens_before_in_turn(self._spans(row), int(self.prompt_lengths[row]), int(self.lengths[row]))

    def states(self, row: int) -> np.ndarray:
        """``(S + 1,)`` tokens after the prompt of the states between which the policy's S tokens lead: where it writes
        them, and the text's end."""
        return np.append(self.action_positions(row), self.lengths[row]) - self.prompt_lengths[row]

    def turn_states(self, row: int) -> np.ndarray:
        """``(K + 1,)`` tokens after the prompt of the states in which the policy's K turns begin, and of the text's
        end."""
        bounds = turns_between(self._spans(row), int(self.prompt_lengths[row]), int(self.lengths[row]))
        begins = [start for start, end in bounds if end > start]
        return np.array([*begins, self.lengths[row]]) - self.prompt_lengths[row]

    @cached_property
    def texts(self) -> list[str]:
        """B decoded texts of prompt and all after it; see :meth:`~textgym.chat.turns.TurnTokens.decode`."""
        lengths = self.lengths.tolist()
        return self._decode([ids[:n].tolist() for ids, n in zip(self.input_ids, lengths, strict=True)])

    @cached_property
    def continuations(self) -> list[str]:
        """B decoded texts after the prompts: what has to be appended to the decoded prompt to get :attr:`texts`.

        Decoded alone they would lose their leading space with SentencePiece tokenizers. A character whose bytes are not
        all there yet is left out, so that each prefix of a completion is one as text, too.
        """
        lengths = self.prompt_lengths.tolist()
        prompt_ids = [tuple(ids[:n].tolist()) for ids, n in zip(self.input_ids, lengths, strict=True)]
        different = list(dict.fromkeys(prompt_ids))  # prefixes of one episode share their prompt
        decoded = dict(zip(different, self._decode([list(ids) for ids in different]), strict=True))
        return [_without_prefix(text, decoded[ids]) for ids, text in zip(prompt_ids, self.texts, strict=True)]

    @cached_property
    def completions(self) -> list[str]:
        """B decoded completions: what the policy wrote. Where others spoke, its turns are lines."""
        if self.replies is None or not any(self.replies):
            return self.continuations
        return ["\n".join(turn for turn in self._turn_texts[row] if turn) for row in range(len(self))]

    @cached_property
    def transcripts(self) -> list[list[dict[str, Any]]]:
        """B conversations after the prompts, as messages: the policy's turns are the assistant's."""
        transcripts = []
        for row in range(len(self)):
            spans = self._spans(row)
            messages: list[dict[str, Any]] = []
            for i, text in enumerate(self._turn_texts[row]):
                written = i < len(spans) or self.lengths[row] > (spans[-1].end if spans else self.prompt_lengths[row])
                messages += [{"role": "assistant", "content": text}] if written else []
                messages += [{"role": span.role, "content": span.content} for span in spans[i : i + 1]]
            transcripts.append(messages)
        return transcripts

    def _spans(self, row: int) -> list[ReplySpan]:
        return [] if self.replies is None else self.replies[row]

    @cached_property
    def _turn_texts(self) -> list[list[str]]:
        """The texts of each row's turns, the policy's."""
        newest = [
            turns_between(self._spans(row), int(self.prompt_lengths[row]), int(self.lengths[row]))[-1]
            for row in range(len(self))
        ]
        ids = self.input_ids.tolist()
        texts = self._decode([ids[row][:end] for row, (_, end) in enumerate(newest)])
        before = self._decode([ids[row][:start] for row, (start, _) in enumerate(newest)])
        return [
            [*(span.turn for span in self._spans(row)), _without_prefix(text, start)]
            for row, (text, start) in enumerate(zip(texts, before, strict=True))
        ]

    def at(self, indices: Sequence[int] | np.ndarray, completion_lengths: Sequence[int] | np.ndarray) -> PrefixBatch:
        """Rows of this batch, cut to shorter completions.

        :param indices: ``(K,)`` rows to take; they may repeat
        :param completion_lengths: ``(K,)`` completion tokens to keep of each; 0 is the prompt alone
        :return: a batch of K prefixes; ``finished`` stays true only where nothing was cut off
        :raises ValueError: if a length is negative or more than the row has
        """
        indices = np.asarray(indices, dtype=np.int64)
        kept = np.asarray(completion_lengths, dtype=np.int64)
        available = self.completion_lengths[indices]
        wrong = np.flatnonzero((kept < 0) | (kept > available))
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"completion_lengths[{i}] is {kept[i]}, but row {indices[i]} has {available[i]} completion "
                "tokens; expected 0 to that many"
            )
        lengths = self.prompt_lengths[indices] + kept
        input_ids = self.input_ids[indices, : int(lengths.max(initial=0))]  # (K, L'), a copy
        input_ids[np.arange(input_ids.shape[1]) >= lengths[:, None]] = self.tokenizer.pad_token_id or 0
        return PrefixBatch(
            input_ids=input_ids,
            lengths=lengths,
            prompt_lengths=self.prompt_lengths[indices],
            finished=self.finished[indices] & (kept == available),
            rows=self.rows[indices],
            prompts=[self.prompts[i] for i in indices],
            columns={name: [column[i] for i in indices] for name, column in self.columns.items()},
            tokenizer=self.tokenizer,
            turns=self.turns,
            replies=None
            if self.replies is None
            else [before(self.replies[i], int(n)) for i, n in zip(indices, lengths, strict=True)],
        )

    def ended_with(self, token: int | None) -> np.ndarray:
        """``(B, L)`` the token ids, for a model that knows one end only.

        :param token: stands where a finished completion's last token was; None leaves it as it is
        """
        if token is None or not self.finished.any():
            return self.input_ids
        ids = self.input_ids.copy()
        rows = np.flatnonzero(self.finished)
        ids[rows, self.lengths[rows] - 1] = token
        return ids

    def _decode(self, ids: list[list[int]]) -> list[str]:
        if self.turns is None:
            self.turns = TurnTokens(self.tokenizer)
        return self.turns.decode_all(ids)


def _without_prefix(text: str, prefix: str) -> str:
    """What follows the longest common start of the two.

    That is all of ``prefix``, unless the prompt's tokens end inside a character that the completion
    completes.
    """
    if text.startswith(prefix):
        return text[len(prefix) :]
    differs = (i for i, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b)
    return text[next(differs, min(len(text), len(prefix))) :]
