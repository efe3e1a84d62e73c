"""Rows that reward models can learn from in seconds, and the models, shared by the tests of their training."""

from __future__ import annotations

import random
from typing import Any

import torch
from tiny_models import CONTEXT, EOS, PAD, VOCABULARY, tiny_causal_reward_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

TOKENIZER = tiny_tokenizer()
GOOD = "good great fine warm funny clever moving fresh".split()
BAD = "bad dull slow weak cold empty silly hate".split()
NEUTRAL = "the a film movie story plot cast actor scene and it is was".split()
QUICK: dict[str, Any] = {"learning_rate": 3e-3, "epochs": 5, "device": "cpu", "validation_share": 0.25}


def review(good: bool, rng: random.Random) -> str:
    """Neutral words, two of which give way to words that say what the text is."""
    words = rng.choices(NEUTRAL, k=rng.randint(3, 8))
    for place in rng.sample(range(len(words)), 2):
        words[place] = rng.choice(GOOD if good else BAD)
    return " ".join(words)


def labelled(count: int = 300, share: float = 0.5) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        good = rng.random() < share
        rows.append({"text": review(good, rng), "label": "good" if good else "bad"})
    return rows


def scored(count: int = 300) -> list[dict[str, Any]]:
    return [{"text": row["text"], "score": 0.9 if row["label"] == "good" else -0.9} for row in labelled(count)]


def pairs(count: int = 300, margin: float | None = None) -> list[dict[str, Any]]:
    rng = random.Random(1)
    rows = []
    for i in range(count):
        row = {"prompt": f"{rng.choice(NEUTRAL)} {i % 60}", "chosen": " " + review(True, rng)}
        row["rejected"] = " " + review(False, rng)
        rows.append(row if margin is None else {**row, "margin": margin})
    return rows


def tiny_encoder(num_labels: int = 1) -> BertForSequenceClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=CONTEXT,
                pad_token_id=PAD,
                num_labels=num_labels,
                initializer_range=0.2,
            )
        )


def tiny_causal(num_labels: int) -> LlamaForSequenceClassification:
    config: LlamaConfig = tiny_causal_reward_model().config
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForSequenceClassification(config)


def framing_tokenizer() -> Any:
    """A tokenizer that puts ``<bos>`` before and ``<eos>`` behind every text, as encoders' do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", EOS)]
    )
    return tokenizer
