"""Agents are saved as Stable-Baselines3 saves them, without the models of the environment, and load anywhere."""

from __future__ import annotations

import json
import shutil
import threading
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import LinearSchedule
from tiny_agents import tiny_language_model, tiny_ppo, tiny_vector_env
from tiny_models import ARCHITECTURES, tiny_causal_reward_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from textgym.agents import PPO, TrustWarning
from textgym.language_model import load_language_model
from textgym.rewards import CausalRewardModel


def trained(**options: Any) -> PPO:
    return tiny_ppo(tiny_vector_env(4, **options)).learn(48)


def observation(model: PPO) -> dict[str, np.ndarray]:
    assert model.env is not None
    obs = model.env.reset()
    assert isinstance(obs, dict)
    return obs


def assert_same_policy(one: PPO, other: PPO, obs: dict[str, np.ndarray]) -> None:
    torch.testing.assert_close(one.policy.predict_values(obs), other.policy.predict_values(obs), rtol=0, atol=0)
    logits = [m.policy.get_distribution(obs).distribution.logits for m in (one, other)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    np.testing.assert_array_equal(one.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loaded_agent_predicts_the_same_without_environment_or_model_path(tmp_path, architecture):
    source = tmp_path / "source"
    lm = tiny_language_model(architecture)
    lm.model.save_pretrained(source)
    lm.tokenizer.save_pretrained(source)
    env = tiny_vector_env(4, language_model=str(source), temperature=0.8)
    model = tiny_ppo(env, policy_kwargs={"value_head": "mlp"}).learn(48)
    model.save(tmp_path / "agent")
    shutil.rmtree(source)
    loaded = PPO.load(tmp_path / "agent", device="cpu", trust=True)
    assert_same_policy(model, loaded, observation(model))
    assert loaded.policy.temperature == 0.8
    assert loaded.num_timesteps == 48
    assert loaded.policy.language_model.encode("the film") == model.policy.language_model.encode("the film")
    assert loaded.policy.generate(["the film"], 5, seed=0) == model.policy.generate(["the film"], 5, seed=0)


def test_a_loaded_agent_learns_on_like_the_one_that_was_saved(tmp_path):
    model = trained()
    model.save(tmp_path / "agent")
    ends = []
    for agent in (model, PPO.load(tmp_path / "agent", device="cpu", trust=True)):
        agent.set_env(tiny_vector_env(4))
        agent.set_random_seed(5)
        agent.learn(96, reset_num_timesteps=False)
        assert agent.num_timesteps == 144
        ends.append(agent.policy.parameters_to_vector())
    np.testing.assert_array_equal(*ends)  # the optimizer's moments were saved, too


def test_loading_with_another_number_of_rows(tmp_path):
    model = trained()
    model.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", env=tiny_vector_env(1), device="cpu", trust=True)
    assert loaded.rollout_buffer.n_envs == 1
    loaded.learn(24)
    assert loaded.num_timesteps == 24


def test_the_file_holds_the_policy_and_nothing_of_the_environment(tmp_path):
    lock = threading.Lock()  # can't be pickled: saving would fail if it came near the reward

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        with lock:
            return [0.5] * len(completions)

    for number, phi in enumerate((reward, CausalRewardModel(tiny_causal_reward_model(), tiny_tokenizer()))):
        agent = trained(reward=phi)
        agent.save(tmp_path / f"{number}.zip")
        with zipfile.ZipFile(tmp_path / f"{number}.zip") as archive:
            data = archive.read("data").decode()
            sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert set(sizes) == {
            "data",
            "policy.pth",
            "policy.optimizer.pth",
            "pytorch_variables.pth",
            "_stable_baselines3_version",
            "system_info.txt",
        }
        parameters = sum(p.numel() for p in agent.policy.parameters())
        assert 4 * parameters <= sizes["policy.pth"] < 4 * parameters + 40_000
        assert sizes["policy.optimizer.pth"] < 8 * parameters + 80_000
        assert sizes["data"] < 60_000
        for word in ("RewardModel", "VectorEnv", "ForSequenceClassification", "PreTrainedModel"):
            assert word not in data


def test_parameters_can_be_taken_and_given(tmp_path):
    model, other = trained(), tiny_ppo(tiny_vector_env(4, language_model=tiny_language_model(seed=3)))
    obs = observation(model)
    assert set(model.get_parameters()) == {"policy", "policy.optimizer"}
    with pytest.raises(AssertionError):
        assert_same_policy(model, other, obs)
    other.set_parameters(model.get_parameters())
    assert_same_policy(model, other, obs)
    model.save(tmp_path / "agent.zip")
    third = tiny_ppo(tiny_vector_env(4, language_model=tiny_language_model(seed=4)))
    third.set_parameters(tmp_path / "agent.zip", device="cpu")
    assert_same_policy(model, third, obs)


def test_an_environment_at_another_temperature_is_refused(tmp_path):
    model = trained(temperature=0.8)
    model.save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"temperature=0.8 is not the environment's 1.0"):
        model.set_env(tiny_vector_env(4))
    with pytest.raises(ValueError, match=r"temperature=0.8 is not the environment's 1.0"):
        PPO.load(tmp_path / "agent", env=tiny_vector_env(4), device="cpu", trust=True)
    model.set_env(tiny_vector_env(4, temperature=0.8))
    model.learn(48)


# Without Qwen2: for that architecture AutoTokenizer makes a Qwen2Tokenizer of whatever tokenizer was saved.
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "qwen2"])
def test_save_pretrained_writes_what_transformers_and_textgym_open(tmp_path, architecture):
    model = trained(language_model=tiny_language_model(architecture))
    model.save_pretrained(tmp_path / "checkpoint")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    ids = tokenizer("the film is very good", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model.policy.transformer(ids).logits, rtol=0, atol=1e-6)
    again = load_language_model(str(tmp_path / "checkpoint"), device="cpu")
    env = tiny_vector_env(2, language_model=str(tmp_path / "checkpoint"))
    assert again.encode("the film") == model.policy.language_model.encode("the film")
    assert tiny_ppo(env, policy_kwargs={"language_model": str(tmp_path / "checkpoint")}).learn(24)


def test_save_pretrained_refuses_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        tiny_ppo().save_pretrained(tmp_path / "file")


def test_from_pretrained_opens_the_agent_without_its_environment(tmp_path):
    env = tiny_vector_env(4, temperature=0.8, language_model=tiny_language_model("gpt2"))
    model = tiny_ppo(env, policy_kwargs={"value_head": "mlp", "value_trunk": "detached"}, clip_range=0.1).learn(48)
    model.save_pretrained(tmp_path / "agent")
    opened = PPO.from_pretrained(tmp_path / "agent", device="cpu")
    assert_same_policy(model, opened, observation(model))
    assert (opened.num_timesteps, opened.n_steps, opened.batch_size, opened.seed) == (48, 12, 16, 0)
    assert opened.clip_range(1.0) == 0.1
    assert (opened.policy.value_head, opened.policy.value_trunk) == ("mlp", "detached")
    assert opened.policy.generate(["the film"], 5, seed=0) == model.policy.generate(["the film"], 5, seed=0)


def test_from_pretrained_learns_on_in_an_environment(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "agent")
    opened = PPO.from_pretrained(tmp_path / "agent", tiny_vector_env(2), device="cpu", n_steps=24)
    assert_same_policy(model, opened, observation(model))
    before = opened.policy.parameters_to_vector()
    opened.learn(48, reset_num_timesteps=False)
    assert opened.num_timesteps == 96
    assert not np.array_equal(before, opened.policy.parameters_to_vector())


def test_what_save_pretrained_writes_holds_no_pickle(tmp_path):
    trained().save_pretrained(tmp_path / "agent")
    endings = {path.suffix for path in (tmp_path / "agent").rglob("*") if path.is_file()}
    assert endings <= {".json", ".safetensors", ".jinja"}


def test_linear_schedules_are_stored_and_functions_must_be_given(tmp_path):
    model = tiny_ppo(learning_rate=LinearSchedule(1e-3, 0.0, 1.0), clip_range=lambda remaining: 0.1 + 0.1 * remaining)
    model.save_pretrained(tmp_path / "agent")
    with pytest.raises(ValueError, match="clip_range was the function <lambda>, .* pass clip_range="):
        PPO.from_pretrained(tmp_path / "agent", device="cpu")
    opened = PPO.from_pretrained(tmp_path / "agent", device="cpu", clip_range=0.3)
    assert opened.clip_range(1.0) == 0.3
    assert [opened.lr_schedule(remaining) for remaining in (1.0, 0.5, 0.0)] == [1e-3, 5e-4, 0.0]


def test_from_pretrained_refuses_what_is_no_agent(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no agent.json"):
        PPO.from_pretrained(tmp_path)
    (tmp_path / "agent.json").write_text("{")
    with pytest.raises(ValueError, match="is broken"):
        PPO.from_pretrained(tmp_path)
    (tmp_path / "agent.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99"):
        PPO.from_pretrained(tmp_path)
    (tmp_path / "agent.json").write_text('{"format": 1, "agent": "DQN"}')
    with pytest.raises(ValueError, match="is of the agent DQN"):
        PPO.from_pretrained(tmp_path)


def test_load_says_what_it_unpickles(tmp_path):
    trained().save(tmp_path / "agent")
    with pytest.warns(TrustWarning, match=r"agent holds pickles \(.*policy_class.*runs the code that it names"):
        PPO.load(tmp_path / "agent", device="cpu")
    with pytest.raises(ValueError, match="from_pretrained opens what"):
        PPO.load(tmp_path / "agent", device="cpu", trust=False)
    with (tmp_path / "agent.zip").open("rb") as file:
        assert PPO.load(file, device="cpu", trust=True).num_timesteps == 48


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("arguments", "tensorboard_log", "somewhere"),
        ("arguments", "device", "meta"),
        ("arguments", "policy_kwargs", {"language_model": "somewhere"}),
        ("arguments", "unknown", 1),
        ("policy", "language_model", "somewhere"),
        ("policy", "optimizer_class", "somewhere"),
    ],
)
def test_a_foreign_agent_names_nothing_that_is_for_its_user_to_say(tmp_path, section, name, value):
    trained().save_pretrained(tmp_path)
    configuration = json.loads((tmp_path / "agent.json").read_text())
    configuration[section][name] = value
    (tmp_path / "agent.json").write_text(json.dumps(configuration))
    with pytest.raises(ValueError, match=f"{name}.* not to be trusted"):
        PPO.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"format": 1}', '{"format": 1, "agent": "PPO", "policy": 3}'])
def test_a_broken_configuration_of_an_agent_is_named(tmp_path, content):
    trained().save_pretrained(tmp_path)
    (tmp_path / "agent.json").write_text(content)
    with pytest.raises(ValueError, match=r"agent\.json"):
        PPO.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("content", [b"", b"no tensors at all", None])
def test_a_broken_value_head_is_named(tmp_path, content):
    trained().save_pretrained(tmp_path)
    head = tmp_path / "value_head.safetensors"
    head.unlink() if content is None else head.write_bytes(content)
    with pytest.raises(ValueError, match=r"value_head\.safetensors is not a value head"):
        PPO.from_pretrained(tmp_path, device="cpu")


class _Marker:
    """What a pickle of a stranger may do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("opens", [load_language_model, CausalRewardModel.from_pretrained])
def test_pickled_weights_with_code_are_refused_and_nobody_is_told_how_to_run_it(tmp_path, opens):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    tiny_causal_reward_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": _Marker(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle with more in it than tensors") as caught:
        opens(str(folder))
    assert "weights_only" not in str(caught.value)
    assert not ran.exists()
