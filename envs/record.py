"""The record of a rollout: what was written, under which log-probabilities, and what it earned.

There is one, whenever rewards are computed. With instant scoring it notes beside each step what the step earned; with
deferred scoring the rewards of all steps are worked out when they are asked for. Whoever asks gets the same.
"""

from __future__ import annotations

import numpy as np

from textgym.envs.scoring import RolloutScores, Scorer, StepParts, Stretch
from textgym.envs.texts import Texts


class RolloutRecord:
    """Steps of N rows that were not asked for yet.

    :param texts: the rows
    :param scorer: scores them
    :param deferred: whether steps are scored when they are asked for, and not as they are taken
    """

    def __init__(self, texts: Texts, scorer: Scorer, deferred: bool) -> None:
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
        self._parts: list[tuple[StepParts, float]] = []  # with instant scoring: (N,) arrays, and β
        self._ended: list[Stretch] = []
        self._before = self.texts.taken.copy()  # (N,) completion tokens that were written before the record

    def begin(self, rows: np.ndarray) -> None:
        """New episodes begin in these rows."""
        self._before[rows] = 0

    def add(self, log_prob: np.ndarray, allowed: np.ndarray | None, parts: StepParts, kl_coef: float) -> None:
        """Note a step.

        :param log_prob: ``(N,)`` what the policy reported
        :param allowed: ``(N, V)`` bool action masks before the step, if the environment masks
        :param parts: ``(N,)`` arrays: what it earned, with instant scoring
        :param kl_coef: β when it was paid
        """
        self._log_probs.append(log_prob)
        if not self.deferred:
            self._parts.append((parts, kl_coef))
        elif allowed is not None:
            self._masks.append(np.packbits(allowed, axis=1))

    def end(self, rows: np.ndarray, completions: list[str]) -> None:
        """Note the episodes that ended with the newest step, before others begin in their rows."""
        for row, completion in zip(rows.tolist(), completions, strict=True):
            self._ended.append(self._stretch(row, completion))

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
        stretches = [*self._ended, *(self._stretch(row, None) for row in running)]
        coefficients: np.ndarray | float = kl_coef
        if self.deferred:
            parts = self.scorer.score_stretches(
                stretches, (len(self), len(texts.lengths)), texts.vocabulary, self._masks or None
            )
        else:
            parts = StepParts.stack([parts for parts, _ in self._parts])
            coefficients = np.array([[coefficient] for _, coefficient in self._parts])  # (S, 1)
        scores = self.scorer.paid(parts, np.stack(self._log_probs), coefficients)
        self.clear()
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

    def _replace(self, log_probs: np.ndarray) -> None:
        steps, rows = len(self), len(self._before)
        if log_probs.ndim != 2 or log_probs.shape[1] != rows or len(log_probs) > steps:
            raise ValueError(
                f"log_probs has shape {log_probs.shape}; the record has {steps} steps of {rows} rows: give one value "
                "for each row of the newest steps"
            )
        self._log_probs[steps - len(log_probs) :] = list(log_probs.astype(np.float64))

    def _stretch(self, row: int, completion: str | None) -> Stretch:
        """The steps of a row that are in the record; the newest is the newest of all."""
        texts, start = self.texts, int(self._before[row])
        return Stretch(
            row=row,
            first_step=len(self) - (int(texts.taken[row]) - start),
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
            score=float(self.scorer.potential[row]),
            applies=bool(self.scorer.applies[row]),
        )
