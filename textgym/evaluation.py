"""How good are a model's texts, and how far have they drifted? Samples on held-out prompts, with the usual figures.

:func:`evaluate` measures whole texts; :func:`score_tokens` says what each token of a text was worth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from textgym.action_masks import masks_of
from textgym.checks import check_int
from textgym.language_model import LanguageModel
from textgym.metrics import bootstrap_interval, distinct_n, distinct_n_interval, repetition, repetitions
from textgym.replies.base import Transcript, aside
from textgym.replies.opening import as_reply
from textgym.rewards import Reward
from textgym.rewards.base import potentials_of, prefix_potentials_of
from textgym.rewards.scores import payable
from textgym.sampled_texts import (
    Prompts,
    SampledTexts,
    check_reference,
    completion_log_probs,
    log_probs_of,
    rows_of,
    sampled_texts,
    token_log_probs,
)
from textgym.sampling import SamplingSettings
from textgym.token_values import ScoredCompletion, score_tokens

__all__ = [
    "Estimate",
    "Evaluation",
    "Prompts",
    "ScoredCompletion",
    "TurnFigures",
    "check_reference",
    "completion_log_probs",
    "evaluate",
    "score_tokens",
    "token_log_probs",
]


class Estimate(NamedTuple):
    """A figure and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass
class TurnFigures:
    """What there is to know of N texts of several turns, besides what every text has."""

    transcripts: list[Transcript]  # N conversations after the prompts, as messages; the model's are the assistant's
    reply_rewards: np.ndarray  # (N,) sum of what replies paid
    turn_rewards: list[list[float]]  # N lists: Φ after each turn and its reply, less Φ before, plus what the reply paid

    @property
    def counts(self) -> np.ndarray:
        """``(N,)`` turns of each text."""
        return np.array([len(rewards) for rewards in self.turn_rewards])

    def rewards_of(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """``(M,)`` which texts have a turn of that number, from 0, and what it earned in each."""
        having = np.flatnonzero(self.counts > turn)
        return having, np.array([self.turn_rewards[i][turn] for i in having])


@dataclass
class Evaluation:
    """N completions and what was measured on each.

    Several completions of one prompt are next to each other. Of texts of several turns, a completion is what the model
    said, a line for each turn, and ``length``, KL and log-probabilities are of its tokens alone.
    """

    prompts: list[str]
    completions: list[str]
    scores: np.ndarray  # (N,) Φ of prompt and completion
    kl: np.ndarray  # (N,) Σ_t log π − log π_ref over the completion, nats
    ref_log_prob: np.ndarray  # (N,) log π_ref of the completion, nats
    lengths: np.ndarray  # (N,) tokens, with the end-of-sequence token
    finish_reasons: list[str]  # "eos", "stop" (a stop string) or "length"; in turns "reply", "turns" or "length"
    settings: dict[str, Any] = field(default_factory=dict)  # how it was sampled: plain data, for the record
    turns: TurnFigures | None = None  # where somebody replied

    def __post_init__(self) -> None:
        for name in ("completions", "scores", "kl", "ref_log_prob", "lengths", "finish_reasons"):
            if len(getattr(self, name)) != len(self.prompts):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {len(self.prompts)} prompts; expected as many"
                )
        if not self.prompts:
            raise ValueError("an evaluation needs at least one text")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def ended(self) -> np.ndarray:
        """``(N,)`` bool, whether the text ended by itself, or with a reply, and not because a budget was used up."""
        return np.array([reason not in ("length", "turns") for reason in self.finish_reasons])

    @property
    def returns(self) -> np.ndarray:
        """``(N,)`` what each text is worth: its score, and what replies paid."""
        return self.scores if self.turns is None else self.scores + self.turns.reply_rewards

    @property
    def perplexity(self) -> float:
        """Per token, of all completions under the reference model."""
        return float(np.exp(-self.ref_log_prob.sum() / self.lengths.sum()))

    @property
    def distinct_1(self) -> float:
        """Share of words that are different from all others (Li et al. 2016)."""
        return distinct_n(self.completions, 1)

    @property
    def distinct_2(self) -> float:
        """Share of word pairs that are different from all others (Li et al. 2016)."""
        return distinct_n(self.completions, 2)

    def figures(self) -> dict[str, float]:
        """The means that a table shows.

        ``score`` and its standard deviation ``score_std``; ``positive``, the share of scores above 0, which says
        something only where the reward's zero does; ``kl`` in nats per completion; ``perplexity`` per token under the
        reference; ``distinct_1``, ``distinct_2`` and ``repetition`` (of word pairs within a text); ``length`` in
        tokens; ``eos_rate``, the share that ended with the end-of-sequence token.

        Where somebody replied there is no ``eos_rate``, but ``turns``; ``reply_reward``, the sum of what replies paid,
        and ``return``, the score with it; ``turn_1_reward``, ``turn_2_reward`` ..., what the turn earned in the texts
        that have it; ``ended_by_reply``, ``ended_by_turns`` and ``ended_by_length``, shares of the texts.
        """
        return {
            "score": float(self.scores.mean()),
            "score_std": float(self.scores.std()),
            "positive": float((self.scores > 0).mean()),
            "kl": float(self.kl.mean()),
            "perplexity": self.perplexity,
            "distinct_1": self.distinct_1,
            "distinct_2": self.distinct_2,
            "repetition": repetition(self.completions, 2),
            "length": float(self.lengths.mean()),
            **{name: float(values.mean()) for name, (values, _) in self._of_the_end().items()},
        }

    def summary(self, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> dict[str, Estimate]:
        """The figures, but for ``score_std``, with confidence intervals.

        Intervals are percentile bootstrap intervals over prompts: completions of the same prompt are drawn together,
        as they are not independent. With one prompt only, its completions are drawn, and the interval says nothing
        about other prompts. Those of distinct-1 and distinct-2 come from the jackknife, for the reason that
        :func:`~textgym.metrics.distinct_n_interval` gives. They cover the choice of prompts and the sampling of
        texts; that another training run would end elsewhere is not in them.

        :param confidence: probability that an interval is to cover
        :param n_resamples: how often the bootstrap draws
        :param seed: of the bootstrap
        """
        groups = self.prompts if len(set(self.prompts)) > 1 else None

        def interval(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
            return bootstrap_interval(values, confidence, n_resamples, seed, weights=weights, groups=groups)

        # Perplexity is a monotone function of a mean over tokens, and so are its quantiles.
        log_perplexity = interval(-self.ref_log_prob / self.lengths, self.lengths)
        intervals = {
            "score": interval(self.scores),
            "positive": interval(self.scores > 0),
            "kl": interval(self.kl),
            "perplexity": (math.exp(log_perplexity[0]), math.exp(log_perplexity[1])),
            "distinct_1": distinct_n_interval(self.completions, 1, confidence, groups),
            "distinct_2": distinct_n_interval(self.completions, 2, confidence, groups),
            "repetition": interval(repetitions(self.completions, 2)),
            "length": interval(self.lengths),
        }
        for name, (values, texts) in self._of_the_end().items():
            of_these = None if groups is None else [groups[i] for i in texts]
            intervals[name] = bootstrap_interval(values, confidence, n_resamples, seed, groups=of_these)
        figures = self.figures()
        return {name: Estimate(figures[name], *ends) for name, ends in intervals.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, a dictionary a text, with the figures for whoever reads the file."""
        turns: list[dict[str, Any]] = [{} for _ in self.prompts]
        if self.turns is not None:
            parts = (self.turns.transcripts, self.turns.reply_rewards.tolist(), self.turns.turn_rewards)
            turns = [dict(zip(_TURN_FIELDS, values, strict=True)) for values in zip(*parts, strict=True)]
        columns = zip(
            self.prompts,
            self.completions,
            self.scores.tolist(),
            self.kl.tolist(),
            self.ref_log_prob.tolist(),
            self.lengths.tolist(),
            self.finish_reasons,
            strict=True,
        )
        return {
            "settings": self.settings,
            "figures": self.figures(),
            "texts": [
                {**dict(zip(_TEXT_FIELDS, values, strict=True)), **more}
                for values, more in zip(columns, turns, strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Evaluation:
        """What :meth:`to_dict` was called on.

        :raises ValueError: if ``data`` is something else
        """
        texts = data.get("texts") if isinstance(data, dict) else None
        if not isinstance(texts, list) or not isinstance(data.get("settings"), dict):
            raise ValueError("this is not an evaluation: expected an object with 'settings' and a list of 'texts'")
        in_turns = bool(texts) and isinstance(texts[0], dict) and "transcript" in texts[0]
        fields = {**_TEXT_FIELDS, **_TURN_FIELDS} if in_turns else _TEXT_FIELDS
        for i, text in enumerate(texts):
            for name, kind in fields.items():
                value = text.get(name) if isinstance(text, dict) else None
                if isinstance(value, bool) or not isinstance(value, kind):
                    raise ValueError(f"this is not an evaluation: texts[{i}] has {value!r} as {name!r}")
        columns = {name: [text[name] for text in texts] for name in fields}
        turns = None
        if in_turns:
            paid = np.array(columns["reply_reward"], dtype=np.float64)
            turns = TurnFigures(columns["transcript"], paid, columns["turn_rewards"])
        return cls(
            prompts=columns["prompt"],
            completions=columns["completion"],
            scores=np.array(columns["score"], dtype=np.float64),
            kl=np.array(columns["kl"], dtype=np.float64),
            ref_log_prob=np.array(columns["ref_log_prob"], dtype=np.float64),
            lengths=np.array(columns["length"], dtype=np.int64),
            finish_reasons=columns["finish_reason"],
            settings=data["settings"],
            turns=turns,
        )

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON; the numbers come back to the last bit."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """What :meth:`to_json` was called on.

        :raises ValueError: if the text is something else
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"this is not an evaluation: broken JSON, {error}") from error

    def _of_the_end(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Figures of how texts end and of their turns: values ``(M,)`` and which M texts they are of."""
        every = np.arange(len(self))

        def ended_by(reason: str) -> tuple[np.ndarray, np.ndarray]:
            return np.array([each == reason for each in self.finish_reasons]), every

        if self.turns is None:
            return {"eos_rate": ended_by("eos")}
        found = {
            "turns": (self.turns.counts, every),
            "reply_reward": (self.turns.reply_rewards, every),
            "return": (self.returns, every),
        }
        for turn in range(int(self.turns.counts.max())):
            having, rewards = self.turns.rewards_of(turn)
            found[f"turn_{turn + 1}_reward"] = (rewards, having)
        return found | {f"ended_by_{reason}": ended_by(reason) for reason in ("reply", "turns", "length")}


_TEXT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "completion": str,
    "score": (int, float),
    "kl": (int, float),
    "ref_log_prob": (int, float),
    "length": int,
    "finish_reason": str,
}
_TURN_FIELDS: dict[str, type | tuple[type, ...]] = {
    "transcript": list,
    "reply_reward": (int, float),
    "turn_rewards": list,
}


def evaluate(
    model: LanguageModel,
    reference: LanguageModel,
    reward: Reward,
    prompts: Prompts,
    sampling: SamplingSettings | None = None,
    *,
    reply: Any = None,
    restricting: LanguageModel | None = None,
    completions_per_prompt: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Evaluation:
    """Complete each prompt and measure the texts.

    Same arguments, same machine, same library versions: the same texts and figures. ``batch_size`` is one of these
    arguments, as the rows of a batch share the random numbers.

    :param model: writes the completions
    :param reference: what KL and perplexity are measured against
    :param reward: Φ
    :param prompts: texts, rows with further columns, what ``load_prompt_file`` returns, or another finite source that
        ``as_prompt_source`` takes; each shorter than the model's context by ``max_new_tokens``
    :param sampling: how completions are sampled; an environment's ``sampling`` is how a policy is trained in it.
        Log-probabilities are those of what was sampled from: at the same temperature, under the same masks
    :param reply: who speaks after each turn, an environment's ``reply`` or whatever it takes as that; afterwards it
        goes on in the episodes that it was in. None for texts of one turn
    :param restricting: whose likeliest tokens top-k and top-p are; default the reference
    :param completions_per_prompt: how many of each prompt
    :param batch_size: completions written side by side
    :param seed: of the sampling
    :param progress: called after each batch with the number of texts done and of all texts
    :param settings: of :class:`~textgym.sampling.SamplingSettings`, in the place of those of ``sampling``
    :raises ValueError: if there are no prompts, one is too long or of no token, the reference has another vocabulary
        than the model, or a number is out of range
    """
    sampling = (sampling or SamplingSettings()).changed(**settings)
    check_reference(model, reference)
    check_int("completions_per_prompt", completions_per_prompt, low=1)
    rows = [row for row in rows_of(prompts, model) for _ in range(completions_per_prompt)]
    speaker = None if reply is None else as_reply(reply)
    masks = masks_of(sampling, model, restricting or reference)
    parts: list[_Measured] = []
    with aside(speaker, seed):
        for texts in sampled_texts(sampling, masks, model, rows, speaker, batch_size, seed):
            parts.append(
                _Measured.of(texts, reward, *log_probs_of((model, reference), texts.batch, sampling.temperature, masks))
            )
            if progress is not None:
                progress(sum(len(part.texts.batch) for part in parts), len(rows))
    turns = None
    if speaker is not None:
        turns = TurnFigures(
            transcripts=[transcript for part in parts for transcript in part.texts.batch.transcripts],
            reply_rewards=np.array([sum(paid) for part in parts for paid in part.texts.reply_rewards]),
            turn_rewards=[rewards for part in parts for rewards in part.turn_rewards],
        )
    return Evaluation(
        prompts=[prompt for part in parts for prompt in part.texts.batch.prompts],
        completions=[completion for part in parts for completion in part.texts.batch.completions],
        scores=np.concatenate([part.scores for part in parts]),
        kl=np.concatenate([part.log_prob - part.ref_log_prob for part in parts]),
        ref_log_prob=np.concatenate([part.ref_log_prob for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        finish_reasons=[reason for part in parts for reason in part.texts.finish_reasons],
        settings={
            "model": model.name,
            "reference": reference.name,
            "reward": reward.name,
            "reply": None if speaker is None else speaker.name,
            "completions_per_prompt": completions_per_prompt,
            **sampling.as_dict(),
            "batch_size": batch_size,
            "seed": seed,
        },
        turns=turns,
    )


@dataclass
class _Measured:
    """What was measured of a batch of B texts."""

    texts: SampledTexts
    scores: np.ndarray  # (B,)
    turn_rewards: list[list[float]]  # of each turn, where somebody replied
    log_prob: np.ndarray  # (B,)
    ref_log_prob: np.ndarray  # (B,)
    lengths: np.ndarray  # (B,)

    @classmethod
    def of(
        cls, texts: SampledTexts, reward: Reward, log_probs: list[np.ndarray], ref_log_probs: list[np.ndarray]
    ) -> _Measured:
        batch = texts.batch
        reward.forget(batch.rows)  # what was scored before must not show, not even in the last bits
        if batch.replies is None:
            scores = np.nan_to_num(payable(reward, potentials_of(reward, batch), batch))
            turn_rewards: list[list[float]] = []
        else:
            states = [batch.turn_states(row) for row in range(len(batch))]
            potentials = [
                np.nan_to_num(payable(reward, values, batch, row))
                for row, values in enumerate(prefix_potentials_of(reward, batch, states))
            ]
            scores = np.array([values[-1] for values in potentials])
            turn_rewards = [np.diff(values).tolist() for values in potentials]
            for rewards, paid in zip(turn_rewards, texts.reply_rewards, strict=True):
                rewards[: len(paid)] = [reward + more for reward, more in zip(rewards, paid, strict=False)]
        return cls(
            texts,
            scores,
            turn_rewards,
            np.array([tokens.sum() for tokens in log_probs]),
            np.array([tokens.sum() for tokens in ref_log_probs]),
            np.array([len(tokens) for tokens in log_probs]),
        )
