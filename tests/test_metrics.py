"""Metrics of generated text, by hand-computed values and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgym.metrics import bootstrap_interval, distinct_n, distinct_n_interval, mean_length, repetition, repetitions

TEXTS = st.lists(st.lists(st.sampled_from(["a", "b", "c"])).map(" ".join), min_size=1)


def test_distinct_n_counts_over_the_corpus_and_not_across_texts():
    texts = ["a b a b", "a b", "c"]  # bigrams: ab ba ab | ab | none
    assert distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)
    assert distinct_n(texts, 5) == 0.0


def test_repetition_counts_within_a_text():
    texts = ["a b a b a", "a b", "c"]  # bigrams: ab ba ab ba | ab | none
    assert repetition(texts, 2) == pytest.approx((1 - 2 / 4 + 0 + 0) / 3)
    assert repetition(["a b", "a b"], 2) == 0.0
    assert distinct_n(["a b", "a b"], 2) == 0.5


def test_mean_length_counts_words():
    assert mean_length(["a good  film .", "", " x\n"]) == pytest.approx(5 / 3)


@given(TEXTS, st.integers(1, 4))
def test_shares_stay_between_0_and_1_and_copies_halve_distinct_n(texts, n):
    assert 0 <= repetition(texts, n) < 1
    assert 0 <= distinct_n(texts, n) <= 1
    assert distinct_n(texts * 2, n) == pytest.approx(distinct_n(texts, n) / 2)
    assert repetition(texts * 2, n) == pytest.approx(repetition(texts, n))
    if len(texts) == 1 and distinct_n(texts, n):
        assert distinct_n(texts, n) == pytest.approx(1 - repetition(texts, n))


@pytest.mark.parametrize("metric", [distinct_n, repetition, mean_length])
def test_texts_must_be_a_list_with_something_in_it(metric):
    with pytest.raises(ValueError, match=r"texts=\[\] must have at least 1 text"):
        metric([])
    with pytest.raises(TypeError, match="for one text, texts="):
        metric("a good film")


@pytest.mark.parametrize("metric", [distinct_n, repetition])
def test_n_must_be_positive(metric):
    with pytest.raises(ValueError, match="n=0 must be a whole number, at least 1"):
        metric(["a"], 0)


def test_the_bootstrap_interval_is_near_the_normal_one_and_covers_as_often_as_it_says():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values, rng=0)
    error = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - error, abs=0.03)
    assert high == pytest.approx(values.mean() + error, abs=0.03)
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.normal(size=50), 0.8, 200, rng) for _ in range(200)]
    assert 0.7 < np.mean([low < 0 < high for low, high in intervals]) < 0.88


def test_the_bootstrap_interval_repeats_with_its_seed():
    values = [1.0, 2.0, 4.0, 8.0]
    assert bootstrap_interval(values, rng=3) == bootstrap_interval(np.array(values), rng=np.random.default_rng(3))
    assert bootstrap_interval([2.0], rng=0) == (2.0, 2.0)
    wide, narrow = bootstrap_interval(values, 0.99, rng=0), bootstrap_interval(values, 0.5, rng=0)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (([],), "non-empty list of finite numbers"),
        (([1.0, math.nan],), "non-empty list of finite numbers"),
        ((np.zeros((2, 2)),), "non-empty list of finite numbers"),
        (([1.0], 1.0), "confidence=1.0 must be a finite number greater than 0 and less than 1"),
        (([1.0], 0.9, 0), "n_resamples=0 must be a whole number, at least 1"),
    ],
)
def test_bad_bootstrap_arguments_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        bootstrap_interval(*arguments)


def test_repetition_is_the_mean_of_the_texts_repetitions():
    texts = ["a b a b a", "a b", "c"]
    assert repetitions(texts, 2).tolist() == [0.5, 0.0, 0.0]
    assert repetition(texts, 2) == pytest.approx(0.5 / 3)


def test_weights_and_groups_agree_with_scipys_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    groups = rng.integers(40, size=300)
    weights = rng.integers(1, 20, size=300).astype(float)
    values = rng.normal(size=300) + 0.5 * np.repeat(rng.normal(size=40), 8)[:300][np.argsort(groups)]
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    sums = np.array([(weights * values)[rows].sum() for rows in members])
    totals = np.array([weights[rows].sum() for rows in members])
    expected = stats.bootstrap(
        (sums, totals), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True,
        n_resamples=5000, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    ours = bootstrap_interval(values, n_resamples=5000, rng=0, weights=weights, groups=groups)
    assert ours == pytest.approx(tuple(expected), abs=0.02)


def test_copies_of_a_measurement_make_no_mean_surer():
    values = np.random.default_rng(0).normal(size=60)
    once = bootstrap_interval(values, rng=0)
    copied = bootstrap_interval(np.repeat(values, 5), rng=0, groups=np.repeat(np.arange(60), 5))
    assert copied == pytest.approx(once)
    careless = bootstrap_interval(np.repeat(values, 5), rng=0)
    assert careless[1] - careless[0] < 0.6 * (once[1] - once[0])


def zipf_corpus(rng: np.random.Generator, size: int) -> list[str]:
    shares, lengths = 1 / np.arange(1, 2001), rng.integers(5, 25, size)
    words = rng.choice(2000, lengths.sum(), p=shares / shares.sum()).astype(str)
    return [" ".join(text) for text in np.split(words, lengths.cumsum()[:-1])]


@pytest.mark.parametrize("n", [1, 2])
def test_the_distinct_n_interval_covers_fresh_corpora_where_the_bootstrap_misses_its_own(n):
    rng = np.random.default_rng(0)
    fresh = [distinct_n(zipf_corpus(rng, 80), n) for _ in range(150)]
    corpora = [zipf_corpus(rng, 80) for _ in range(60)]
    intervals = [distinct_n_interval(corpus, n) for corpus in corpora]
    assert np.mean([low < np.mean(fresh) < high for low, high in intervals]) > 0.88
    deviation = np.mean([high - low for low, high in intervals]) / 2 / 1.96
    assert 0.85 * np.std(fresh) < deviation < 1.4 * np.std(fresh)
    resampled = [distinct_n([corpora[0][i] for i in rng.integers(80, size=80)], n) for _ in range(100)]
    assert max(resampled) < distinct_n(corpora[0], n) - 0.05


@given(TEXTS, st.integers(1, 3), st.data())
def test_the_distinct_n_interval_is_that_of_a_plain_jackknife_over_groups(texts, n, data):
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(texts), max_size=len(texts)))
    left_out = [[t for t, g in zip(texts, groups, strict=True) if g != group] for group in set(groups)]
    values = np.array([distinct_n(some, n) if some else 0.0 for some in left_out])
    reach = 1.959964 * math.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum())
    value = distinct_n(texts, n)
    expected = (max(value - reach, 0.0), min(value + reach, 1.0))
    assert distinct_n_interval(texts, n, groups=groups) == pytest.approx(expected, abs=1e-6)


def test_bad_weights_and_groups_are_refused():
    with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
        bootstrap_interval([1.0, 2.0], weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
        bootstrap_interval([1.0, 2.0], weights=[1.0])
    with pytest.raises(ValueError, match="groups must have 2 labels, one for each value, got 1"):
        bootstrap_interval([1.0, 2.0], groups=["a"])
    with pytest.raises(ValueError, match="groups must have 1 labels"):
        distinct_n_interval(["a"], groups=[])
    with pytest.raises(ValueError, match="confidence=1.5 must be"):
        distinct_n_interval(["a"], 1, 1.5)
    with pytest.raises(ValueError, match=r"texts=\[\] must have at least 1 text"):
        distinct_n_interval([])
