"""Numbers that describe generated text: diversity, repetition, length, and how sure a mean is.

Words are what stands between white space; case and punctuation count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams of all texts together, divided by all their word n-grams.

    After Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016), who
    divide by the number of words. It falls as the corpus grows: compare corpora of the same size only.

    :param texts: the corpus; no n-gram reaches from one text into the next
    :param n: words in an n-gram
    :return: share from 0 to 1; 0.0 if no text has n words
    :raises ValueError: if ``texts`` is empty or ``n`` is less than 1

    >>> distinct_n(["a good film", "a good story"], n=2)  # a good, good film, a good, good story
    0.75
    """
    grams = [gram for text in _checked(texts, n) for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], n: int = 2) -> float:
    """Share of word n-grams that occurred before in the same text, averaged over texts.

    That is the mean of 1 − (distinct n-grams) / (n-grams), "seq-rep-n" in Welleck et al., "Neural Text
    Generation with Unlikelihood Training" (2020).

    :param texts: the texts; those with fewer than n words have no repetition, 0.0
    :param n: words in an n-gram
    :return: share from 0 (nothing is repeated) to below 1
    :raises ValueError: if ``texts`` is empty or ``n`` is less than 1

    >>> repetition(["very very very very good", "a good film"], n=1)  # (1 - 2/5 + 0) / 2
    0.3
    """
    shares = []
    for text in _checked(texts, n):
        grams = _ngrams(text, n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares))


def mean_length(texts: Sequence[str]) -> float:
    """Mean number of words of a text.

    :raises ValueError: if ``texts`` is empty

    >>> mean_length(["a good film", "good"])
    2.0
    """
    return float(np.mean([len(text.split()) for text in _checked(texts, 1)]))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    rng: np.random.Generator | int | None = None,
) -> tuple[float, float]:
    """Confidence interval of the mean by the percentile bootstrap (Efron 1979).

    The values are drawn anew with replacement, ``n_resamples`` times; the interval lies between the
    (1 − confidence) / 2 and (1 + confidence) / 2 quantiles of the means, interpolated linearly.

    :param values: ``(N,)`` independent measurements
    :param confidence: probability that the interval is to cover, between 0 and 1
    :param n_resamples: how often to draw
    :param rng: random generator or its seed; by default different every time
    :return: lower and upper end
    :raises ValueError: if there are no values, one is not finite, or a parameter is out of range

    >>> low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0], rng=0)
    >>> 1.0 < low < 2.5 < high < 4.0
    True
    """
    measured = np.asarray(values, dtype=np.float64)
    if measured.ndim != 1 or measured.size == 0 or not np.isfinite(measured).all():
        raise ValueError(f"values must be a non-empty list of finite numbers, got {values!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    generator = np.random.default_rng(rng)
    means = [generator.choice(measured, measured.size).mean() for _ in range(n_resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _checked(texts: Sequence[str], n: int) -> Sequence[str]:
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of texts, got the single text {texts!r}")
    if len(texts) == 0:
        raise ValueError("texts is empty; at least one text is needed")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return texts
