"""What every agent has in common: it learns, is saved and opened again, resumes exactly, and its first ratio is 1.

The losses are compared with code that is not ours: Stable-Baselines3's A2C, and TRL's RLOO and GRPO on the same
numbers.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.logger import Logger
from tiny_agents import LIKED, logs_of_learning, tiny_env, tiny_language_model, tiny_vector_env, values_of

from textgym.agents import (
    A2C,
    GRPO,
    PPO,
    REINFORCE,
    RLOO,
    LanguageModelPolicy,
    TextEpisodeAlgorithm,
    TrainingCheckpoints,
)
from textgym.agents.callbacks.checkpoints import resume
from textgym.agents.common.groups import by_credit, group_relative_advantages, leave_one_out_advantages
from textgym.envs.sb3 import TextGenVecEnv
from textgym.teacher_forcing import forced_log_probs

AGENTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "a2c": (A2C, {"n_steps": 8, "learning_rate": 1e-2}),
    "reinforce": (REINFORCE, {"learning_rate": 1e-2}),
    "reinforce, mean": (REINFORCE, {"baseline": "mean", "learning_rate": 1e-2}),
    "reinforce, none": (REINFORCE, {"baseline": "none", "learning_rate": 1e-2}),
    "rloo": (RLOO, {"normalize_advantage": True, "learning_rate": 5e-3}),
    "rloo, token": (RLOO, {"credit": "token", "learning_rate": 1e-2, "episodes": 16}),
    "grpo": (GRPO, {"learning_rate": 1e-2}),
    "grpo, token": (GRPO, {"credit": "token", "learning_rate": 1e-2, "n_epochs": 2, "batch_size": 30}),
    "grpo, in the loss": (GRPO, {"kl_loss_coef": 0.05, "loss_type": "dapo", "learning_rate": 1e-2}),
    "dr_grpo": (GRPO, {"loss_type": "dr_grpo", "scale": "none", "learning_rate": 1e-2}),
}
every_agent = pytest.mark.parametrize("name", AGENTS)
EPISODIC = [name for name, (agent, _) in AGENTS.items() if issubclass(agent, TextEpisodeAlgorithm)]


def make_agent(name: str, env: Any = None, **arguments: Any) -> Any:
    agent, own = AGENTS[name]
    env = tiny_vector_env(8, kl_coef=0.05) if env is None else env
    return agent("LanguageModelPolicy", env, seed=0, device="cpu", **{**own, **arguments})


def with_rollout(model: Any) -> Any:
    """The agent with a rollout that it has not learned from."""
    model.set_logger(Logger(None, []))
    callback = model._setup_learn(1000)[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


@torch.no_grad()
def move_away(model: Any, scale: float = 0.02) -> None:
    """Some steps away from the policy that made the rollout, so that ratios are clipped here and there."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.policy.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)


# --- every agent


@every_agent
def test_it_learns(name):
    model = make_agent(name)
    scores = values_of(logs_of_learning(model, 4500, until=("rollout/score_mean", 0.75)), "rollout/score_mean")
    assert np.mean(scores[:3]) < 0.25
    assert np.mean(scores[-3:]) > 0.5
    text = " ".join(model.policy.generate(["the film is"] * 20, max_new_tokens=8, seed=0)).split()
    assert sum(word in LIKED for word in text) > len(text) / 3


@every_agent
def test_the_first_minibatch_has_ratio_one_and_no_kl_to_the_reference(name):
    model = with_rollout(make_agent(name, learning_rate=1e-8))
    batch = next(model.rollout_buffer.get())
    with torch.no_grad():
        _, log_prob, _ = model.policy.evaluate_segments(batch)
    torch.testing.assert_close(log_prob, batch.old_log_prob, rtol=0, atol=1e-4)
    if model.needs_reference:
        torch.testing.assert_close(batch.ref_log_prob, batch.old_log_prob, rtol=0, atol=1e-4)
    episodes = model.finished_episodes
    assert episodes
    assert max(abs(episode["kl"]) for episode in episodes) < 1e-4


@every_agent
def test_it_is_saved_and_opened_again(name, tmp_path):
    model = make_agent(name).learn(200)
    model.save(tmp_path / "agent.zip")
    model.save_pretrained(tmp_path / "files")
    loaded = type(model).load(tmp_path / "agent.zip", env=tiny_vector_env(8, kl_coef=0.05), trust=True)
    opened = type(model).from_pretrained(tmp_path / "files", env=tiny_vector_env(8, kl_coef=0.05), device="cpu")
    texts = model.policy.generate(["the film is"], deterministic=True)
    for other in (loaded, opened):
        assert other.policy.generate(["the film is"], deterministic=True) == texts
        for argument, value in AGENTS[name][1].items():
            assert getattr(other, argument) == value, argument
        before = other.num_timesteps
        other.learn(100, reset_num_timesteps=False)
        assert other.num_timesteps >= before + 100


@every_agent
def test_a_resumed_run_ends_with_the_same_weights(name, tmp_path):
    whole = make_agent(name)
    whole.learn(500)

    # Stopped after some rollouts, in the manner of a process that ends.
    first = make_agent(name)
    first.learn(200, callback=TrainingCheckpoints(tmp_path, every=50))
    second = make_agent(name)
    checkpoints = TrainingCheckpoints(tmp_path, every=50)
    resume(second, tmp_path, [checkpoints])
    assert 0 < second.num_timesteps <= first.num_timesteps
    second.learn(500 - second.num_timesteps, reset_num_timesteps=False, callback=checkpoints)
    assert second.num_timesteps == whole.num_timesteps
    for ours, theirs in zip(second.policy.parameters(), whole.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@every_agent
def test_rewards_scored_at_once_and_at_the_end_give_the_same_advantages(name):
    instant, deferred = (with_rollout(make_agent(name, scoring=scoring)) for scoring in ("instant", "deferred"))
    np.testing.assert_array_equal(instant.rollout_buffer.actions, deferred.rollout_buffer.actions)
    for array in ("rewards", "advantages", "returns"):
        ours, theirs = getattr(instant.rollout_buffer, array), getattr(deferred.rollout_buffer, array)
        np.testing.assert_allclose(ours, theirs, atol=1e-3 if "grpo" in name else 1e-4, err_msg=array)


def test_an_agent_may_pass_arguments_on_and_is_saved_with_all_of_them(tmp_path):
    class Own(PPO):
        def __init__(self, policy, env, patience=3, **arguments):
            self.patience = patience
            super().__init__(policy, env, **arguments)

    Own("LanguageModelPolicy", tiny_vector_env(8), patience=7, n_steps=8, vf_coef=0.3).save_pretrained(tmp_path)
    opened = Own.from_pretrained(tmp_path, env=tiny_vector_env(8), device="cpu")
    assert (opened.patience, opened.n_steps, opened.vf_coef, opened.n_epochs) == (7, 8, 0.3, 4)


# --- whole episodes


@pytest.mark.parametrize("name", EPISODIC)
def test_rollouts_are_whole_episodes(name):
    model = with_rollout(make_agent(name))
    buffer = model.rollout_buffer
    episodes = model.episodes or 8
    segments = buffer.segments
    assert sorted(segment.episode for segment in segments) == list(range(episodes))
    assert len(model.finished_episodes) == episodes
    assert sorted(e["l"] for e in model.finished_episodes) == sorted(segment.steps for segment in segments)
    assert model.num_timesteps == buffer.taken == sum(segment.steps for segment in segments)
    seen = sorted(segment.episode for batch in model.units(buffer) for segment in batch)
    assert seen == list(range(episodes))


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
@pytest.mark.parametrize("scoring", ["instant", "deferred"])
def test_the_references_log_probs_are_those_of_its_plain_forward_and_asked_for_once(kl_coef, scoring, monkeypatch):
    model = make_agent("grpo, in the loss", tiny_vector_env(8, kl_coef=kl_coef), scoring=scoring, episodes=16)
    passes = []
    for module in ("textgym.agents.common.rollout_log_probs", "textgym.envs.scoring"):
        monkeypatch.setattr(
            f"{module}.forced_log_probs", lambda *a, module=module: passes.append(module) or forced_log_probs(*a)
        )
    move_away(model)
    buffer = with_rollout(model).rollout_buffer
    # Instant scoring has stepped the reference along; without a penalty nobody has asked it yet.
    asking = (
        {"deferred": ["textgym.envs.scoring"], "instant": []}[scoring]
        if kl_coef
        else ["textgym.agents.common.rollout_log_probs"]
    )
    assert passes == asking
    reference = model.env.text_env.reference_language_model().model
    for segment in buffer.segments:
        steps = slice(segment.start, segment.start + segment.steps)
        tokens = buffer.actions[steps, segment.row, 0]
        with torch.no_grad():
            logits = reference(torch.as_tensor([*segment.prefix, *tokens])[None]).logits[0]
        plain = logits.log_softmax(-1)[len(segment.prefix) - 1 : -1][np.arange(segment.steps), tokens]
        np.testing.assert_allclose(buffer.ref_log_probs[steps, segment.row], plain, atol=1e-4)


def test_rows_that_wait_are_not_forwarded():
    model = make_agent("grpo", episodes=8)
    sizes = []
    acting = model.policy.forward

    def counted(obs, *arguments, **options):
        sizes.append(len(obs["input_ids"]))
        return acting(obs, *arguments, **options)

    model.policy.forward = counted
    with_rollout(model)
    assert sum(sizes) == model.rollout_buffer.taken
    assert sizes[-1] < 8


def test_a_round_longer_than_the_rows_fits_whatever_lengths_episodes_have():
    for seed in range(5):
        model = make_agent("rloo, token", tiny_vector_env(3, max_new_tokens=5), episodes=20)
        model.set_random_seed(seed)
        with_rollout(model)
        assert len(model.finished_episodes) == 20


def test_wrapped_and_separate_environments_are_refused():
    with pytest.raises(ValueError, match="no rounds of whole episodes"):
        REINFORCE("LanguageModelPolicy", tiny_env())
    with pytest.raises(ValueError, match="num_envs=6 must be a multiple of group_size=4"):
        RLOO("LanguageModelPolicy", tiny_vector_env(6))
    with pytest.raises(ValueError, match="episodes=4 must be a multiple of group_size=4 and at least num_envs=8"):
        GRPO("LanguageModelPolicy", tiny_vector_env(8), episodes=4)


@pytest.mark.parametrize(
    ("agent", "arguments", "message"),
    [
        (RLOO, {"group_size": 1}, "group_size=1"),
        (RLOO, {"credit": "word"}, "credit='word'"),
        (GRPO, {"loss_type": "bnpo"}, "loss_type='bnpo'"),
        (GRPO, {"scale": "std"}, "scale='std'"),
        (GRPO, {"kl_loss_coef": -1.0}, "kl_loss_coef=-1.0"),
        (GRPO, {"clip_range_high": 0.0}, "clip_range_high=0.0"),
        (REINFORCE, {"baseline": "greedy"}, "baseline='greedy'"),
        (A2C, {"gae_lambda": 2.0}, "gae_lambda=2.0"),
        (PPO, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_impossible_hyperparameters_are_named(agent, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        agent("LanguageModelPolicy", tiny_vector_env(8), **arguments)


def test_target_kl_of_an_agent_without_ratios_is_refused():
    model = make_agent("a2c")
    model.target_kl = 0.1
    with pytest.raises(ValueError, match="target_kl=0.1: the loss has no ratio"):
        model.learn(64)


# --- advantages, by hand and by TRL's formulas


def test_token_credit_compares_rewards_to_go_place_by_place():
    """Two completions of one prompt, of 3 and of 1 tokens: where the second has ended it counts as 0."""
    to_go, turns = np.array([[6.0, 5.0, 3.0], [2.0, 0.0, 0.0]]), np.array([[0, 0, 0], [0, -1, -1]])
    worth, decided = by_credit(to_go, turns, "token")
    expected = [[4.0, 5.0, 3.0], [-4.0, -5.0, -3.0]]
    np.testing.assert_allclose(leave_one_out_advantages(worth, 2), expected)
    np.testing.assert_array_equal(decided, [[0, 1, 2]] * 2)
    for credit in ("completion", "turn"):  # there is one turn
        worth, decided = by_credit(to_go, turns, credit)
        np.testing.assert_allclose(leave_one_out_advantages(worth, 2), [[4.0], [-4.0]])
        np.testing.assert_array_equal(decided, 0)


def test_turn_credit_compares_rewards_to_go_turn_by_turn():
    """Three completions of 3, 1 and 2 turns; turns that a completion has not got count as 0."""
    turns = np.array([[0, 0, 1, 2], [0, 0, -1, -1], [0, 1, 1, -1]])
    to_go = np.array([[6.0, 5.0, 3.0, 1.0], [2.0, 1.0, 0.0, 0.0], [4.0, 8.0, 7.0, 0.0]])
    worth, decided = by_credit(to_go, turns, "turn")
    np.testing.assert_array_equal(worth, [[6, 3, 1], [2, 0, 0], [4, 8, 0]])
    np.testing.assert_array_equal(decided[turns >= 0], turns[turns >= 0])
    np.testing.assert_allclose(leave_one_out_advantages(worth, 3), [[3, -1, 1], [-3, -5.5, -0.5], [0, 6.5, -0.5]])
    means, deviation = np.array([4.0, 11 / 3, 1 / 3]), 2.0
    expected = (worth - means) / (deviation + 1e-4)
    np.testing.assert_allclose(group_relative_advantages(worth, to_go[:, 0], 3), expected)


def test_rewards_to_go_are_those_of_the_buffer():
    model = with_rollout(make_agent("rloo, token", gamma=0.9))
    segments, to_go = model.rewards_to_go(model.rollout_buffer)
    for row, segment in enumerate(segments):
        rewards = model.rollout_buffer.rewards[segment.start : segment.start + segment.steps, segment.row]
        for t in range(segment.steps):
            assert to_go[row, t] == pytest.approx(sum(0.9**k * r for k, r in enumerate(rewards[t:])), abs=1e-6)
        assert (to_go[row, segment.steps :] == 0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_trls(scale):
    """The statements of GRPOTrainer and RLOOTrainer that make advantages, on rewards of 6 groups of 4."""
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    grouped = rewards.view(-1, 4)
    relative = rewards - grouped.mean(1).repeat_interleave(4)
    if scale == "group":
        relative = relative / (grouped.std(1).repeat_interleave(4) + 1e-4)
    elif scale == "batch":
        relative = relative / (rewards.std() + 1e-4)
    ours = rewards.numpy()[:, None].astype(np.float64)
    np.testing.assert_allclose(group_relative_advantages(ours, ours[:, 0], 4, scale)[:, 0], relative, rtol=1e-5)
    left_out = rewards - ((grouped.sum(1, keepdim=True) - grouped) / 3).view(-1)
    np.testing.assert_allclose(leave_one_out_advantages(ours, 4)[:, 0], left_out, rtol=1e-4, atol=1e-6)


# --- losses, by code that isn't ours


class _Accelerator:
    num_processes = 1

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def trl_inputs(model: Any, batch: Any) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The minibatch as TRL's trainers have it, rows of completions, and log-probabilities and entropies likewise.

    They come from a plain forward of the transformers model over each text.
    """
    number, width = len(batch.episodes), int(np.bincount(batch.rows).max())
    log_probs, entropies = torch.zeros(number, width), torch.zeros(number, width)
    mask, old, ref = torch.zeros(number, width), torch.zeros(number, width), torch.zeros(number, width)
    advantages = torch.zeros(number)
    for row in range(number):
        which = np.flatnonzero(batch.rows == row)
        ids = torch.as_tensor(batch.input_ids[row, : batch.lengths[row]])[None]
        logits = model.policy.transformer(ids).logits[0, batch.positions[which]]
        distribution = torch.distributions.Categorical(logits=logits / model.policy.temperature)
        count = len(which)
        log_probs[row, :count] = distribution.log_prob(batch.actions[which])
        entropies[row, :count] = distribution.entropy()
        mask[row, :count] = 1
        old[row, :count] = batch.old_log_prob[which]
        if batch.ref_log_prob is not None:
            ref[row, :count] = batch.ref_log_prob[which]
        advantages[row] = batch.advantages[which[0]]
    inputs = {
        "prompt_ids": torch.zeros(number, 1, dtype=torch.long),
        "prompt_mask": torch.ones(number, 1),
        "completion_ids": torch.zeros(number, width, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "old_logps": old.sum(1),
        "num_items_in_batch": mask.sum(),
    }
    return inputs, (log_probs, entropies)


def trl_loss(trainer: type[Any], model: Any, batch: Any, **settings: Any) -> torch.Tensor:
    """The loss that a trainer of TRL computes, by its own method on a stand-in for the trainer."""
    inputs, (log_probs, entropies) = trl_inputs(model, batch)
    trainer_like = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, entropies, None),
        aux_loss_enabled=False,
        accelerator=_Accelerator(),
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        _entropy_bonus_enabled=False,
        max_completion_length=8,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        **settings,
    )
    return trainer._compute_loss(trainer_like, None, inputs)


def assert_same_gradients(model: Any, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-6)
    parameters = list(model.policy.transformer.parameters())
    our_gradients = torch.autograd.grad(ours, parameters, allow_unused=True)
    their_gradients = torch.autograd.grad(theirs, parameters, allow_unused=True)
    scale = max(float(g.abs().max()) for g in their_gradients if g is not None)
    assert scale > 1e-4
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl_loss_coef", [0.0, 0.3])
def test_the_loss_of_grpo_is_trls(loss_type, kl_loss_coef):
    from trl import GRPOTrainer

    arguments = {"loss_type": loss_type, "kl_loss_coef": kl_loss_coef, "clip_range": 0.1, "clip_range_high": 0.2}
    model = with_rollout(make_agent("grpo", tiny_vector_env(8, kl_coef=0.0), **arguments))
    move_away(model)
    batch = next(model.rollout_buffer.get())
    theirs = trl_loss(
        GRPOTrainer, model, batch, loss_type=loss_type, beta=kl_loss_coef, epsilon_low=0.1, epsilon_high=0.2
    )
    loss = model.loss(batch)
    assert 0.05 < loss.figures["clip_fraction"] < 0.95
    assert_same_gradients(model, loss.value, theirs)


def test_the_loss_of_rloo_is_trls():
    from trl import RLOOTrainer

    model = with_rollout(make_agent("rloo", clip_range=0.2, normalize_advantage=False))
    move_away(model, scale=0.01)
    batch = next(model.rollout_buffer.get())
    theirs = trl_loss(RLOOTrainer, model, batch, epsilon_low=0.2, epsilon_high=0.2)
    loss = model.loss(batch)
    assert 0.05 < loss.figures["clip_fraction"] < 0.95
    assert_same_gradients(model, loss.value, theirs)


@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_one_update_equals_stock_a2c(normalize_advantage):
    model = with_rollout(make_agent("a2c", ent_coef=0.01, vf_coef=0.5, normalize_advantage=normalize_advantage))
    twin = sb3.A2C(
        LanguageModelPolicy,
        TextGenVecEnv(tiny_vector_env(8)),
        learning_rate=model.learning_rate,
        n_steps=model.n_steps,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=model.max_grad_norm,
        use_rms_prop=False,
        normalize_advantage=normalize_advantage,
        policy_kwargs={"language_model": tiny_language_model()},
        device="cpu",
    )
    twin.policy = copy.deepcopy(model.policy)
    twin.rollout_buffer = model.rollout_buffer.as_single_steps()
    twin.set_logger(Logger(None, []))
    twin.train()
    model.train()
    ours, theirs = model.logger.name_to_value, twin.logger.name_to_value
    for key in ("policy_loss", "value_loss", "entropy_loss", "explained_variance", "n_updates"):
        assert ours[f"train/{key}"] == pytest.approx(theirs[f"train/{key}"], rel=2e-5, abs=1e-6), key
    for mine, other in zip(model.policy.parameters(), twin.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-2 * model.learning_rate)


def test_reinforce_is_the_gradient_of_the_return():
    """Against a loop over the tokens of each episode with plain forwards."""
    model = with_rollout(make_agent("reinforce, none"))
    batch = next(model.rollout_buffer.get())
    total, count = torch.zeros(()), 0
    for segment in model.rollout_buffer.segments:
        ids = list(segment.prefix)
        rewards = model.rollout_buffer.rewards[segment.start : segment.start + segment.steps, segment.row]
        for t in range(segment.steps):
            action = int(model.rollout_buffer.actions[segment.start + t, segment.row, 0])
            logits = model.policy.transformer(torch.tensor([ids])).logits[0, -1]
            total = total - float(rewards[t:].sum()) * logits.log_softmax(-1)[action]
            ids.append(action)
            count += 1
    assert_same_gradients(model, model.loss(batch).value, total / count)
