"""Rewards from a causal language model: equal to Hugging Face's forward, stepped equal to one pass, any tokenizer."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, prefix_batch, text_batch
from tiny_models import CONTEXT, EOS, VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import textgym  # noqa: F401  registers the environments
from textgym.language_model import LanguageModel
from textgym.rewards import (
    Fluency,
    LikelihoodCoherence,
    LogProbReward,
    RewardError,
    SentenceFluency,
    TargetLikelihood,
    TokenMatch,
)

TOKENIZER = tiny_tokenizer()
ATOL = 1e-4
PROMPTS = [[5, 6, 7], [8], [9, 10]]
COMPLETIONS = [[11, 12, 13, 14, EOS], [15, 16, 17, 18, 19, 20, 21], []]


def hugging_face_log_probs(model, ids: list[int], start: int) -> list[float]:
    """log p of each token from ``start`` on, in one forward of the model itself."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logits[t - 1, ids[t]].item() for t in range(start, len(ids))]


@pytest.fixture
def batch():
    return prefix_batch(TOKENIZER, PROMPTS, COMPLETIONS)


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer's words under other ids."""
    words = list(VOCABULARY[:4]) + list(VOCABULARY[:3:-1])
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_every_prefix_scores_what_hugging_faces_forward_says(architecture, normalize, batch):
    model = tiny_model(architecture)
    reward = LogProbReward(model.train(), tokenizer=TOKENIZER, normalize=normalize)
    reduce = sum if normalize == "sum" else lambda values: sum(values) / max(len(values), 1)
    in_one_pass = reward.prefix_potentials(batch, all_lengths(batch))
    for prompt, completion, scores in zip(PROMPTS, COMPLETIONS, in_one_pass, strict=True):
        log_probs = hugging_face_log_probs(model, prompt + completion, len(prompt))
        np.testing.assert_allclose(scores, [reduce(log_probs[:n]) for n in range(len(completion) + 1)], atol=ATOL)
    for step in range(8):
        lengths = np.minimum(step, batch.completion_lengths)
        stepped = reward.potentials(batch.at(np.arange(3), lengths))
        np.testing.assert_allclose(stepped, [in_one_pass[i][n] for i, n in enumerate(lengths)], atol=ATOL)


def test_a_step_forwards_one_token(batch):
    model = tiny_model("llama")
    reward = LogProbReward(model, tokenizer=TOKENIZER)
    widths = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for length in range(8):
        reward.potentials(batch.at([1], [length]))
    assert widths == [1] * 7  # the prompt has one token, and the last token is never read
    assert reward.potentials(batch.at([1], [7]))[0] < 0
    assert len(widths) == 7


def test_a_row_with_another_text_is_scored_anew_and_forgotten_rows_too(batch):
    reward = LogProbReward(tiny_model("llama"), tokenizer=TOKENIZER)
    expected = reward.prefix_potentials(batch, all_lengths(batch))
    other = prefix_batch(TOKENIZER, [[30, 31], [32], [33]], [[34, 35], [36], [37]])
    for lengths in ([2, 6, 0], [3, 7, 0], [1, 2, 0], [4, 3, 0]):
        np.testing.assert_allclose(
            reward.potentials(batch.at(np.arange(3), lengths)),
            [expected[i][n] for i, n in enumerate(lengths)],
            atol=ATOL,
        )
        reward.potentials(other)
        reward.forget(np.array([0, 2]))
    repeated = reward.potentials(batch.at([0, 0, 1], [1, 4, 2]))
    np.testing.assert_allclose(repeated, [expected[0][1], expected[0][4], expected[1][2]], atol=ATOL)


def test_new_weights_are_noticed(batch):
    model = tiny_model("llama")
    reward = LogProbReward(model, tokenizer=TOKENIZER, normalize="sum")
    reward.potentials(batch)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    expected = sum(hugging_face_log_probs(model, PROMPTS[1] + COMPLETIONS[1], 1))
    assert reward.potentials(batch)[1] == pytest.approx(expected, abs=ATOL)


def test_the_end_of_sequence_token_counts_unless_it_is_left_out(batch):
    model = tiny_model("llama")
    log_probs = hugging_face_log_probs(model, PROMPTS[0] + COMPLETIONS[0], 3)
    text = {"prompts": [batch.prompts[0]], "completions": [batch.completions[0]]}
    for append_eos, expected in ((True, sum(log_probs)), (False, sum(log_probs[:-1]))):
        reward = LogProbReward(model, tokenizer=TOKENIZER, normalize="sum", append_eos=append_eos)
        assert reward(**text) == [pytest.approx(expected, abs=ATOL)]
        assert reward.potentials(batch)[0] == pytest.approx(expected, abs=ATOL)
        assert reward.prefix_potentials(batch, [np.array([5, 4]), [], []])[0] == pytest.approx(
            [expected, sum(log_probs[:4])], abs=ATOL
        )


def test_another_tokenizer_reads_the_same_texts(batch):
    model = tiny_model("llama")
    reward = LogProbReward(model, tokenizer=other_tokenizer())
    scores = reward.prefix_potentials(batch, all_lengths(batch))
    for i, completion in enumerate(COMPLETIONS):
        words = [VOCABULARY[token] for token in PROMPTS[i] + completion]
        ids = reward.likelihood.language_model.tokenizer.convert_tokens_to_ids(words)
        expected = hugging_face_log_probs(model, ids, len(PROMPTS[i]))
        np.testing.assert_allclose(scores[i][-1], np.mean(expected or [0.0]), atol=ATOL)
    np.testing.assert_allclose(reward.potentials(batch), [row[-1] for row in scores], atol=ATOL)


def test_a_text_without_a_prompt_is_read_behind_bos():
    model = tiny_model("llama")
    reward = LogProbReward(model, tokenizer=TOKENIZER, normalize="sum", append_eos=False)
    ids = TOKENIZER("the film")["input_ids"]
    expected = sum(hugging_face_log_probs(model, [1, *ids], 1))
    assert reward(prompts=["", "the"], completions=["the film", ""]) == [pytest.approx(expected, abs=ATOL), 0.0]
    batch = prefix_batch(TOKENIZER, [[], [4]], [ids, []])
    assert reward.potentials(batch).tolist() == [pytest.approx(expected, abs=ATOL), 0.0]


def test_texts_beyond_the_context_are_an_error():
    reward = LogProbReward(tiny_model("llama"), tokenizer=TOKENIZER)
    with pytest.raises(RewardError, match=f"row 1 .*text is 201 tokens long, more than the context of {CONTEXT}"):
        reward(prompts=["the"] * 2, completions=[" film", " very" * 199])
    with pytest.raises(RewardError, match="more than the context"):
        reward.potentials(text_batch(TOKENIZER, ["the"], [" very" * 200]))


def test_micro_batches_change_nothing(batch):
    model = tiny_model("gpt2")
    whole, small = (
        LogProbReward(model, tokenizer=TOKENIZER, max_batch_tokens=tokens).prefix_potentials(batch, all_lengths(batch))
        for tokens in (16_384, 1)
    )
    for a, b in zip(whole, small, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="max_batch_tokens=0 must be a whole number, at least 1"):
        LogProbReward(model, tokenizer=TOKENIZER, max_batch_tokens=0)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="normalize='median' must be one of 'mean', 'sum'"):
        LogProbReward(tiny_model("llama"), tokenizer=TOKENIZER, normalize="median")
    with pytest.raises(ValueError, match="worst=1.* must be a finite number greater than 1"):
        Fluency(tiny_model("llama"), tokenizer=TOKENIZER, worst=1)
    with pytest.raises(ValueError, match="pass its tokenizer too"):
        LogProbReward(tiny_model("llama"))
    with pytest.raises(ValueError, match="CUDA devices"):
        LogProbReward("embedded", device="cuda:99")
    with pytest.raises(ValueError, match="measure='ppl' must be one of 'log_prob', 'match'"):
        TargetLikelihood(tiny_model("llama"), tokenizer=TOKENIZER, measure="ppl")


def test_prefix_lengths_are_checked(batch):
    reward = LogProbReward(tiny_model("llama"), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"at\[1\] is \[8\], but row 1 has 7 completion tokens"):
        reward.prefix_potentials(batch, [np.array([0]), np.array([8]), np.array([0])])
    with pytest.raises(ValueError, match="at has 1 entries for a batch of 3 rows"):
        reward.prefix_potentials(batch, [np.array([0])])


ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(4, 63), min_size=1, max_size=4), st.lists(st.integers(4, 63), max_size=6), st.booleans()
    ),
    min_size=1,
    max_size=5,
)
SHARED = LogProbReward(tiny_model("llama"), tokenizer=TOKENIZER)


@settings(max_examples=20)
@given(rows=ROWS, pad=st.integers(0, 63), extra=st.integers(0, 4), data=st.data())
def test_padding_order_and_history_change_nothing(rows, pad, extra, data):
    prompts = [prompt for prompt, _, _ in rows]
    completions = [completion + [EOS] * ends for _, completion, ends in rows]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)) + extra
    batch = prefix_batch(TOKENIZER, prompts, completions, pad=pad, width=width)
    model = SHARED.likelihood.language_model.model
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        log_probs = hugging_face_log_probs(model, prompt + completion, len(prompt))
        expected.append([np.mean(log_probs[:n]) if n else 0.0 for n in range(len(completion) + 1)])
    for got, row in zip(SHARED.prefix_potentials(batch, all_lengths(batch)), expected, strict=True):
        np.testing.assert_allclose(got, row, atol=ATOL)
    order = data.draw(st.permutations(range(len(rows))))
    lengths = np.array([data.draw(st.integers(0, len(completions[i]))) for i in order])
    np.testing.assert_allclose(
        SHARED.potentials(batch.at(order, lengths)),
        [expected[i][n] for i, n in zip(order, lengths, strict=True)],
        atol=ATOL,
    )


# --- fluency


def test_fluency_is_one_minus_log_perplexity_over_that_of_guessing(batch):
    model = tiny_model("llama")
    reward = Fluency(model, tokenizer=TOKENIZER, worst=5000.0)
    scores = reward.potentials(batch)
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        if not completion:
            assert score == 0.0
            continue
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(prompt) + completion])
            loss = model(input_ids=torch.tensor([prompt + completion]), labels=labels).loss.item()
        assert score == pytest.approx(max(1 - loss / math.log(5000), 0), abs=ATOL)
    assert Fluency(model, tokenizer=TOKENIZER).worst == len(VOCABULARY)
    assert 0 in Fluency(model, tokenizer=TOKENIZER, worst=1.5).potentials(batch)
    assert all(0 <= score <= 1 for row in reward.prefix_potentials(batch, all_lengths(batch)) for score in row)


def test_sentence_fluency_is_the_mean_over_sentences_read_alone():
    model = tiny_model("llama")
    reward = SentenceFluency(model, tokenizer=TOKENIZER, worst=5000.0)
    sentences = ["the film was good .", "i love it !"]
    alone = []
    for sentence in sentences:
        ids = [1, *TOKENIZER(sentence)["input_ids"]]
        alone.append(1 + np.mean(hugging_face_log_probs(model, ids, 1)) / math.log(5000))
    scores = reward(prompts=["a"] * 3, completions=[" ".join(sentences), "", " ..."])
    assert scores == [pytest.approx(np.mean(alone), abs=ATOL), 0.0, 0.0]


# --- targets


@pytest.mark.parametrize("measure", ["log_prob", "match"])
def test_the_target_is_scored_behind_prompt_and_completion(measure):
    model = tiny_model("llama")
    reward = TargetLikelihood(model, tokenizer=TOKENIZER, column="answer", before=" it is", measure=measure)
    prompts, completions, targets = ["the film", "a"], [" was", ""], [" very good", " bad movie ."]
    expected = []
    for prompt, completion, target in zip(prompts, completions, targets, strict=True):
        before = TOKENIZER(prompt + completion + " it is")["input_ids"]
        ids = torch.tensor([before + TOKENIZER(target)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(before) - 1 : -1]
        if measure == "log_prob":
            expected.append(-torch.nn.functional.cross_entropy(logits, ids[0, len(before) :]).item())
        else:
            expected.append((logits.argmax(-1) == ids[0, len(before) :]).double().mean().item())
    assert reward(prompts=prompts, completions=completions, answer=targets) == pytest.approx(expected, abs=ATOL)


def test_greedy_targets_match_and_none_does_not_apply():
    model = tiny_model("llama")
    ids = TOKENIZER("the film was")["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    target = TOKENIZER.decode(ids[3:])
    reward = TargetLikelihood(model, tokenizer=TOKENIZER, measure="match")
    assert reward(prompts=["the film"] * 2, completions=[" was "] * 2, target=[target, None]) == [1.0, None]


@pytest.mark.parametrize("target", ["", [], ["a", "b"], 3])
def test_a_target_that_is_no_text_is_an_error_that_shows_it(target):
    reward = TargetLikelihood(tiny_model("llama"), tokenizer=TOKENIZER)
    with pytest.raises(RewardError, match=r"row 1 .*column 'target' holds .*; expected"):
        reward(prompts=["the"] * 2, completions=[" film"] * 2, target=[" good", target])


def test_a_missing_column_is_named_with_those_there_are():
    for reward in (
        TargetLikelihood(tiny_model("llama"), tokenizer=TOKENIZER, column="goal"),
        TokenMatch(TOKENIZER, column="goal"),
    ):
        with pytest.raises(
            RewardError, match="needs 'goal', .* available: prompts, completions, completion_ids, target"
        ):
            reward(prompts=["a"], completions=["b"], completion_ids=[[5]], target=["c"])


def test_token_match_pays_each_right_token_at_once():
    batch = text_batch(TOKENIZER, ["the"] * 2, ["film was good", "movie"], target=["film is good .", None])
    scores = TokenMatch(TOKENIZER).prefix_potentials(batch, [np.arange(4), np.arange(2)])
    assert scores[0].tolist() == [0.0, 0.25, 0.25, 0.5]
    assert scores[1].tolist() == [0.0, 0.0]
    with pytest.raises(RewardError, match=r"column 'target' holds ''; expected a text with at least one token"):
        TokenMatch(TOKENIZER)(prompts=["a"], completions=["b"], completion_ids=[[5]], target=[""])


# --- coherence by likelihood


def test_likelihood_coherence_is_the_gain_from_the_sentence_before():
    model = tiny_model("llama")
    reward = LikelihoodCoherence(model, tokenizer=TOKENIZER)
    first, second, third = (
        TOKENIZER(text)["input_ids"] for text in ("the film was good .", "i love it !", "so do they .")
    )
    gains = [
        sum(hugging_face_log_probs(model, a + b, len(a))) - sum(hugging_face_log_probs(model, [1, *b], 1))
        for a, b in ((first, second), (second, third))
    ]
    text = " i love it ! so do they ."
    got = reward(prompts=["the film was good ."], completions=[text])
    assert got == [pytest.approx(np.mean([gains[0] / len(second), gains[1] / len(third)]), abs=ATOL)]
    alone = LikelihoodCoherence(model, tokenizer=TOKENIZER, with_prompt=False)
    got = alone(prompts=["the film was good ."] * 2, completions=[text, " i love it"])
    assert got == [pytest.approx(gains[1] / len(third), abs=ATOL), 0.0]


def test_one_language_model_object_serves_many_rewards(batch):
    model = LanguageModel(tiny_model("llama"), TOKENIZER)
    log_prob, fluency = LogProbReward(model), Fluency(model)
    assert log_prob.likelihood.language_model is fluency.likelihood.language_model
    both = (log_prob + fluency).potentials(batch)
    np.testing.assert_allclose(both, log_prob.potentials(batch) + fluency.potentials(batch), atol=ATOL)


def test_in_the_environment_each_token_is_paid_its_log_probability():
    reward = LogProbReward("embedded", normalize="sum", device="cpu")
    env = gym.make("TextGen-v0", prompts=["the film is"], reward=reward, kl_coef=0.0, max_new_tokens=6, device="cpu")
    observation, _ = env.reset(seed=0)
    start = int(observation["prompt_length"][0])
    ids = reward.likelihood.language_model.encode("the film is a very good and funny story .")[start : start + 6]
    paid = []
    for token in ids:
        observation, value, _, truncated, _ = env.step(token)
        paid.append(value)
    assert truncated
    model = reward.likelihood.language_model.model
    expected = hugging_face_log_probs(model, observation["input_ids"][: start + 6].tolist(), start)
    np.testing.assert_allclose(paid, expected, atol=1e-3)
