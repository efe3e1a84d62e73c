"""The embedded models, prompts and judge as shipped: loadable, small, lossless, in the documented ranges."""

import json
import random
import re
import string
import time
import zlib
from array import array
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from textgym.embedded import LANGUAGE_MODEL, REWARD_MODEL, WordSentiment, load_prompts

FOLDER = LANGUAGE_MODEL.parent

TEXTS = [
    "the film is a triumph, and it's never dull.",
    "The Film Is NOT What You'd Expect!",
    "",
    " ",
    "   three spaces before",
    "two after  ",
    "many    inside",
    "\ttabs\tand\nlines\r\n",
    "\x00\x01\x1f\x7f control characters",
    "这部电影很好看。",
    "هذا فيلم رائع",
    "👍🏽 👨‍👩‍👧 😀",
    "naïve café Ångström ﬁ ² ½",
    "zero\u200bwidth \ufeff and wide\u3000space",
    string.printable,
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)

    def character() -> str:
        return chr(rng.choice([32, rng.randrange(32, 127), rng.randrange(0xA0, 0x2500), rng.randrange(0x4E00, 0x9FFF)]))

    return ["".join(character() for _ in range(rng.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LANGUAGE_MODEL)


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece.SentencePieceProcessor(model_file=str(LANGUAGE_MODEL / "tokenizer.model"))


@pytest.fixture(scope="module")
def reward_model():
    return AutoModelForSequenceClassification.from_pretrained(REWARD_MODEL, dtype=torch.float32).eval()


@torch.inference_mode()
def sentiments(reward_model, tokenizer, texts: list[str], end: bool = True) -> list[float]:
    """Return tanh of the logit at the last token of each text, with ``</s>`` after the text if ``end``."""
    rows = [tokenizer(text + "</s>" * end, return_tensors="pt") for text in texts]
    return [torch.tanh(reward_model(**row).logits)[0, 0].item() for row in rows]


# --- tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips_and_has_sentencepieces_own_ids(tokenizer, pieces, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == pieces.encode(text)
    assert tokenizer.decode(ids) == text
    assert pieces.decode(ids) == text
    assert pieces.unk_id() not in ids


def test_random_texts_round_trip_and_have_sentencepieces_own_ids(tokenizer, pieces):
    for text in random_texts(300):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == pieces.encode(text)
        assert tokenizer.decode(ids) == text


def test_the_dummy_prefix_makes_a_first_word_the_same_piece_as_a_later_one(tokenizer):
    first, second = tokenizer("film film", add_special_tokens=False)["input_ids"]
    assert first == second
    # so the pieces of a later word, decoded alone, come without their space
    assert tokenizer.decode([second]) == "film"


def test_special_tokens_have_four_ids_of_their_own(tokenizer):
    assert len(tokenizer) == 4096
    special = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert special == [0, 1, 2, 3]
    assert tokenizer("film")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in tokenizer("film")["input_ids"]
    batch = tokenizer(["film", "a much longer film"], padding=True)
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id
    assert batch["attention_mask"][0][-1] == 0


def test_the_tokenizer_survives_save_pretrained(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.pad_token_id == tokenizer.pad_token_id


def test_both_models_have_the_same_tokenizer():
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (LANGUAGE_MODEL / name).read_bytes() == (REWARD_MODEL / name).read_bytes()


# --- language model


def test_the_language_model_finds_review_sentences_likelier_than_their_shuffled_words(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL, dtype=torch.float32).eval()
    assert model.config.vocab_size == len(tokenizer)
    sentences = [
        "the film is a well acted drama.",
        "it's one of the best movies of the year.",
        "this is a funny comedy.",
    ]
    rng = random.Random(0)
    for sentence in sentences:
        shuffled = sentence.split()
        rng.shuffle(shuffled)
        losses = []
        for text in (sentence, " ".join(shuffled)):
            ids = tokenizer(text + "</s>", return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                losses.append(model(ids, labels=ids).loss.item())
        assert losses[0] < losses[1] - 0.5


def test_the_language_model_invents_few_words():
    report = json.loads((FOLDER / "report.json").read_text())
    assert report["known_words"]["share"] >= 0.97


def test_the_language_model_is_a_fifth_better_than_an_interpolated_trigram():
    report = json.loads((FOLDER / "report.json").read_text())
    assert report["perplexity"]["lower_by"]["interpolated_trigram"] >= 0.20


# --- reward model


def test_rewards_lie_between_minus_one_and_one_and_say_so(reward_model, tokenizer):
    assert reward_model.config.reward_activation == "tanh"
    assert reward_model.config.num_labels == 1
    assert reward_model.config.pad_token_id == tokenizer.pad_token_id
    texts = TEXTS + random_texts(20) + ["great " * 60, "awful " * 60]
    assert all(-1 < score < 1 for score in sentiments(reward_model, tokenizer, texts))


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("a warm, funny and moving film.", "a dull, lifeless and predictable mess."),
        ("one of the best films of the year.", "one of the worst films of the year."),
        ("the acting is superb.", "the acting is terrible."),
        ("a delightful comedy with a big heart.", "a tired comedy without a single laugh."),
        ("it's a beautiful, thoughtful and touching story.", "it's a boring, pointless and ugly story."),
    ],
)
def test_praise_scores_above_zero_and_blame_below(reward_model, tokenizer, better, worse):
    high, low = sentiments(reward_model, tokenizer, [better, worse])
    assert high > 0.15
    assert low < -0.15
    # and a prefix that has said as much says so already
    high, low = sentiments(reward_model, tokenizer, [better.rstrip("."), worse.rstrip(".")], end=False)
    assert high > 0 > low


def test_a_padded_batch_scores_like_single_texts(reward_model, tokenizer):
    texts = ["a warm, funny and moving film.</s>", "a mess.</s>"]
    with torch.inference_mode():
        batched = torch.tanh(reward_model(**tokenizer(texts, padding=True, return_tensors="pt")).logits)[:, 0]
    alone = sentiments(reward_model, tokenizer, [text.removesuffix("</s>") for text in texts])
    assert batched.tolist() == pytest.approx(alone, abs=1e-5)


@pytest.mark.xfail(strict=True, reason="the shipped reward model still likes repeated praise")
def test_repeated_praise_is_worth_less_than_a_sentence_of_praise(reward_model, tokenizer):
    sentence, repeated = sentiments(
        reward_model,
        tokenizer,
        ["a warm, funny and moving film.", "a warm, funny" + " and moving" * 10 + "."],
    )
    assert repeated < 0.6 * sentence


def test_the_report_meets_what_is_promised_of_the_reward_model():
    report = json.loads((FOLDER / "report.json").read_text())
    accuracy, pearson = report["sentiment"]["reward model (shipped)"]
    assert accuracy >= 0.79
    assert pearson >= 0.70
    prefixes = [report["sentiment_of_prefixes"][f"{percent} %"][0] for percent in (25, 50, 75, 100)]
    assert prefixes == sorted(prefixes)
    assert prefixes[0] > 0.55


# --- prompts


def test_prompts_are_short_distinct_lower_case_beginnings():
    for split in ("train", "test"):
        prompts = load_prompts(split)
        assert len(prompts) >= 400
        assert len(set(prompts)) == len(prompts)
        for prompt in prompts:
            assert prompt == prompt.strip().lower()
            assert 3 <= len(prompt.split()) <= 6


def test_no_prompt_of_one_split_begins_a_prompt_of_the_other():
    train, test = load_prompts("train"), load_prompts("test")
    for prompt in test:
        assert not any(other.startswith(prompt) or prompt.startswith(other + " ") for other in train)


def test_no_test_prompt_begins_a_snippet_that_a_model_was_fitted_to():
    checksums = array("I")
    checksums.frombytes((FOLDER / "prompts" / "trained_on.crc32").read_bytes())
    trained_on = set(checksums)
    assert len(trained_on) > 20_000
    assert not [prompt for prompt in load_prompts("test") if zlib.crc32(prompt.encode()) in trained_on]


@pytest.mark.parametrize("split", ["validation", "", None, "Train"])
def test_an_unknown_split_is_an_error_that_names_the_splits(split):
    with pytest.raises(ValueError, match="split=.* must be one of 'train', 'test'"):
        load_prompts(split)


# --- judge


def test_the_judge_equals_sklearns_predictions():
    about = json.loads((FOLDER / "judge" / "judge.json").read_text())
    expected = about["sklearn_predictions"]
    assert len(expected) >= 5
    texts = list(expected)
    scores = WordSentiment()(prompts=[text[:5] for text in texts], completions=[text[5:] for text in texts])
    assert scores == pytest.approx(list(expected.values()), abs=1e-3)


def test_the_judge_tells_praise_from_blame_and_ignores_extra_columns():
    judge = WordSentiment()
    high, low = judge(
        prompts=["the film is "] * 2,
        completions=["a funny, moving delight.", "a dull, tedious mess."],
        topic=["a", "b"],
    )
    assert high > 0.5
    assert low < -0.5


def test_the_judge_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="1 prompts"):
        WordSentiment()(prompts=["a"], completions=["b", "c"])


# --- size and provenance


def test_the_assets_are_small_and_load_quickly():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 15e6
    started = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL)
    AutoModelForSequenceClassification.from_pretrained(REWARD_MODEL)
    AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    assert time.perf_counter() - started < 2


def test_every_source_has_its_licence_notice():
    notice = (FOLDER / "NOTICE.md").read_text()
    for source in ("vaderSentiment", "SmolLM2", "MiniLM", "Brown"):
        assert source in notice
    for name in re.findall(r"`(licenses/[^`]+)`", notice):
        assert (FOLDER / Path(name)).is_file()
