"""How good are a model's texts, and how far have they drifted? Samples on held-out prompts, with the usual figures.

:func:`evaluate` measures whole texts; :func:`score_tokens` says what each token of a text was worth.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from textgym.action_masks import ActionMasks, masks_of
from textgym.checks import check_int
from textgym.episode_rules import EpisodeRules
from textgym.generation import complete_texts
from textgym.language_model import LanguageModel
from textgym.metrics import bootstrap_interval, distinct_n, distinct_n_interval, repetition, repetitions
from textgym.prompts.fitting import FittedPrompt, as_chat
from textgym.prompts.opening import as_prompt_source
from textgym.prompts.rows import PromptRow, PromptRows
from textgym.rewards import PrefixBatch, Reward
from textgym.rewards.base import potentials_of, prefix_potentials_of
from textgym.rewards.scores import payable
from textgym.sampling import SamplingSettings
from textgym.teacher_forcing import forced_log_probs
from textgym.texts import token_texts

# Also whatever else as_prompt_source takes and has an end, such as the path of a file.
Prompts: TypeAlias = Sequence[str] | Sequence[PromptRow] | Sequence[Mapping[str, Any]] | PromptRows


class Estimate(NamedTuple):
    """A figure and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass
class Evaluation:
    """N completions and what was measured on each.

    Several completions of one prompt are next to each other.
    """

    prompts: list[str]
    completions: list[str]
    scores: np.ndarray  # (N,) Φ of prompt and completion
    kl: np.ndarray  # (N,) Σ_t log π − log π_ref over the completion, nats
    ref_log_prob: np.ndarray  # (N,) log π_ref of the completion, nats
    lengths: np.ndarray  # (N,) tokens, with the end-of-sequence token
    finish_reasons: list[str]  # "eos", "stop" (a stop string) or "length"
    settings: dict[str, Any] = field(default_factory=dict)  # how it was sampled: plain data, for the record

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
        """``(N,)`` bool, whether the completion ended by itself and not because its budget was used up."""
        return np.array([reason != "length" for reason in self.finish_reasons])

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
            "eos_rate": float(self._at_eos().mean()),
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
            "eos_rate": interval(self._at_eos()),
        }
        figures = self.figures()
        return {name: Estimate(figures[name], *ends) for name, ends in intervals.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, a dictionary a text, with the figures for whoever reads the file."""
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
            "texts": [dict(zip(_TEXT_FIELDS, values, strict=True)) for values in columns],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Evaluation:
        """What :meth:`to_dict` was called on.

        :raises ValueError: if ``data`` is something else
        """
        texts = data.get("texts") if isinstance(data, dict) else None
        if not isinstance(texts, list) or not isinstance(data.get("settings"), dict):
            raise ValueError("this is not an evaluation: expected an object with 'settings' and a list of 'texts'")
        for i, text in enumerate(texts):
            for name, kind in _TEXT_FIELDS.items():
                value = text.get(name) if isinstance(text, dict) else None
                if isinstance(value, bool) or not isinstance(value, kind):
                    raise ValueError(f"this is not an evaluation: texts[{i}] has {value!r} as {name!r}")
        columns = {name: [text[name] for text in texts] for name in _TEXT_FIELDS}
        return cls(
            prompts=columns["prompt"],
            completions=columns["completion"],
            scores=np.array(columns["score"], dtype=np.float64),
            kl=np.array(columns["kl"], dtype=np.float64),
            ref_log_prob=np.array(columns["ref_log_prob"], dtype=np.float64),
            lengths=np.array(columns["length"], dtype=np.int64),
            finish_reasons=columns["finish_reason"],
            settings=data["settings"],
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

    def _at_eos(self) -> np.ndarray:
        return np.array([reason == "eos" for reason in self.finish_reasons])


_TEXT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "completion": str,
    "score": (int, float),
    "kl": (int, float),
    "ref_log_prob": (int, float),
    "length": int,
    "finish_reason": str,
}


def evaluate(
    model: LanguageModel,
    reference: LanguageModel,
    reward: Reward,
    prompts: Prompts,
    sampling: SamplingSettings | None = None,
    *,
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
    :param restricting: whose likeliest tokens top-k and top-p are; default the reference
    :param completions_per_prompt: how many of each prompt
    :param batch_size: completions written side by side
    :param seed: of the sampling
    :param progress: called after each batch with the number of texts done and of all texts
    :param settings: of :class:`~textgym.sampling.SamplingSettings`, in the place of those of ``sampling``
    :raises ValueError: if there are no prompts, one is too long or of no token, the reference has another vocabulary
        than the model, or a number is out of range
    """
    sampling = _with_settings(sampling, settings)
    check_reference(model, reference)
    check_int("completions_per_prompt", completions_per_prompt, low=1)
    rows = [row for row in _as_rows(prompts, model) for _ in range(completions_per_prompt)]
    parts, finish_reasons = [], []
    masks = masks_of(sampling, model, restricting or reference)
    for batch, reasons in _batches(sampling, masks, model, rows, batch_size, seed):
        log_prob, ref_log_prob = (
            np.array([tokens.sum() for tokens in each])
            for each in _log_probs((model, reference), batch, sampling.temperature, masks)
        )
        reward.forget(batch.rows)  # what was scored before must not show, not even in the last bits
        scores = np.nan_to_num(payable(reward, potentials_of(reward, batch), batch))
        parts.append((batch, scores, log_prob - ref_log_prob, ref_log_prob))
        finish_reasons += reasons
        if progress is not None:
            progress(len(finish_reasons), len(rows))
    return Evaluation(
        prompts=[prompt for batch, *_ in parts for prompt in batch.prompts],
        completions=[completion for batch, *_ in parts for completion in batch.completions],
        scores=np.concatenate([scores for _, scores, _, _ in parts]),
        kl=np.concatenate([kl for _, _, kl, _ in parts]),
        ref_log_prob=np.concatenate([ref for *_, ref in parts]),
        lengths=np.concatenate([batch.completion_lengths for batch, *_ in parts]),
        finish_reasons=finish_reasons,
        settings={
            "model": model.name,
            "reference": reference.name,
            "reward": reward.name,
            "completions_per_prompt": completions_per_prompt,
            **sampling.as_dict(),
            "batch_size": batch_size,
            "seed": seed,
        },
    )


def check_reference(model: LanguageModel, reference: LanguageModel) -> None:
    """:raises ValueError: if the two don't have the same tokens"""
    if reference is not model and (
        reference.vocab_size != model.vocab_size or reference.tokenizer.get_vocab() != model.tokenizer.get_vocab()
    ):
        raise ValueError(
            f"the reference {reference.name} has another vocabulary than the model {model.name}: KL and perplexity "
            "compare the same tokens; give the model that training started from"
        )


@dataclass
class ScoredCompletion:
    """A completion of T tokens and what each of them was worth.

    ``"".join(tokens)`` is the completion; a token without text of its own, such as end-of-sequence, is ``""``. The
    rewards telescope: they sum to ``score`` − ``prompt_score``.
    """

    prompt: str
    token_ids: list[int]
    tokens: list[str]
    rewards: np.ndarray  # (T,) Φ(x, y_≤t) − Φ(x, y_<t), without the KL penalty
    kl: np.ndarray | None  # (T,) log π − log π_ref, nats; None without a reference model
    prompt_score: float  # Φ(x, ∅)
    score: float  # Φ(x, y)
    finish_reason: str  # "eos", "stop" (a stop string) or "length"

    @property
    def completion(self) -> str:
        return "".join(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "prompt": self.prompt,
            "completion": self.completion,
            "score": self.score,
            "prompt_score": self.prompt_score,
            "kl": None if self.kl is None else float(self.kl.sum()),
            "finish_reason": self.finish_reason,
            "token_ids": self.token_ids,
            "tokens": self.tokens,
            "token_rewards": self.rewards.tolist(),
            "token_kl": None if self.kl is None else self.kl.tolist(),
        }


def score_tokens(
    model: LanguageModel,
    reference: LanguageModel | None,
    reward: Reward,
    prompts: Prompts,
    sampling: SamplingSettings | None = None,
    *,
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
    scored = []
    sampling = _with_settings(sampling, settings)
    if reference is not None:
        check_reference(model, reference)
    masks = masks_of(sampling, model, restricting or reference)
    rows = _as_rows(prompts, model)
    for batch, reasons in _batches(sampling, masks, model, rows, batch_size, seed, deterministic):
        kl: list[np.ndarray] | list[None] = [None] * len(batch)
        if reference is not None:
            own, other = _log_probs((model, reference), batch, sampling.temperature, masks)
            kl = [a - b for a, b in zip(own, other, strict=True)]
        reward.forget(batch.rows)
        every = [np.arange(n + 1) for n in batch.completion_lengths.tolist()]
        potentials = [
            np.nan_to_num(payable(reward, values, batch, i))
            for i, values in enumerate(prefix_potentials_of(reward, batch, every))
        ]
        for i, (values, token_kl, reason) in enumerate(zip(potentials, kl, reasons, strict=True)):
            scored.append(
                ScoredCompletion(
                    prompt=batch.prompts[i],
                    token_ids=batch.completion_ids[i],
                    tokens=token_texts(batch, i),
                    rewards=np.diff(values),
                    kl=token_kl,
                    prompt_score=float(values[0]),
                    score=float(values[-1]),
                    finish_reason=reason,
                )
            )
    return scored


def completion_log_probs(
    model: LanguageModel, batch: PrefixBatch, temperature: float = 1.0, masks: ActionMasks | None = None
) -> np.ndarray:
    """Log-probability of each completion given its prompt, ``(B,)`` in nats, from one teacher-forced pass."""
    return np.array([log_probs.sum() for log_probs in token_log_probs(model, batch, temperature, masks)])


def token_log_probs(
    model: LanguageModel, batch: PrefixBatch, temperature: float = 1.0, masks: ActionMasks | None = None
) -> list[np.ndarray]:
    """Log-probability of each token of B completions, in nats, from one teacher-forced pass.

    :param masks: what the distributions are restricted to; a token that was chosen against them is treated as allowed
    :return: B arrays ``(T,)`` float64
    """
    return _log_probs((model,), batch, temperature, masks)[0]


@torch.no_grad()
def _log_probs(
    models: Sequence[LanguageModel], batch: PrefixBatch, temperature: float, masks: ActionMasks | None
) -> list[list[np.ndarray]]:
    """:func:`token_log_probs` of several models, under the same masks."""
    counts = batch.completion_lengths
    rows = np.repeat(np.arange(len(batch)), counts)
    at = np.concatenate([np.arange(p, n) for p, n in zip(batch.prompt_lengths, batch.lengths, strict=True)])
    tokens = batch.input_ids[rows, at]  # (M,)

    written = at - batch.prompt_lengths[rows]
    restricting = None
    if masks is not None and masks.model is not None:
        machine = masks.model.cached(batch.input_ids.shape[1])
        restricting = machine.hidden_at(batch.input_ids, batch.lengths, rows, at - 1, batch.prompt_lengths)  # (M, H)

    def allowed(which: np.ndarray) -> np.ndarray:
        assert masks is not None
        return masks.at(written[which], None if restricting is None else restricting[which])

    found = []
    for model in models:
        log_probs = forced_log_probs(
            model,
            batch.input_ids.shape[1],
            batch.input_ids,
            batch.lengths,
            batch.prompt_lengths,
            rows,
            at - 1,
            tokens,
            temperature,
            None if masks is None else allowed,
        )
        found.append(np.split(log_probs, np.cumsum(counts)[:-1]))
    return found


def _with_settings(sampling: SamplingSettings | None, settings: Mapping[str, Any]) -> SamplingSettings:
    return dataclasses.replace(SamplingSettings() if sampling is None else sampling, **settings)


def _batches(
    sampling: SamplingSettings,
    masks: ActionMasks | None,
    model: LanguageModel,
    rows: Sequence[PromptRow],
    batch_size: int,
    seed: int,
    deterministic: bool = False,
) -> Iterator[tuple[PrefixBatch, list[str]]]:
    """Batches of completions, and why each of them ended."""
    check_int("batch_size", batch_size, low=1)
    fitted = _fitted(sampling, model, rows)  # all of them before the first is completed
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for start in range(0, len(fitted), batch_size):
        part = fitted[start : start + batch_size]
        texts = complete_texts(model, part, sampling, deterministic=deterministic, masks=masks, generator=generator)
        yield texts.batch(np.arange(len(part))), [str(reason) for reason in texts.finish_reasons]


def _fitted(sampling: SamplingSettings, model: LanguageModel, rows: Sequence[PromptRow]) -> list[FittedPrompt]:
    """The prompts as the model sees them."""
    if sampling.chat:
        rows = [as_chat(row, model.vocabulary) for row in rows]
    rules = EpisodeRules(model.vocabulary, sampling)
    fitted = [rules.fit(row) for row in rows]
    limit = model.vocabulary.context_limit
    for row, ids in fitted:
        if limit is not None and len(ids) + sampling.max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} are together more than "
                f"the context of {limit} tokens that {model.name} has: {row.prompt[:60]!r}..."
            )
    cut = [row.prompt for row, (kept, _) in zip(rows, fitted, strict=True) if kept is not row]
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(rows)} prompts are longer than max_prompt_tokens={sampling.max_prompt_tokens} and "
            f"were cut on the left, or in their oldest turns, such as {cut[0][:60]!r}...",
            stacklevel=4,
        )
    return fitted


def _as_rows(prompts: Any, model: LanguageModel) -> list[PromptRow]:
    source = as_prompt_source(prompts, model.tokenizer)
    if not isinstance(source, PromptRows):
        raise TypeError(f"prompts is a {type(source).__name__}, which has no end; give a list of prompts")
    return list(source)
