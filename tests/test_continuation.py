"""Tokens that continue a text by exactly the characters given, for the kinds of tokenizer that causal LMs have."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from textgym.continuation import continuation_ids, decode
from textgym.language_model import load_vocabulary
from textgym.vocabulary import Vocabulary

SENTENCES = [
    "the film is a warm and funny story about a very good man .",
    "The plot?! It's  nothing new,\n\nbut I don't care...\n",
    "中文 電影 很 好。 Ünïcödé é 🙂 1999",
] * 20


def trained(tokenizer: Tokenizer, special: list[str], **trainer) -> Tokenizer:
    options = {"vocab_size": 600, "special_tokens": special, "show_progress": False, **trainer}
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(**options))
    return tokenizer


def byte_level(normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2's; with NFC as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trained(tokenizer, ["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_level_with_prefix_space() -> PreTrainedTokenizerFast:
    """As GPT-NeoX's and OPT's may be: a space is put before a text, and BOS before that."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trained(tokenizer, ["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """SentencePiece's manner with byte fallback; "first" puts a space before a text as Llama's, "never" as Gemma's."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    learned = json.loads(trained(learner, ["<bos>", "<eos>", "<unk>"]).to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    strip = [decoders.Strip(" ", 1, 0)] if scheme == "first" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


TOKENIZERS = {
    "embedded": lambda: load_vocabulary().tokenizer,
    "byte-level": byte_level,
    "byte-level, NFC": lambda: byte_level(normalizers.NFC()),
    "byte-level, prefix space": byte_level_with_prefix_space,
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    tokenizer = TOKENIZERS[request.param]()
    return Vocabulary(tokenizer, LlamaConfig(vocab_size=max(5000, len(tokenizer))), request.param)


SPECIAL = ["the film</s>", " </s>is<s> <|end|><eos>", "<0x0A>", "<unk>"]
UNICODE = ["e\u0301", "\u0301", "🙂", "\u200d👩", "\ufffd", "。", "\x00"]
AWKWARD = [*SPECIAL, *UNICODE, "\n\n", "\n", "  ", " ", "", " good", "good", "ful", ".", " is a"]
# Characters that no Unicode normalisation replaces when they stand alone; together they may compose. And not the one
# that tokenizers of words write for a space.
characters = st.characters(codec="utf-8").filter(lambda c: unicodedata.is_normalized("NFC", c) and c != "▁")
pieces = st.lists(st.sampled_from(AWKWARD) | st.text(characters, max_size=8), max_size=6)


@settings(max_examples=100, deadline=None)
@given(prompt=st.sampled_from(["the film", "the film is ", "I don", "中文", "一\n"]), pieces=pieces)
@example(prompt="the film", pieces=AWKWARD)
def test_prompt_and_pieces_decode_to_their_concatenation(vocabulary, prompt, pieces):
    ids = vocabulary.encode(prompt)
    start = decode(vocabulary, ids)
    special = set(vocabulary.tokenizer.all_special_ids)
    for piece in pieces:
        new = continuation_ids(vocabulary, ids, piece)
        assert special.isdisjoint(new)
        ids = ids + new
    assert decode(vocabulary, ids) == start + "".join(pieces)


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_a_character_that_stands_for_a_space_is_an_error(scheme):
    tokenizer = metaspace(scheme)
    vocabulary = Vocabulary(tokenizer, LlamaConfig(vocab_size=len(tokenizer)), scheme)
    with pytest.raises(ValueError, match="can't write '▁' after 'the film'.*as another"):
        continuation_ids(vocabulary, vocabulary.encode("the film"), "▁")


def test_words_are_the_tokens_of_the_whole_text(vocabulary):
    text = "the film is a warm and funny story"
    ids = vocabulary.encode("the film")
    for word in text.split()[2:]:
        ids += continuation_ids(vocabulary, ids, f" {word}")
    assert ids == vocabulary.encode(text)
    begun = vocabulary.encode("the film")
    assert begun + continuation_ids(vocabulary, begun, " is a warm and funny story") == ids


def test_a_word_in_parts_stays_in_parts(vocabulary):
    ids = vocabulary.encode("the film is a war")
    assert decode(vocabulary, ids + continuation_ids(vocabulary, ids, "m")).lstrip() == "the film is a warm"
    assert ids + continuation_ids(vocabulary, ids, "m") != vocabulary.encode("the film is a warm")


def test_nothing_is_continued_with_nothing(vocabulary):
    assert continuation_ids(vocabulary, vocabulary.encode("the film"), "") == []


def test_what_a_tokenizer_cannot_write_is_an_error_that_shows_it():
    words = Vocabulary(tiny_tokenizer(), LlamaConfig(vocab_size=64), "words")
    ids = words.encode("the film")
    assert decode(words, ids + continuation_ids(words, ids, " is good")) == "the film is good"
    for piece in ("good", " is xylophonic", "  "):
        with pytest.raises(ValueError, match=f"can't write '{piece}' after 'the film': it has no tokens for '.' there"):
            continuation_ids(words, ids, piece)
    composed = Vocabulary(byte_level(normalizers.NFC()), LlamaConfig(vocab_size=900), "NFC")
    with pytest.raises(ValueError, match="no tokens for '\uf900' there"):  # NFC has another character for it
        continuation_ids(composed, composed.encode("the film"), " \uf900")


def test_half_a_surrogate_pair_is_no_text(vocabulary):
    with pytest.raises(ValueError, match="half of a surrogate pair at position 1"):
        continuation_ids(vocabulary, vocabulary.encode("the film"), "a\ud83d")
