"""Tokenizers of the kinds that causal language models have, trained on the spot."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from textgym.language_model import load_vocabulary

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
