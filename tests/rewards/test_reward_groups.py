"""Diversity within the batch, and novelty against a memory."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, text_batch
from tiny_agents import tiny_vector_env
from tiny_models import tiny_tokenizer

from textgym.rewards import EmbeddingDiversity, NoveltyReward, RewardError, SelfBLEU

TOKENIZER = tiny_tokenizer()
COMPLETIONS = ["a good film and warm", "a good film but slow", "we love it", "a good film and warm", "no"]
PROMPTS = ["the", "the", "the", "a", "this"]


def bag(texts):
    words = ["a", "good", "film", "and", "but", "warm", "slow", "we", "love", "it"]
    return np.array([[text.split().count(word) for word in words] for text in texts], dtype=float)


# --- diversity


def test_self_bleu_of_texts_is_sacrebleus_against_the_other_completions_of_the_prompt():
    values = SelfBLEU()(prompts=PROMPTS, completions=COMPLETIONS)
    for i in range(3):
        others = [COMPLETIONS[j] for j in range(3) if j != i]
        expected = sacrebleu.sentence_bleu(COMPLETIONS[i], others).score
        assert values[i] == pytest.approx(1 - expected / 100)
    assert values[3:] == [1.0, 1.0]  # nobody else wrote to these prompts


def test_embedding_diversity_is_one_minus_the_mean_cosine():
    values = EmbeddingDiversity(bag)(prompts=PROMPTS, completions=COMPLETIONS)
    a, b, c = bag(COMPLETIONS[:3])
    cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
    assert values[0] == pytest.approx(1 - (cosine(a, b) + cosine(a, c)) / 2)
    assert values[3] == 1.0
    assert EmbeddingDiversity(bag)(prompts=["", ""], completions=["", "film"]) == [1.0, 1.0]  # no words, no likeness


@pytest.mark.parametrize("reward", [SelfBLEU(), EmbeddingDiversity(bag)], ids=["bleu", "embedding"])
def test_a_prefix_is_compared_with_as_many_tokens_of_its_peers(reward):
    batch = text_batch(TOKENIZER, PROMPTS[:3], COMPLETIONS[:3])
    values = reward.prefix_potentials(batch, all_lengths(batch))
    for i, lengths in enumerate(all_lengths(batch)):
        for length in lengths:
            cut = batch.at([0, 1, 2], np.minimum(batch.completion_lengths, length)).completions
            others = [cut[j] for j in range(3) if j != i]
            assert values[i][length] == pytest.approx(reward.compare([cut[i]], [others])[0])
    assert [row[0] for row in values] == [1.0, 1.0, 1.0]  # nothing is copied yet
    # The token that leaves the common path earns what the ones before it cost.
    if isinstance(reward, SelfBLEU):
        assert values[0][3] == pytest.approx(0.0, abs=1e-9)
        assert values[0][4] > 0.3


def test_both_schedules_pay_the_same_where_rows_run_in_step():
    batch = text_batch(TOKENIZER, ["the"] * 3, ["a good film", "a good plot", "we love it"])
    for reward in (SelfBLEU(), EmbeddingDiversity(bag)):
        deferred = np.stack(reward.prefix_potentials(batch, all_lengths(batch)), axis=1)  # (T + 1, B)
        instant = [reward.potentials(batch.at([0, 1, 2], [t, t, t])) for t in range(4)]
        np.testing.assert_allclose(deferred, instant, rtol=1e-12)


def test_a_row_that_occurs_twice_is_no_peer_of_itself():
    batch = text_batch(TOKENIZER, ["the", "a"], ["a good film", "we love it"]).at([0, 0, 1], [3, 3, 3])
    assert SelfBLEU().potentials(batch).tolist() == [1.0, 1.0, 1.0]


def test_the_order_of_the_group_does_not_matter():
    batch = text_batch(TOKENIZER, PROMPTS, COMPLETIONS)
    order = [4, 2, 0, 3, 1]
    for reward in (SelfBLEU(), EmbeddingDiversity(bag)):
        shuffled = reward.potentials(batch.at(order, batch.completion_lengths[order]))
        np.testing.assert_allclose(shuffled, reward.potentials(batch)[order], rtol=1e-12)


def test_copies_of_one_text_earn_less_than_different_texts_in_an_environment():
    """One prompt, four rows, the tokens given: the sum of the rewards is Φ(y) − Φ(∅)."""
    for texts, expected in (["warm warm warm"] * 4, -1.0), (["warm", "film", "slow", "love"], 0.0):
        env = tiny_vector_env(4, reward=SelfBLEU(), kl_coef=0.0, prompts=["the film is"], max_new_tokens=4)
        env.reset(seed=0)
        ids = np.array([TOKENIZER(text)["input_ids"] for text in texts])
        total = sum(env.step(ids[:, t])[1] for t in range(ids.shape[1]))
        np.testing.assert_allclose(total, [expected] * 4, atol=1e-6)
        env.close()


@pytest.mark.parametrize(
    ("embed", "complaint"),
    [
        (lambda texts: np.zeros(3), r"embed returned shape \(3,\) for 2 texts, expected \(N, D\)"),
        (lambda texts: np.zeros((1, 3)), r"embed returned shape \(1, 3\) for 2 texts"),
        (lambda texts: np.full((2, 3), math.nan), "embed returned numbers that are not finite for 'a'"),
    ],
)
def test_wrong_embeddings_are_errors(embed, complaint):
    with pytest.raises(RewardError, match=complaint):
        EmbeddingDiversity(embed)(prompts=["p", "p"], completions=["a", "b"])
    with pytest.raises(TypeError, match="embed must be a function"):
        EmbeddingDiversity("minilm")


def test_without_sacrebleu_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"SelfBLEU needs .*pip install \"textgym\[metrics\]\""):
        SelfBLEU()
    with pytest.raises(ValueError, match="max_order=0"):
        SelfBLEU(0)


# --- novelty

TEXTS = st.lists(st.text("ab c", max_size=10), max_size=12)


@settings(max_examples=40)
@given(seen=TEXTS, memory=st.integers(1, 6), text=st.text("ab c", max_size=12), n=st.integers(1, 3))
def test_novelty_is_the_count_based_bonus_over_what_is_remembered(seen, memory, text, n):
    reward = NoveltyReward(n=n, memory=memory, floor=2)
    for part in (seen[: len(seen) // 2], seen[len(seen) // 2 :]):
        reward.observe(prompts=[""] * len(part), completions=part)

    def ngrams(some):
        words = some.split()
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    counts = Counter(gram for some in seen[-memory:] for gram in set(ngrams(some)))
    expected = sum(1 / math.sqrt(1 + counts[gram]) for gram in set(ngrams(text))) / max(len(ngrams(text)), 2)
    assert reward(prompts=[""], completions=[text]) == [pytest.approx(expected)]
    assert reward.metrics() == {"novelty/remembered": min(len(seen), memory)}
    other = NoveltyReward(n=n, memory=memory, floor=2)
    other.load_state_dict(reward.state_dict())
    more = {"prompts": [""], "completions": [text + " c c"]}
    reward.observe(**more)
    other.observe(**more)
    assert other(**more) == reward(**more)
    assert other.state_dict() == reward.state_dict()


def test_what_is_written_again_and_again_loses_its_novelty():
    reward = NoveltyReward(n=1, floor=3)
    values = []
    for _ in range(5):
        values += reward(prompts=[""], completions=["a warm film"])
        reward.observe(prompts=[""], completions=["a warm film"])
    np.testing.assert_allclose(values, 1 / np.sqrt([1, 2, 3, 4, 5]))
    assert reward(prompts=[""] * 2, completions=["", "plot plot plot plot"]) == [0.0, 0.25]
    characters = NoveltyReward(n=2, floor=1, unit="characters")
    characters.observe(prompts=[""], completions=["\u82b1\u5f00"])
    assert characters(prompts=[""], completions=["\u82b1\u5f00\u4e86"]) == [pytest.approx((0.5**0.5 + 1) / 2)]


def test_impossible_memories_are_refused():
    for name in ("n", "memory", "floor"):
        with pytest.raises(ValueError, match=f"{name}=0 must be a whole number, at least 1"):
            NoveltyReward(**{name: 0})
    with pytest.raises(ValueError, match="unit='tokens' must be one of 'words', 'characters'"):
        NoveltyReward(unit="tokens")
    with pytest.raises(ValueError, match="another reward's"):
        NoveltyReward().load_state_dict({"mean": 0.0})
