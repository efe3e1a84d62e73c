"""TRPO: sb3-contrib's own update over segments is its update over single steps, and it learns."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import torch
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.logger import Logger
from tiny_agents import KeepRollouts, logs_of_learning, tiny_language_model, tiny_vector_env, values_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from textgym.agents import LanguageModelPolicy
from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, resume
from textgym.agents.common.exploration import Exploration
from textgym.agents.trpo import TRPO
from textgym.envs.sb3 import TextGenVecEnv

KEYS = ("policy_objective", "value_loss", "kl_divergence_loss", "explained_variance", "is_line_search_success")


def tiny_trpo(env: Any = None, **arguments: Any) -> TRPO:
    arguments = {"n_steps": 10, "cg_max_steps": 5, "seed": 0, "device": "cpu", **arguments}
    return TRPO("LanguageModelPolicy", tiny_vector_env() if env is None else env, **arguments)


def with_rollout(env: Any = None, **arguments: Any) -> TRPO:
    """An agent with a rollout that it has not learned from."""
    model = tiny_trpo(env, **arguments)
    with torch.no_grad():
        for parameter in model.policy.value_net.parameters():
            parameter.normal_(std=0.1)
    callback = model._setup_learn(1000)[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


class ForcedPolicy(LanguageModelPolicy):
    """What sb3-contrib's TRPO takes for granted of a policy: values with gradients, and nothing from a cache."""

    def get_distribution(self, obs: Any, action_masks: Any = None) -> Any:
        log_probs = self._log_distribution(self.language_model, self._forced_hidden(obs), action_masks)
        return CategoricalDistribution(int(self.action_space.n)).proba_distribution(log_probs)

    def predict_values(self, obs: Any, rows: Any = None) -> torch.Tensor:
        return self._values(self._forced_hidden(obs))


def stock_twin(model: TRPO) -> sb3_contrib.TRPO:
    """sb3-contrib's TRPO with a copy of the policy and the same rollout as single steps."""
    twin = sb3_contrib.TRPO(
        ForcedPolicy,
        TextGenVecEnv(tiny_vector_env(4)),
        learning_rate=model.learning_rate,
        n_steps=model.n_steps,
        batch_size=model.n_steps * model.n_envs,
        cg_max_steps=model.cg_max_steps,
        target_kl=model.target_kl,
        n_critic_updates=model.n_critic_updates,
        normalize_advantage=model.normalize_advantage,
        policy_kwargs={"language_model": tiny_language_model()},
        device="cpu",
    )
    policy = copy.deepcopy(model.policy)
    policy.__class__ = ForcedPolicy
    twin.policy = policy
    twin.rollout_buffer = model.rollout_buffer.as_single_steps()
    return twin


def train(model: Any) -> dict[str, Any]:
    model.set_logger(Logger(None, []))
    torch.manual_seed(5)  # conjugate gradients begin at random
    with sdpa_kernel([SDPBackend.MATH]):
        model.train()
    return dict(model.logger.name_to_value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_one_update_equals_sb3_contribs_on_single_steps(architecture, normalize_advantage):
    env = tiny_vector_env(4, language_model=tiny_language_model(architecture), temperature=0.9)
    model = with_rollout(env, normalize_advantage=normalize_advantage)
    twin, before = stock_twin(model), model.policy.parameters_to_vector()
    ours, theirs = train(model), train(twin)
    for key in KEYS:
        assert ours[f"train/{key}"] == pytest.approx(theirs[f"train/{key}"], rel=1e-2, abs=1e-5), key
    assert ours["train/is_line_search_success"] == 1
    assert 0 < ours["train/kl_divergence_loss"] < model.target_kl
    mine, other = (m.policy.parameters_to_vector() - before for m in (model, twin))
    assert np.linalg.norm(other) > 1e-2
    # fp32 through conjugate gradients: what differs is the order of summation.
    assert np.linalg.norm(mine - other) < 1e-2 * np.linalg.norm(other)


def test_attention_layers_with_value_in_their_names_are_policy_too():
    """GPT-NeoX calls the matrix of its queries, keys and values query_key_value."""
    model = with_rollout(tiny_vector_env(4, language_model=tiny_language_model("gpt_neox")))
    before = {name: p.detach().clone() for name, p in model.policy.transformer.named_parameters()}
    train(model)
    still = [name for name, p in model.policy.transformer.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in still if "weight" in name]


def test_masked_tokens_stay_out_and_the_kl_stays_small():
    env = tiny_vector_env(4, action_masking=True, top_k=6, min_new_tokens=3)
    logs = logs_of_learning(tiny_trpo(env, target_kl=0.02), 4 * 10 * 3)
    kls, found = values_of(logs, "train/kl_divergence_loss"), values_of(logs, "train/is_line_search_success")
    assert len(kls) == 3
    assert all(np.isfinite(kl) and kl < 0.02 for kl in kls)
    assert max(kls) > 0.001
    assert any(found)


def test_sub_sampling_looks_at_every_so_manyth_token():
    updates = []
    for factor in (1, 1, 3):
        model = with_rollout(sub_sampling_factor=factor)
        np.random.seed(0)  # noqa: NPY002
        before = model.policy.parameters_to_vector()
        train(model)
        updates.append(model.policy.parameters_to_vector() - before)
    np.testing.assert_array_equal(updates[0], updates[1])
    assert np.linalg.norm(updates[2] - updates[0]) > 1e-2 * np.linalg.norm(updates[0])


def test_it_learns():
    env = tiny_vector_env(16, kl_coef=0.0, action_masking=True)
    model = tiny_trpo(env, n_steps=16, cg_max_steps=4, n_critic_updates=4, target_kl=0.05)
    scores = values_of(logs_of_learning(model, 16 * 16 * 20, until=("rollout/score_mean", 0.8)), "rollout/score_mean")
    assert scores[0] < 0.4
    assert scores[-1] > scores[0] + 0.3


def test_an_adapter_is_all_that_moves():
    model = with_rollout(policy_kwargs={"lora": {"r": 2}})
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    train(model)
    moved = {name for name, p in model.policy.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora" in name for name in moved)
    assert all("lora" in name or name.startswith("value_net") for name in moved)


def test_it_is_saved_and_loaded_and_resumes_exactly(tmp_path: Path):
    def new() -> TRPO:
        return tiny_trpo(target_kl=0.02, n_critic_updates=3)

    whole, kept = new(), KeepRollouts()
    whole.learn(120, callback=kept)
    stopped = new()
    stopped.learn(40, callback=TrainingCheckpoints(tmp_path, every=10**6))
    again, kept_again = new(), KeepRollouts()
    torch.manual_seed(99)
    resume(again, tmp_path, [TrainingCheckpoints(tmp_path / "other", every=10**6)])
    again.learn(80, callback=kept_again, reset_num_timesteps=False)
    np.testing.assert_array_equal(np.stack(kept.actions[1:]), np.stack(kept_again.actions))
    np.testing.assert_array_equal(whole.policy.parameters_to_vector(), again.policy.parameters_to_vector())

    whole.save(tmp_path / "agent.zip")
    whole.save_pretrained(tmp_path / "agent")
    loaded = TRPO.load(tmp_path / "agent.zip", env=tiny_vector_env(), device="cpu", trust=True)
    opened = TRPO.from_pretrained(tmp_path / "agent", env=tiny_vector_env(), device="cpu")
    for other in (loaded, opened):
        assert (other.target_kl, other.n_critic_updates, other.cg_max_steps) == (0.02, 3, 5)
        np.testing.assert_array_equal(other.policy.parameters_to_vector(), whole.policy.parameters_to_vector())


def test_without_sb3_contrib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "textgym\[contrib\]"'):
        tiny_trpo()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"target_kl": 0.0}, "target_kl=0.0"),
        ({"cg_max_steps": 0}, "cg_max_steps=0"),
        ({"sub_sampling_factor": 0}, "sub_sampling_factor=0"),
        ({"normalize_advantage": "rollout"}, "normalize_advantage='rollout'"),
        ({"policy_kwargs": {"autocast": "bfloat16"}}, "autocast='bfloat16'"),
        ({"policy_kwargs": {"gradient_checkpointing": True}}, "gradient_checkpointing=True"),
    ],
)
def test_impossible_arguments_are_refused_by_name(arguments, named):
    with pytest.raises((TypeError, ValueError), match=named):
        tiny_trpo(**arguments)


def test_exploration_is_no_argument():
    """Tokens would have importance weights, which sb3-contrib's objective has no place for."""
    with pytest.raises(TypeError, match="exploration"):
        tiny_trpo(exploration=Exploration(temperature=1.5))
