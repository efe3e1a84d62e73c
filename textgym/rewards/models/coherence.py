"""Coherence: whether neighbouring sentences belong together, by their embeddings or by a language model."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from typing_extensions import Unpack

from textgym.checks import check_bool
from textgym.handed_on import hands_on
from textgym.rewards.base import Reward
from textgym.rewards.models.embedding import Encoder, open_encoder, unit_vectors
from textgym.rewards.models.likelihood import LikelihoodArguments, ModelSpec, TextLikelihood
from textgym.text_units import clauses_of, sentences_of


class EmbeddingCoherence(Reward):
    """Mean cosine of the embeddings of neighbouring sentences, from −1 to 1.

    Φ = (1/P) Σ_i cos(e(s_i), e(s_{i+1})) over the P pairs of neighbours, of which the first is the prompt's last
    sentence and the completion's first. A text of one sentence is divided at its commas instead; 0.0 without a pair.
    Foltz, Kintsch and Landauer, "The Measurement of Textual Coherence with Latent Semantic Analysis" (1998). A sentence
    that is repeated is perfectly coherent: combine it with :class:`~textgym.rewards.Repetition`.

    :param encoder: ``"minilm"``, a directory or a hub id, or a function from N texts to ``(N, D)``; see
        :class:`~textgym.rewards.SentenceEncoder`
    :param with_prompt: whether the prompt's last sentence counts as the first

    >>> def letters(texts):
    ...     return np.array([[text.count("a"), text.count("b")] for text in texts])
    >>> reward = EmbeddingCoherence(encoder=letters)
    >>> reward(prompts=["aa."] * 3, completions=[" a. b.", " ab.", ""])
    [0.5, 0.707..., 0.0]
    """

    def __init__(self, encoder: Encoder | str | os.PathLike[str] = "minilm", *, with_prompt: bool = True) -> None:
        self.encoder = open_encoder(encoder)
        self.with_prompt = check_bool("with_prompt", with_prompt)

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        pairs, rows = _neighbours(prompts, completions, self.with_prompt)
        different = list(dict.fromkeys(text for pair in pairs for text in pair))
        place = {text: i for i, text in enumerate(different)}
        vectors = unit_vectors(self.encoder, different)
        cosines = [float((vectors[place[a]] @ vectors[place[b]]).clip(-1, 1)) for a, b in pairs]
        return _means(cosines, rows, len(completions))


@hands_on(TextLikelihood)
class LikelihoodCoherence(Reward):
    """How much likelier a sentence is after the one before it than by itself, in nats a token, without limits.

    Φ = (1/P) Σ_i [log p(s_{i+1} | s_i) − log p(s_{i+1})] / |s_{i+1}| over the P pairs of neighbours, of which the first
    is the prompt's last sentence and the completion's first; 0.0 without a pair. It is the pointwise mutual information
    of neighbours under the model, per token (Li et al., "A Diversity-Promoting Objective Function for Neural
    Conversation Models", 2016, equation 6 with λ = 1): above 0 where the first sentence helps to foresee the second.
    Further arguments are those of :class:`~textgym.rewards.models.likelihood.TextLikelihood`.

    :param model: a causal language model, as in :func:`~textgym.language_model.load_language_model`
    :param with_prompt: whether the prompt's last sentence counts as the first

    >>> reward = LikelihoodCoherence("embedded")
    >>> same, other, none = reward(prompts=["I liked the plot."] * 3, completions=[" I liked the plot.", " Zz q.", ""])
    >>> same > other, none
    (True, 0.0)
    """

    def __init__(
        self, model: ModelSpec = "embedded", *, with_prompt: bool = True, **arguments: Unpack[LikelihoodArguments]
    ) -> None:
        self.likelihood = TextLikelihood(model, **arguments)
        self.with_prompt = check_bool("with_prompt", with_prompt)

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """:raises RewardError: if two neighbouring sentences are longer than the model's context"""
        pairs, rows = _neighbours(prompts, completions, self.with_prompt)
        read = [self.likelihood.ids_of(first, " " + second) for first, second in pairs]
        read += [self.likelihood.ids_of("", second) for _, second in pairs]
        values = self.likelihood.log_probs(
            self.name,
            [ids for ids, _ in read],
            [start for _, start in read],
            lambda i: (rows[i % len(rows)], completions[rows[i % len(rows)]]),
        )
        gains = []
        for behind, alone in zip(values[: len(pairs)], values[len(pairs) :], strict=True):
            gains.append(float((behind.sum() - alone.sum()) / max(len(behind), 1)))
        return _means(gains, rows, len(completions))


def _neighbours(
    prompts: list[str], completions: list[str], with_prompt: bool
) -> tuple[list[tuple[str, str]], list[int]]:
    """Pairs of neighbouring sentences, and the row that each belongs to.

    Where the prompt ends within a sentence the completion goes on with it, so that one is not divided. A text of one
    sentence has no pair; then its clauses are compared, of which Chinese strings many together.
    """
    pairs, rows = [], []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        sentences = _parts(sentences_of, prompt, completion, with_prompt)
        if len(sentences) == 1:
            sentences = _parts(clauses_of, prompt, completion, with_prompt)
        pairs += list(itertools.pairwise(sentences))
        rows += [row] * max(len(sentences) - 1, 0)
    return pairs, rows


def _parts(divide: Callable[[str], list[str]], prompt: str, completion: str, with_prompt: bool) -> list[str]:
    """The completion's sentences or clauses, from the prompt's last one on."""
    if not with_prompt:
        return divide(completion)
    before = len(divide(prompt))
    return divide(prompt + completion)[max(before - 1, 0) :] if divide(completion) else []


def _means(values: list[float], rows: list[int], count: int) -> list[float | None]:
    """The mean of each row's values; 0.0 for a row without any."""
    sums = np.bincount(rows, values, minlength=count) if rows else np.zeros(count)
    numbers = np.bincount(rows, minlength=count) if rows else np.zeros(count)
    return list((sums / np.maximum(numbers, 1)).tolist())
