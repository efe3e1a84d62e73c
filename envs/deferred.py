"""Deferred scoring: the steps that wait to be scored, and what comes of them."""

from __future__ import annotations

import numpy as np

from textgym.envs.scoring import DeferredScores, Scorer, Stretch
from textgym.envs.texts import Texts


class PendingSteps:
    """Steps of N rows that were taken but not scored.

    :param texts: the rows
    :param scorer: scores them
    """

    def __init__(self, texts: Texts, scorer: Scorer) -> None:
        self.texts = texts
        self.scorer = scorer
        self._scored = np.zeros(len(texts.lengths), dtype=np.int64)  # (N,) completion tokens that are scored
        self.clear()

    def __len__(self) -> int:
        """Steps that wait."""
        return len(self._log_probs)

    def clear(self) -> None:
        """Give up what waits."""
        self._log_probs: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._stretches: list[Stretch] = []

    def go_on(self) -> None:
        """Everything written so far is scored; what comes from now on waits."""
        self._scored = self.texts.taken.copy()

    def begin(self, rows: np.ndarray) -> None:
        """New episodes begin in these rows."""
        self._scored[rows] = 0

    def add(self, log_prob: np.ndarray, allowed: np.ndarray | None) -> None:
        """Note a step before it is taken.

        :param log_prob: ``(N,)`` what the policy reported
        :param allowed: ``(N, V)`` bool action masks, if the environment masks
        """
        self._log_probs.append(log_prob)
        if allowed is not None:
            self._masks.append(np.packbits(allowed, axis=1))

    def replace_log_probs(self, log_probs: np.ndarray) -> None:
        """:param log_probs: ``(K, N)`` of the newest K steps, instead of what was reported."""
        shape = (len(self._log_probs), *self._scored.shape)
        if log_probs.ndim != 2 or log_probs.shape[1] != shape[1] or len(log_probs) > shape[0]:
            raise ValueError(f"log_probs has shape {log_probs.shape}; {shape} steps of rows wait to be scored")
        self._log_probs[shape[0] - len(log_probs) :] = list(log_probs.astype(np.float64))

    def finish(self, rows: np.ndarray, completions: list[str]) -> None:
        """Note the episodes that ended with the newest step, before others begin in their rows."""
        for row, completion in zip(rows.tolist(), completions, strict=True):
            self._stretches.append(self._stretch(row, completion))

    def score(self, kl_coef: float) -> DeferredScores:
        """Score all that waits."""
        texts = self.texts
        running = np.flatnonzero(~texts.done & (texts.taken > self._scored)).tolist()
        # Not kept, so that a call whose reward raises an error can be made again.
        stretches = [*self._stretches, *(self._stretch(row, None) for row in running)]
        scores = self.scorer.score_stretches(
            stretches, np.stack(self._log_probs), texts.vocabulary, kl_coef, self._masks or None
        )
        self.clear()
        self._scored = texts.taken.copy()
        for stretch in stretches:
            row, steps = stretch.row, slice(stretch.first_step, stretch.first_step + stretch.end - stretch.start)
            rewards, kl = scores.rewards[steps, row], scores.kl[steps, row]
            if stretch.finish_reason is None:
                texts.token_rewards[row, stretch.start : stretch.end] = rewards
                texts.token_kl[row, stretch.start : stretch.end] = kl
                continue
            scores.episodes.append(
                {
                    "row": row,
                    "step": steps.stop - 1,
                    "r": stretch.return_before + float(rewards.sum(dtype=np.float64)),
                    "l": stretch.end,
                    "score": stretch.score,
                    "applies": stretch.applies,
                    "kl": stretch.kl_before + float(kl.sum(dtype=np.float64)),  # NaN without a reference model
                    "finish_reason": stretch.finish_reason,
                    "prompt": stretch.prompt,
                    "completion": stretch.completion,
                }
            )
        return scores

    def _stretch(self, row: int, completion: str | None) -> Stretch:
        """The steps of a row since it was last scored; the newest is the newest that waits."""
        texts, start = self.texts, int(self._scored[row])
        return Stretch(
            row=row,
            first_step=len(self._log_probs) - (int(texts.taken[row]) - start),
            start=start,
            ids=texts.ids[row, : texts.lengths[row]].copy(),
            prompt_length=int(texts.prompt_lengths[row]),
            prompt=texts.prompts[row].prompt,
            columns=texts.prompts[row].columns,
            finish_reason=texts.finish_reasons[row],
            completion=completion,
            penalty=float(texts.missing_eos_penalties(np.array([row]))[0]),
            return_before=float(texts.token_rewards[row, :start].sum()),
            kl_before=float(texts.token_kl[row, :start].sum()),
        )
