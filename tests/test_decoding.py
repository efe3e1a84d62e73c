"""The texts of a row's prefixes are prefixes of its text, whatever the tokenizer does with bytes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import gymnasium as gym
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import prefix_batch
from tiny_tokenizers import TOKENIZERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import textgym.envs  # noqa: F401  registers the environments
from textgym.chat.turns import TurnTokens
from textgym.texts import token_texts

TEXTS = [
    "今天天气真好，出门记得带伞哦。",
    "Good 🪿🎬 👩\u200d🔬 film",
    "e\u0301 a\u0308\u0323 cafe\u0301",
    "ไทยພາສາ हिन्दी 한국어 にほんご",
    "a\ufffdb\ufffd",  # the sign itself is a character like others
    "naïve — très 猫",
]


def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT's: characters and parts of words, no bytes."""
    characters = sorted({c for text in TEXTS for c in text if not c.isspace()})
    names = ["[UNK]", "[PAD]", "[SEP]", *characters, *(f"##{c}" for c in characters)]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]")


KINDS = {**TOKENIZERS, "word pieces": word_pieces}


@pytest.fixture(scope="module", params=list(KINDS))
def turns(request: pytest.FixtureRequest) -> TurnTokens:
    return TurnTokens(KINDS[request.param]())


def prefixes(turns: TurnTokens, ids: list[int]) -> list[str]:
    return turns.decode_all(ids[:n] for n in range(len(ids) + 1))


@pytest.mark.parametrize("text", TEXTS)
def test_prefixes_of_a_text_are_prefixes_without_a_broken_character(turns, text):
    ids = turns.encode(text)
    whole = turns.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    parts = prefixes(turns, ids)
    if "##a" not in turns.tokenizer.get_vocab():  # BERT's has spaces that decoding takes out of Chinese
        assert parts[-1] == whole
    for shorter, longer in pairwise(parts):
        assert longer.startswith(shorter)
    assert sum(part.count("\ufffd") for part in parts[:-1]) == sum(
        text[: len(part.strip())].count("\ufffd") for part in parts[:-1]
    ), "U+FFFD stands only where the text has it"


@settings(max_examples=60)
@given(data=st.data())
def test_prefixes_of_any_tokens_are_prefixes(turns, data):
    size = len(turns.tokenizer)
    bytes_alone = [i for i in range(size) if "\ufffd" in turns.tokenizer.decode([i])] or [0]
    ids = data.draw(st.lists(st.integers(0, size - 1) | st.sampled_from(bytes_alone), max_size=12))
    for shorter, longer in pairwise(prefixes(turns, ids)):
        assert longer.startswith(shorter)


def test_what_is_no_character_whatever_follows_is_shown_as_such():
    turns = TurnTokens(KINDS["metaspace, never"]())
    byte = {value: turns.tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in (0xE4, 0xBB, 0x8A, 0x80)}
    letter = turns.tokenizer.convert_tokens_to_ids("a")
    now = [byte[0xE4], byte[0xBB], byte[0x8A]]  # 今
    assert turns.decode([*now, byte[0xE4], byte[0xBB]]) == "今"
    assert turns.decode([*now, byte[0xE4], byte[0xBB], letter]) == "今\ufffda"
    assert turns.decode([byte[0x80], *now]) == "\ufffd今"
    assert turns.decode([*now, byte[0xE4], turns.tokenizer.eos_token_id]) == "今"


def test_a_prompt_that_ends_inside_a_character_leaves_it_to_the_completion(turns):
    ids = turns.encode("天气🎬")
    batch = prefix_batch(turns.tokenizer, [ids[:-1]], [ids[-1:]])
    [whole], [completion] = batch.texts, batch.completions
    assert turns.decode(ids[:-1]) + completion == whole


def test_tokens_of_a_picture_join_to_the_text(turns):
    ids = turns.encode("天气 good 🎬!")
    batch = prefix_batch(turns.tokenizer, [ids[:1]], [ids[1:]])
    texts = token_texts(batch, 0)
    assert len(texts) == len(ids) - 1
    assert "".join(texts) == batch.completions[0]
    assert "\ufffd" not in batch.completions[0]


def test_rewards_see_no_broken_character_and_none_is_lost_again():
    seen: list[str] = []

    def watch(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    env = gym.make("TextGen-v0", reward=watch, kl_coef=0.0, prompts=["今天天气真好"], max_new_tokens=32)
    env.reset(seed=0)
    ids = env.unwrapped.tokenizer("，出门", add_special_tokens=False)["input_ids"]
    ids = ids[1:] if env.unwrapped.tokenizer.decode(ids[:1]) == "" else ids
    rewards = [env.step(token)[1] for token in ids]
    assert seen[-1] == "，出门"
    assert all("，出门".startswith(text) for text in seen)
    assert min(rewards) >= 0
    assert sum(rewards) == 3.0
