"""Tiny random models and a word tokenizer, made on the spot: no weights to load, milliseconds to run.

Dropout keeps each architecture's default, so that a test fails where somebody forgets to switch it off.
Initial weights are ten times wider than usual: with the usual 0.02 every token is about equally likely, and a
wrong position or a wrong mask would hardly show in a log-prob.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
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

from textgym.model_sources import quiet_progress

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


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_EOS, CHAT_PAD, CHAT_BOS, CHAT_SPECIAL = (
    0,
    1,
    2,
    3,
)  # ids of the chat tokenizer; others follow


def chat_tokenizer(
    special: Sequence[str] = ("<|im_start|>", "<|im_end|>"), template: str | None = CHATML, bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with end of sequence, padding, ``<s>``, special tokens, and all bytes.

    :param special: further special tokens, with ids from ``CHAT_SPECIAL`` on
    :param template: the chat template
    :param bos: whether it puts ``<s>`` before a text
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>", "<s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a good film"], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", CHAT_BOS)])
    opened = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        bos_token="<s>" if bos else None,
        additional_special_tokens=list(special),
    )
    opened.chat_template = template
    return opened


def save_chat_model(
    path: Path, tokenizer: PreTrainedTokenizerFast | None = None, ends: int | list[int] | None = None, **config: Any
) -> PreTrainedTokenizerFast:
    """Write a chat model, 32 wide and 1 layer deep, with its tokenizer.

    :param path: a directory
    :param tokenizer: by default ``chat_tokenizer()``
    :param ends: what its generation configuration lists; None for no such file
    :param config: of the model
    :return: the tokenizer
    """
    tokenizer = chat_tokenizer() if tokenizer is None else tokenizer
    shape = {**_LLAMA_SHAPE, "num_hidden_layers": 1, "max_position_embeddings": 512}
    ids = {"eos_token_id": CHAT_EOS, "pad_token_id": CHAT_PAD, "bos_token_id": CHAT_BOS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **ids, "vocab_size": len(tokenizer), **config}))
    with quiet_progress():
        model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    generation = path / "generation_config.json"
    generation.unlink(missing_ok=True)
    if ends is not None:
        generation.write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    return tokenizer
