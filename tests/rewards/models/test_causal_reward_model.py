"""The causal reward model: equal to Hugging Face's forward, cached equal to one pass, with any tokenizer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, prefix_batch, text_batch
from tiny_models import CONTEXT, EOS, PAD, VOCABULARY, tiny_causal_reward_model, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from textgym.engine.cached_model import CachedModel
from textgym.rewards import CausalRewardModel, Reward, RewardError, as_reward
from textgym.rewards.models import causal as causal_module

TOKENIZER = tiny_tokenizer()
ATOL = 1e-5
RNG = np.random.default_rng(0)
PROMPTS = [[5, 6, 7], [8], [9, 10]]
COMPLETIONS = [[11, 12, 13, 14, EOS], [15, 16, 17, 18, 19, 20, 21], [22]]


def classifier(architecture: str) -> torch.nn.Module:
    shape = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "num_labels": 1, "initializer_range": 0.2}
    torch.manual_seed(2)
    if architecture == "gpt2":
        # Dropout keeps its default of 0.1.
        return GPT2ForSequenceClassification(GPT2Config(**shape, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT))
    if architecture == "qwen2":
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        return Qwen2ForSequenceClassification(
            Qwen2Config(**shape, **sizes, intermediate_size=64, max_position_embeddings=CONTEXT)
        )
    if architecture == "bloom":  # its positions come from the attention mask
        return BloomForSequenceClassification(BloomConfig(**shape, hidden_size=32, n_layer=2, n_head=2))
    if architecture == "mistral":  # its attention window is shorter than the texts
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        return MistralForSequenceClassification(
            MistralConfig(**shape, **sizes, intermediate_size=64, max_position_embeddings=CONTEXT, sliding_window=5)
        )
    return tiny_causal_reward_model()


def hugging_face_score(model, ids: list[int]) -> float:
    """What the model's own forward gives for one row without padding."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.item()


@pytest.fixture
def model() -> LlamaForSequenceClassification:
    return tiny_causal_reward_model()


@pytest.fixture
def reward(model) -> CausalRewardModel:
    return CausalRewardModel(model, TOKENIZER)


@pytest.fixture
def batch():
    return prefix_batch(TOKENIZER, PROMPTS, COMPLETIONS)


def other_tokenizer(begins_with_bos: bool = False) -> PreTrainedTokenizerFast:
    """The tiny tokenizer's words under other ids; or its own ids, but with BOS before each text."""
    words = list(VOCABULARY) if begins_with_bos else list(VOCABULARY[:4]) + list(VOCABULARY[:3:-1])
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if begins_with_bos:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# What it computes


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_scores_equal_hugging_faces_forward(architecture, batch):
    model = classifier(architecture)
    reward = CausalRewardModel(model.train(), TOKENIZER)
    expected = [hugging_face_score(copy.deepcopy(model), p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(reward.potentials(batch), expected, atol=ATOL)
    model.eval()
    with torch.no_grad():  # and with its own right padding
        padded = torch.tensor(batch.input_ids)
        logits = model(input_ids=padded, attention_mask=(padded != PAD).long()).logits[:, 0]
    np.testing.assert_allclose(reward.potentials(batch), logits.numpy(), atol=ATOL)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_stepping_with_the_cache_equals_one_pass_equals_hugging_face(architecture, batch):
    model = classifier(architecture)
    reward = CausalRewardModel(model, TOKENIZER)
    at = all_lengths(batch)
    in_one_pass = reward.prefix_potentials(batch, at)
    for step in range(max(map(len, COMPLETIONS)) + 1):
        lengths = np.minimum(step, batch.completion_lengths)
        stepped = reward.potentials(batch.at(np.arange(3), lengths))
        for row, length in enumerate(lengths):
            assert stepped[row] == pytest.approx(in_one_pass[row][length], abs=ATOL)
            ids = PROMPTS[row] + COMPLETIONS[row][:length]
            assert stepped[row] == pytest.approx(hugging_face_score(model, ids), abs=ATOL)


@pytest.mark.parametrize("architecture", ["bloom", "mistral"])
def test_positions_from_the_mask_and_rows_beyond_a_window_are_scored_as_by_the_model(architecture, batch):
    model = classifier(architecture)
    reward = CausalRewardModel(model, TOKENIZER)
    steps = [np.minimum(step, batch.completion_lengths) for step in range(max(map(len, COMPLETIONS)) + 1)]
    stepped_scores = [reward.potentials(batch.at(np.arange(3), lengths)) for lengths in steps]
    in_one_pass = reward.prefix_potentials(batch, all_lengths(batch))
    for lengths, stepped in zip(steps, stepped_scores, strict=True):
        for row, length in enumerate(lengths):
            score = hugging_face_score(model, PROMPTS[row] + COMPLETIONS[row][:length])
            assert stepped[row] == pytest.approx(score, abs=ATOL)
            assert in_one_pass[row][length] == pytest.approx(score, abs=ATOL)


def test_a_model_that_reads_both_ways_is_no_causal_reward_model():
    shape = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=64, num_labels=1))
    model.score = model.classifier
    with pytest.raises(ValueError, match="hidden states of BertForSequenceClassification change by"):
        CausalRewardModel(model, TOKENIZER)


def test_ids_that_only_the_policy_has_are_read_as_the_text_they_are_not(reward):
    unknown = len(VOCABULARY) + 7
    batch = prefix_batch(TOKENIZER, PROMPTS, [[*c[:2], unknown, *c[2:]] for c in COMPLETIONS])
    without = prefix_batch(TOKENIZER, PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(reward.potentials(batch), reward.potentials(without), atol=ATOL)


def test_texts_are_scored_with_the_end_of_sequence_token(model, reward):
    prompts, completions = ["the film", "i"], [" is good .", " love it"]
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    expected = [hugging_face_score(model, [*TOKENIZER(text)["input_ids"], EOS]) for text in texts]
    np.testing.assert_allclose(reward(prompts=prompts, completions=completions), expected, atol=ATOL)
    without = CausalRewardModel(model, TOKENIZER, append_eos=False)
    expected = [hugging_face_score(model, TOKENIZER(text)["input_ids"]) for text in texts]
    np.testing.assert_allclose(without(prompts=prompts, completions=completions), expected, atol=ATOL)


def test_a_finished_prefix_scores_as_its_text(reward, model):
    finished = prefix_batch(TOKENIZER, [[5, 6]], [[7, 8, EOS]])
    for scored in (reward, CausalRewardModel(model, TOKENIZER, append_eos=False)):
        expected = scored(prompts=finished.prompts, completions=finished.completions)
        np.testing.assert_allclose(scored.potentials(finished), expected, atol=ATOL)
        np.testing.assert_allclose(scored.prefix_potentials(finished, [np.array([3])])[0], expected, atol=ATOL)


def test_a_model_that_was_not_trained_on_eos_never_reads_it(model):
    reward = CausalRewardModel(model, TOKENIZER, append_eos=False)
    values = reward.prefix_potentials(prefix_batch(TOKENIZER, [[5, 6]], [[7, 8, EOS]]), [np.arange(4)])[0]
    assert values[3] == values[2]
    assert values[2] == pytest.approx(hugging_face_score(model, [5, 6, 7, 8]), abs=ATOL)


@pytest.mark.parametrize(
    ("activation", "function"),
    [("identity", lambda x: x), ("tanh", np.tanh), ("sigmoid", lambda x: 1 / (1 + np.exp(-x)))],
)
def test_activations(model, batch, activation, function):
    logits = CausalRewardModel(model, TOKENIZER).potentials(batch)
    values = CausalRewardModel(model, TOKENIZER, activation=activation).potentials(batch)
    np.testing.assert_allclose(values, function(logits), atol=1e-12)
    model.config.reward_activation = activation
    np.testing.assert_allclose(CausalRewardModel(model, TOKENIZER).potentials(batch), function(logits), atol=1e-12)
    explicit = CausalRewardModel(model, TOKENIZER, activation="identity")
    np.testing.assert_allclose(explicit.potentials(batch), logits, atol=1e-12)


ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(4, 63), min_size=1, max_size=5),
        st.lists(st.integers(4, 63), max_size=8),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25)
@given(
    rows=ROWS,
    pad=st.integers(0, 63),
    extra=st.integers(0, 5),
    budget=st.sampled_from([1, 20, 16_384]),
    data=st.data(),
)
def test_padding_batch_size_order_and_history_change_nothing(rows, pad, extra, budget, data):
    prompts = [prompt for prompt, _, _ in rows]
    completions = [completion + [EOS] * ends for _, completion, ends in rows]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)) + extra
    batch = prefix_batch(TOKENIZER, prompts, completions, pad=pad, width=width)
    # One model for all examples: whatever earlier examples left in its cache must not matter.
    shared, model = SHARED, SHARED.model
    expected = [
        [hugging_face_score(model, prompt + completion[:n]) for n in range(len(completion) + 1)]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_module, "BATCH_TOKENS", budget)
        for got, row in zip(shared.prefix_potentials(batch, all_lengths(batch)), expected, strict=True):
            np.testing.assert_allclose(got, row, atol=ATOL)
    order = data.draw(st.permutations(range(len(rows))))
    lengths = np.array([data.draw(st.integers(0, len(completions[i]))) for i in order])
    np.testing.assert_allclose(
        shared.potentials(batch.at(order, lengths)),
        [expected[i][n] for i, n in zip(order, lengths, strict=True)],
        atol=ATOL,
    )


SHARED = CausalRewardModel(tiny_causal_reward_model(), TOKENIZER)


def test_repeated_rows_do_not_disturb_each_other(reward, batch):
    lengths = np.array([0, 3, 5, 2])
    repeated = reward.potentials(batch.at([0, 0, 0, 1], lengths))
    at = reward.prefix_potentials(batch, all_lengths(batch))
    np.testing.assert_allclose(repeated, [at[0][0], at[0][3], at[0][5], at[1][2]], atol=ATOL)


def test_a_row_keeps_its_cache_while_others_rest(reward, model, batch):
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    reward.potentials(batch.at([0, 1, 2], [0, 0, 0]))
    shapes.clear()
    for length in (1, 2, 3):
        reward.potentials(batch.at([1], [length]))
    assert shapes == [(1, 1)] * 3  # one row, one token


def test_rows_that_grow_beyond_the_first_cache_are_still_right(reward, model):
    ids = RNG.integers(4, 63, CONTEXT).tolist()
    for length in (2, 3, 63, 64, 65, CONTEXT):
        value = reward.potentials(prefix_batch(TOKENIZER, [ids[:1]], [ids[1:length]]))[0]
        assert value == pytest.approx(hugging_face_score(model, ids[:length]), abs=ATOL)


def test_new_weights_are_noticed(reward, model, batch):
    before = reward.potentials(batch)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    after = reward.potentials(batch)
    assert np.abs(after - before).max() > 1e-3
    expected = [hugging_face_score(model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(after, expected, atol=ATOL)


def test_inside_arithmetic_it_still_runs_in_one_pass(reward, batch, monkeypatch):
    passes = []
    forward = CachedModel.hidden_at
    monkeypatch.setattr(CachedModel, "hidden_at", lambda *args: passes.append(1) or forward(*args))
    composed = (2 * reward.clip(-1, 1) + (lambda completions: [len(c) / 100 for c in completions])).normalized(0.5, 2)
    at = all_lengths(batch)
    values = composed.prefix_potentials(batch, at)
    assert len(passes) == 1
    for row, lengths in enumerate(at):
        alone = composed.potentials(batch.at(np.full(len(lengths), row), lengths))
        np.testing.assert_allclose(values[row], alone, atol=ATOL)
        model_part = reward.prefix_potentials(batch, at)[row]
        text_part = [len(text) / 100 for text in batch.at(np.full(len(lengths), row), lengths).completions]
        expected = (2 * np.clip(model_part, -1, 1) + text_part - 0.5) / 2
        np.testing.assert_allclose(values[row], expected, atol=ATOL)


# Another tokenizer than the policy's


def test_a_policy_with_another_tokenizer_is_read_as_text(model):
    own = other_tokenizer()
    reward = CausalRewardModel(model, own)
    batch = text_batch(TOKENIZER, ["the film", "i"], ["is good and funny .", "love it"])
    batch.finished[1] = True  # the policy's end-of-sequence token becomes the reward model's
    expected = [
        hugging_face_score(model, own("the film is good and funny .")["input_ids"]),
        hugging_face_score(model, [*own("i love it")["input_ids"], EOS]),
    ]
    np.testing.assert_allclose(reward.potentials(batch), expected, atol=ATOL)
    native = CausalRewardModel(model, TOKENIZER).potentials(batch)
    assert np.abs(native - expected).max() > 1e-3
    at = [np.array([5, 0, 2]), np.array([1, 2])]
    texts = [["the film is good and funny .", "the film", "the film is good"], ["i love", None]]
    for got, row in zip(reward.prefix_potentials(batch, at), texts, strict=True):
        scores = [expected[1] if text is None else hugging_face_score(model, own(text)["input_ids"]) for text in row]
        np.testing.assert_allclose(got, scores, atol=ATOL)


def test_tokens_are_read_directly_only_where_they_mean_the_same(model):
    reward = CausalRewardModel(model, TOKENIZER)
    assert reward._same_tokens(TOKENIZER)
    assert reward._same_tokens(tiny_tokenizer())
    assert not reward._same_tokens(other_tokenizer())
    assert not reward._same_tokens(other_tokenizer(begins_with_bos=True))
    different_end = tiny_tokenizer()
    different_end.eos_token = "."
    assert not reward._same_tokens(different_end)


def test_vocabularies_are_compared_once(model, batch):
    reward = CausalRewardModel(model, TOKENIZER)
    batch.tokenizer = tokenizer = tiny_tokenizer()
    compared = []
    get_vocab = tokenizer.get_vocab
    tokenizer.get_vocab = lambda: compared.append(1) or get_vocab()
    for _ in range(3):
        reward.potentials(batch)
    assert compared == [1]


def test_a_tokenizer_that_adds_bos_is_asked_to(model):
    own = other_tokenizer(begins_with_bos=True)
    score = CausalRewardModel(model, own)(prompts=["the"], completions=[" film"])
    film = TOKENIZER("the film")["input_ids"]
    assert score[0] == pytest.approx(hugging_face_score(model, [1, *film, EOS]), abs=ATOL)


def test_an_end_of_sequence_token_that_the_tokenizer_adds_is_read_once_and_only_where_it_belongs(model):
    own = other_tokenizer()
    own.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    reward = CausalRewardModel(model, own)
    batch = text_batch(TOKENIZER, ["the"] * 2, ["film", "film"])
    batch.finished[1] = True
    ids = own("the film", add_special_tokens=False)["input_ids"]
    expected = [hugging_face_score(model, ids), hugging_face_score(model, [*ids, EOS])]
    np.testing.assert_allclose(reward.potentials(batch), expected, atol=ATOL)
    assert reward(prompts=["the"], completions=[" film"])[0] == pytest.approx(expected[1], abs=ATOL)


# Loading, sharing and errors


def test_a_saved_model_loads_with_its_activation(tmp_path, model, batch):
    model.config.reward_activation = "tanh"
    expected = CausalRewardModel(model, TOKENIZER).potentials(batch)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "sentiment")
    TOKENIZER.save_pretrained(tmp_path / "sentiment")
    for path in (tmp_path / "sentiment", str(tmp_path / "sentiment")):
        loaded = as_reward(path)
        assert isinstance(loaded, CausalRewardModel)
        assert loaded.name == "sentiment"
        assert next(loaded.model.parameters()).dtype == torch.float32
        np.testing.assert_allclose(loaded.potentials(batch), expected, atol=0.05)  # rounded to bfloat16
    halved = CausalRewardModel.from_pretrained(tmp_path / "sentiment", dtype="bfloat16", device="cpu")
    assert next(halved.model.parameters()).dtype == torch.bfloat16
    assert halved.potentials(batch).dtype == np.float64


def test_a_checkpoint_without_a_reward_head_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    TOKENIZER.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain' is not a trained reward model: it has no weights for score.weight"):
        CausalRewardModel.from_pretrained(tmp_path / "plain")


def test_a_missing_directory_is_named(tmp_path):
    for path in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(FileNotFoundError, match=r"there is no reward model directory .*nowhere"):
            as_reward(path)


def test_models_that_are_no_reward_models_are_refused(model):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no head called 'score'"):
        CausalRewardModel(tiny_model("llama"), TOKENIZER)
    with pytest.raises(ValueError, match="one of identity, tanh, sigmoid, got 'relu'"):
        CausalRewardModel(model, TOKENIZER, activation="relu")
    with pytest.raises(ValueError, match="dtype='float31' is not a floating-point type"):
        CausalRewardModel(model, TOKENIZER, dtype="float31")
    without_end = tiny_tokenizer()
    without_end.eos_token = None
    with pytest.raises(ValueError, match="append_eos=True needs a tokenizer with an end-of-sequence token"):
        CausalRewardModel(model, without_end)
    model.config.num_labels = 3
    with pytest.raises(ValueError, match="num_labels=3"):
        CausalRewardModel(model, TOKENIZER)


def test_a_row_longer_than_the_context_is_an_error_that_says_so(reward):
    batch = prefix_batch(TOKENIZER, [[5], [6]], [[7], [8] * CONTEXT])
    batch.rows[:] = [3, 4]
    complaint = rf"'LlamaForSequenceClassification', row 4 .*are {CONTEXT + 1} tokens long, .*context of {CONTEXT}"
    with pytest.raises(RewardError, match=complaint):
        reward.potentials(batch)
    with pytest.raises(RewardError, match=complaint):
        reward.prefix_potentials(batch, all_lengths(batch))
    with pytest.raises(RewardError, match=r"row 1 .*tokens long"):
        reward(prompts=["the"] * 2, completions=[" film", " film" * CONTEXT])
    assert len(reward.prefix_potentials(batch, [np.array([0]), np.array([CONTEXT - 1])])) == 2


def test_an_empty_prompt_is_an_error(reward):
    batch = prefix_batch(TOKENIZER, [[5], []], [[7], []])
    for score in (reward.potentials, lambda b: reward.prefix_potentials(b, all_lengths(b))):
        with pytest.raises(RewardError, match=r"row 1 .*no tokens to read"):
            score(batch)


def test_broken_weights_are_an_error(reward, model, batch):
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    batch.rows[:] = [5, 6, 7]
    for score in (reward.potentials, lambda b: reward.prefix_potentials(b, all_lengths(b))):
        with pytest.raises(RewardError, match=r"row 5 .*the score is nan"):
            score(batch)


def test_wrong_completion_lengths_are_named(reward, batch):
    with pytest.raises(ValueError, match=r"at\[2\] is \[0 2\], but row 2 has 1 completion tokens"):
        reward.prefix_potentials(batch, [np.array([0]), np.array([]), np.array([0, 2])])
    with pytest.raises(ValueError, match="at has 1 entries for a batch of 3 rows"):
        reward.prefix_potentials(batch, [np.array([0])])


def test_rows_without_wanted_prefixes_get_none(reward, batch):
    values = reward.prefix_potentials(batch, [np.array([], dtype=int), np.array([7, 7]), np.array([], dtype=int)])
    assert [len(row) for row in values] == [0, 2, 0]
    assert values[1][0] == pytest.approx(values[1][1], abs=1e-6)
    assert [len(row) for row in reward.prefix_potentials(batch, [np.array([])] * 3)] == [0, 0, 0]
    empty = prefix_batch(TOKENIZER, [], [])
    assert reward.potentials(empty).shape == (0,)
    assert reward.prefix_potentials(empty, []) == []
    assert reward(prompts=[], completions=[]) == []


def test_scoring_leaves_no_gradients_and_no_training_mode(reward, model, batch):
    model.train()
    reward.potentials(batch)
    reward.prefix_potentials(batch, all_lengths(batch))
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_deep_copies_share_the_model(reward):
    assert copy.deepcopy({"reward": reward})["reward"] is reward
    assert isinstance(0.5 * reward, Reward)
    assert copy.deepcopy(0.5 * reward).parts[0] is reward
