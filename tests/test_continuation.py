"""Tokens that continue a text by exactly the characters given, for the kinds of tokenizer that causal LMs have."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tiny_tokenizers import TOKENIZERS, byte_level, metaspace
from tokenizers import normalizers
from transformers import LlamaConfig

from textgym.continuation import continuation_ids, decode
from textgym.vocabulary import Vocabulary


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


@settings(max_examples=100)
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
