"""Whatever a model does behind its last hidden states, its logits are its own: when opened, and when weights grow."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tiny_agents import tiny_ppo, tiny_vector_env
from tiny_models import BOS, CONTEXT, EOS, PAD, VOCABULARY, tiny_tokenizer
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    ElectraConfig,
    ElectraForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)

from textgym.engine.encoder_decoder import model_inputs
from textgym.engine.head import own_logits
from textgym.language_model import LanguageModel

V = len(VOCABULARY)
IDS = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.15}
LLAMA = {**SHAPE, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
GROUPED = {**LLAMA, "num_key_value_heads": 1}
T5 = {
    "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "decoder_start_token_id": PAD,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": CONTEXT,
    "init_std": 0.15, "decoder_start_token_id": EOS, "forced_eos_token_id": None,
}  # fmt: skip


def bart_with_a_bias() -> PreTrainedModel:
    model = BartForConditionalGeneration(BartConfig(**IDS, **BART))
    model.final_logits_bias.copy_(torch.linspace(-3, 3, V))
    return model


def recurrent_gemma(std: float = 0.15) -> PreTrainedModel:
    shape = {**GROUPED, "lru_width": 32, "head_dim": 16, "attention_window_size": CONTEXT, "w_init_variance_scale": std}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**IDS, **shape, logits_soft_cap=2.0))


MODELS: dict[str, Any] = {
    "a layer before the head": lambda: BertLMHeadModel(BertConfig(**IDS, **LLAMA, is_decoder=True)),
    "positions that skip pad tokens": lambda: RobertaForCausalLM(RobertaConfig(**IDS, **LLAMA, is_decoder=True)),
    "a narrower head": lambda: ElectraForCausalLM(
        ElectraConfig(**IDS, **LLAMA, embedding_size=16, is_decoder=True)
    ),
    "a multiplier in the trunk": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            **IDS, **GROUPED, head_dim=16, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16,
            mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=4,
        )
    ),
    "a scaling that multiplies": lambda: HyperCLOVAXForCausalLM(
        HyperCLOVAXConfig(**IDS, **GROUPED, head_dim=16, logits_scaling=0.4)
    ),
    "a cap of another name": recurrent_gemma,
    "a trunk of another name": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **IDS, **GROUPED, head_dim=16, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=CONTEXT
        )
    ),
    "a scale by width": lambda: UMT5ForConditionalGeneration(UMT5Config(**IDS, **T5)),
    "a scale by width, experts": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**IDS, **T5, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    ),
    "a bias elsewhere": bart_with_a_bias,
    "positions that skip pad tokens, without a cache": lambda: M2M100ForConditionalGeneration(
        M2M100Config(**IDS, **BART)
    ),
}  # fmt: skip


@cache
def opened(name: str) -> LanguageModel:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that some are slow
        torch.manual_seed(0)
        model = MODELS[name]()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
        lm = LanguageModel(model, tiny_tokenizer())
        lm.cached(CONTEXT)
    return lm


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Rows ``(4, 16)`` with a padding token in each completion, as sampling may draw it, and their prompts' lengths."""
    ids = np.random.default_rng(0).integers(4, V, (4, 16))
    ids[[0, 1, 2, 3], [9, 6, 7, 8]] = PAD
    return ids, np.array([5, 3, 4, 1])


def expected_logits(lm: LanguageModel, ids: np.ndarray, prompt: int) -> Tensor:
    inputs = model_inputs(lm.model, torch.as_tensor(ids[None]), prompt)
    return lm.model(**inputs, use_cache=False).logits[0, -1]


@pytest.mark.parametrize("name", MODELS)
def test_steps_and_teacher_forced_rows_have_the_models_own_logits_with_pad_tokens_in_the_text(name):
    lm = opened(name)
    machine = lm.cached(CONTEXT)
    ids, prompts = texts()
    lengths = np.array([8, 5, 4, 7])
    for _ in range(4):
        with torch.no_grad():
            stepped = lm.head(machine.last_hidden(ids, lengths, prompt_lengths=prompts))
            forced = lm.head(machine.hidden_at(ids, lengths, np.arange(4), lengths - 1, prompts))
            for row in range(4):
                expected = expected_logits(lm, ids[row, : lengths[row]], int(prompts[row]))
                torch.testing.assert_close(stepped[row], expected, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(forced[row], expected, atol=1e-4, rtol=1e-4)
        lengths = lengths + 1


@pytest.mark.parametrize("name", ["a layer before the head", "a cap of another name", "a bias elsewhere"])
def test_log_probs_and_gradients_are_those_of_the_models_own_forward(name):
    lm = opened(name).trainable_copy()
    ids, prompts = texts()
    token, length, prompt = 7, 12, int(prompts[0])
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    hidden = lm.cached(CONTEXT).hidden_at(
        ids[:1], np.array([length]), np.zeros(1, int), np.array([length - 1]), prompts[:1]
    )
    log_prob, _ = lm.token_log_probs(hidden, torch.tensor([token]), entropy_gradient=False)
    got = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
    logits = expected_logits(lm, ids[0, :length], prompt)
    expected_log_prob = logits.log_softmax(-1)[token]
    expected = torch.autograd.grad(expected_log_prob, parameters, allow_unused=True)
    torch.testing.assert_close(log_prob[0], expected_log_prob, atol=1e-4, rtol=1e-4)
    for one, other in zip(got, expected, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
        else:
            assert all(gradient is None or not gradient.any() for gradient in (one, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_is_found_before_weights_have_grown_into_it(dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = LanguageModel(recurrent_gemma().to(dtype), tiny_tokenizer())
    hidden = 1e-3 * torch.randn(3, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        small, large = lm.head(hidden), lm.head(1e6 * hidden)
    assert small.abs().max() < 0.1
    assert large.abs().max() <= 2.0


def test_a_policy_behind_such_a_head_begins_with_ratio_one_and_is_saved(tmp_path):
    from tiny_agents import logs_of_learning, values_of

    lm = opened("a narrower head")
    agent = tiny_ppo(tiny_vector_env(4, language_model=lm), learning_rate=1e-2)
    logs = logs_of_learning(agent, 96)
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    agent.save_pretrained(tmp_path)
    saved = ElectraForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(4, 12)[None]
    torch.testing.assert_close(saved(input_ids=ids).logits, agent.policy.transformer(input_ids=ids).logits)


def test_running_a_models_own_head_leaves_the_model_as_it_is():
    model = opened("a layer before the head").model
    before = dict(model.named_modules())
    own_logits(model, torch.zeros(2, 3, 32))
    assert all(after is before[name] for name, after in model.named_modules())
    assert "forward" not in vars(model.base_model)


def test_how_completions_begin_may_stand_in_the_generation_configuration_alone():
    model = opened("a scale by width").model
    other = UMT5ForConditionalGeneration(UMT5Config(**IDS, **{**T5, "decoder_start_token_id": None}))
    other.load_state_dict(model.state_dict())
    other.generation_config.decoder_start_token_id = PAD
    lm = LanguageModel(other, tiny_tokenizer())
    ids, _ = texts()
    with torch.no_grad():
        expected = expected_logits(opened("a scale by width"), ids[0], 5)
        torch.testing.assert_close(expected_logits(lm, ids[0], 5), expected)


def test_positions_under_other_names_are_limits_when_an_environment_is_made():
    shape = {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 12, "logit_scale": "inv_sqrt_d_model"}
    lm = LanguageModel(MptForCausalLM(MptConfig(vocab_size=V, **shape)), tiny_tokenizer())
    gym.make("TextGen-v0", language_model=lm, prompts=["the film"], max_prompt_tokens=6, max_new_tokens=6)
    with pytest.raises(ValueError, match="context"):
        gym.make("TextGen-v0", language_model=lm, prompts=["the film"], max_prompt_tokens=8, max_new_tokens=8)


def test_models_that_read_in_both_directions_are_still_refused():
    config = XLMConfig(n_words=V, emb_dim=32, n_layers=1, n_heads=2, pad_index=PAD)
    with pytest.raises(ValueError, match="XLMWithLMHeadModel change by .* when tokens follow"):
        LanguageModel(XLMWithLMHeadModel(config), tiny_tokenizer())
