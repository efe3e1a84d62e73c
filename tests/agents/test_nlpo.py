"""NLPO: PPO under the nucleus of a policy that lags behind, whose log-probabilities are those it drew with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_agents import KeepRollouts, logs_of_learning, tiny_language_model, tiny_vector_env, values_of
from tiny_models import tiny_causal_reward_model, tiny_tokenizer

from textgym.action_masks import nucleus
from textgym.agents import PPO
from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, read_latest, resume
from textgym.agents.nlpo import NLPO
from textgym.rewards import CausalRewardModel

ROLLOUT = 48  # 12 steps of 4 rows


def tiny_nlpo(env: Any = None, **arguments: Any) -> NLPO:
    arguments = {"n_steps": 12, "batch_size": 16, "mask_top_p": 0.7, "seed": 0, "device": "cpu", **arguments}
    return NLPO("LanguageModelPolicy", tiny_vector_env() if env is None else env, **arguments)


def collected(model: NLPO) -> NLPO:
    """The agent with a rollout that it has not learned from."""
    callback = model._setup_learn(1000)[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def numpy_nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """``(V,)`` bool, token by token as the words of the definition go."""
    keep, total = np.zeros(len(probs), dtype=bool), 0.0
    for token in np.argsort(-probs):
        if total >= top_p:
            break
        keep[token] = True
        total += float(probs[token])
    return keep


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    logits[::2, 3:9] = -torch.inf
    probs = logits.softmax(-1)
    ours = nucleus(logits.log_softmax(-1), top_p).numpy()
    for row, row_probs in zip(ours, probs.numpy(), strict=True):
        np.testing.assert_array_equal(row, numpy_nucleus(row_probs, top_p) & (row_probs > 0))
        assert row_probs[row].sum() >= top_p - 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_log_probs_are_those_of_the_mask_policys_nucleus(architecture):
    """Whole prefixes through the plain models, softmax and masks in NumPy."""
    env = tiny_vector_env(4, language_model=tiny_language_model(architecture), temperature=0.8)
    model = tiny_nlpo(env, learning_rate=1e-2, mask_update_every=5)
    model.learn(2 * ROLLOUT)  # policy and mask policy aren't the same any more
    buffer = collected(model).rollout_buffer
    assert model.mask_policy is not None
    batch = buffer.samples(buffer.segments)
    assert batch.action_masks is not None
    differ = 0
    for i in range(len(batch.actions)):
        ids = torch.as_tensor(batch.input_ids[batch.rows[i], : batch.positions[i] + 1])[None]
        with torch.no_grad():
            lagging = model.mask_policy.language_model.model(ids).logits[0, -1].double() / 0.8
            current = model.policy.transformer(ids).logits[0, -1].double() / 0.8
        mask = numpy_nucleus(lagging.softmax(-1).numpy(), 0.7)
        differ += int((mask != numpy_nucleus(current.softmax(-1).numpy(), 0.7)).any())
        np.testing.assert_array_equal(batch.action_masks[i].numpy(), mask)
        kept = np.where(mask, current.numpy(), -np.inf)
        expected = kept[int(batch.actions[i])] - np.logaddexp.reduce(kept)
        assert float(batch.old_log_prob[i]) == pytest.approx(expected, abs=1e-4)
    assert differ > len(batch.actions) / 4  # else the mask policy might as well be the policy
    with torch.no_grad():
        _, log_prob, _ = model.policy.evaluate_segments(batch)
    torch.testing.assert_close(log_prob, batch.old_log_prob, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"action_masking": True, "min_new_tokens": 3, "temperature": 1.4}])
def test_the_ratio_is_one_in_the_first_minibatch_of_every_update(options):
    keep = KeepRollouts()
    model = tiny_nlpo(tiny_vector_env(4, **options), learning_rate=3e-3, mask_update_every=2)
    logs = logs_of_learning(model, 4 * ROLLOUT, callback=keep)
    ratios = values_of(logs, "train/ratio_first")
    assert len(ratios) == 4
    assert max(ratios) < 1e-4
    # The environment was told the masked log-probabilities: its KL is that to the whole reference.
    assert all(0 <= episode["kl"] <= -np.log(0.7) * episode["l"] + 1e-4 for episode in keep.episodes[0])
    assert np.mean([episode["kl"] for episode in keep.episodes[0]]) > 0.1


@pytest.mark.parametrize("masking", [False, True])
def test_with_top_p_one_it_is_ppo(masking):
    keeps, weights = [], []
    for algorithm, more in ((PPO, {}), (NLPO, {"mask_top_p": 1.0})):
        env = tiny_vector_env(4, action_masking=masking)
        model = algorithm("LanguageModelPolicy", env, n_steps=12, batch_size=16, seed=0, device="cpu", **more)
        keeps.append(KeepRollouts())
        model.learn(2 * ROLLOUT, callback=keeps[-1])
        weights.append(model.policy.parameters_to_vector())
    np.testing.assert_array_equal(np.stack(keeps[0].actions), np.stack(keeps[1].actions))
    np.testing.assert_array_equal(*weights)


def test_the_first_update_is_that_of_ppo_in_an_environment_with_the_references_nucleus():
    """Before any update the mask policy is the reference, whose top-p the environment can mask with."""
    weights = []
    for algorithm, options, more in ((PPO, {"top_p": 0.7}, {}), (NLPO, {}, {"mask_top_p": 0.7})):
        reward = CausalRewardModel(tiny_causal_reward_model(), tiny_tokenizer())
        env = tiny_vector_env(4, action_masking=True, kl_coef=0.0, reward=reward, **options)
        model = algorithm("LanguageModelPolicy", env, n_steps=12, batch_size=16, seed=0, device="cpu", **more)
        before = model.policy.parameters_to_vector()
        model.learn(ROLLOUT)
        weights.append(model.policy.parameters_to_vector())
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-6)
    assert np.abs(weights[0] - before).max() > 1e-4


class KeepMasks(KeepRollouts):
    """The mask policy's and the policy's weights as each rollout ended."""

    def __init__(self) -> None:
        super().__init__()
        self.lagging: list[np.ndarray] = []
        self.current: list[np.ndarray] = []

    def _on_rollout_end(self) -> None:
        super()._on_rollout_end()

        def vector(model: torch.nn.Module) -> np.ndarray:
            return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy()

        self.lagging.append(vector(self.model.mask_policy.language_model.model))  # type: ignore[attr-defined]
        self.current.append(vector(self.model.policy.transformer))  # type: ignore[attr-defined]


@pytest.mark.parametrize("every", [1, 2])
def test_the_mask_policy_catches_up_when_it_is_time_and_not_before(every):
    keep = KeepMasks()
    tiny_nlpo(learning_rate=3e-3, mask_update_every=every).learn(5 * ROLLOUT, callback=keep)
    assert len(keep.lagging) == 5
    for rollout, lagging in enumerate(keep.lagging):
        np.testing.assert_array_equal(lagging, keep.current[rollout - rollout % every])
    for earlier, later in zip(keep.current, keep.current[1:], strict=False):
        assert np.abs(earlier - later).max() > 1e-4


def test_it_learns():
    env = tiny_vector_env(16, kl_coef=0.0, action_masking=True)
    model = tiny_nlpo(
        env, n_steps=16, batch_size=128, n_epochs=2, learning_rate=5e-3, mask_top_p=0.95, mask_update_every=2
    )
    logs = logs_of_learning(model, 16 * 16 * 10, until=("rollout/score_mean", 1.2))
    scores = values_of(logs, "rollout/score_mean")
    assert scores[0] < 0.6
    assert scores[-1] > scores[0] + 0.5


def test_it_is_saved_and_loaded(tmp_path: Path):
    model = tiny_nlpo(mask_top_p=0.6, mask_update_every=3)
    model.learn(ROLLOUT)
    model.save(tmp_path / "agent.zip")
    model.save_pretrained(tmp_path / "agent")
    loaded = NLPO.load(tmp_path / "agent.zip", env=tiny_vector_env(), device="cpu", trust=True)
    opened = NLPO.from_pretrained(tmp_path / "agent", env=tiny_vector_env(), device="cpu")
    for other in (loaded, opened):
        assert (other.mask_top_p, other.mask_update_every) == (0.6, 3)
        np.testing.assert_array_equal(other.policy.parameters_to_vector(), model.policy.parameters_to_vector())
        other.learn(ROLLOUT, reset_num_timesteps=False)
        assert other.num_timesteps == 2 * ROLLOUT


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_resumed_training_equals_one_that_was_not_stopped(lora, tmp_path: Path):
    def new() -> NLPO:
        kwargs = {} if lora is None else {"lora": lora}
        return tiny_nlpo(learning_rate=3e-3, mask_update_every=3, n_epochs=1, batch_size=48, policy_kwargs=kwargs)

    whole, kept = new(), KeepMasks()
    whole.learn(6 * ROLLOUT, callback=kept)
    stopped = new()
    stopped.learn(2 * ROLLOUT, callback=TrainingCheckpoints(tmp_path, every=ROLLOUT))
    again, kept_again = new(), KeepMasks()
    torch.manual_seed(99)
    resume(again, tmp_path, [TrainingCheckpoints(tmp_path / "other", every=10**6)])
    again.learn(4 * ROLLOUT, callback=kept_again, reset_num_timesteps=False)
    np.testing.assert_array_equal(np.stack(kept.actions[2:]), np.stack(kept_again.actions))
    np.testing.assert_array_equal(np.stack(kept.lagging[2:]), np.stack(kept_again.lagging))
    np.testing.assert_array_equal(whole.policy.parameters_to_vector(), again.policy.parameters_to_vector())
    learning = {name for name, p in whole.policy.named_parameters() if p.requires_grad}
    assert set(read_latest(tmp_path)[1]["extra"]["mask_policy"]) == learning


@pytest.mark.parametrize("arguments", [{"mask_top_p": 0.0}, {"mask_top_p": 1.5}, {"mask_update_every": 0}])
def test_impossible_arguments_are_refused_by_name(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"{name}={arguments[name]}"):
        tiny_nlpo(**arguments)
