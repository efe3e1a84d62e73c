"""The record of a rollout: what was written, under which log-probabilities, and what it earned.

There is one, whenever rewards are computed. With instant scoring it notes beside each step what the step earned; with
deferred scoring the rewards of all steps are worked out when they are asked for. Whoever asks gets the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from textgym.chat.reply_spans import action_positions
from textgym.envs.scoring import EpisodeScore, RolloutScores, Scorer, StepParts
from textgym.envs.segments import RecordedSegment
from textgym.envs.texts import EpisodeTexts


class RolloutRecord:
    """Steps of N rows that were not asked for yet.

    :param texts: the rows
    :param scorer: scores them
    :param deferred: whether steps are scored when they are asked for, and not as they are taken
    """

    def __init__(self, texts: EpisodeTexts, scorer: Scorer, deferred: bool) -> None:
        self.texts = texts
        self.scorer = scorer
        self.deferred = deferred
        self.clear()

    def __len__(self) -> int:
        """Steps in the record."""
        return len(self._log_probs)

    @property
    def waiting(self) -> int:
        """Steps in the record that are not scored."""
        return len(self) if self.deferred else 0

    def clear(self) -> None:
        """Forget the steps; what was written so far is not part of the record."""
        self._log_probs: list[np.ndarray] = []  # (N,) of each step
        self._masks: list[np.ndarray] = []  # (N, V / 8)
        self._parts: list[tuple[StepParts, float]] = []  # (N,) arrays, and β; scored with instant scoring
        self._turn_ends: list[np.ndarray] = []  # (N,) bool
        self._ended: list[tuple[RecordedSegment, EpisodeScore]] = []  # with instant scoring the scores are known
        self._before = self.texts.taken.copy()  # (N,) completion tokens that were written before the record

    def begin(self, rows: np.ndarray) -> None:
        """New episodes begin in these rows."""
        self._before[rows] = 0

    def add(
        self,
        log_prob: np.ndarray,
        allowed: np.ndarray | None,
        parts: StepParts,
        turn_ends: np.ndarray,
        kl_coef: float,
    ) -> None:
        """Note a step.

        :param log_prob: ``(N,)`` what the policy reported
        :param allowed: ``(N, V)`` bool action masks before the step, if the environment masks
        :param parts: ``(N,)`` arrays: what it costs and what replies paid; with instant scoring all that it earned
        :param turn_ends: ``(N,)`` bool, whether it ended a turn
        :param kl_coef: β when it was paid
        """
        self._log_probs.append(log_prob)
        self._parts.append((parts, kl_coef))
        self._turn_ends.append(turn_ends)
        if self.deferred and allowed is not None:
            self._masks.append(np.packbits(allowed, axis=1))

    def end(self, rows: np.ndarray, completions: list[str]) -> None:
        """Note the episodes that ended with the newest step, before others begin in their rows."""
        for row, completion in zip(rows.tolist(), completions, strict=True):
            self._ended.append((self._segment(row, completion), self.scorer.score_of(row)))

    def scores(self, kl_coef: float, log_probs: np.ndarray | None = None) -> RolloutScores:
        """What the steps earned. They leave the record, unless the reward raises an error: then it can be asked again.

        :param kl_coef: β
        :param log_probs: ``(K, N)`` of the newest K steps, instead of what was reported
        :raises ValueError: if that is not their shape
        """
        if log_probs is not None:
            self._replace(log_probs)
        texts = self.texts
        running = np.flatnonzero(~texts.done & (texts.taken > self._before)).tolist()
        segments = [*(segment for segment, _ in self._ended), *(self._segment(row, None) for row in running)]
        coefficients: np.ndarray | float = kl_coef
        if self.deferred:
            shape = (len(self), len(texts.lengths))
            parts, found = self.scorer.score_segments(segments, shape, texts.vocabulary, self._masks or None)
        else:
            parts = StepParts.stack([parts for parts, _ in self._parts])
            coefficients = np.array([[coefficient] for _, coefficient in self._parts])  # (S, 1)
            found = [score for _, score in self._ended]
        scores = self.scorer.paid(parts, np.stack(self._log_probs), np.stack(self._turn_ends), coefficients)
        ended = len(self._ended)
        self.clear()
        for segment in segments[ended:]:
            end = int(texts.taken[segment.row])
            written = slice(end - segment.steps, end)
            texts.token_rewards[segment.row, written] = scores.rewards[segment.steps_in_rollout, segment.row]
            texts.token_kl[segment.row, written] = scores.kl[segment.steps_in_rollout, segment.row]
        scores.episodes += [
            _episode(segment, score, scores) for segment, score in zip(segments[:ended], found[:ended], strict=True)
        ]
        return scores

    def _replace(self, log_probs: np.ndarray) -> None:
        steps, rows = len(self), len(self._before)
        if log_probs.ndim != 2 or log_probs.shape[1] != rows or len(log_probs) > steps:
            raise ValueError(
                f"log_probs has shape {log_probs.shape}; the record has {steps} steps of {rows} rows: give one value "
                "for each row of the newest steps"
            )
        self._log_probs[steps - len(log_probs) :] = list(log_probs.astype(np.float64))

    def _segment(self, row: int, completion: str | None) -> RecordedSegment:
        """The steps of a row that are in the record; the newest is the newest of all."""
        texts, before = self.texts, int(self._before[row])
        steps, length = int(texts.taken[row]) - before, int(texts.lengths[row])
        start, prompt_length = len(self) - steps, int(texts.prompt_lengths[row])
        parts = [parts for parts, _ in self._parts[start:]]
        return RecordedSegment(
            row=row,
            start=start,
            ids=texts.ids[row, :length].copy(),
            positions=action_positions(texts.replies[row], prompt_length, length)[before:],
            prompt_length=prompt_length,
            replies=None if texts.reply is None else texts.replies[row],
            prompt=texts.prompts[row].prompt,
            columns=texts.prompts[row].columns,
            finish_reason=texts.finish_reasons[row],
            finished=texts.is_finished(row),
            completion=completion,
            turn_ends=np.array([ends[row] for ends in self._turn_ends[start:]]),
            penalties=np.array([part.penalty[row] for part in parts]),
            reply_rewards=np.array([part.reply[row] for part in parts]),
            taken_before=before,
            return_before=float(texts.token_rewards[row, :before].sum()),
            kl_before=float(texts.token_kl[row, :before].sum()),
        )


def _episode(segment: RecordedSegment, score: EpisodeScore, scores: RolloutScores) -> dict[str, Any]:
    """What is said of an episode that ended with a segment."""
    at = (segment.steps_in_rollout, segment.row)
    return {
        "row": segment.row,
        "step": int(segment.steps_in_rollout[-1]),
        "r": segment.return_before + float(scores.rewards[at].sum(dtype=np.float64)),
        "l": segment.taken_before + segment.steps,
        "score": score.score,
        "applies": score.applies,
        "kl": segment.kl_before + float(scores.kl[at].sum(dtype=np.float64)),  # NaN without a reference model
        "finish_reason": segment.finish_reason,
        "prompt": segment.prompt,
        "completion": segment.completion,
    }
