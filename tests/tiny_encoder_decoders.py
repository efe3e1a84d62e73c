"""Random T5 and BART of a few thousand weights."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import BOS, EOS, PAD, VOCABULARY, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "eos_token_id": EOS}


# Few buckets, so that distances of the rows below fall into those that stand for one, for several and for all larger.
T5_SHAPE = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": PAD,
}


def t5_config(**arguments: Any) -> T5Config:
    return T5Config(**{**IDS, **T5_SHAPE, **arguments})


def tiny_encoder_decoder(name: str = "t5", seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "t5":
            return T5ForConditionalGeneration(t5_config()).eval()
        if name == "t5 1.1":  # its logits aren't scaled
            return T5ForConditionalGeneration(
                t5_config(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
            ).eval()
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        shape = {**layers, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
        start = {"bos_token_id": BOS, "decoder_start_token_id": EOS, "forced_eos_token_id": None}
        return BartForConditionalGeneration(BartConfig(**IDS, **shape, **start, init_std=0.2)).eval()


def ending_tokenizer() -> PreTrainedTokenizerBase:
    """The tiny tokenizer, with EOS behind every text as T5's has it."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    return tokenizer
