"""Adapters on experts, shared blocks, state-space layers, odd routers and models that also see: what is saved is what
was trained."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_agents import tiny_ppo, tiny_vector_env
from tiny_models import BOS, CONTEXT, EOS, PAD, VOCABULARY, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from textgym.language_model import LanguageModel
from textgym.lora import AdaptedLanguageModel, add_lora

# peft asks transformers for an attribute under its old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*which is exact but slow:UserWarning"),
]

TOKEN_IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.15}
LLAMA_SHAPE = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip

MODELS: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TOKEN_IDS, **LLAMA_SHAPE, **EXPERTS)),
    "phimoe": lambda: PhimoeForCausalLM(PhimoeConfig(**TOKEN_IDS, **LLAMA_SHAPE, **EXPERTS)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**TOKEN_IDS, **SHAPE, state_size=4)),
    "zamba2": lambda: Zamba2ForCausalLM(
        Zamba2Config(
            **TOKEN_IDS,
            **{**LLAMA_SHAPE, "num_hidden_layers": 4, "num_key_value_heads": 2},
            layers_block_type=["linear_attention", "hybrid"] * 2,
            mamba_d_state=4,
            n_mamba_heads=2,
            mamba_ngroups=1,
            num_mem_blocks=1,
            chunk_size=4,
        )
    ),
    "gemma3": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**TOKEN_IDS, **LLAMA_SHAPE, "head_dim": 16},
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=len(VOCABULARY) - 1,
            boi_token_index=len(VOCABULARY) - 2,
            eoi_token_index=len(VOCABULARY) - 3,
        )
    ),
}
IDS = torch.randint(4, 60, (3, 12), generator=torch.Generator().manual_seed(0))


@cache
def language_model(name: str) -> LanguageModel:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some are slow
        torch.manual_seed(0)
        lm = LanguageModel(MODELS[name](), tiny_tokenizer())
        lm.cached(CONTEXT)
    return lm


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def moved(lm: LanguageModel, lora: Any = True) -> AdaptedLanguageModel:
    """A model with an adapter that is no longer where it begins."""
    adapted = add_lora(lm, lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def adapted_layers(model: PreTrainedModel) -> set[str]:
    names = (name for name, _ in model.named_parameters(remove_duplicate=False) if ".lora_A" in name)
    return {name.partition(".lora_A")[0] for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_the_saved_model_is_the_one_with_the_adapter_and_so_is_the_adapter_on_its_base(tmp_path, name):
    lm = language_model(name)
    base = logits(lm.model)
    torch.testing.assert_close(logits(add_lora(lm, True).model), base, atol=1e-5, rtol=0)
    adapted = moved(lm)
    trained = logits(adapted.model)
    assert (trained - base).abs().max() > 0.1
    adapted.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is type(lm.model)
    torch.testing.assert_close(logits(opened), trained, atol=2e-4, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about attributes of transformers
        on_base = PeftModel.from_pretrained(copy.deepcopy(lm.model), Path(tmp_path, "adapter"))
    torch.testing.assert_close(logits(on_base), trained, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(lm.model), base)


def test_merging_experts_equals_pefts_own_merging():
    adapted = moved(language_model("mixtral"))
    merged = adapted.merged()
    assert {type(m).__module__.partition(".")[0] for m in merged.modules()} <= {"torch", "transformers"}
    torch.testing.assert_close(logits(merged), logits(adapted.model), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "zamba2"])
def test_what_ppo_trained_is_what_it_saves(tmp_path, name):
    def longer(completions, **columns):
        return [len(text) / 20 for text in completions]

    lm = language_model(name)
    env = tiny_vector_env(4, language_model=lm, reward=longer)
    agent = tiny_ppo(env, policy_kwargs={"lora": True}, learning_rate=2e-2).learn(96)
    trained = logits(agent.policy.transformer)
    assert (trained - logits(lm.model)).abs().max() > 0.05
    agent.save_pretrained(tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(opened), trained, atol=2e-4, rtol=1e-4)
    agent.save(tmp_path / "agent")
    loaded = type(agent).load(tmp_path / "agent", device="cpu", trust=True)
    torch.testing.assert_close(logits(loaded.policy.transformer), trained, rtol=0, atol=0)


def test_blocks_that_share_weights_share_an_adapter():
    model = add_lora(language_model("zamba2"), True).model
    parts = dict(model.named_parameters(remove_duplicate=False))
    shared = [parts[f"model.layers.{i}.shared_transformer.self_attn.q_proj.lora_A.default.weight"] for i in (1, 3)]
    assert shared[0] is shared[1]


def test_layers_that_text_never_reaches_get_no_adapter():
    lm = language_model("gemma3")
    for lora in (True, {"target_modules": ["q_proj", "v_proj"]}):
        names = adapted_layers(add_lora(lm, lora).model)
        assert names
        assert all(".language_model." in name for name in names)


@pytest.mark.parametrize(("name", "layer"), [("mamba", "out_proj"), ("phimoe", "router")])
def test_layers_on_which_no_adapter_can_act_get_none_unless_they_are_asked_for(name, layer):
    lm = language_model(name)
    kinds = {path.rpartition(".")[2] for path in adapted_layers(add_lora(lm, True).model)}
    assert kinds
    assert layer not in kinds
    with pytest.raises(ValueError, match=rf"target_modules=\['{layer}'\].*{layer}"):
        add_lora(lm, {"target_modules": [layer]})


def test_what_you_leave_out_yourself_stays_left_out():
    for exclude in (["x_proj"], r".*x_proj"):
        names = adapted_layers(add_lora(language_model("mamba"), {"exclude_modules": exclude}).model)
        assert {name.rpartition(".")[2] for name in names} == {"in_proj"}
