"""Padding tokens that belong to a text: an encoder-decoder reads them as its own forward of that text does.

M2M100 doesn't count them as positions, and T5Gemma hides them, where they are given neither a mask nor a cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_encoder_decoder import Walk, assert_steps_are_exact, batch_of, plain_logits
from tiny_encoder_decoders import ending_tokenizer
from tiny_models import BOS, EOS, PAD, VOCABULARY
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

from textgym.engine.encoder_decoder import CachedEncoderDecoder, GroupedPadTokensApart, PadTokensApart
from textgym.evaluation import token_log_probs
from textgym.language_model import LanguageModel

IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
M2M = {
    **IDS,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "d_model": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "decoder_start_token_id": EOS,
}


def t5gemma(window: int = 64) -> PreTrainedModel:
    shape = {
        **IDS,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "sliding_window": window,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 64,
    }
    model = T5GemmaForConditionalGeneration(
        T5GemmaConfig(encoder=dict(shape), decoder=dict(shape), vocab_size=len(VOCABULARY), initializer_range=0.2)
    )
    model.config.decoder_start_token_id = BOS
    return model


def nllb_moe() -> PreTrainedModel:
    sparse = {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 2, "router_dtype": "float32"}
    return NllbMoeForConditionalGeneration(NllbMoeConfig(**M2M, **sparse))


MODELS: dict[str, tuple[Any, type[CachedEncoderDecoder]]] = {
    "m2m100": (lambda: M2M100ForConditionalGeneration(M2M100Config(**M2M)), GroupedPadTokensApart),
    "nllb-moe": (nllb_moe, GroupedPadTokensApart),
    "t5gemma": (t5gemma, PadTokensApart),
    "t5gemma with a window": (lambda: t5gemma(4), PadTokensApart),
}


def opened(name: str) -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LanguageModel(MODELS[name][0]().eval(), ending_tokenizer(), "mine")


class WalkWithPads(Walk):
    """A walk in whose prompts and completions are padding tokens, that come and go."""

    def __init__(self, rows: int, width: int, seed: int) -> None:
        super().__init__(rows, width, seed)
        for row in range(rows):
            self._put_pads(row)

    def change(self, row: int) -> None:
        before = self.ids[row].copy()
        super().change(row)
        if (self.ids[row] != before).any():
            self._put_pads(row)

    def _put_pads(self, row: int) -> None:
        width = self.ids.shape[1]
        self.ids[row, self.rng.choice(width, self.rng.integers(0, 4), replace=False)] = PAD


@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_the_plain_forward_with_pad_tokens_in_the_text(name):
    lm = opened(name)
    machine = lm.cached(20)
    assert type(machine) is MODELS[name][1]
    assert_steps_are_exact(lm, machine, seed=0, steps=12, kind=WalkWithPads)


@pytest.mark.parametrize("name", MODELS)
def test_teacher_forced_log_probs_equal_those_of_the_plain_forward_with_pad_tokens_in_the_text(name):
    lm = opened(name)
    batch = batch_of(lm.tokenizer, rows=5)
    for i, prompt in enumerate(batch.prompt_lengths.tolist()):
        batch.input_ids[i, [prompt // 2, prompt + 1]] = PAD
    for i, got in enumerate(token_log_probs(lm, batch)):
        ids, prompt = batch.input_ids[i, : batch.lengths[i]], int(batch.prompt_lengths[i])
        expected = plain_logits(lm.model, ids, prompt)[:-1].log_softmax(-1)
        np.testing.assert_allclose(got, expected[np.arange(len(ids) - prompt), ids[prompt:]], atol=1e-4)


def test_gradients_go_through_prompts_with_pad_tokens_as_in_the_plain_forward():
    lm = opened("t5gemma").trainable_copy()
    prompts, ids = np.array([4, 2]), np.array([[5, PAD, 6, EOS, 7, 8], [9, EOS, 10, 11, 12, 13]])
    wanted = [torch.randn(1, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    base = lm.model.base_model
    for row, prompt in enumerate(prompts.tolist()):
        inputs = {"input_ids": ids[None, row, :prompt], "decoder_input_ids": [[BOS, *ids[row, prompt:]]]}
        tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
        hidden = base(**tensors, use_cache=False).last_hidden_state[0, -1]
        (hidden * wanted[row]).sum().backward()
    expected = {name: p.grad.clone() for name, p in base.encoder.named_parameters()}
    lm.model.zero_grad()
    hidden = lm.cached(8).hidden_at(ids, np.array([6, 6]), np.arange(2), np.array([5, 5]), prompts)
    (hidden * torch.cat(wanted)).sum().backward()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, parameter in base.encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_only_rows_with_a_pad_token_in_their_completion_are_read_as_a_whole():
    lm = opened("m2m100")
    machine, prompts, tokens = lm.cached(16), np.array([3, 3]), []
    ids = np.random.default_rng(0).integers(4, len(VOCABULARY), (2, 16))
    ids[0, 1] = PAD  # in its prompt
    ids[1, 6] = PAD
    handle = lm.model.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for length in range(3, 10):
        machine.last_hidden(ids, np.array([length, length]), prompt_lengths=prompts)
    # Start tokens and 3 more of both; then the whole of the second, 5 to 7 tokens with the start token, and one.
    assert tokens == [2, 2, 2, 2, 5, 1, 6, 1, 7, 1]
    tokens.clear()
    ids[1, 6] = 5  # a new completion, which has none: what is not in the cache is read once
    for length in (9, 10):
        machine.last_hidden(ids[1:], np.array([length]), rows=np.array([1]), prompt_lengths=prompts[1:])
    assert tokens == [7, 1]
    handle.remove()
