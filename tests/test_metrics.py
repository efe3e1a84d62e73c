"""Metrics of generated text, by hand-computed values and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgym.metrics import bootstrap_interval, distinct_n, mean_length, repetition

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
    with pytest.raises(ValueError, match="texts is empty"):
        metric([])
    with pytest.raises(ValueError, match="the single text 'a good film'"):
        metric("a good film")


@pytest.mark.parametrize("metric", [distinct_n, repetition])
def test_n_must_be_positive(metric):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
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
        (([1.0], 1.0), "confidence must lie between 0 and 1, got 1.0"),
        (([1.0], 0.9, 0), "n_resamples must be at least 1, got 0"),
    ],
)
def test_bad_bootstrap_arguments_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        bootstrap_interval(*arguments)
