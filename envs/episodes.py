"""Running episodes: what a token does to the text of each row, who answers it, and what it earns.

When a row begins anew, and from which prompt, is not decided here; see :mod:`textgym.envs.vector_env`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from textgym.action_masks import ActionMasks
from textgym.chat.reply_spans import action_positions
from textgym.envs.infos import VectorInfos
from textgym.envs.record import RolloutRecord
from textgym.envs.rendering import RenderedEpisode
from textgym.envs.scoring import RolloutScores, Scorer, StepParts
from textgym.envs.texts import EpisodeTexts
from textgym.prompts.fitting import FittedPrompt


class Episodes:
    """N episodes, one in each row.

    ``texts`` and ``scorer`` are those it was given, ``kl_coef`` is β and may be changed at any time. ``allowed`` is
    ``(N, V)`` bool, the actions that the current states allow; None without masking. ``record`` holds the steps of a
    rollout; None outside of one.

    :param texts: the rows
    :param scorer: says what a token earns
    :param masks: which actions are allowed; None without masking
    :param kl_coef: β
    """

    def __init__(self, texts: EpisodeTexts, scorer: Scorer, masks: ActionMasks | None, kl_coef: float) -> None:
        self.texts = texts
        self.scorer = scorer
        self.kl_coef = kl_coef
        self.num_rows = len(texts.lengths)
        self.allowed: np.ndarray | None = None
        self.record: RolloutRecord | None = None
        self._masks = masks
        if masks is not None:
            self.allowed = np.ones((self.num_rows, texts.vocabulary.size), dtype=bool)
        self._starts_due = np.zeros(self.num_rows, dtype=bool)  # rows whose prompts have no Φ yet

    def begin(self, rows: np.ndarray, prompts: list[FittedPrompt]) -> None:
        """Start an episode in each of some rows.

        :param rows: ``(B,)``
        :param prompts: B of them
        """
        for row, prompt in zip(rows.tolist(), prompts, strict=True):
            self.texts.begin(row, *prompt)
        if self.texts.reply is not None:
            self.texts.reply.begin(rows)
        if self.record is not None:
            self.record.begin(rows)
        self._mask_actions(rows)
        self._starts_due[rows] = not self.deferred

    def note_starts(self) -> None:
        """Ask for Φ of prompts that is due by now: at a reset, or before the first step from them, which can be taken
        again after an error of the reward.
        """
        rows = np.flatnonzero(self._starts_due)
        if len(rows) and not self.deferred:
            self.scorer.start_rows(self.texts.batch(rows))
            self._starts_due[:] = False

    # ------------------------------------------------------------------ a step

    def step(self, rows: np.ndarray, actions: np.ndarray, log_prob: np.ndarray, infos: VectorInfos) -> np.ndarray:
        """Append a token to some rows; the others wait.

        :param rows: ``(B,)`` rows whose episodes go on
        :param actions: ``(N,)`` the tokens
        :param log_prob: ``(N,)`` under which they were drawn, nats
        :param infos: what there is to say of the step is put into them
        :return: ``(N,)`` rewards, 0 while scoring is deferred
        :raises RewardError: if the reward fails; the rows are then what they were before
        :raises ReplyError: if the reply fails; likewise
        """
        texts = self.texts
        self.note_starts()
        reward = np.zeros(self.num_rows)
        parts = StepParts.nothing((self.num_rows,))
        turn_ends = np.zeros(self.num_rows, dtype=bool)
        if len(rows):
            parts.ref_log_prob[rows] = self._reference_log_prob(rows, actions[rows])
            with self._taken_back_where_it_fails(rows):
                texts.append(rows, actions[rows])
                parts.penalty[rows] = texts.missing_eos_penalties(rows)
                turn_ends[rows] = [texts.turn_reasons[row] is not None for row in rows.tolist()]
                self._answer(np.flatnonzero(turn_ends & ~texts.done), parts, infos)
                if not self.deferred:
                    reward[rows] = self._reward_step(rows, log_prob[rows], turn_ends[rows], parts, infos)
            texts.keep()
        if self.record is not None:
            self.record.add(log_prob, self.allowed, parts, turn_ends, self.kl_coef)
        self._mask_actions(rows)
        self._end(rows[texts.done[rows]], infos)
        return reward

    @contextmanager
    def _taken_back_where_it_fails(self, rows: np.ndarray) -> Iterator[None]:
        """After an error, the texts of rows are what they were before."""
        mark = self.texts.mark(rows)
        try:
            yield
        except BaseException:
            self.texts.take_back(rows, mark)
            raise

    def _reference_log_prob(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """``(B,)`` log π_ref of each row's token in the state before it; NaN where unknown or deferred."""
        if self.scorer.reference is None or self.deferred:
            return np.full(len(rows), np.nan)
        allowed = None if self.allowed is None else self.allowed[rows]
        texts = self.texts
        return self.scorer.reference_log_probs(
            texts.ids[rows], texts.lengths[rows], texts.prompt_lengths[rows], rows, tokens, allowed
        )

    def _answer(self, rows: np.ndarray, parts: StepParts, infos: VectorInfos) -> None:
        """Let the reply speak after turns that have ended, and say so in infos."""
        if self.texts.reply is None or not len(rows):
            return
        results = self.texts.answer(rows)
        parts.reply[rows] = [result.reward for result in results]
        infos.put("reply", rows, [result.text for result in results], object)
        infos.put("reply_reward", rows, parts.reply[rows])
        infos.put("reply_truncated", rows, self.texts.cut[rows], bool)
        infos.put("turn", rows, self.texts.turn_numbers[rows], np.int64)

    def _reward_step(
        self, rows: np.ndarray, log_prob: np.ndarray, turn_ends: np.ndarray, parts: StepParts, infos: VectorInfos
    ) -> np.ndarray:
        """``(B,)`` rewards of the newest tokens of rows, with what they are made of put into ``parts`` and infos."""
        texts = self.texts
        batch, taken = texts.batch(rows), texts.taken[rows]
        reward_model = self.scorer.reward_step(batch, self.scorer.is_due(taken, turn_ends, texts.done[rows]))
        ref_log_prob, penalty = parts.ref_log_prob[rows], parts.penalty[rows]
        parts.taken[rows], parts.reward_model[rows] = True, reward_model
        kl = self.scorer.kl(log_prob, ref_log_prob)
        reward = reward_model + parts.reply[rows] - penalty - (self.kl_coef * kl if self.kl_coef else 0.0)
        texts.token_rewards[rows, taken - 1] = reward
        texts.token_kl[rows, taken - 1] = kl
        infos.put("reward_model", rows, reward_model)
        if self.scorer.reference is not None:
            infos.put("kl", rows, kl)
            infos.put("ref_log_prob", rows, ref_log_prob)
        if texts.missing_eos_penalty:
            infos.put("missing_eos_penalty", rows, penalty)
        ended = rows[texts.done[rows]]
        infos.put("score", ended, self.scorer.potential[ended])
        infos.put("applies", ended, self.scorer.applies[ended], bool)
        return reward

    def _mask_actions(self, rows: np.ndarray) -> None:
        """Bring the action masks of rows up to date with their states."""
        if self._masks is not None:
            assert self.allowed is not None
            texts = self.texts
            self.allowed[rows] = self._masks.of(
                texts.ids[rows],
                texts.lengths[rows],
                texts.prompt_lengths[rows],
                rows,
                texts.turn_tokens[rows],
                texts.done[rows],
            )

    def _end(self, rows: np.ndarray, infos: VectorInfos) -> None:
        """Say how the episodes of these rows ended, and keep them if they are to be scored later."""
        if not len(rows):
            return
        batch = self.texts.batch(rows)
        if self.record is not None:
            self.record.end(rows, batch.completions)
        infos.put("finish_reason", rows, [self.texts.finish_reasons[row] for row in rows], object)
        infos.put("prompt", rows, batch.prompts, object)
        infos.put("completion", rows, batch.completions, object)
        if self.texts.reply is not None:
            infos.put("transcript", rows, batch.transcripts, object)

    # ------------------------------------------------------------------ rollouts, and what they earned

    @property
    def deferred(self) -> bool:
        """Whether rewards come from :meth:`scores` instead of :meth:`step`, which pays zero."""
        return self.record is not None and self.record.deferred

    @property
    def recorded(self) -> int:
        """Steps in the record."""
        return 0 if self.record is None else len(self.record)

    @property
    def waiting(self) -> int:
        """Steps in the record that are not scored."""
        return 0 if self.record is None else self.record.waiting

    def begin_rollout(self, defer_scoring: bool) -> None:
        """Record what is written from now on, and what it earns.

        :raises RuntimeError: within a rollout that is scored in the other way
        """
        if self.record is not None:
            if self.record.deferred != defer_scoring:
                raise RuntimeError(f"the rollout has defer_scoring={self.record.deferred}: end_rollout() first")
            return
        self.record = RolloutRecord(self.texts, self.scorer, defer_scoring)
        if defer_scoring:
            self._starts_due[:] = False

    def scores(self, log_probs: np.ndarray | None) -> RolloutScores:
        """What the steps in the record earned.

        :param log_probs: ``(K, N)`` of the newest K steps, instead of what was reported
        :raises RuntimeError: if there are none
        """
        if self.record is None or not len(self.record):
            raise RuntimeError("no step was recorded: begin_rollout(), then step")
        return self.record.scores(self.kl_coef, log_probs)

    def end_rollout(self) -> None:
        """Stop recording.

        :raises RuntimeError: while steps wait to be scored
        """
        if self.record is None:
            return
        if self.record.waiting:
            raise RuntimeError(f"{self.record.waiting} steps wait to be scored; call scores() before end_rollout()")
        if self.record.deferred:
            # Φ of the prompts of rows that began while scoring was deferred. Where it is deferred again, they are read
            # together with what follows.
            self._starts_due = self.texts.started & (self.texts.taken == 0)
        self.record = None

    def drop_recorded(self) -> None:
        """Forget the steps in the record."""
        if self.record is not None:
            self.record.clear()

    # ------------------------------------------------------------------ what there is to see

    def rendered(self, row: int) -> RenderedEpisode:
        """A row's episode, for a terminal or a picture."""
        texts, taken = self.texts, int(self.texts.taken[row])
        known = not self.deferred
        self.note_starts()
        return RenderedEpisode(
            prompt=texts.prompts[row].prompt,
            tokens=texts.token_texts(row),
            rewards=self._rewards_of_tokens(row),
            score=float(self.scorer.potential[row]) if known else None,
            kl=float(texts.token_kl[row, :taken].sum()) if known and self.scorer.reference is not None else None,
            ret=float(texts.token_rewards[row, :taken].sum()),
            finish_reason=texts.finish_reasons[row],
        )

    def _rewards_of_tokens(self, row: int) -> list[float | None]:
        """The reward of each token after a row's prompt; None where somebody else spoke."""
        texts = self.texts
        start, end = int(texts.prompt_lengths[row]), int(texts.lengths[row])
        rewards: list[float | None] = [None] * (end - start)
        for place, reward in zip(
            action_positions(texts.replies[row], start, end), texts.token_rewards[row].tolist(), strict=False
        ):
            rewards[place - start] = reward
        return rewards

    # ------------------------------------------------------------------ caches and the state

    def forget_cached(self) -> None:
        """Drop what the models have cached of all rows."""
        rows = np.arange(self.num_rows)
        self.scorer.forget(rows)
        if self._masks is not None:
            self._masks.forget(rows, self.texts.context)
        if self.texts.reply is not None:
            self.texts.reply.forget_cached()

    def state_dict(self) -> dict[str, Any]:
        """Where every episode stands, and β, as arrays and plain data."""
        return {
            "texts": self.texts.state_dict(),
            "potential": self.scorer.potential.copy(),
            # Asked for with the first step, and not for the state: what is cached then decides about the last bits.
            "starts_due": self._starts_due.copy(),
            "kl_coef": self.kl_coef,
            "allowed": None if self.allowed is None else np.packbits(self.allowed, axis=1),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; further entries and β, whose owner sets it, are not read.

        :raises ValueError: if it is the state of episodes with other options
        """
        if (state["allowed"] is None) != (self.allowed is None):
            raise ValueError(
                f"action_masking={self.allowed is not None} here, but the state is of an environment with "
                f"action_masking={state['allowed'] is not None}"
            )
        self.texts.load_state_dict(state["texts"])
        self.drop_recorded()
        self._starts_due[:] = state["starts_due"]
        self.scorer.potential[:] = state["potential"]
        if self.allowed is not None:
            self.allowed = np.unpackbits(state["allowed"], axis=1, count=self.allowed.shape[1]).astype(bool)
