"""Models that can't be served exactly, and tokenizers that can't write, are refused when they are opened."""

from __future__ import annotations

import pytest
import torch
from text_envs import text_score
from tiny_models import BOS, EOS, PAD, VOCABULARY, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LEDConfig,
    LEDForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    ReformerConfig,
    ReformerModelWithLMHead,
)

from textgym.envs import TextGenVectorEnv
from textgym.language_model import LanguageModel, load_language_model

IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def test_layers_that_hash_at_random_are_refused():
    shape = {"attention_head_size": 16, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "num_buckets": 2}
    lengths = {"lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "max_position_embeddings": 64}
    config = ReformerConfig(
        **IDS, **shape, **lengths, hidden_size=32, feed_forward_size=32, attn_layers=["local", "lsh"], is_decoder=True
    )
    with pytest.raises(ValueError, match="'lsh' layers of ReformerModelWithLMHead hash tokens at random"):
        LanguageModel(ReformerModelWithLMHead(config), tiny_tokenizer())


def test_a_tokenizer_that_is_reopened_as_another_class_and_writes_nothing_is_refused(tmp_path):
    """transformers opens whatever lies beside a Qwen2 model as Qwen2's byte-level tokenizer."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "good", "film", "story"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=16, num_key_value_heads=2, max_position_embeddings=64, **shape)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a Qwen2Tokenizer\w*, makes no token of .*pass a tokenizer object"):
        load_language_model(str(tmp_path))
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    assert load_language_model(str(tmp_path), tokenizer=whole).encode("good film") == [3, 4]


def test_completions_beyond_the_decoders_positions_are_refused_before_anything_is_written():
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "attention_window": 4}
    positions = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 8}
    config = LEDConfig(**IDS, **layers, **sizes, **positions, decoder_start_token_id=EOS, forced_eos_token_id=None)
    model = LanguageModel(LEDForConditionalGeneration(config), tiny_tokenizer())
    options = {"language_model": model, "reward": text_score, "prompts": ["the film"], "max_prompt_tokens": 8}
    with pytest.raises(ValueError, match="max_new_tokens=8 is more than the 7 tokens that the model's decoder"):
        TextGenVectorEnv(2, max_new_tokens=8, **options)
    envs = TextGenVectorEnv(2, max_new_tokens=7, **options)
    envs.reset(seed=0)
    for _ in range(7):
        *_, truncated, _ = envs.step([5, 6])
    assert truncated.all()
