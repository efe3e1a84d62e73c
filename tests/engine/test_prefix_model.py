"""Models of any kind are stepped exactly: in groups or by whole prefixes where need be; others are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny_agents import PROMPTS, count_liked, logs_of_learning, tiny_ppo, tiny_vector_env, values_of
from tiny_kinds import FAST, GROUPED, IDS, LLAMA_SHAPE, SLOW, WINDOW, WINDOWED, build, opened
from tiny_models import CONTEXT, VOCABULARY, tiny_tokenizer
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    PreTrainedModel,
)

from textgym.engine.cached_model import CachedModel
from textgym.engine.grouped_model import GroupedModel
from textgym.engine.prefix_model import PrefixModel
from textgym.generation import complete
from textgym.language_model import LanguageModel
from textgym.vocabulary import context_limit, position_limit


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: np.ndarray, length: int) -> Tensor:
    """Next-token logits ``(V,)`` after ``length`` tokens of one row, from transformers' forward of these alone."""
    return model(input_ids=torch.as_tensor(ids[None, :length]), use_cache=False).logits[0, -1]


def machine_of(name: str) -> type[CachedModel]:
    return GroupedModel if name in GROUPED else PrefixModel if name in SLOW else CachedModel


@pytest.mark.parametrize("name", [*GROUPED, *SLOW, *WINDOWED, *FAST])
def test_steps_and_teacher_forced_rows_equal_the_plain_forward_of_each_prefix(name):
    lm, rng = opened(name), np.random.default_rng(0)
    model, machine = lm.model, lm.cached(24)
    assert type(machine) is machine_of(name)
    ids, lengths = rng.integers(4, len(VOCABULARY), (4, 24)), np.array([9, 1, 4, 16])
    for step in range(8):
        stepped = lm.head(machine.last_hidden(ids, lengths))
        forced = lm.head(machine.hidden_states(torch.as_tensor(ids)))[range(4), lengths - 1].detach()
        for row, length in enumerate(lengths.tolist()):
            expected = plain_logits(model, ids[row], length)
            torch.testing.assert_close(stepped[row], expected, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(forced[row], expected, atol=2e-5, rtol=1e-5)
        lengths = lengths + 1
        if step == 4:  # one row ended and another began
            ids[2], lengths[2] = rng.integers(4, len(VOCABULARY), 24), 3


@pytest.mark.parametrize("name", [*GROUPED, *SLOW, *WINDOWED])
def test_gradients_equal_those_of_the_plain_forward(name):
    lm, rng = opened(name), np.random.default_rng(1)
    ids, lengths = rng.integers(4, len(VOCABULARY), (3, 20)), np.array([20, 7, 13])
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    hidden = lm.cached(24).hidden_states(torch.as_tensor(ids))[range(3), lengths - 1]
    got = torch.autograd.grad(lm.head(hidden).square().sum(), parameters)
    losses = [
        lm.model(input_ids=torch.as_tensor(row[None, :length]), use_cache=False).logits[0, -1].square().sum()
        for row, length in zip(ids, lengths, strict=True)
    ]
    expected = torch.autograd.grad(sum(losses), parameters)
    assert max(float(g.abs().max()) for g in got) > 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SLOW)
def test_the_warning_names_model_and_reason_and_comes_once_for_a_model_and_its_copies(name):
    lm = LanguageModel(build(name), tiny_tokenizer(), "mine")
    with pytest.warns(
        UserWarning, match=r"language_model=mine: .*exact but slow: (with a cache|with a state it forgets)"
    ):
        lm.cached(10)
    lm.cached(24)  # warnings are errors
    lm.trainable_copy().cached(10)


@pytest.mark.parametrize("name", WINDOWED)
def test_rows_longer_than_a_window_are_stepped_with_the_cache(name):
    lm = LanguageModel(build(name), tiny_tokenizer())
    assert type(lm.cached(WINDOW)) is type(lm.cached(20)) is CachedModel  # warnings are errors
    assert context_limit(lm.model.config) == WINDOW
    assert position_limit(lm.model.config) == lm.vocabulary.context_limit == CONTEXT
    with pytest.raises(ValueError, match=rf"context={CONTEXT + 1} tokens is more than .* \({CONTEXT}\)"):
        lm.cached(CONTEXT + 1)


def test_a_window_that_is_not_where_the_configuration_says_is_noticed():
    lm = LanguageModel(build("gemma3"), tiny_tokenizer())
    lm.model.config.layer_types = ["full_attention", "sliding_attention"]
    for layer in lm.model.model.layers:  # attends to a token less than the window that the configuration names
        attend = layer.self_attn.forward
        layer.self_attn.forward = partial(shorter_window, attend)
    with pytest.warns(UserWarning, match="exact but slow: with a cache of keys and values its logits differ by"):
        assert isinstance(lm.cached(20), PrefixModel)


def shorter_window(attend: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
    if attention_mask is not None and options.get("past_key_values") is None and attention_mask.shape[2] > 1:
        attention_mask = attention_mask & ~torch.ones_like(attention_mask).tril(-1)
    return attend(hidden_states=hidden_states, attention_mask=attention_mask, **options)


@pytest.fixture
def forwards(request):
    """An opened model and the shapes of what goes through its trunk."""
    lm, shapes = opened(request.param), []
    lm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return lm, shapes


@pytest.mark.parametrize("forwards", ["openai-gpt"], indirect=True)
def test_rows_seen_before_and_weights_unchanged_cost_nothing(forwards):
    lm, shapes = forwards
    ids, lengths = np.random.default_rng(0).integers(4, 60, (3, 24)), np.array([5, 9, 2])
    first = lm.cached(24).last_hidden(ids, lengths).clone()
    assert torch.equal(lm.cached(24).last_hidden(ids[[1]], lengths[[1]], np.array([1])), first[[1]])
    assert shapes == [(3, 9)]
    lm.cached(24).last_hidden(ids, lengths + np.array([0, 1, 0]))
    assert shapes == [(3, 9), (1, 10)]
    with torch.no_grad():
        lm.model.transformer.h[0].mlp.c_fc.weight.mul_(2.0)
    assert (lm.cached(24).last_hidden(ids, lengths) - first).abs().max() > 1e-3


@pytest.mark.parametrize("forwards", ["bloom", "gpt_neo"], indirect=True)
def test_rows_of_the_same_length_step_together_and_each_token_is_forwarded_once(forwards):
    lm, shapes = forwards
    ids, lengths = np.random.default_rng(0).integers(4, 60, (4, 24)), np.array([5, 9, 5, 2])
    machine = lm.cached(24)
    machine.last_hidden(ids, lengths)
    assert sorted(shapes) == [(1, 2), (1, 9), (2, 5)]
    for step in range(1, 4):
        machine.last_hidden(ids, lengths + step)
    assert sorted(shapes[3:]) == [(1, 1)] * 6 + [(2, 1)] * 3
    ids[3] = ids[1]  # begins as another row does, whose keys and values are copied
    del shapes[:]
    machine.last_hidden(ids, np.array([8, 12, 8, 11]))
    assert shapes == [(1, 1)]


@pytest.mark.parametrize("forwards", ["mamba", "mamba2"], indirect=True)
def test_states_step_together_and_each_token_is_forwarded_once(forwards):
    lm, shapes = forwards
    ids, lengths = np.random.default_rng(0).integers(4, 60, (4, 24)), np.array([5, 9, 5, 1])
    machine = lm.cached(24)
    machine.last_hidden(ids, lengths)
    assert sorted(shapes) == [(1, 1), (1, 9), (2, 5)]
    machine.last_hidden(ids[[1, 3]], lengths[[1, 3]] + 1, np.array([1, 3]))
    machine.last_hidden(ids, lengths + 1)
    assert shapes[3:] == [(2, 1), (2, 1)]
    del shapes[:]
    machine.last_hidden(ids, np.array([6, 11, 5, 5]))  # a row is cut shorter, another several tokens longer
    assert sorted(shapes) == [(1, 1), (2, 5)]


def test_a_small_budget_changes_nothing(monkeypatch):
    lm = opened("bloom")
    ids, lengths = np.random.default_rng(0).integers(4, 60, (5, 20)), np.array([20, 3, 11, 2, 17])
    expected = lm.cached(24).last_hidden(ids, lengths).clone()
    monkeypatch.setattr("textgym.engine.cached_model.PREFILL_TOKENS", 25)
    for machine in (PrefixModel, GroupedModel):
        assert (machine(lm.model, 20).last_hidden(ids, lengths) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["mamba", "bloom", "mistral", "openai-gpt"])
def test_deterministic_completions_equal_those_of_generate(name):
    lm = opened(name)
    prompts = [[5, 6, 7], [20, 21], [30, 31, 32, 33, 34, 35]]
    for prompt, completion in zip(prompts, complete(lm, prompts, 12, deterministic=True), strict=True):
        ids = torch.tensor([prompt])
        generated = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=name == "mistral"
        )
        assert completion == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("scoring", ["deferred", "instant"])
@pytest.mark.parametrize("name", ["bloom", "mamba", "mistral"])
def test_ppo_learns_with_ratio_one_first_and_no_kl_at_the_start(name, scoring):
    env = tiny_vector_env(3, language_model=opened(name), prompts=PROMPTS, reward=count_liked)
    agent = tiny_ppo(env, scoring=scoring, n_steps=8, batch_size=12, n_epochs=2, learning_rate=1e-2)
    before = agent.policy.parameters_to_vector()
    logs = logs_of_learning(agent, 72)
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    assert abs(values_of(logs, "rollout/kl_ref")[0]) < 1e-4  # of the first rollout
    assert abs(values_of(logs, "rollout/kl_ref")[-1]) > 1e-3
    assert not np.allclose(before, agent.policy.parameters_to_vector())


@pytest.mark.parametrize("name", ["mamba", "bloom", "gemma3", "openai-gpt"])
def test_rows_with_prompts_of_a_shared_beginning_learn_and_their_log_probs_are_the_plain_forwards(name):
    prompts = ["we like this good film with the", "we like this very slow plot and the actor"]
    env = tiny_vector_env(4, language_model=opened(name), prompts=prompts, reward=count_liked)
    agent = tiny_ppo(env, n_steps=12, batch_size=24, n_epochs=1, learning_rate=1e-2)
    agent.learn(144)  # three rollouts, each with episodes that begin beside others of the same prompt
    model = agent.policy.transformer
    checked = 0
    obs, _ = env.reset(seed=3)
    for _ in range(12):
        actions, _, log_probs = agent.policy(agent.policy.obs_to_tensor(obs)[0])
        for row in range(4):
            logits = plain_logits(model, obs["input_ids"][row], int(obs["attention_mask"][row].sum()))
            expected = logits.log_softmax(0)[int(actions[row])]
            torch.testing.assert_close(log_probs[row], expected, atol=1e-4, rtol=1e-4)
            checked += 1
        obs = env.step(actions.numpy())[0]
    assert checked == 48


# --- refused


def refuse(model: PreTrainedModel, match: str, **attributes: Any) -> None:
    with pytest.raises(ValueError, match=match):
        LanguageModel(model.eval(), tiny_tokenizer(), "mine")


def test_an_encoder_is_refused():
    model = BertLMHeadModel(BertConfig(**IDS, **LLAMA_SHAPE))
    refuse(model, r"language_model=mine: the hidden states of BertLMHeadModel change by .* when tokens follow")
