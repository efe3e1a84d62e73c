"""Rewards from a causal language model: how likely it finds the completion, or a target after the completion."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from typing_extensions import Unpack

from textgym.checks import check_choice, check_number, check_text, shown
from textgym.engine.cached_model import WeightsVersion
from textgym.handed_on import hands_on
from textgym.language_model import load_vocabulary
from textgym.rewards.base import Reward
from textgym.rewards.columns import column_of, texts_of
from textgym.rewards.errors import RewardError
from textgym.rewards.models.likelihood import LikelihoodArguments, ModelSpec, Origin, TextLikelihood, check_finite
from textgym.rewards.models.own_template import OwnTemplate
from textgym.rewards.models.same_tokens import SameTokens
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import wanted_per_row
from textgym.text_units import sentences_of

Normalize = Literal["mean", "sum"]


class CompletionArguments(LikelihoodArguments, total=False):
    """What a :class:`CompletionLikelihood` takes besides the model."""

    append_eos: bool


@hands_on(TextLikelihood)
class CompletionLikelihood(Reward):
    """Φ made of the sum of a completion's log-probabilities and of how many tokens it has.

    It reads the policy's tokens where its tokenizer gives them the same ids: one token at a time with a cache
    (:meth:`potentials`), or all prefixes of a text in one teacher-forced pass (:meth:`prefix_potentials`), with the
    same result. With another tokenizer it reads decoded text, and conversations in the chat template of its own.

    Further arguments are those of :class:`~textgym.rewards.models.likelihood.TextLikelihood`.

    :param model: a causal language model, as in :func:`~textgym.language_model.load_language_model`
    :param append_eos: whether the end-of-sequence token is part of a completion that ended by itself. Where it is not,
        stopping costs nothing, and with sums the empty completion is the best
    """

    def __init__(
        self,
        model: ModelSpec = "embedded",
        *,
        append_eos: bool = True,
        **arguments: Unpack[LikelihoodArguments],
    ) -> None:
        self.likelihood = TextLikelihood(model, **arguments)
        self.append_eos = append_eos
        lm = self.likelihood.language_model
        self._same_tokens = SameTokens(lm.tokenizer, lm.vocab_size)
        self._template = OwnTemplate(lm.tokenizer, type(self).__name__)
        # What was computed of each environment row: its tokens, where the completion begins, the sum over it.
        self._known: dict[int, tuple[np.ndarray, int, float]] = {}
        self._version: int | None = None
        self._weights = WeightsVersion(self.likelihood.language_model.model)

    @abstractmethod
    def _value(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Φ ``(N,)`` of completions, from sums of log-probabilities ``(N,)`` in nats over ``(N,)`` tokens."""

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """Score complete texts: each ends in the end-of-sequence token where ``append_eos`` is set.

        :raises RewardError: if a text is longer than the model's context
        """
        prompts = self._template.prompts(prompts, columns)
        ended = np.ones(len(completions), dtype=bool)
        return list(self._score_texts(prompts, completions, ended, lambda i: (i, completions[i])).tolist())

    def potentials(self, batch: PrefixBatch) -> np.ndarray:
        """Φ of each prefix; where one has grown by a token since the last call, only one token is computed.

        :return: ``(B,)`` float64
        :raises RewardError: if a prefix is longer than the model's context, or its value is not finite
        """
        if len(batch) == 0:
            return np.zeros(0)
        if not self._reads_tokens_of(batch):
            prompts = self._template.prompts(batch.prompts, batch.columns)
            return self._score_texts(prompts, batch.completions, batch.finished, batch.origin)
        ids, starts = self._tokens_of(batch)
        if len(np.unique(batch.rows)) < len(batch):  # several prefixes of one row can't share its slot
            sums = np.array([row.sum() for row in self._log_probs(ids, starts, batch.origin)])
        else:
            sums = self._stepped_sums(ids, starts, batch.rows, batch.origin)
        return self._value(sums, np.array([len(row) for row in ids]) - starts)

    def prefix_potentials(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Φ of many prefixes of each row, from one pass over it; see :meth:`Reward.prefix_potentials`."""
        if not self._reads_tokens_of(batch):
            return super().prefix_potentials(batch, at)
        wanted_per_row(batch, at)
        for i, (lengths, available) in enumerate(zip(at, batch.completion_lengths, strict=True)):
            if len(lengths) and not 0 <= min(lengths) <= max(lengths) <= available:
                raise ValueError(f"at[{i}] is {lengths}, but row {i} has {available} completion tokens")
        ids, starts = self._tokens_of(batch)
        longest = [max(lengths, default=0) for lengths in at]
        ids = [row[: start + length] for row, start, length in zip(ids, starts, longest, strict=True)]
        scores = []
        values = self._log_probs(ids, starts, lambda i: (int(batch.rows[i]), batch.completions[i]))
        for lengths, log_probs in zip(at, values, strict=True):
            counts = np.minimum(np.asarray(lengths, dtype=np.int64), len(log_probs))  # an EOS that does not count
            scores.append(self._value(np.concatenate([[0.0], np.cumsum(log_probs)])[counts], counts))
        return scores

    def forget(self, rows: np.ndarray) -> None:
        for row in rows:
            self._known.pop(int(row), None)
        self.likelihood.machine(1).forget(rows)

    def _reads_tokens_of(self, batch: PrefixBatch) -> bool:
        """Whether the batch's token ids can be read as they are."""
        return self._same_tokens.of(batch) and self._template.is_of(batch)

    def _tokens_of(self, batch: PrefixBatch) -> tuple[list[np.ndarray], np.ndarray]:
        """The tokens of each row that count, and ``(B,)`` where its completion begins."""
        lengths = batch.lengths - (0 if self.append_eos else batch.finished.astype(np.int64))
        ids = [row[:length] for row, length in zip(batch.input_ids, lengths, strict=True)]
        starts = batch.prompt_lengths.copy()
        for i in np.flatnonzero(starts == 0):
            ids[i], starts[i] = np.concatenate([[self.likelihood.start_token_id], ids[i]]), 1
        return ids, starts

    def _stepped_sums(self, ids: list[np.ndarray], starts: np.ndarray, rows: np.ndarray, origin: Origin) -> np.ndarray:
        """Sums ``(B,)`` of log-probabilities; what is known of rows that grew by a token is not computed again."""
        version = self._weights.now()
        if version != self._version:
            self._known.clear()
            self._version = version
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self.likelihood.check_lengths(self.name, lengths, origin)
        sums = np.zeros(len(ids))
        grown, fresh = [], []
        for i, (row, start) in enumerate(zip(rows.tolist(), starts.tolist(), strict=True)):
            tokens, known_start, known_sum = self._known.get(row, (np.zeros(0, dtype=np.int64), -1, 0.0))
            fits = known_start == start and np.array_equal(tokens, ids[i][: len(tokens)])
            if lengths[i] == start or (fits and lengths[i] == len(tokens)):
                sums[i] = known_sum if lengths[i] > start else 0.0
            elif lengths[i] == start + 1 or (fits and lengths[i] == len(tokens) + 1):
                sums[i] = known_sum if lengths[i] > start + 1 else 0.0
                grown.append(i)
            else:
                fresh.append(i)
        if grown:
            sums[grown] += self._last_log_probs([ids[i] for i in grown], rows[grown], lambda k: origin(grown[k]))
        if fresh:
            values = self._log_probs([ids[i] for i in fresh], starts[fresh], lambda k: origin(fresh[k]))
            sums[fresh] = [row.sum() for row in values]
        for i, row in enumerate(rows.tolist()):
            self._known[row] = (ids[i], int(starts[i]), float(sums[i]))
        return sums

    @torch.no_grad()
    def _last_log_probs(self, ids: list[np.ndarray], rows: np.ndarray, origin: Origin) -> np.ndarray:
        """Log-probability ``(B,)`` of each row's last token, from the cache."""
        before = np.array([len(row) - 1 for row in ids])
        padded = np.zeros((len(ids), int(before.max())), dtype=np.int64)  # (B, L)
        for i, row in enumerate(ids):
            padded[i, : before[i]] = row[:-1]
        hidden = self.likelihood.machine(int(before.max())).last_hidden(padded, before, rows)  # (B, H)
        last = torch.as_tensor(np.array([row[-1] for row in ids]), device=hidden.device)
        log_probs, _ = self.likelihood.language_model.token_log_probs(hidden, last, with_entropy=False)
        values: np.ndarray = log_probs.double().cpu().numpy()
        for i, value in enumerate(values):
            check_finite(self.name, np.array([value]), *origin(i))
        return values

    def _score_texts(
        self, prompts: list[str], completions: list[str], finished: np.ndarray, origin: Origin
    ) -> np.ndarray:
        """Φ ``(B,)`` of texts, tokenized anew."""
        read = [
            self.likelihood.ids_of(prompt, completion, bool(ended) and self.append_eos)
            for prompt, completion, ended in zip(prompts, completions, finished, strict=True)
        ]
        ids, starts = [ids for ids, _ in read], np.array([start for _, start in read], dtype=np.int64)
        values = self._log_probs(ids, starts, origin)
        return self._value(np.array([row.sum() for row in values]), np.array([len(row) for row in values]))

    def _log_probs(self, ids: list[np.ndarray], starts: np.ndarray, origin: Origin) -> list[np.ndarray]:
        return self.likelihood.log_probs(self.name, ids, starts.tolist(), origin)


@hands_on()
class LogProbReward(CompletionLikelihood):
    """Log-probability of the completion given the prompt, in nats: at most 0, without a lower limit.

    Φ = Σ_t log p(y_t | x, y_<t), divided by the number of tokens with ``normalize="mean"``; 0.0 for the empty
    completion. With ``"sum"`` each token is paid its own log-probability, and the differences are exact at no extra
    cost. Both grow with the negative KL to ``model``; likely text is often dull text (Holtzman et al., "The Curious
    Case of Neural Text Degeneration", 2020).

    :param normalize: ``"mean"`` per token, or ``"sum"``

    Further arguments are those of :class:`CompletionLikelihood`.

    >>> reward = LogProbReward("embedded", normalize="sum", append_eos=False)
    >>> scores = reward(prompts=["the film is"] * 2, completions=[" a good film", " film a good"])
    >>> scores[1] < scores[0] < 0
    True
    >>> model = reward.likelihood.language_model
    >>> ids = torch.tensor([model.encode("the film is a good film")])
    >>> logits = model.model(ids).logits.log_softmax(-1)[0]
    >>> start = len(model.encode("the film is"))
    >>> expected = sum(logits[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
    >>> abs(scores[0] - expected) < 1e-3
    True
    """

    def __init__(
        self, model: ModelSpec = "embedded", *, normalize: Normalize = "mean", **arguments: Unpack[CompletionArguments]
    ) -> None:
        check_choice("normalize", normalize, ("mean", "sum"))
        super().__init__(model, **arguments)
        self.normalize = normalize

    def _value(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return sums if self.normalize == "sum" else sums / np.maximum(counts, 1)


@hands_on()
class Fluency(CompletionLikelihood):
    """How far the completion's perplexity lies below that of guessing, from 0 to 1.

    Φ = 1 − ln PPL / ln W, not less than 0, with PPL = exp(−(1/T) Σ_t log p(y_t | x, y_<t)): 1 where each token was
    certain, 0 where the perplexity is W or more, and 0 for the empty completion. On this scale the steps from
    perplexity 1000 to 100 and from 100 to 10 are worth the same.

    :param worst: W, the perplexity that earns nothing; by default the size of the vocabulary, which is that of guessing

    Further arguments are those of :class:`CompletionLikelihood`.

    >>> reward = Fluency("embedded", worst=1000.0, append_eos=False)
    >>> fluent, guessed, empty = reward(prompts=["the film is"] * 3, completions=[" a good film", " zz qq xx", ""])
    >>> log_prob, = LogProbReward("embedded", append_eos=False)(prompts=["the film is"], completions=[" a good film"])
    >>> abs(fluent - (1 + log_prob / math.log(1000))) < 1e-6, guessed < fluent, empty
    (True, True, 0.0)
    """

    def __init__(
        self, model: ModelSpec = "embedded", *, worst: float | None = None, **arguments: Unpack[CompletionArguments]
    ) -> None:
        if worst is not None:
            check_number("worst", worst, low=1.0, open_low=True)
        super().__init__(model, **arguments)
        self.worst = float(self.likelihood.language_model.vocab_size if worst is None else worst)

    def _value(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        scores = np.maximum(1 + sums / np.maximum(counts, 1) / math.log(self.worst), 0.0)
        return np.where(counts > 0, scores, 0.0)


@hands_on(Fluency)
class SentenceFluency(Reward):
    """Mean fluency of the completion's sentences, each read by itself: a language model's view of grammar, 0 to 1.

    A sentence scores 1 − ln PPL / ln W, not less than 0, as in :class:`Fluency`, but without what stands before it:
    "MeanLP" of Lau, Clark and Lappin, "Grammaticality, Acceptability, and Probability" (2017), on another scale. 0.0
    without a sentence.

    Arguments are those of :class:`Fluency`, without ``append_eos``.

    >>> reward = SentenceFluency("embedded")
    >>> good, bad = reward(prompts=["p"] * 2, completions=["This is a good film.", "This good is film a."])
    >>> 0 <= bad < good <= 1
    True
    >>> one, other, both = reward(prompts=["p"] * 3, completions=["It is.", "So was I.", "It is. So was I."])
    >>> abs(both - (one + other) / 2) < 1e-6
    True
    """

    def __init__(
        self, model: ModelSpec = "embedded", *, worst: float | None = None, **arguments: Unpack[LikelihoodArguments]
    ) -> None:
        self._sentence = Fluency(model, worst=worst, append_eos=False, **arguments)

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        sentences = [sentences_of(completion) for completion in completions]
        rows = np.repeat(np.arange(len(sentences)), [len(some) for some in sentences])  # (S,)
        flat = [sentence for some in sentences for sentence in some]

        def origin(i: int) -> tuple[int, str]:
            return int(rows[i]), completions[rows[i]]

        scores = self._sentence._score_texts([""] * len(flat), flat, np.zeros(len(flat), dtype=bool), origin)
        counts = np.array([len(some) for some in sentences])
        return list((np.bincount(rows, scores, minlength=len(sentences)) / np.maximum(counts, 1)).tolist())


@hands_on(TextLikelihood)
class TargetLikelihood(Reward):
    """How well the completion prepares a target text from a column, per token of the target.

    The model reads prompt, completion and target. ``measure="log_prob"`` (at most 0, no lower limit) is the mean
    log-probability of the target's tokens, minus their cross-entropy in nats:
    Φ = (1/N) Σ_i log p(z_i | x, y, z_<i). ``measure="match"`` (0 to 1) is the share of the target's tokens that are the
    model's first choice at their place. Rewarding reasoning by the likelihood of the reference answer after it is
    described in Zhou et al., "Reinforcing General Reasoning without Verifiers" (2025).

    It reads text, with one forward for each prefix, and works with any tokenizer. None where the column has None.
    Further arguments are those of :class:`~textgym.rewards.models.likelihood.TextLikelihood`.

    :param model: as in :func:`~textgym.language_model.load_language_model`
    :param column: the column with the targets
    :param before: text between completion and target, such as ``"\\nAnswer:"``; a target usually begins with a space
    :param measure: ``"log_prob"`` or ``"match"``

    >>> reward = TargetLikelihood("embedded", column="target")
    >>> completions, targets = [" a very", " the of"], [" good film."] * 2
    >>> prepared, unprepared = reward(prompts=["it is"] * 2, completions=completions, target=targets)
    >>> unprepared < prepared < 0
    True
    """

    def __init__(
        self,
        model: ModelSpec = "embedded",
        *,
        column: str = "target",
        before: str = "",
        measure: Literal["log_prob", "match"] = "log_prob",
        **arguments: Unpack[LikelihoodArguments],
    ) -> None:
        check_choice("measure", measure, ("log_prob", "match"))
        check_text("column", column, empty=False)
        check_text("before", before)
        self.likelihood = TextLikelihood(model, **arguments)
        self.column = column
        self.before = before
        self.measure = measure

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """:raises RewardError: if the column is missing, a target isn't a text, has no tokens, or a text is too long"""
        targets = texts_of(self.name, self.column, columns, completions)
        rows = [i for i, target in enumerate(targets) if target is not None]
        read = []
        for i in rows:
            target = targets[i] or ()
            ids, start = self.likelihood.ids_of(prompts[i] + completions[i] + self.before, target[0])
            if len(target) > 1 or len(ids) == start:
                raise RewardError(
                    self.name,
                    f"column {self.column!r} holds {list(target)!r}; expected one text with at least one token",
                    row=i,
                    completion=completions[i],
                )
            read.append((ids, start))
        measured = self.likelihood.log_probs if self.measure == "log_prob" else self.likelihood.matches
        values = measured(
            self.name, [ids for ids, _ in read], [start for _, start in read], lambda k: (rows[k], completions[rows[k]])
        )
        scores: list[float | None] = [None] * len(completions)
        for i, some in zip(rows, values, strict=True):
            scores[i] = float(some.mean())
        return scores


class TokenMatch(Reward):
    """Share of a target's tokens that the completion has at the same places, from 0 to 1.

    Φ = |{i : y_i = z_i}| / N over the N tokens of the target in a column: each right token is paid 1/N at once.
    Tokens are the policy's, as in ``completion_ids``; nothing is paid after the target's end. None where the column
    has None.

    :param tokenizer: the policy's tokenizer, or the name or directory of its model
    :param column: the column with the targets, texts or lists of token ids

    >>> from textgym.embedded import LANGUAGE_MODEL
    >>> from transformers import AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    >>> reward = TokenMatch(tokenizer, column="target")
    >>> reward(prompts=["p"], completions=[""], completion_ids=[[5, 6, 9]], target=[[5, 6, 7, 8]])
    [0.5]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str], *, column: str = "target") -> None:
        named = isinstance(tokenizer, str | os.PathLike)
        self.tokenizer: Any = load_vocabulary(tokenizer).tokenizer if named else tokenizer
        if not callable(self.tokenizer):
            raise TypeError(f"tokenizer={shown(tokenizer)} must be a tokenizer, or the name or directory of its model")
        self.column = check_text("column", column, empty=False)

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        targets = self._targets(columns, completions)
        ids = column_of(self.name, "completion_ids", columns, completions)
        return [
            None if target is None else sum(a == b for a, b in zip(row, target, strict=False)) / len(target)
            for row, target in zip(ids, targets, strict=True)
        ]

    def _targets(self, columns: dict[str, Any], completions: list[str]) -> list[list[int] | None]:
        """Token ids of each target."""
        targets: list[list[int] | None] = []
        for i, entry in enumerate(column_of(self.name, self.column, columns, completions)):
            ids = entry
            if isinstance(entry, str):
                ids = self.tokenizer(entry, add_special_tokens=False)["input_ids"]
            if ids is not None and (not isinstance(ids, (list, tuple)) or not ids):
                raise RewardError(
                    self.name,
                    f"column {self.column!r} holds {entry!r}; expected a text with at least one token, a list of "
                    "token ids, or None",
                    row=i,
                    completion=completions[i],
                )
            targets.append(None if ids is None else list(ids))
        return targets
