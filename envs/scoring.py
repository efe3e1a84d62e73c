"""What a step is worth: the instant reward, the KL penalty, and the two schedules that compute them.

Both schedules pay the same rewards::

    r_t = [Φ(x, y_≤t) − Φ(x, y_<t)] − β · kl_t − penalty_t

Instant scoring computes them beside the agent: one token more through the reference model and the reward model at every
step. Deferred scoring remembers the tokens and scores whole segments of episodes afterwards, all prefixes of a segment
in one teacher-forced pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from textgym.envs.segments import RecordedSegment
from textgym.kl import kl_estimate
from textgym.language_model import LanguageModel
from textgym.prompts.rows import as_columns
from textgym.rewards import PrefixBatch, Reward
from textgym.rewards.base import potentials_of, prefix_potentials_of
from textgym.rewards.scores import payable
from textgym.teacher_forcing import forced_log_probs
from textgym.vocabulary import Vocabulary


@dataclass
class StepParts:
    """What steps are paid for, besides the KL of their tokens: arrays ``(S, N)``, or ``(N,)`` of a single step.

    ``taken`` says where a row took a step that earns something, and not one that only resets the row or waits;
    ``reply`` is what a reply paid for the turn that the step ended.
    ``ref_log_prob`` is in nats, NaN without a reference model.
    """

    taken: np.ndarray
    reward_model: np.ndarray
    penalty: np.ndarray
    reply: np.ndarray
    ref_log_prob: np.ndarray

    @classmethod
    def nothing(cls, shape: tuple[int, ...]) -> StepParts:
        """Steps of that shape that no row has taken."""
        return cls(
            np.zeros(shape, dtype=bool), np.zeros(shape), np.zeros(shape), np.zeros(shape), np.full(shape, np.nan)
        )

    @classmethod
    def stack(cls, steps: list[StepParts]) -> StepParts:
        """Of single steps."""
        names = [part.name for part in fields(cls)]
        return cls(*(np.stack([getattr(step, name) for step in steps]) for name in names))


class EpisodeScore(NamedTuple):
    """Φ of a text, and whether the reward applies to it: where it is None, 0 is paid."""

    score: float
    applies: bool


@dataclass
class RolloutScores:
    """Rewards of S steps of N rows, and the episodes that ended in them.

    ``rewards``, ``reward_model``, ``kl`` and ``ref_log_prob`` are ``(S, N)`` float32; KL and log-probabilities in nats,
    NaN without a reference model. ``turn_ends`` ``(S, N)`` bool says which steps ended a turn. Each episode is a
    dictionary with ``row``, ``step`` (in which of the S steps it ended), ``r`` (its return, with what it earned before
    these steps), ``l`` (tokens), ``score`` (Φ of the text), ``applies`` (False where the reward is None, "not
    applicable", which is paid as 0), ``kl`` (sum, nats), ``finish_reason``, ``prompt`` and ``completion``.
    """

    rewards: np.ndarray
    reward_model: np.ndarray
    kl: np.ndarray
    ref_log_prob: np.ndarray
    turn_ends: np.ndarray
    episodes: list[dict[str, Any]] = field(default_factory=list)


class Scorer:
    """The reward of a token, given the reward function and the reference model.

    :param reward: Φ
    :param reward_every: Φ is paid every so many tokens and at the end; ``"end"`` pays Φ itself once
    :param reference: the reference model, or None where no KL is wanted
    :param kl_estimator: ``k1``, ``k2`` or ``k3``
    :param temperature: divides the reference model's logits, as it does the policy's
    :param context: most tokens of a row
    :param num_rows: N
    """

    def __init__(
        self,
        reward: Reward,
        reward_every: int | str,
        reference: LanguageModel | None,
        kl_estimator: str,
        temperature: float,
        context: int,
        num_rows: int,
    ) -> None:
        self.reward = reward
        self.reward_every = reward_every
        self.reference = reference
        self.kl_estimator = kl_estimator
        self.temperature = temperature
        self.context = context
        # Φ last scored of the running episode of each row; the next difference is taken from it.
        self.potential = np.zeros(num_rows)
        # Whether it was a number, and not None, "not applicable", which is paid as 0.
        self.applies = np.ones(num_rows, dtype=bool)

    @property
    def pays_differences(self) -> bool:
        return self.reward_every != "end"

    def is_due(self, tokens: np.ndarray, turn_ends: np.ndarray, done: np.ndarray) -> np.ndarray:
        """``(B,)`` bool, whether Φ is scored after some actions.

        :param tokens: ``(B,)`` how many tokens the policy has written in the episode with each
        :param turn_ends: ``(B,)`` bool, whether it ended a turn
        :param done: ``(B,)`` bool, whether it ended the episode
        """
        if self.reward_every == "end":
            return done
        if isinstance(self.reward_every, str):
            return turn_ends | done
        due: np.ndarray = (tokens % self.reward_every == 0) | done
        return due

    def forget(self, rows: np.ndarray) -> None:
        """Drop what the models have cached of rows that were reset.

        A hidden state depends, in its last bits, on how much of its row was computed at once. After a reset nothing of
        earlier episodes may show, so that the same seed gives the same rewards.
        """
        self.reward.forget(rows)
        if self.reference is not None:
            self.reference.cached(self.context).forget(rows)

    def start_rows(self, batch: PrefixBatch) -> None:
        """Note Φ(x, ∅) of rows that begin an episode."""
        self.potential[batch.rows] = np.nan_to_num(self._potentials(batch)) if self.pays_differences else 0.0

    def reward_step(self, batch: PrefixBatch, due: np.ndarray) -> np.ndarray:
        """The reward-model part of one step.

        :param batch: B rows after the step
        :param due: ``(B,)`` bool, rows that are scored now
        :return: ``(B,)`` Φ differences; 0 where not due
        """
        paid = np.zeros(len(batch))
        if due.any():
            scored = batch if due.all() else batch.at(np.flatnonzero(due), batch.completion_lengths[due])
            potential = self._potentials(scored)
            self.applies[scored.rows] = ~np.isnan(potential)
            potential = np.nan_to_num(potential)
            paid[due] = potential - self.potential[scored.rows]
            self.potential[scored.rows] = potential
        return paid

    def _potentials(self, batch: PrefixBatch) -> np.ndarray:
        """``(B,)`` Φ, NaN where the reward does not apply."""
        return payable(self.reward, potentials_of(self.reward, batch), batch)

    def kl(self, log_prob: np.ndarray, ref_log_prob: np.ndarray) -> np.ndarray:
        """KL estimate of each token in nats; NaN without a reference model."""
        return np.asarray(kl_estimate(log_prob, ref_log_prob, self.kl_estimator))

    @torch.no_grad()
    def reference_log_probs(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        prompt_lengths: np.ndarray,
        rows: np.ndarray,
        tokens: np.ndarray,
        allowed: np.ndarray | None,
    ) -> np.ndarray:
        """``(B,)`` log-probability, in nats, of each row's next token under the reference model.

        :param ids: ``(B, L)`` token ids before that token
        :param lengths: ``(B,)`` how many there are
        :param prompt_lengths: ``(B,)`` how many of these are the prompt's
        :param rows: ``(B,)`` environment rows, which are slots in the model's cache
        :param tokens: ``(B,)`` the next tokens
        :param allowed: ``(B, V)`` bool action masks, or None without masking
        """
        assert self.reference is not None
        hidden = self.reference.cached(self.context).last_hidden(ids, lengths, rows, prompt_lengths)
        return self._token_log_probs(hidden, torch.as_tensor(tokens, device=hidden.device), allowed)

    def _token_log_probs(self, hidden: Tensor, tokens: Tensor, allowed: np.ndarray | None) -> np.ndarray:
        """``(M,)`` log-probability under the reference model of tokens predicted from ``(M, H)`` hidden states."""
        assert self.reference is not None
        mask = None
        if allowed is not None:
            mask = torch.as_tensor(allowed, device=tokens.device)
            # Who chooses a token against the mask pays for its rarity, not an infinite penalty.
            mask = mask.scatter(1, tokens[:, None], True)
        chosen, _ = self.reference.token_log_probs(hidden, tokens, self.temperature, mask, with_entropy=False)
        return chosen.cpu().numpy()

    def paid(
        self, parts: StepParts, log_probs: np.ndarray, turn_ends: np.ndarray, kl_coef: np.ndarray | float
    ) -> RolloutScores:
        """Rewards from their parts.

        :param parts: of S steps of N rows
        :param log_probs: ``(S, N)`` under which the tokens were drawn, nats
        :param turn_ends: ``(S, N)`` bool, which steps ended a turn
        :param kl_coef: β, a number or ``(S, 1)``
        """
        kl = self.kl(log_probs, parts.ref_log_prob)
        costs = np.where(parts.taken & (np.asarray(kl_coef) != 0), kl_coef * kl, 0.0)
        rewards = parts.reward_model + parts.reply - parts.penalty - costs
        return RolloutScores(
            rewards=rewards.astype(np.float32),
            reward_model=parts.reward_model.astype(np.float32),
            kl=kl.astype(np.float32),
            ref_log_prob=parts.ref_log_prob.astype(np.float32),
            turn_ends=turn_ends,
        )

    @torch.no_grad()
    def score_segments(
        self,
        segments: list[RecordedSegment],
        shape: tuple[int, int],
        vocabulary: Vocabulary,
        allowed: list[np.ndarray] | None,
    ) -> tuple[StepParts, list[EpisodeScore]]:
        """What the steps of segments are paid for, from teacher-forced passes, and Φ after each segment.

        :param segments: K of them, in the order in which their episodes ended
        :param shape: ``(S, N)``, how many steps of how many rows
        :param vocabulary: decodes for rewards that read text
        :param allowed: S packed action masks ``(N, V / 8)``, or None without masking
        """
        parts, scores = StepParts.nothing(shape), []
        batch = _as_batch(segments, vocabulary)
        due = [self._scored_states(segment) for segment in segments]
        points = [segment.states[states] for segment, states in zip(segments, due, strict=True)]
        potentials = prefix_potentials_of(self.reward, batch, points)
        for i, (segment, states, values) in enumerate(zip(segments, due, potentials, strict=True)):
            row = segment.row
            if len(values):
                self.applies[row] = not np.isnan(payable(self.reward, values, batch, i)[-1])
            values = np.nan_to_num(values)
            if len(states) and states[0] == 0:  # Φ of the prompt, where the episode begins here
                previous, states, values = values[0], states[1:], values[1:]
            else:
                previous = self.potential[row] if segment.states[0] else 0.0
            steps = segment.steps_in_rollout
            parts.reward_model[steps[states - 1], row] = np.diff(values, prepend=previous)
            self.potential[row] = float(values[-1] if len(values) else previous)
            scores.append(self.score_of(row))
            parts.taken[steps, row] = True
            parts.penalty[steps, row] = segment.penalties
            parts.reply[steps, row] = segment.reply_rewards
        if self.reference is not None and segments:
            steps, columns, log_probs = self._reference_log_probs_of(segments, batch, allowed)
            parts.ref_log_prob[steps, columns] = log_probs
        return parts, scores

    def score_of(self, row: int) -> EpisodeScore:
        """Φ of the text in a row, as it was last scored."""
        return EpisodeScore(float(self.potential[row]), bool(self.applies[row]))

    def _scored_states(self, segment: RecordedSegment) -> np.ndarray:
        """Which of a segment's states Φ is needed of: those due after its steps, and the first where it is a prompt."""
        states = np.arange(1, segment.steps + 1)
        last = np.zeros(segment.steps, dtype=bool)
        last[-1] = segment.finish_reason is not None
        due = states[self.is_due(segment.taken_before + states, segment.turn_ends, last)]
        begins = self.pays_differences and segment.states[0] == 0
        return np.concatenate([[0], due]).astype(np.int64) if begins else due

    def _reference_log_probs_of(
        self, segments: list[RecordedSegment], batch: PrefixBatch, allowed: list[np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps ``(M,)`` and rows ``(M,)`` of the segments' tokens, and their log-probabilities ``(M,)`` under the
        reference model."""
        assert self.reference is not None
        rows = np.concatenate([np.full(segment.steps, i) for i, segment in enumerate(segments)])
        at = np.concatenate([segment.positions for segment in segments])
        steps = np.concatenate([segment.steps_in_rollout for segment in segments])
        columns = batch.rows[rows]

        def masks(which: np.ndarray) -> np.ndarray:
            assert allowed is not None
            packed = np.stack([allowed[step][row] for step, row in zip(steps[which], columns[which], strict=True)])
            return np.unpackbits(packed, axis=1, count=reference.vocab_size).astype(bool)

        reference = self.reference
        log_probs = forced_log_probs(
            reference,
            self.context,
            batch.input_ids,
            batch.lengths,
            batch.prompt_lengths,
            rows,
            at - 1,
            batch.input_ids[rows, at],
            self.temperature,
            None if allowed is None else masks,
        )
        return steps, columns, log_probs


def _as_batch(segments: list[RecordedSegment], vocabulary: Vocabulary) -> PrefixBatch:
    width = max((len(segment.ids) for segment in segments), default=0)
    ids = np.zeros((len(segments), width), dtype=np.int64)
    for i, segment in enumerate(segments):
        ids[i, : len(segment.ids)] = segment.ids
    return PrefixBatch(
        input_ids=ids,
        lengths=np.array([len(segment.ids) for segment in segments]),
        prompt_lengths=np.array([segment.prompt_length for segment in segments]),
        finished=np.array([segment.finished for segment in segments]),
        rows=np.array([segment.row for segment in segments]),
        prompts=[segment.prompt for segment in segments],
        columns=as_columns([segment.columns for segment in segments]),
        tokenizer=vocabulary.tokenizer,
        turns=vocabulary.turns,
        replies=None if all(segment.replies is None for segment in segments) else [s.replies or [] for s in segments],
    )
