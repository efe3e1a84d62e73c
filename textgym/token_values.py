"""What each token of a model's texts was worth: its instant reward and its KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from textgym.action_masks import masks_of
from textgym.language_model import LanguageModel
from textgym.replies.base import Transcript, aside
from textgym.replies.opening import as_reply
from textgym.rewards import Reward
from textgym.rewards.base import prefix_potentials_of
from textgym.rewards.scores import payable
from textgym.sampled_texts import Prompts, SampledTexts, check_reference, log_probs_of, rows_of, sampled_texts
from textgym.sampling import SamplingSettings
from textgym.texts import token_texts


@dataclass
class ScoredCompletion:
    """A completion of T tokens and what each of them was worth.

    ``"".join(tokens)`` is the text after the prompt; a token without text of its own, such as end-of-sequence, is
    ``""``. The rewards telescope: they sum to ``score`` − ``prompt_score``, plus what replies paid.

    Where somebody replied, the tokens of replies are among the T. Those earn nothing, and have no KL: NaN stands there.
    """

    prompt: str
    token_ids: list[int]
    tokens: list[str]
    rewards: np.ndarray  # (T,) Φ(x, y_≤t) − Φ(x, y_<t), without the KL penalty; with replies as in the environment
    kl: np.ndarray | None  # (T,) log π − log π_ref, nats; None without a reference model
    prompt_score: float  # Φ(x, ∅)
    score: float  # Φ(x, y)
    finish_reason: str  # "eos", "stop" (a stop string) or "length"; in turns "reply", "turns" or "length"
    transcript: Transcript | None = None  # where somebody replied: the messages after the prompt

    @property
    def completion(self) -> str:
        """What the model wrote; in turns a line for each."""
        if self.transcript is None:
            return "".join(self.tokens)
        turns = [message["content"] for message in self.transcript if message["role"] == "assistant"]
        return "\n".join(turn for turn in turns if turn)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "prompt": self.prompt,
            "completion": self.completion,
            "score": self.score,
            "prompt_score": self.prompt_score,
            "kl": None if self.kl is None else float(np.nansum(self.kl)),
            "finish_reason": self.finish_reason,
            "token_ids": self.token_ids,
            "tokens": self.tokens,
            "token_rewards": _numbers(self.rewards),
            "token_kl": None if self.kl is None else _numbers(self.kl),
            **({} if self.transcript is None else {"transcript": self.transcript}),
        }


def score_tokens(
    model: LanguageModel,
    reference: LanguageModel | None,
    reward: Reward,
    prompts: Prompts,
    sampling: SamplingSettings | None = None,
    *,
    reply: Any = None,
    restricting: LanguageModel | None = None,
    deterministic: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    **settings: Any,
) -> list[ScoredCompletion]:
    """Complete each prompt once and say what every token was worth: its instant reward and its KL.

    :param reference: what KL is measured against, or None for no KL
    :param deterministic: take the most likely token each time instead of sampling

    The other parameters and what is raised: as for :func:`evaluate`.
    """
    sampling = (sampling or SamplingSettings()).changed(**settings)
    if reference is not None:
        check_reference(model, reference)
    masks = masks_of(sampling, model, restricting or reference)
    rows, speaker = rows_of(prompts, model), None if reply is None else as_reply(reply)
    scored = []
    with aside(speaker, seed):
        for texts in sampled_texts(sampling, masks, model, rows, speaker, batch_size, seed, deterministic):
            batch = texts.batch
            kl: list[np.ndarray] | list[None] = [None] * len(batch)
            if reference is not None:
                own, other = log_probs_of((model, reference), batch, sampling.temperature, masks)
                kl = [a - b for a, b in zip(own, other, strict=True)]
            reward.forget(batch.rows)
            states = [batch.states(row) for row in range(len(batch))]
            for row, values in enumerate(prefix_potentials_of(reward, batch, states)):
                potentials = np.nan_to_num(payable(reward, values, batch, row))
                scored.append(_scored(texts, row, potentials, kl[row]))
    return scored


def _scored(texts: SampledTexts, row: int, potentials: np.ndarray, kl: np.ndarray | None) -> ScoredCompletion:
    """One of a batch of texts.

    :param potentials: ``(S + 1,)`` Φ of the states between which its S actions lead
    :param kl: ``(S,)`` of the actions
    """
    batch = texts.batch
    rewards, actions = np.diff(potentials), batch.states(row)[:-1]  # (S,)
    ends = np.searchsorted(actions, batch.turn_states(row)[1:]) - 1  # (K,) the actions that end turns
    paid = texts.reply_rewards[row]
    rewards[ends[: len(paid)]] += paid
    count = int(batch.completion_lengths[row])

    def among_all(values: np.ndarray) -> np.ndarray:
        placed = np.full(count, np.nan)
        placed[actions] = values
        return placed

    return ScoredCompletion(
        prompt=batch.prompts[row],
        token_ids=batch.input_ids[row, batch.prompt_lengths[row] : batch.lengths[row]].tolist(),
        tokens=token_texts(batch, row),
        rewards=among_all(rewards),
        kl=None if kl is None else among_all(kl),
        prompt_score=float(potentials[0]),
        score=float(potentials[-1]),
        finish_reason=texts.finish_reasons[row],
        transcript=None if batch.replies is None else batch.transcripts[row],
    )


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]
