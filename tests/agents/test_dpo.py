"""DPO: pairs by the environment's reward without its KL, TRL's loss, and rollouts of the reference or of the policy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_agents import KeepRollouts, logs_of_learning, tiny_language_model, tiny_ppo, tiny_vector_env, values_of
from tiny_models import PAD, WORDS, tiny_causal_reward_model, tiny_tokenizer

from textgym.agents import TextEnvironment
from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, resume
from textgym.agents.common.exploration import Exploration
from textgym.agents.dpo import DPO
from textgym.rewards import CausalRewardModel


def causal_reward() -> CausalRewardModel:
    """One that hardly ever scores two texts the same."""
    return CausalRewardModel(tiny_causal_reward_model(), tiny_tokenizer())


def tiny_dpo(env: Any = None, **arguments: Any) -> DPO:
    arguments = {"group_size": 3, "episodes": 9, "beta": 0.3, "seed": 0, "device": "cpu", **arguments}
    env = tiny_vector_env(reward=causal_reward()) if env is None else env
    return DPO("LanguageModelPolicy", env, **arguments)


def collect(model: DPO) -> DPO:
    """The agent with a rollout that it has not learned from."""
    callback = model._setup_learn(1000)[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def moved(model: DPO) -> DPO:
    """The agent with a policy some way from the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


# Pairs


@pytest.mark.parametrize("scoring", ["deferred", "instant"])
@pytest.mark.parametrize("kl_coef", [0.0, 5.0])
def test_pairs_are_the_best_and_the_worst_by_the_reward_without_the_kl(scoring, kl_coef):
    env = tiny_vector_env(4, reward=causal_reward(), kl_coef=kl_coef, missing_eos_penalty=0.7)
    model = moved(tiny_dpo(env, offline=False, scoring=scoring))
    buffer = collect(model).rollout_buffer
    lm = model.policy.language_model
    pairs = model.units(buffer)
    assert len(pairs) == 3
    by_number = {segment.episode: segment for segment in buffer.segments}
    for group, pair in enumerate(pairs):
        paid = {}
        for number in range(3 * group, 3 * group + 3):
            segment = by_number[number]
            completion = buffer.actions[segment.start : segment.start + segment.steps, segment.row, 0]
            whole = torch.as_tensor(np.concatenate([segment.prefix, completion]))[None]
            scores = [
                tiny_causal_reward_model()(ids, attention_mask=torch.ones_like(ids)).logits.item()
                for ids in (whole, whole[:, : len(segment.prefix)])
            ]
            paid[number] = scores[0] - scores[1] - 0.7 * (completion[-1] != lm.eos_token_id)
        assert [segment.episode for segment in pair] == [max(paid, key=paid.get), min(paid, key=paid.get)]  # type: ignore[arg-type]


def test_completions_that_are_paid_the_same_are_no_pair():
    def flat(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    model = tiny_dpo(tiny_vector_env(4, reward=flat, kl_coef=0.5), learning_rate=1e-2, offline=False)
    before = moved(model).policy.parameters_to_vector()
    logs = logs_of_learning(model, 100)
    np.testing.assert_array_equal(before, model.policy.parameters_to_vector())
    assert set(values_of(logs, "rollout/pair_share")) == {0.0}
    assert len(model.units(collect(tiny_dpo(min_margin=1e6)).rollout_buffer)) == 0


# The loss


def trl_trainer(model: DPO, tmp_path: Path, **options: Any) -> Any:
    """The real DPOTrainer of TRL, with copies of the policy and of the reference."""
    from trl import DPOConfig, DPOTrainer

    row = {"prompt": "the film is", "chosen": " good", "rejected": " bad"}
    arguments = DPOConfig(
        output_dir=str(tmp_path), beta=model.beta, report_to="none", use_cpu=True, bf16=False, **options
    )
    return DPOTrainer(
        copy.deepcopy(model.policy.transformer),
        ref_model=copy.deepcopy(model._reference(TextEnvironment(model.env)).model),  # type: ignore[arg-type]
        args=arguments,
        train_dataset=Dataset.from_list([row]),
        processing_class=tiny_tokenizer(),
    )


def trl_inputs(model: DPO, pairs: list[Any]) -> dict[str, torch.Tensor]:
    """The pairs as TRL has them: chosen ones, then rejected ones."""
    buffer = model.rollout_buffer
    segments = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    width = max(len(s.prefix) + s.steps for s in segments)
    ids = torch.full((len(segments), width), PAD)
    attended, completed = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, s in enumerate(segments):
        end = len(s.prefix) + s.steps
        ids[row, : len(s.prefix)] = torch.as_tensor(s.prefix)
        ids[row, len(s.prefix) : end] = torch.as_tensor(buffer.actions[s.start : s.start + s.steps, s.row, 0])
        attended[row, :end], completed[row, len(s.prefix) : end] = 1, 1
    return {"input_ids": ids, "attention_mask": attended, "completion_mask": completed}


# TRL calls things by names that transformers will give up.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_gradients_and_figures_are_those_of_trls_trainer(smoothing, tmp_path: Path):
    model = collect(moved(tiny_dpo(label_smoothing=smoothing)))
    pairs = model.units(model.rollout_buffer)
    assert len(pairs) == 3
    if smoothing:
        # TRL has the conservative loss inside "aot_unpaired" only, where pairs are sorted: alone, one stays as it is.
        pairs = pairs[:1]
    ours = model.loss(model.rollout_buffer.samples([segment for pair in pairs for segment in pair]))
    ours.value.backward()

    options = {"loss_type": ["aot_unpaired"], "label_smoothing": smoothing} if smoothing else {}
    trainer = trl_trainer(model, tmp_path, **options)
    twin = trainer.model.eval()
    loss = trainer._compute_loss(twin, trl_inputs(model, pairs), False)
    loss.backward()
    assert ours.value.item() == pytest.approx(loss.item(), rel=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert ours.figures[name].item() == pytest.approx(trainer._metrics["eval"][name][0], rel=1e-3, abs=1e-5), name
    for name in ("logps/chosen", "logps/rejected"):
        assert ours.figures[name].item() == pytest.approx(trainer._metrics["eval"][name][0], rel=1e-4), name
    grads = dict(model.policy.transformer.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in twin.parameters())
    assert scale > 1e-2
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, rtol=1e-3, atol=1e-4 * scale)


def test_at_the_reference_the_loss_is_log_two_whatever_the_smoothing():
    for smoothing in (0.0, 0.3):
        logs = logs_of_learning(tiny_dpo(label_smoothing=smoothing, learning_rate=0.0), 40)
        assert values_of(logs, "train/loss")[0] == pytest.approx(np.log(2), abs=1e-4)


def test_a_minibatch_has_whole_pairs():
    model = collect(tiny_dpo(group_size=2, episodes=8, batch_size=10))
    batches = list(model._minibatches(model.rollout_buffer))
    assert len(batches) > 1
    for batch in batches:
        first, second = batch.episodes[::2] // 2, batch.episodes[1::2] // 2
        np.testing.assert_array_equal(first, second)


# Offline and online


def test_offline_completions_are_the_references_whatever_the_policy_has_learned():
    actions, log_probs = [], []
    for learning_rate in (0.0, 3e-2):
        keep = KeepRollouts()
        model = tiny_dpo(learning_rate=learning_rate)
        model.learn(120, callback=keep)
        actions.append(np.concatenate([a.ravel() for a in keep.actions]))
        log_probs.append((model.rollout_buffer.log_probs, model.rollout_buffer.ref_log_probs))
        assert all(abs(e["kl"]) < 1e-4 for rollout in keep.episodes for e in rollout)
    np.testing.assert_array_equal(actions[0], actions[1])
    for drawn, reference in log_probs:
        np.testing.assert_allclose(drawn, reference, atol=1e-4)


def test_online_completions_are_the_policys():
    actions = []
    for learning_rate in (0.0, 3e-2):
        keep = KeepRollouts()
        tiny_dpo(learning_rate=learning_rate, offline=False).learn(120, callback=keep)
        actions.append(keep.actions)
    np.testing.assert_array_equal(actions[0][0], actions[1][0])
    assert not np.array_equal(actions[0][1], actions[1][1])


def even_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Which share of eight words are every other one of the vocabulary; the reference writes many of them."""
    return [sum(word in WORDS[::2] for word in text.split()) / 8 for text in completions]


@pytest.mark.parametrize("offline", [True, False])
def test_it_learns(offline):
    env = tiny_vector_env(16, reward=even_words, kl_coef=0.0, action_masking=True)
    arguments = {"group_size": 4, "episodes": 32, "n_epochs": 2, "batch_size": 64, "beta": 0.05}
    model = tiny_dpo(env, learning_rate=2e-3, offline=offline, **arguments)

    def score() -> float:
        texts = model.policy.generate(["the film is", "this"] * 50, max_new_tokens=8, seed=1)
        return float(np.mean(even_words([], texts)))

    before = score()
    logs = logs_of_learning(model, 3_000)
    accuracies = values_of(logs, "train/rewards/accuracies")
    assert np.mean(accuracies[-3:]) > 0.6
    assert score() > before + 0.15


# Saving


def test_it_is_saved_and_loaded(tmp_path: Path):
    model = tiny_dpo(label_smoothing=0.1, min_margin=0.01, offline=False)
    model.learn(50)
    model.save(tmp_path / "agent.zip")
    model.save_pretrained(tmp_path / "agent")
    loaded = DPO.load(tmp_path / "agent.zip", env=tiny_vector_env(), device="cpu", trust=True)
    opened = DPO.from_pretrained(tmp_path / "agent", env=tiny_vector_env(), device="cpu")
    for other in (loaded, opened):
        kept = (other.group_size, other.beta, other.label_smoothing, other.offline, other.min_margin)
        assert kept == (3, 0.3, 0.1, False, 0.01)
        np.testing.assert_array_equal(other.policy.parameters_to_vector(), model.policy.parameters_to_vector())
        steps = other.num_timesteps
        other.learn(1, reset_num_timesteps=False)
        assert other.num_timesteps > steps


@pytest.mark.parametrize("offline", [True, False])
def test_a_resumed_training_equals_one_that_was_not_stopped(offline, tmp_path: Path):
    def new() -> DPO:
        env = tiny_vector_env(reward=causal_reward(), language_model=tiny_language_model())
        return tiny_dpo(env, learning_rate=3e-3, offline=offline)

    whole, kept = new(), KeepRollouts()
    whole.learn(200, callback=kept)
    stopped = new()
    stopped.learn(80, callback=TrainingCheckpoints(tmp_path, every=10**6))
    again, kept_again = new(), KeepRollouts()
    torch.manual_seed(99)
    resume(again, tmp_path, [TrainingCheckpoints(tmp_path / "other", every=10**6)])
    again.learn(200 - again.num_timesteps, callback=kept_again, reset_num_timesteps=False)
    left = len(kept_again.actions)
    assert 0 < left < len(kept.actions)
    np.testing.assert_array_equal(np.stack(kept.actions[-left:]), np.stack(kept_again.actions))
    np.testing.assert_array_equal(whole.policy.parameters_to_vector(), again.policy.parameters_to_vector())


@pytest.mark.parametrize(
    "arguments", [{"beta": 0.0}, {"label_smoothing": 0.6}, {"group_size": 1}, {"offline": "yes"}, {"min_margin": -1.0}]
)
def test_impossible_arguments_are_refused_by_name(arguments):
    name = next(iter(arguments))
    with pytest.raises((TypeError, ValueError), match=f"{name}={arguments[name]!r}"):
        tiny_dpo(**arguments)


def test_stored_pairs_are_refused_in_memory_too():
    rows = [{"prompt": "the film", "chosen": "good", "rejected": "bad"}]
    with pytest.raises(ValueError, match="not from stored ones: learn a reward from those"):
        tiny_dpo(tiny_vector_env(prompts=rows))
    agent = tiny_dpo(tiny_vector_env())
    with pytest.raises(ValueError, match="not from stored ones"):
        agent.set_env(tiny_vector_env(prompts=rows))
    tiny_ppo(tiny_vector_env(prompts=rows))


def test_a_dtype_for_acting_is_refused_where_the_policy_does_not_act():
    with pytest.raises(ValueError, match="rollout_dtype='bfloat16' is what the policy acts in"):
        tiny_dpo(policy_kwargs={"rollout_dtype": "bfloat16"})


def test_exploration_is_refused_where_the_policy_does_not_draw():
    with pytest.raises(ValueError, match="exploration=.* changes what the policy draws"):
        tiny_dpo(exploration=Exploration(temperature=1.5))
    tiny_dpo(offline=False, exploration=Exploration(temperature=1.5)).learn(50)
