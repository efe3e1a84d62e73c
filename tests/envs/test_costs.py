"""What a rollout and an update cost, counted and not timed: forwards, tokens and memory. A change that makes one grow
fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tiny_agents import tiny_language_model, tiny_ppo, tiny_vector_env
from tiny_models import CONTEXT, tiny_causal_reward_model, tiny_tokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from textgym import language_model as language_model_module
from textgym.agents import GRPO, PPO
from textgym.agents.buffers.episode_buffer import SegmentSamples
from textgym.language_model import LanguageModel
from textgym.replies import ScriptedReply
from textgym.rewards import CausalRewardModel

ROWS, PROMPT = 4, 3
PROMPTS = ["the film is"]  # three tokens


@dataclass
class Forwards:
    """Calls of a transformer's trunk: how many, and over how many tokens, padding included."""

    tokens: list[int] = field(default_factory=list)

    @contextmanager
    def counted(self, trunk: nn.Module) -> Iterator[None]:
        def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.tokens.append(kwargs["input_ids"].numel())

        hook = trunk.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def agent(new_tokens: int, *, ends: bool = False, language_model: Any = None, **arguments: Any) -> PPO:
    """PPO with a reference and a causal reward model of its tokenizer, all completions of ``new_tokens`` tokens."""
    env = tiny_vector_env(
        ROWS,
        prompts=PROMPTS,
        language_model=language_model or tiny_language_model(),
        max_new_tokens=new_tokens,
        min_new_tokens=0 if ends else new_tokens,
        reward=CausalRewardModel(tiny_causal_reward_model(), tiny_tokenizer()),
    )
    steps = {"n_steps": new_tokens, "batch_size": ROWS * new_tokens // 2, **arguments}
    return tiny_ppo(env, n_epochs=2, **steps)


def collect(model: PPO) -> None:
    callback = model._setup_learn(10_000)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


def trunks(model: PPO) -> dict[str, nn.Module]:
    env = model.env.text_env
    return {
        "policy": model.policy.transformer.base_model,
        "reference": env.reference_language_model().model.base_model,
        "reward": env.reward.model.base_model,
    }


def counts(model: PPO, run: Any) -> dict[str, list[int]]:
    forwards = {name: Forwards() for name in trunks(model)}
    with forwards["policy"].counted(trunks(model)["policy"]), forwards["reference"].counted(
        trunks(model)["reference"]
    ), forwards["reward"].counted(trunks(model)["reward"]):  # fmt: skip
        run(model)
    return {name: counted.tokens for name, counted in forwards.items()}


@pytest.mark.parametrize("new_tokens", [8, 16, 32])
def test_a_deferred_rollout_forwards_each_token_once_with_each_model(new_tokens):
    model = agent(new_tokens)
    counted = counts(model, collect)
    # The prompt, which is the same for all, then a token a row and step. The last action ends the episodes and is read
    # by nobody.
    assert counted["policy"] == [PROMPT, *[ROWS] * (new_tokens - 1)]
    assert counted["reference"] == [ROWS * (PROMPT + new_tokens)]
    # Φ of the prompts when the environment was reset, and of all prefixes.
    assert counted["reward"] == [PROMPT, ROWS * (PROMPT + new_tokens)]
    callback = model._setup_learn(10_000, reset_num_timesteps=False)[1]
    again = counts(model, lambda m: m.collect_rollouts(m.env, callback, m.rollout_buffer, m.n_steps))
    assert again["reward"] == [ROWS * (PROMPT + new_tokens)], "the prompts are among the prefixes"


def test_values_behind_a_rollout_are_those_of_the_texts_that_it_cuts():
    model = agent(32, n_steps=8, batch_size=8)
    counted = counts(model, collect)
    assert counted["policy"] == [PROMPT, *[ROWS] * 8]
    model.policy.value_net.bias.data += 1.0
    torch.testing.assert_close(model._last_values(), model.policy.predict_values(model._last_obs))
    model._last_episode_starts = np.array([True, False] * (ROWS // 2))
    expected = model.policy.predict_values(model._last_obs) * torch.tensor([[0.0], [1.0]] * (ROWS // 2))
    torch.testing.assert_close(model._last_values(), expected)


@pytest.mark.parametrize("new_tokens", [8, 16, 32])
def test_an_instant_rollout_forwards_each_token_once_with_each_model(new_tokens):
    model = agent(new_tokens, scoring="instant")
    counted = counts(model, collect)
    assert counted["policy"] == [PROMPT, *[ROWS] * (new_tokens - 1)]
    assert counted["reference"] == [PROMPT, *[ROWS] * (new_tokens - 1)]
    # Nothing cached reaches into a rollout, so the prompts are read again with the first tokens, like ones once.
    different = len(set(model.rollout_buffer.actions[0].flatten().tolist()))
    assert counted["reward"] == [PROMPT, different * (PROMPT + 1), *[ROWS] * (new_tokens - 1)]


@pytest.mark.parametrize("new_tokens", [8, 16, 32])
def test_an_update_forwards_each_episode_once_an_epoch(new_tokens):
    model = agent(new_tokens)
    collect(model)
    counted = counts(model, lambda m: m.train())
    each = 2 * (PROMPT + new_tokens - 1)  # two episodes a minibatch; the last action is predicted and not read
    assert counted == {"policy": [each] * 4, "reference": [], "reward": []}


def test_ragged_episodes_are_packed_and_not_padded():
    model = agent(40, ends=True)
    with torch.no_grad():  # some end at once, some never
        model.policy.transformer.get_output_embeddings().weight[2] *= 4
    collect(model)
    segments = model.rollout_buffer.segments
    lengths = [len(s.prefix) + s.steps - 1 for s in segments]
    assert min(lengths) < max(lengths) / 3
    counted = counts(model, lambda m: m.train())
    assert sum(counted["policy"]) < 1.35 * 2 * sum(lengths)  # in two epochs
    assert sum(lengths) < 0.6 * len(lengths) * max(lengths), "padding would have cost much more"


def test_instant_and_deferred_scoring_act_alike():
    lengths = []
    for scoring in ("deferred", "instant"):
        model = agent(16, scoring=scoring)
        lengths.append(len(counts(model, collect)["policy"]))
    assert lengths[0] == lengths[1]


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that operations made, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.untyped_storage().data_ptr() for a in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(a)}
        out = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in known:
                self.total += made.untyped_storage().nbytes()
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return out


def allocations(run: Any, *args: Any) -> Allocations:
    with Allocations() as counted:
        run(*args)
    return counted


def test_memory_of_a_rollout_and_an_update_grows_with_the_tokens_and_not_faster():
    totals = {}
    for new_tokens in (8, 32):
        model = agent(new_tokens)
        collect(model)  # what is allocated once is not counted
        model.train()
        totals[new_tokens] = allocations(collect, model).total, allocations(model.train).total
    for small, large in zip(totals[8], totals[32], strict=True):
        assert large < 6 * small, "four times the tokens; attention's own share grows faster"


def test_no_tensor_has_the_logits_of_all_tokens(monkeypatch):
    vocab = 2048
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=CONTEXT, **shape))
    learner = agent(32, language_model=LanguageModel(model, tiny_tokenizer()))
    collect(learner)
    everything = ROWS * 32 // 2 * vocab * 4  # bytes of a minibatch's logits
    whole = allocations(learner.train).largest
    assert whole >= everything, "they are small enough here to be computed at once"
    monkeypatch.setattr(language_model_module, "HEAD_ELEMENTS", 8 * vocab)
    assert allocations(learner.train).largest <= everything / 4


def test_a_longer_context_than_needed_costs_no_forwards():
    lm = tiny_language_model()
    machine = lm.cached(CONTEXT)
    forwards = Forwards()
    ids = np.random.default_rng(0).integers(4, lm.vocab_size, (2, CONTEXT))
    with forwards.counted(machine.trunk):
        for length in range(4, 10):
            machine.last_hidden(ids, np.array([length, length]))
            machine.last_hidden(ids, np.array([length, length]))  # asked again: nothing to do
    assert forwards.tokens == [8, 2, 2, 2, 2, 2]


LONG_PROMPTS = [
    "the film is a very good movie and we like the story of it but the cast was not so great too , . " * 2,
    "this was a dull film with a slow plot and cold music , they hate that it was not too moving and fresh . " * 2,
]
LONG_PROMPT = 48  # with what follows, packed rows are as wide as they are: a multiple of 8
GROUP, NEW = 4, 8


def group_agent(policy_kwargs: dict[str, Any] | None = None, **options: Any) -> GRPO:
    """GRPO on two groups of completions of long prompts."""
    reward = CausalRewardModel(tiny_causal_reward_model(), tiny_tokenizer())
    env = tiny_vector_env(
        2 * GROUP, prompts=LONG_PROMPTS, max_new_tokens=NEW, min_new_tokens=NEW, reward=reward, **options
    )
    return GRPO(
        "LanguageModelPolicy", env, group_size=GROUP, n_epochs=2, seed=1, device="cpu", policy_kwargs=policy_kwargs
    )


def test_each_prompt_is_read_once_for_all_its_completions_by_every_model():
    model = group_agent()
    once = 2 * (LONG_PROMPT + GROUP * NEW)
    assert once < 0.6 * 2 * GROUP * (LONG_PROMPT + NEW)
    rollout = counts(model, collect)
    assert {len(segment.prefix) for segment in model.rollout_buffer.segments} == {LONG_PROMPT}
    assert rollout["policy"] == [2 * LONG_PROMPT, *[2 * GROUP] * (NEW - 1)]
    assert sum(rollout["reference"]) <= once
    assert sum(rollout["reward"][1:]) <= once, "behind the prompts, when the environment was reset"
    update = counts(model, lambda m: m.train())
    assert len(update["policy"]) == 2
    assert max(update["policy"]) <= once


@pytest.mark.parametrize("turns", [False, True], ids=["one turn", "turns"])
@pytest.mark.parametrize("policy_kwargs", [{}, {"gradient_checkpointing": True}, {"lora": {"r": 4}}], ids=str)
def test_an_update_has_the_gradients_of_rows_that_are_read_apart(policy_kwargs, turns, monkeypatch):
    if "lora" in policy_kwargs:
        pytest.importorskip("peft")
    talk = (
        {"reply": ScriptedReply([" a great movie", " but not so"]), "max_turns": 2, "max_reply_tokens": 3}
        if turns
        else {}
    )
    model = group_agent(policy_kwargs, **talk)
    for weight in model.policy.value_net.parameters():
        torch.nn.init.normal_(weight)  # at first it is 0, and stops gradients
    collect(model)
    batch = next(model.rollout_buffer.get())
    found = {}
    for apart in (False, True):
        if apart:
            monkeypatch.setattr("textgym.engine.cached_model.worth_packing", lambda *arguments: False)
        model.policy.zero_grad()
        read = counts(model, lambda m: backward(m, batch))["policy"]
        gradients = {n: p.grad.clone() for n, p in model.policy.named_parameters() if p.grad is not None}
        found[apart] = sum(read), gradients
    (tokens, got), (of_rows, expected) = found[False], found[True]
    assert tokens < 0.7 * of_rows
    assert {name.split(".")[0] for name in got} == {"transformer", "value_net"}
    assert got.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * (gradient.norm() + 0.01 * whole), name


def backward(model: GRPO, batch: SegmentSamples) -> None:
    """Of a number into which every log-probability, entropy and value of a minibatch goes with a weight of its own."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.cat([each.flatten() for each in model.policy.evaluate_segments(batch)])  # (3 M,)
    (outputs * torch.randn(outputs.shape, generator=generator)).sum().backward()
