"""Models that already carry an adapter: it becomes part of the weights, and what is trained then is not lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_agents import tiny_language_model, tiny_ppo, tiny_vector_env
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from textgym.language_model import LanguageModel, load_language_model, load_vocabulary
from textgym.lora import add_lora
from textgym.rewards import CausalRewardModel
from textgym.rewards.reward_directory import open_reward

# peft asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(4, 60, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapted(base: Path) -> Any:
    """A ``PeftModel`` as supervised training leaves it, with layers that are trained as a whole."""
    config = LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"],
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    return model


@pytest.fixture
def directory(adapted: Any, tmp_path: Path) -> Path:
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def with_load_adapter(base: Path, directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(directory))
    return model


@pytest.mark.parametrize("kind", ["PeftModel", "load_adapter"])
def test_an_adapter_on_a_model_object_is_merged_and_training_it_is_saved(base, tmp_path, adapted, kind):
    if kind == "load_adapter":  # which knows no modules_to_save
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"),
        )
        adapted.save_pretrained(tmp_path / "adapter")
        adapted = with_load_adapter(base, tmp_path / "adapter")
    expected = logits(adapted)
    with pytest.warns(UserWarning, match="what peft added is now part of the weights"):
        lm = load_language_model(adapted, tokenizer=tiny_tokenizer())
    torch.testing.assert_close(logits(lm.model), expected, atol=1e-4, rtol=1e-4)
    agent = tiny_ppo(tiny_vector_env(4, language_model=lm), learning_rate=2e-2).learn(96)
    trained = logits(agent.policy.transformer)
    assert (trained - expected).abs().max() > 1e-2
    agent.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load_language_model(tmp_path / "saved").model), trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(adapted), expected, atol=0, rtol=0)


def test_a_model_whose_adapter_was_deleted_is_saved_under_its_own_names(base, tmp_path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    model = with_load_adapter(base, tmp_path / "adapter")
    model.delete_adapter("default")
    with pytest.warns(UserWarning, match="part of the weights"):
        lm = load_language_model(model, tokenizer=tiny_tokenizer())
    lm.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load_language_model(tmp_path / "saved").model), logits(tiny_model("llama")))


def test_an_adapter_on_top_of_a_merged_one_begins_at_the_merged_one_and_names_no_other_base(adapted, tmp_path):
    with pytest.warns(UserWarning, match="part of the weights"):
        lm = load_language_model(adapted, tokenizer=tiny_tokenizer())
    agent = tiny_ppo(tiny_vector_env(4, language_model=lm), policy_kwargs={"lora": True})
    torch.testing.assert_close(logits(agent.policy.transformer), logits(lm.model), atol=1e-5, rtol=0)
    agent.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"is an adapter on '.* with its adapter', which its .*json names"):
        load_language_model(tmp_path / "saved" / "adapter")


def test_an_adapter_directory_opens_on_its_base(base, directory, adapted):
    lm = load_language_model(directory)
    torch.testing.assert_close(logits(lm.model), logits(adapted), atol=1e-4, rtol=1e-4)
    assert (logits(lm.model) - logits(load_language_model(base).model)).abs().max() > 0.1
    assert lm.name == str(directory)
    assert load_vocabulary(directory).size == lm.vocab_size


def test_our_own_adapter_opens_on_its_base(base, tmp_path):
    lm = load_language_model(base)
    agent = tiny_ppo(tiny_vector_env(4, language_model=lm), policy_kwargs={"lora": True}, learning_rate=2e-2).learn(96)
    agent.save_pretrained(tmp_path / "out")
    trained = logits(agent.policy.transformer)
    assert (trained - logits(lm.model)).abs().max() > 1e-2
    torch.testing.assert_close(
        logits(load_language_model(tmp_path / "out" / "adapter").model), trained, atol=1e-4, rtol=1e-4
    )


def rewrite(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_directory_whose_base_is_unknown_is_a_clear_error(directory, tmp_path):
    rewrite(directory, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say what the adapter was trained on"):
        load_language_model(directory)
    rewrite(directory, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"is an adapter on '.*gone', which its adapter_config.json names: .*no such"):
        load_language_model(directory)
    (directory / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="adapter_config.json can't be read"):
        load_language_model(directory)


def test_an_adapter_of_another_shape_is_a_clear_error(directory, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    rewrite(directory, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is an adapter that does not fit its base model GPT2LMHeadModel"):
        load_language_model(directory)


def test_adapters_that_no_weights_can_hold_are_refused(base, adapted):
    prompt = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="carries a prompt adapter"):
        load_language_model(prompt, tokenizer=tiny_tokenizer())
    adapted.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"switched off.*merge_and_unload\(\)"):
        load_language_model(adapted, tokenizer=tiny_tokenizer())


def test_a_language_model_is_not_made_around_an_adapter(base, directory):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    inner = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).get_base_model()
    with pytest.raises(ValueError, match="carries an adapter of peft.*open it with load_language_model"):
        LanguageModel(inner, tiny_tokenizer())
    assert add_lora(tiny_language_model(), True).merged() is not None  # our own are not such models


def put_on_the_hub(folder: Path, name: str, cache: Path) -> None:
    """Write a folder into a cache of the hub, as a download leaves it there."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_adapters_and_their_bases_are_opened_by_hub_id(base, directory, adapted, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    put_on_the_hub(Path(base), "somebody/base", cache)
    rewrite(directory, base_model_name_or_path="somebody/base")
    torch.testing.assert_close(logits(load_language_model(directory).model), logits(adapted), atol=1e-4, rtol=1e-4)
    put_on_the_hub(directory, "somebody/adapter", cache)
    lm = load_language_model("somebody/adapter")
    torch.testing.assert_close(logits(lm.model), logits(adapted), atol=1e-4, rtol=1e-4)
    assert lm.name == "somebody/adapter"
    assert load_vocabulary("somebody/adapter").size == lm.vocab_size
    with pytest.raises(ValueError, match="'somebody/else' can't be opened as a language model"):
        load_language_model("somebody/else")


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # of peft, which asks the hub itself
@pytest.mark.parametrize("where", ["directory", "hub"])
def test_a_reward_model_that_is_an_adapter_scores_as_peft_does(base, tmp_path, monkeypatch, where):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    put_on_the_hub(base, "somebody/base", tmp_path / "cache")
    config = LoraConfig(r=4, init_lora_weights=False, task_type="SEQ_CLS", target_modules=["q_proj"])
    model = AutoModelForSequenceClassification.from_pretrained("somebody/base", num_labels=1)
    tuned = get_peft_model(model, config).eval()
    tuned.save_pretrained(tmp_path / "reward")
    put_on_the_hub(tmp_path / "reward", "somebody/reward", tmp_path / "cache")
    reward = open_reward(tmp_path / "reward" if where == "directory" else "somebody/reward")
    assert isinstance(reward, CausalRewardModel)
    ids = tiny_tokenizer()("the film was good <eos>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = float(tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert reward(prompts=["the film"], completions=[" was good"]) == pytest.approx([expected], abs=1e-4)
    assert reward.name == "reward"


def test_an_adapter_of_a_language_model_is_no_reward_model(base, directory):
    rewrite(directory, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="is not a trained reward model: it is an adapter of a language model"):
        open_reward(directory)
