"""Numbers that describe generated text: diversity, repetition, length, and how sure a mean is.

Words are separated by white space; in scripts without spaces, such as Chinese, each character is one. Case and
punctuation count.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from textgym.checks import check_int, check_number, check_texts
from textgym.text_units import units_of


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
    return float(np.mean(repetitions(texts, n)))


def repetitions(texts: Sequence[str], n: int = 2) -> np.ndarray:
    """The share of repeated n-grams of each text, ``(N,)``; :func:`repetition` is its mean."""
    shares = []
    for text in _checked(texts, n):
        grams = _ngrams(text, n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares)


def mean_length(texts: Sequence[str]) -> float:
    """Mean number of words of a text.

    :raises ValueError: if ``texts`` is empty

    >>> mean_length(["a good film", "good"])
    2.0
    """
    return float(np.mean([len(units_of(text)) for text in _checked(texts, 1)]))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    rng: np.random.Generator | int | None = None,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> tuple[float, float]:
    """Confidence interval of the mean by the percentile bootstrap (Efron 1979).

    The values are drawn anew with replacement, ``n_resamples`` times; the interval lies between the
    (1 − confidence) / 2 and (1 + confidence) / 2 quantiles of the means, interpolated linearly. Values that were not
    measured independently, such as several completions of one prompt, are drawn as a group, all or none of them (the
    cluster bootstrap).

    What all values share has an interval of no width, however few they are: of a share that was 0 in N texts, the
    95 % interval of an exact method would reach up to about 3 / N.

    :param values: ``(N,)`` measurements
    :param confidence: probability that the interval is to cover, between 0 and 1
    :param n_resamples: how often to draw
    :param rng: random generator or its seed; by default different every time
    :param weights: ``(N,)`` positive numbers, for a weighted mean Σ w·v / Σ w; by default all the same
    :param groups: ``(N,)`` labels, the same where values belong together; by default each value is its own group
    :return: lower and upper end
    :raises ValueError: if there are no values, one is not finite, or a parameter is out of range

    >>> low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0], rng=0)
    >>> 1.0 < low < 2.5 < high < 4.0
    True
    """
    measured = np.asarray(values, dtype=np.float64)
    if measured.ndim != 1 or measured.size == 0 or not np.isfinite(measured).all():
        raise ValueError(f"values must be a non-empty list of finite numbers, got {values!r}")
    _check_confidence(confidence)
    check_int("n_resamples", n_resamples, low=1)
    heavy = np.ones(measured.size) if weights is None else np.asarray(weights, dtype=np.float64)
    if heavy.shape != measured.shape or not (np.isfinite(heavy) & (heavy > 0)).all():
        raise ValueError(f"weights must be {measured.size} positive numbers, one for each value, got {weights!r}")
    members = _group_of_each(groups, measured.size)  # (N,)
    sums = np.bincount(members, heavy * measured)  # (G,)
    totals = np.bincount(members, heavy)
    generator = np.random.default_rng(rng)
    means = []
    for _ in range(n_resamples):
        drawn = generator.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / totals[drawn].sum())
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def distinct_n_interval(
    texts: Sequence[str],
    n: int = 2,
    confidence: float = 0.95,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> tuple[float, float]:
    """Confidence interval of :func:`distinct_n`, by the jackknife.

    The bootstrap is of no use here. A corpus drawn with replacement holds a third of its texts twice or more, and a
    text that occurs twice brings no n-gram that the first did not: the resampled values lie far below distinct-n of the
    corpus, mostly so far that their interval leaves it out. Leaving one text out at a time repeats none. The interval
    is distinct-n ± z · s with s² = (G − 1) / G · Σ_i (d_i − mean of d)², where d_i is distinct-n without the i-th of G
    texts, and z the normal quantile. On average s² is not less than the variance of distinct-n over fresh corpora
    (Efron and Stein, "The Jackknife Estimate of Variance", 1981), so the interval is, if anything, too wide. It is for
    corpora of this size, as distinct-n itself is.

    :param texts: the corpus
    :param n: words in an n-gram
    :param confidence: probability that the interval is to cover, between 0 and 1
    :param groups: ``(N,)`` labels, the same where texts belong together, such as completions of one prompt: they are
        left out together; by default each text is its own group
    :return: lower and upper end, within 0 and 1; both are distinct-n itself where there is one group only
    :raises ValueError: if there are no texts or a parameter is out of range
    """
    value = distinct_n(texts, n)
    _check_confidence(confidence)
    members = _group_of_each(groups, len(texts))
    grams = [_ngrams(text, n) for text in texts]
    count = int(members.max()) + 1
    totals = np.bincount(members, [len(some) for some in grams], minlength=count)  # (G,) n-grams of each group
    owners: dict[tuple[str, ...], set[int]] = {}
    for member, some in zip(members.tolist(), grams, strict=True):
        for gram in some:
            owners.setdefault(gram, set()).add(member)
    # Without a group, the n-grams are gone that only it had.
    single = np.array([next(iter(of)) for of in owners.values() if len(of) == 1], dtype=np.int64)
    own = np.bincount(single, minlength=count)  # (G,)
    left = totals.sum() - totals
    without = np.divide(len(owners) - own, left, out=np.zeros(count), where=left > 0)
    deviation = float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * deviation
    return max(value - reach, 0.0), min(value + reach, 1.0)


def _check_confidence(confidence: float) -> None:
    check_number("confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True)


def _group_of_each(groups: Sequence[Any] | np.ndarray | None, size: int) -> np.ndarray:
    """``(N,)`` numbers from 0 to G − 1, the same for the same labels."""
    if groups is None:
        return np.arange(size)
    if len(groups) != size:
        raise ValueError(f"groups must have {size} labels, one for each value, got {len(groups)}")
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in groups])


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = units_of(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _checked(texts: Sequence[str], n: int) -> Sequence[str]:
    check_int("n", n, low=1)
    return check_texts("texts", texts, least=1)
