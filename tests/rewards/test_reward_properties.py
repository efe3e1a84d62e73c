"""What holds for every reward about people, servers and groups, and for the combinators, whatever the text."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, prefix_batch
from tiny_models import tiny_causal_reward_model, tiny_tokenizer

from textgym.rewards import (
    AdversarialReward,
    AnswerStore,
    CausalDiscriminator,
    CausalRewardModel,
    DiscountedPotential,
    EmbeddingDiversity,
    Ensemble,
    FunctionReward,
    HumanReward,
    LengthDebiased,
    MonteCarloDropout,
    NoveltyReward,
    RemoteReward,
    RewardServer,
    Router,
    RunningNormalized,
    SelfBLEU,
)

TOKENIZER = tiny_tokenizer()
STRANGE = [
    "",
    " ",
    "\x00",
    "\ud800",
    "a\udfffb",
    "\U0001f600" * 3,
    "\u05e9\u05dc\u05d5\u05dd",
    "x" * 10_000,
    "\u200b\n\t",
]
ANY_TEXT = st.one_of(
    st.sampled_from(STRANGE),
    st.text(st.characters(codec=None, categories=None), max_size=30),
    st.text("the film is good. ", max_size=30),
)


def characters(completions, **columns):
    return [len(text) / 100 for text in completions]


def hashed(completions, **columns):
    return [zlib.crc32(text.encode("utf-8", "surrogatepass")) / 2**32 for text in completions]


def letters(texts):
    return np.array([[text.count(letter) for letter in "the film"] for text in texts], dtype=float)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """All of them, by name; those of the second dictionary compare completions with each other."""
    store = AnswerStore(tmp_path_factory.mktemp("answers") / "answers.sqlite")
    for text in STRANGE:
        store.add_score("p", text, 0.5)
    learned = {
        "novelty": NoveltyReward(n=2, floor=4),
        "adversarial": AdversarialReward(["the film is good", "a good film"]),
        "running": RunningNormalized(characters, warm_up=False),
    }
    for reward in learned.values():
        reward.observe(prompts=["p"] * len(STRANGE), completions=STRANGE)
    with RewardServer(hashed) as server:
        alone = {
            **learned,
            "human": HumanReward(store, fallback=hashed),
            "router": Router("task", {"a": hashed}, default=characters, normalise=False),
            "ensemble": Ensemble([hashed, characters], "mean-std"),
            "debiased": LengthDebiased(hashed, slope=0.01),
            "remote": RemoteReward(server.url, batch_size=2),
        }
        yield alone, {"self-bleu": SelfBLEU(), "embedding": EmbeddingDiversity(letters)}


def score(reward, rows):
    prompts, completions, tasks = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    return reward(prompts=prompts, completions=completions, task=tasks)


@settings(max_examples=15)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["p", "q", ""]), ANY_TEXT, st.sampled_from("ab")), max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_every_text_gets_one_finite_number_whatever_stands_beside_it(rewards, rows, order):
    alone, together = rewards
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    for name, reward in {**alone, **together}.items():
        values = score(reward, rows)
        assert len(values) == len(rows), name
        assert all(isinstance(value, float) and math.isfinite(value) for value in values), name
        # Rows in another order get the same values in that order.
        reordered = score(reward, [rows[i] for i in shuffled])
        assert reordered == pytest.approx([values[i] for i in shuffled], rel=1e-12, abs=1e-12), name
        if name in alone:
            assert [score(reward, [row])[0] for row in rows] == values, name


@pytest.mark.parametrize("text", STRANGE)
def test_each_strange_text_has_a_number_in_the_documented_range(rewards, text):
    alone, together = rewards
    ranges = {"novelty": (0, 1), "adversarial": (0, 1), "human": (-1, 1), "self-bleu": (0, 1), "embedding": (0, 2)}
    for name, (low, high) in ranges.items():
        for value in score({**alone, **together}[name], [("p", text, "a"), ("p", "the film", "a")]):
            assert low <= value <= high, name


IDS = st.lists(st.integers(3, 63), min_size=1, max_size=5)


@settings(max_examples=12)
@given(rows=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4))
def test_all_prefixes_at_once_are_the_prefixes_one_by_one(rewards, rows):
    causal = CausalRewardModel(tiny_causal_reward_model(), TOKENIZER)
    discriminator = CausalDiscriminator(tiny_causal_reward_model(2), TOKENIZER)
    more = {
        "dropout": MonteCarloDropout(causal, passes=2, head_dropout=0.2),
        "discounted": DiscountedPotential(FunctionReward(hashed), 0.9),
        "causal adversarial": AdversarialReward(["the film"], discriminator),
    }
    batch = prefix_batch(TOKENIZER, [p for p, _ in rows], [c for _, c in rows], task=["a", "b", "a", "b"][: len(rows)])
    for name, reward in {**rewards[0], **more}.items():
        values = reward.prefix_potentials(batch, all_lengths(batch))
        for i, lengths in enumerate(all_lengths(batch)):
            assert np.isfinite(values[i]).all(), name
            one_by_one = [reward.potentials(batch.at([i], [n]))[0] for n in lengths]
            np.testing.assert_allclose(values[i], one_by_one, atol=1e-4, err_msg=name)
        # Beside a sum, which passes the batch on.
        np.testing.assert_allclose(
            np.concatenate((reward + 1).prefix_potentials(batch, all_lengths(batch))),
            np.concatenate(values) + 1,
            atol=1e-4,
        )


def test_an_empty_batch_gets_no_scores(rewards):
    batch = prefix_batch(TOKENIZER, [], [])
    for reward in {**rewards[0], **rewards[1]}.values():
        assert score(reward, []) == []
        assert reward.potentials(batch).shape == (0,)
        assert reward.prefix_potentials(batch, []) == []
