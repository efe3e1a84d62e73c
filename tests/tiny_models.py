"""Tiny random models and a word tokenizer, made on the spot: no weights to load, milliseconds to run.

Dropout keeps each architecture's default, so that a test fails where somebody forgets to switch it off.
Initial weights are ten times wider than usual: with the usual 0.02 every token is about equally likely, and a
wrong position or a wrong mask would hardly show in a log-prob.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = tuple(
    "the a an this that it is was and but not very so too of in to for with "
    "film movie story plot cast actor scene end time heart script music "
    "good great fine warm funny clever moving fresh bad dull slow weak cold empty silly "
    "i we you he she they like love hate see feel . , !".split()
)
VOCABULARY = SPECIAL_TOKENS + WORDS
PAD, BOS, EOS, UNK = range(4)
CONTEXT = 128  # positions that every tiny model has

_TOKEN_IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
_LLAMA_SHAPE = {**_SHAPE, "intermediate_size": 64, "max_position_embeddings": CONTEXT}

ARCHITECTURES = ("llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with 64 ids: four special tokens, and words and marks. Other words become ``<unk>``.

    Decoding puts a space between tokens, so ``decode([a, b])`` is not ``decode([a]) + decode([b])``: the same
    goes, in one way or another, for most real tokenizers. It adds no special tokens to what it encodes.
    """
    model = WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A causal language model of the given architecture, 32 wide and 2 layers deep, in evaluation mode.

    :param architecture: One of ``ARCHITECTURES``
    :param seed: Seed of the weights; the global random state is left as it was
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if architecture == "llama":
            model = LlamaForCausalLM(LlamaConfig(**_TOKEN_IDS, **_LLAMA_SHAPE))
        elif architecture == "gpt2":
            shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
            model = GPT2LMHeadModel(GPT2Config(**_TOKEN_IDS, **shape, initializer_range=0.2))
        elif architecture == "qwen2":
            # Grouped-query attention: two query heads share one key-value head.
            model = Qwen2ForCausalLM(Qwen2Config(**_TOKEN_IDS, **_LLAMA_SHAPE, num_key_value_heads=1))
        elif architecture == "gpt_neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**_TOKEN_IDS, **_LLAMA_SHAPE))
        elif architecture == "opt":
            shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
            config = OPTConfig(
                **_TOKEN_IDS,
                **shape,
                word_embed_proj_dim=32,
                max_position_embeddings=CONTEXT,
                init_std=0.2,
            )
            model = OPTForCausalLM(config)
        elif architecture == "gemma":
            model = GemmaForCausalLM(GemmaConfig(**_TOKEN_IDS, **_LLAMA_SHAPE, num_key_value_heads=1, head_dim=16))
        else:
            raise ValueError(f"architecture must be one of {ARCHITECTURES}, got {architecture!r}")
    return model.eval()


def tiny_causal_reward_model(seed: int = 1) -> LlamaForSequenceClassification:
    """A causal reward model with one output on the tiny tokenizer's ids; its scores spread by about 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(LlamaConfig(**_TOKEN_IDS, **_LLAMA_SHAPE, num_labels=1))
    return model.eval()
