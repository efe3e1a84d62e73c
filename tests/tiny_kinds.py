"""Tiny models of many architectures, by how textgym steps them: in groups, by whole prefixes, or from a slot cache."""

from __future__ import annotations

import warnings

import torch
from tiny_models import BOS, CONTEXT, EOS, PAD, VOCABULARY, tiny_model, tiny_tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from textgym.language_model import LanguageModel

IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
LLAMA_SHAPE = {**SHAPE, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
WINDOW = 6

GROUPED = {
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2)
    ),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(
            **IDS, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=16, n_groups=1, chunk_size=4
        )
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2, hidden_dropout=0.1)
    ),
    # Masks by the length of the batch: right while all rows begin together, wrong afterwards.
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            **IDS,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=WINDOW,
            initializer_range=0.2,
            max_position_embeddings=CONTEXT,
        )
    ),
}
SLOW = {
    # In one-token steps its limit of time steps is not applied; the tokens that are tried may not need it.
    "mamba2-limited": lambda: Mamba2ForCausalLM(
        Mamba2Config(
            **IDS,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            num_heads=4,
            head_dim=16,
            n_groups=1,
            chunk_size=4,
            time_step_limit=(0.0, 0.1),
        )
    ),
    # has no cache
    "openai-gpt": lambda: OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(**IDS, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    ),
}
WINDOWED = {
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**IDS, **LLAMA_SHAPE, num_key_value_heads=1, sliding_window=WINDOW)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **IDS,
            **LLAMA_SHAPE,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}
FAST = {
    **{name: (lambda name=name: tiny_model(name)) for name in ("qwen2", "gpt_neox", "opt")},
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**IDS, **LLAMA_SHAPE, num_key_value_heads=1, head_dim=16)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**IDS, **LLAMA_SHAPE)),
}


def build(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {**GROUPED, **SLOW, **WINDOWED, **FAST}[name]().eval()


def opened(name: str, context: int = 24) -> LanguageModel:
    """The language model; that it is slow has been said already."""
    lm = LanguageModel(build(name), tiny_tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lm.cached(context)
    return lm
