"""Adapters: only they are trained, base weights are in memory once, and nothing that shares them ever changes."""

from __future__ import annotations

import copy
import importlib.util
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_agents import logs_of_learning, tiny_env, tiny_language_model, tiny_ppo, tiny_vector_env, values_of
from tiny_kinds import opened
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from textgym.agents import PPO
from textgym.engine.shared_weights import storage
from textgym.language_model import LanguageModel, load_language_model
from textgym.lora import AdaptedLanguageModel, add_lora

IDS = torch.randint(4, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def lora_ppo(lm: LanguageModel | None = None, lora: Any = True, env: Any = None, **arguments: Any) -> PPO:
    env = env or tiny_vector_env(4, language_model=lm or tiny_language_model())
    policy_kwargs = {"lora": lora, **arguments.pop("policy_kwargs", {})}
    return tiny_ppo(env, policy_kwargs=policy_kwargs, learning_rate=2e-2, **{"n_epochs": 3, **arguments})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def base_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights that are the reference's, under its names for them."""
    return {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_weights_are_in_memory_once_and_no_update_changes_them(architecture):
    lm = tiny_language_model(architecture)
    before, expected = copy.deepcopy(lm.model.state_dict()), logits(lm.model)
    agent = lora_ppo(lm)
    base = base_weights(agent.policy.transformer)
    references = dict(lm.model.named_parameters())
    assert base.keys() == references.keys()
    for name, parameter in references.items():
        assert storage(base[name]) == storage(parameter)
        assert parameter.requires_grad
        assert not base[name].requires_grad
    torch.testing.assert_close(logits(agent.policy.transformer), expected, rtol=0, atol=0)
    logs = logs_of_learning(agent, 144)
    assert abs(values_of(logs, "rollout/kl_ref")[0]) < 1e-4
    assert abs(values_of(logs, "rollout/kl_ref")[-1]) > 1e-2
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    assert all(torch.equal(lm.model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(logits(lm.model), expected)
    assert (logits(agent.policy.transformer) - expected).abs().max() > 1e-2
    assert all(storage(base_weights(agent.policy.transformer)[n]) == storage(p) for n, p in references.items())


@pytest.mark.parametrize("trunk", ["shared", "detached"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_adapter_and_value_head_are_all_that_is_trained(head, trunk):
    agent = lora_ppo(policy_kwargs={"value_head": head, "value_trunk": trunk})
    trainable = {name for name, p in agent.policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("value_net.") for name in trainable)
    assert any("lora_A" in name for name in trainable)
    assert any(name.startswith("value_net.") for name in trainable)
    in_optimizer = [id(p) for group in agent.policy.optimizer.param_groups for p in group["params"]]
    assert sorted(in_optimizer) == sorted(id(p) for p in agent.policy.parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    agent.learn(96)
    changed = {name for name, p in agent.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable


def test_cached_steps_notice_that_the_adapter_changed():
    agent = lora_ppo()
    assert agent.env is not None
    obs = agent.env.reset()
    old = agent.policy.get_distribution(obs).distribution.logits.detach()
    agent.policy.predict_values(obs)
    with torch.no_grad():
        for name, parameter in agent.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        cached = agent.policy.get_distribution(obs).distribution.logits
    whole = agent.policy.get_distribution(obs).distribution.logits.detach()
    torch.testing.assert_close(cached, whole, atol=2e-5, rtol=0)
    assert (cached - old).abs().max() > 0.1


def test_the_default_is_all_linear_layers_but_the_output_layer():
    agent = lora_ppo()
    names = {n.split(".lora_A")[0].split(".")[-1] for n, _ in agent.policy.named_parameters() if ".lora_A" in n}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert agent.policy.lora == {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["dictionary", "LoraConfig"],
)
def test_options_and_a_config_object_mean_the_same(lora):
    agent = lora_ppo(lora=lora)
    assert agent.policy.lora == {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    shapes = {n.rsplit("self_attn.")[1]: tuple(p.shape) for n, p in agent.policy.named_parameters() if "lora_A" in n}
    assert shapes == {"q_proj.lora_A.default.weight": (4, 32), "v_proj.lora_A.default.weight": (4, 32)}


def test_single_environments_share_their_weights_with_the_policy_too():
    lm = tiny_language_model()
    agent = lora_ppo(env=tiny_env(language_model=lm), n_steps=24)
    weight = agent.policy.transformer.model.layers[0].self_attn.q_proj.base_layer.weight
    assert storage(weight) == storage(lm.model.model.layers[0].self_attn.q_proj.weight)
    agent.learn(48)


@pytest.mark.parametrize("architecture", ["bloom", "mamba", "mistral"])
def test_models_without_a_slot_cache_get_adapters_too(architecture):
    lm = opened(architecture)
    expected = logits(lm.model)
    lora = {"r": 4, "target_modules": ["in_proj", "x_proj"]} if architecture == "mamba" else True
    # Every token counts, so that there is something to learn from whatever a random model writes.
    env = tiny_vector_env(
        4, language_model=lm, reward=lambda completions, **columns: [len(c) / 20 for c in completions]
    )
    logs = logs_of_learning(lora_ppo(lm, lora, env), 96)
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    assert abs(values_of(logs, "rollout/kl_ref")[-1]) > 1e-3
    assert torch.equal(logits(lm.model), expected)


def test_adapters_of_a_bfloat16_base_are_in_fp32_and_learn():
    lm = tiny_language_model()
    lm = LanguageModel(lm.model.to(torch.bfloat16), lm.tokenizer)
    agent = lora_ppo(lm)
    dtypes = {p.dtype for p in agent.policy.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    logs = logs_of_learning(agent, 144)
    assert values_of(logs, "rollout/kl_ref")[0] == pytest.approx(0.0, abs=0.2)  # of bf16 logits, cached and whole
    assert np.isfinite(agent.policy.parameters_to_vector()).all()
    assert agent.policy.transformer.dtype == torch.bfloat16


# --- saving


# peft asks transformers for an attribute under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_save_pretrained_writes_a_merged_checkpoint_and_the_adapter_and_leaves_the_agent_as_it_was(tmp_path):
    lm = tiny_language_model()
    agent = lora_ppo(lm).learn(96)
    trained, reference = logits(agent.policy.transformer), logits(lm.model)
    weights = copy.deepcopy(agent.policy.state_dict())
    agent.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(agent.policy.transformer), trained, rtol=0, atol=0)
    assert torch.equal(logits(lm.model), reference)
    assert all(torch.equal(value, weights[name]) for name, value in agent.policy.state_dict().items())

    opened_again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(opened_again, LlamaForCausalLM)
    assert not [name for name in opened_again.state_dict() if "lora" in name]
    torch.testing.assert_close(logits(opened_again), trained, rtol=1e-4, atol=1e-4)
    assert (logits(opened_again) - reference).abs().max() > 1e-2
    assert load_language_model(tmp_path / "out").encode("the film") == lm.encode("the film")

    with_adapter = PeftModel.from_pretrained(copy.deepcopy(lm.model), tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(logits(with_adapter), trained, rtol=1e-5, atol=1e-5)
    agent.learn(48)  # and it still learns


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "opt"])  # transposed matrices; tied embeddings
def test_merged_checkpoints_of_other_architectures_equal_the_agent(tmp_path, architecture):
    agent = lora_ppo(tiny_language_model(architecture), {"r": 4, "use_rslora": True}).learn(96)
    agent.save_pretrained(tmp_path)
    opened_again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(opened_again), logits(agent.policy.transformer), rtol=1e-4, atol=1e-4)


def test_dora_begins_at_the_reference_and_merges(tmp_path):
    lm = tiny_language_model()
    agent = lora_ppo(lm, {"r": 4, "use_dora": True})
    torch.testing.assert_close(logits(agent.policy.transformer), logits(lm.model), rtol=0, atol=1e-4)
    agent.learn(96).save_pretrained(tmp_path)
    opened_again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(opened_again), logits(agent.policy.transformer), rtol=1e-4, atol=1e-4)


def assert_same(one: PPO, other: PPO) -> None:
    torch.testing.assert_close(logits(one.policy.transformer), logits(other.policy.transformer), rtol=0, atol=0)
    for (name, a), (_, b) in zip(one.policy.named_parameters(), other.policy.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_saved_agent_loads_without_environment_and_learns_on_alike(tmp_path):
    agent = lora_ppo(policy_kwargs={"value_head": "mlp"}).learn(96)
    agent.save(tmp_path / "agent")
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive, archive.open("policy.optimizer.pth") as file:
        state = torch.load(file, weights_only=True)
    trainable = [p for p in agent.policy.parameters() if p.requires_grad]
    assert len(state["state"]) == len(trainable)
    loaded = PPO.load(tmp_path / "agent", device="cpu", trust=True)
    assert_same(agent, loaded)
    assert loaded.policy.lora == agent.policy.lora
    assert isinstance(loaded.policy.language_model, AdaptedLanguageModel)
    ends = []
    for one in (agent, loaded):
        one.set_env(tiny_vector_env(4))
        one.set_random_seed(3)
        one.learn(96, reset_num_timesteps=False)
        ends.append(one.policy.parameters_to_vector())
    np.testing.assert_array_equal(*ends)


def test_an_agent_loaded_into_its_environment_shares_the_weights_again(tmp_path):
    lm = tiny_language_model()
    agent = lora_ppo(lm).learn(48)
    agent.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", env=tiny_vector_env(4, language_model=lm), device="cpu", trust=True)
    assert_same(agent, loaded)
    for name, parameter in lm.model.named_parameters():
        assert storage(base_weights(loaded.policy.transformer)[name]) == storage(parameter)


def test_loading_weights_of_another_base_leaves_the_reference_alone(tmp_path):
    agent = lora_ppo(tiny_language_model(seed=5)).learn(48)
    agent.save(tmp_path / "agent")
    lm = tiny_language_model(seed=0)
    reference = logits(lm.model)
    loaded = PPO.load(tmp_path / "agent", env=tiny_vector_env(4, language_model=lm), device="cpu", trust=True)
    assert_same(agent, loaded)
    assert torch.equal(logits(lm.model), reference)
    other = lora_ppo(lm)
    other.set_parameters(tmp_path / "agent", device="cpu")
    assert_same(agent, other)
    assert torch.equal(logits(lm.model), reference)


def test_a_copy_of_the_policy_has_an_adapter_of_its_own_and_the_same_base():
    agent = lora_ppo().learn(48)
    twin = copy.deepcopy(agent.policy)
    mine, theirs = dict(agent.policy.named_parameters()), dict(twin.named_parameters())
    assert {name for name in mine if storage(mine[name]) == storage(theirs[name])} == {
        name for name, p in mine.items() if not p.requires_grad
    }
    before = logits(twin.transformer)
    agent.learn(48)
    assert torch.equal(logits(twin.transformer), before)
    assert isinstance(twin.language_model, AdaptedLanguageModel)


def test_a_trainable_copy_is_a_plain_model_with_the_adapter_merged():
    agent = lora_ppo().learn(96)
    plain = agent.policy.language_model.trainable_copy()
    assert type(plain) is LanguageModel
    assert all(p.requires_grad for p in plain.model.parameters())
    torch.testing.assert_close(logits(plain.model), logits(agent.policy.transformer), rtol=1e-4, atol=1e-4)
    own = {storage(p) for p in plain.model.parameters()}
    assert not own & {storage(p) for p in agent.policy.parameters()}


# --- refused


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"target_modules": ["c_attn"]}, r"target_modules=\['c_attn'\] does not fit .* layers are called .*q_proj"),
        ({"rank": 4}, "lora has no option 'rank'"),
        ({"lora_alfa": 4}, "no option 'lora_alfa'; did you mean lora_alpha"),
        ({"r": 0}, "r=0 must be a whole number, at least 1"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 can't be used here"),
        ({"bias": "all"}, "bias='all' can't be used here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* can't be used here"),
        (LoraConfig(lora_dropout=0.1), "lora_dropout=0.1 can't be used here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' doesn't begin at the base model"),
        ({"init_lora_weights": False}, "init_lora_weights=False doesn't begin at the base model"),
    ],
)
def test_options_that_have_no_place_are_clear_errors(lora, match):
    with pytest.raises(ValueError, match=match):
        add_lora(tiny_language_model(), lora)


def test_something_else_than_options_is_a_clear_error():
    with pytest.raises(TypeError, match="lora=8 must be True, a dictionary"):
        add_lora(tiny_language_model(), 8)


def test_layers_that_peft_does_not_support_are_a_clear_error():
    with pytest.raises(ValueError, match="does not fit language_model=MambaForCausalLM.*out_proj"):
        add_lora(opened("mamba"), {"target_modules": ["out_proj"]})


def test_tied_embeddings_get_no_adapter():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    lm = LanguageModel(LlamaForCausalLM(config), tiny_language_model().tokenizer, "tied")
    with pytest.raises(ValueError, match="includes lm_head, whose weights .* uses in model.embed_tokens, too"):
        add_lora(lm, {"target_modules": ["q_proj", "lm_head"]})


def test_an_adapter_on_an_adapter_is_refused():
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(add_lora(tiny_language_model(), True), True)


def test_without_peft_the_error_says_how_to_get_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == "peft" else find_spec(n, *a))
    with pytest.raises(ModuleNotFoundError, match=r'pip install "textgym\[lora\]"'):
        lora_ppo()


@pytest.mark.parametrize("lora", [None, False])
def test_without_lora_there_is_no_adapter(lora):
    agent = lora_ppo(lora=lora)
    assert type(agent.policy.language_model) is LanguageModel
    assert all(p.requires_grad for p in agent.policy.parameters())
