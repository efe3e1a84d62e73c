"""Smaller types and compiled steps: what they may change, what they must not, and that agents still learn with them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_agents import logs_of_learning, tiny_language_model, tiny_ppo, tiny_vector_env, values_of
from tiny_models import tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from textgym.agents import PPO
from textgym.engine.cached_model import CachedModel
from textgym.language_model import LanguageModel

FAST: dict[str, Any] = {"autocast": "bfloat16", "rollout_dtype": "bfloat16"}


def agent(policy_kwargs: dict[str, Any], env: Any = None, **arguments: Any) -> PPO:
    return tiny_ppo(env, policy_kwargs=policy_kwargs, **{"n_epochs": 3, **arguments})


def collect(model: PPO) -> None:
    callback = model._setup_learn(10_000)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


@torch.no_grad()
def plain(model: PPO) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and values of a rollout, ``(T, N)`` each, by transformers' own forward of every prefix."""
    buffer = model.rollout_buffer
    steps = buffer.as_single_steps()
    log_probs, values = np.zeros_like(buffer.log_probs), np.zeros_like(buffer.values)
    lm = model.policy.transformer
    for step in range(buffer.buffer_size):
        for row in range(buffer.n_envs):
            length = int(steps.observations["attention_mask"][step, row].sum())
            ids = torch.as_tensor(steps.observations["input_ids"][step, row, :length][None])
            out = lm(input_ids=ids, output_hidden_states=True)
            log_probs[step, row] = out.logits[0, -1].log_softmax(-1)[int(buffer.actions[step, row, 0])]
            values[step, row] = model.policy.value_net(out.hidden_states[-1][0, -1])
    return log_probs, values


def test_what_a_bfloat16_copy_drew_is_learned_from_with_the_trained_weights():
    env = tiny_vector_env(4)
    model = agent({"rollout_dtype": "bfloat16"}, env, learning_rate=1e-2)
    model.learn(4 * 12 * 3)  # value head and weights are no longer what they were
    collect(model)
    log_probs, values = plain(model)
    np.testing.assert_allclose(model.rollout_buffer.log_probs, log_probs, atol=1e-4)
    np.testing.assert_allclose(model.rollout_buffer.values, values, atol=1e-4)
    ratio = model.rollout_buffer.importance
    assert ratio is not None
    assert 0 < np.abs(ratio - 1).max() < 0.2, "the copy is near the weights, and not the same"


def test_the_kl_is_that_of_the_trained_weights():
    model = agent(
        {"rollout_dtype": "bfloat16"},
        tiny_vector_env(4, kl_coef=1.0, reward=lambda completions: [0.0] * len(completions)),
    )
    collect(model)  # before any update the policy is the reference, whatever the copy rounds
    assert np.abs(model.rollout_buffer.rewards).max() < 1e-4


@pytest.mark.parametrize("cap", [2.0, 1.0, None])
def test_tokens_count_by_the_capped_ratio_of_their_probabilities(cap):
    model = agent({"rollout_dtype": "bfloat16"}, importance_cap=cap, learning_rate=1e-2)
    model.learn(4 * 12 * 2)
    copy_of, seen = model.policy.evaluate_segments, []
    collect(model)
    buffer = model.rollout_buffer
    if cap is None:
        assert buffer.importance is None
        return
    assert buffer.importance.max() <= cap
    batch = buffer.samples(buffer.segments)
    at = buffer.places(buffer.segments)
    np.testing.assert_array_equal(batch.importance.numpy(), buffer.importance[at])
    # The loss of a step on everything at once, by hand.
    model.batch_size, model.n_epochs, model.normalize_advantage = buffer.values.size, 1, False
    buffer.importance[:] = np.linspace(0.5, 1.0, buffer.values.size).reshape(buffer.values.shape)

    def remembering(*arguments: Any) -> Any:
        seen.append(copy_of(*arguments))
        return seen[-1]

    model.policy.evaluate_segments = remembering
    model.train()
    weights, advantages = torch.as_tensor(buffer.importance), torch.as_tensor(buffer.advantages)
    expected = -(weights * advantages).mean()  # the ratio to the old policy is 1
    assert model.logger.name_to_value["train/policy_gradient_loss"] == pytest.approx(float(expected), abs=1e-5)
    assert len(seen) == 1


def test_the_copy_follows_the_weights():
    model = agent({"rollout_dtype": "bfloat16"}, learning_rate=1e-2)
    before = model.policy.acting_model.model.get_output_embeddings().weight.clone()
    model.learn(4 * 12 * 2)
    after = model.policy.acting_model.model.get_output_embeddings().weight
    assert after.dtype == torch.bfloat16
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.policy.transformer.get_output_embeddings().weight.bfloat16())


def test_autocast_computes_in_bfloat16_and_keeps_the_weights():
    exact, cast = agent({}), agent({"autocast": "bfloat16"})
    for model in (exact, cast):
        collect(model)
    batch = exact.rollout_buffer.samples(exact.rollout_buffer.segments)
    with torch.no_grad():
        expected, got = (model.policy.evaluate_segments(batch) for model in (exact, cast))
    difference = (expected[1] - got[1]).abs().max()
    assert 0 < difference < 0.1
    assert all(p.dtype == torch.float32 for p in cast.policy.parameters())
    logs_of_learning(cast, 4 * 12)
    assert all(p.dtype == torch.float32 for p in cast.policy.parameters())


def test_a_float32_policy_starts_from_bfloat16_weights():
    env = tiny_vector_env(4, language_model=_bfloat16())
    model = agent({"dtype": "float32", **FAST}, env)
    reference = env.reference_language_model().model
    assert reference.dtype == torch.bfloat16
    assert model.policy.transformer.dtype == torch.float32
    for mine, theirs in zip(model.policy.transformer.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs.float())


def _bfloat16() -> Any:
    lm = tiny_language_model()
    return lm.with_model(lm.model.bfloat16())


def test_it_learns_in_bfloat16():
    env = tiny_vector_env(16, kl_coef=0.0, action_masking=True)
    model = agent(FAST, env, n_steps=16, batch_size=128, n_epochs=4, learning_rate=1e-2)
    scores = values_of(logs_of_learning(model, 16 * 16 * 10, until=("rollout/score_mean", 1.0)), "rollout/score_mean")
    assert np.mean(scores[:2]) < 0.5
    assert np.mean(scores[-3:]) > 1.0


def test_options_survive_saving(tmp_path):
    model = agent({**FAST, "value_head": "mlp"})
    model.learn(4 * 12)
    model.save(tmp_path / "agent.zip")
    loaded = PPO.load(tmp_path / "agent.zip", env=tiny_vector_env(4), device="cpu", trust=True)
    assert (loaded.policy.autocast, loaded.policy.rollout_dtype) == ("bfloat16", "bfloat16")
    collect(loaded)
    assert loaded.rollout_buffer.importance is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autocast": "float32"}, "autocast='float32' must be 'bfloat16'"),
        ({"rollout_dtype": "int8"}, "dtype='int8' is not a floating-point type"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing=1 must be True or False"),
        ({"compile": "yes"}, "compile='yes' must be True or False"),
        ({"dtype": "float32", "lora": True}, "dtype='float32' with lora"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        agent(options)


def test_the_fused_optimizer_takes_the_step_of_the_plain_one():
    # one after the other: both are seeded when they are made
    fused = agent({}).learn(4 * 12 * 2)
    ordinary = agent({"optimizer_kwargs": {"eps": 1e-5, "foreach": False}}).learn(4 * 12 * 2)
    assert fused.policy.optimizer.defaults["fused"]
    assert not ordinary.policy.optimizer.defaults["fused"]
    for a, b in zip(fused.policy.parameters(), ordinary.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora", [None, True])
def test_checkpointed_gradients_are_the_same_and_keep_less(lora):
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = agent({"gradient_checkpointing": checkpointing, "lora": lora})
        collect(model)
        sizes = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            batch = model.rollout_buffer.samples(model.rollout_buffer.segments)
            values, log_prob, entropy = model.policy.evaluate_segments(batch)
        kept.append(sum(sizes))
        (log_prob.sum() + values.sum() + entropy.sum()).backward()
        gradients.append([p.grad for p in model.policy.parameters() if p.grad is not None])
        assert "forward" not in vars(model.policy.transformer.base_model.layers[0] if lora is None else model.policy)
    assert kept[1] < 0.6 * kept[0]
    for plain_one, checkpointed_one in zip(*gradients, strict=True):
        torch.testing.assert_close(plain_one, checkpointed_one)


def one_layer() -> LlamaForCausalLM:
    config = tiny_model("llama").config
    config.num_hidden_layers = 1
    return LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_compiled_steps_compute_the_same():
    model = one_layer()  # a second one doubles what is translated into C++
    eager, compiled = CachedModel(model, 24), CachedModel(model, 24, compile=True)
    ids = np.random.default_rng(0).integers(4, model.config.vocab_size, (3, 24))
    lengths = np.array([2, 5, 3])
    for step in range(6):
        if step == 4:
            lengths[1] = 2  # one row begins anew
        rows = np.array([0, 1, 2]) if step != 3 else np.array([0, 2])
        got, expected = (machine.last_hidden(ids[rows], lengths[rows], rows) for machine in (compiled, eager))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        lengths[rows] += 1
    assert F.mse_loss(got, torch.zeros_like(got)) > 0


def test_compiled_learning_computes_the_same_gradients(monkeypatch):
    # Traced and differentiated as always, but not translated into C++, which takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = one_layer()
    eager, compiled = CachedModel(model, 24), CachedModel(model, 24, compile_learning=True)
    ids = np.random.default_rng(0).integers(4, model.config.vocab_size, (5, 24))
    weights = list(model.base_model.parameters())
    # Rows as long as each other, then very different ones, which are packed, in another width.
    for lengths in (np.full(5, 12), np.array([17, 3, 4, 2, 5])):
        rows = np.repeat(np.arange(5), lengths)
        positions = np.concatenate([np.arange(length) for length in lengths])
        hidden, gradients = [], []
        for machine in (eager, compiled):
            hidden.append(machine.hidden_at(ids, lengths, rows, positions))
            gradients.append(torch.autograd.grad(hidden[-1].square().sum(), weights))
        assert compiled._compiled_pass is not None
        torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert compiled.hidden_at(ids, lengths, rows, positions).equal(hidden[0].detach()), "scoring is not compiled"


def test_what_is_compiled_depends_on_what_else_the_policy_does():
    plain = tiny_ppo(policy_kwargs={"compile": False}).policy.language_model
    assert (plain._stepping.compile, plain._stepping.compile_learning) == (False, False)
    for options, decoding, learning in (
        ({}, True, True),
        ({"rollout_dtype": "bfloat16"}, False, True),
        ({"gradient_checkpointing": True}, True, False),
    ):
        policy = tiny_ppo(policy_kwargs={"compile": True, **options}).policy
        stepping = policy.language_model._stepping
        assert (stepping.compile, stepping.compile_learning) == (decoding, learning)
        acting = policy.acting_model._stepping
        assert acting.compile
        assert acting is stepping or not acting.compile_learning


def test_what_does_not_step_with_one_forward_for_all_rows_is_not_compiled_in_silence():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, pad_token_id=0))
    env = tiny_vector_env(2, language_model=LanguageModel(mamba, tiny_tokenizer(), "mine"))
    with pytest.raises(ValueError, match=r"compile=True: .*mine \(MambaForCausalLM\) is not stepped with one forward"):
        tiny_ppo(env, policy_kwargs={"compile": True})
