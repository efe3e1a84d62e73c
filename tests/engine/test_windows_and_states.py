"""The slot cache serves models whose layers differ: windows, chunks, states; each token is forwarded once."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from test_cached_model import KINDS, Forwards, Walk, difference, random_ids
from tiny_models import CONTEXT, VOCABULARY, tiny_model
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4TextConfig,
    Llama4TextModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from textgym.engine.cached_model import CachedModel
from textgym.engine.grouped_model import GroupedModel
from textgym.engine.layer_types import FULL, Reach, attention_reach

WINDOW = 5
SHAPE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
}
TWO_KINDS = ["sliding_attention", "full_attention"] * 2
STATES = ["linear_attention", "full_attention"] * 2

WINDOWS = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=WINDOW)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=WINDOW, layer_types=TWO_KINDS)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SHAPE,
            head_dim=16,
            sliding_window=WINDOW,
            layer_types=TWO_KINDS,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    ),
    "llama4": lambda: Llama4TextModel(
        Llama4TextConfig(
            **SHAPE,
            head_dim=16,
            intermediate_size_mlp=64,
            num_local_experts=2,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention"] * 2,
            pad_token_id=0,
        )
    ),
    # Attends to the tokens that an indexer picks, which keeps a key of each token. Few heads would make ties.
    "deepseek_v32": lambda: DeepseekV32ForCausalLM(
        DeepseekV32Config(
            **{**SHAPE, "num_hidden_layers": 2, "num_key_value_heads": 2},
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            index_n_heads=32,
            index_head_dim=16,
            index_topk=WINDOW,
        )
    ),
}
HYBRIDS = {
    "jamba": lambda: JambaForCausalLM(
        JambaConfig(
            **SHAPE,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            num_experts=2,
            mamba_d_state=4,
            mamba_dt_rank=4,
        )
    ),
    "qwen3_next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SHAPE,
            head_dim=16,
            layer_types=STATES,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        )
    ),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"] * 2)),
    # Each layer both keeps a state and attends.
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            **SHAPE,
            head_dim=16,
            mamba_d_ssm=32,
            mamba_n_heads=2,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=8,
            mamba_chunk_size=4,
        )
    ),
}


def build(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {**WINDOWS, **HYBRIDS}[name]().eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_random_walk_of_rows_beyond_the_window_equals_the_plain_forward(name, attention):
    model = build(name)
    if attention == "eager" or name != "gpt_oss":  # which has sinks, and no SDPA
        model.set_attn_implementation(attention)
    walk_rows(CachedModel(model, 10), model)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_random_walk_of_rows_with_states_equals_the_plain_forward(name):
    model = build(name)
    walk_rows(CachedModel(model, 10), model)


def walk_rows(machine: CachedModel, model: PreTrainedModel) -> None:
    walk = Walk(rows=5, width=24, seed=1)
    for step in range(16):
        rows = walk.rng.permutation(5)[: walk.rng.integers(1, 6)]
        for row in rows:
            walk.change(int(row), str(walk.rng.choice(KINDS)) if step % 2 else "one more")
        if walk.lengths[rows].max() > machine.context:
            machine.widen(int(walk.lengths[rows].max()))
        got = machine.last_hidden(walk.ids[rows], walk.lengths[rows], rows)
        assert difference(model, got, walk.ids[rows], walk.lengths[rows]) < 2e-4, (step, rows)


@pytest.mark.parametrize("name", [*WINDOWS, *HYBRIDS])
def test_each_token_of_long_rows_is_forwarded_once(name):
    model = build(name)
    forwards, machine = Forwards(model), CachedModel(model, 24)
    ids, lengths = random_ids(np.random.default_rng(0), 4, 24), np.array([6, 3, 6, 9])
    machine.last_hidden(ids, lengths)
    begun = forwards.take()
    # What keeps a state is not padded: rows of the same length are read together.
    assert sorted(begun) == ([(1, 3), (1, 9), (2, 6)] if name in HYBRIDS else [(4, 9)])
    for step in range(1, 16):
        machine.last_hidden(ids, lengths + step)
    assert forwards.take() == [(4, 1)] * 15
    assert difference(model, machine.last_hidden(ids, lengths + 15), ids, lengths + 15) < 1e-4


@pytest.mark.parametrize("name", [*WINDOWS, *HYBRIDS])
def test_hidden_states_and_gradients_at_places_of_ragged_rows_are_those_of_rows_alone(name):
    model = build(name)
    lengths = np.array([20, 4, 11, 1, 17])
    ids = random_ids(np.random.default_rng(2), len(lengths), 20)
    ids[4, :9] = ids[0, :9]  # they begin alike, further than windows reach
    forwards = Forwards(model)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    got = CachedModel(model, 20).hidden_at(ids, lengths, rows, positions)
    (shape,) = forwards.take()
    assert shape == ((5, 20) if name in HYBRIDS else (1, 48))  # a state would run on through packed rows
    alone = torch.cat([model.base_model(input_ids=torch.as_tensor(ids[i : i + 1, :n])).last_hidden_state[0]
                       for i, n in enumerate(lengths)])  # fmt: skip
    assert (got - alone).abs().max() < 2e-5 * (1 + alone.abs().max())
    weight = model.get_input_embeddings().weight
    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(3))
    (one,) = torch.autograd.grad((got * direction).sum(), weight)
    (other,) = torch.autograd.grad((alone * direction).sum(), weight)
    assert (one - other).abs().max() < 1e-3 * (1 + other.abs().max())


def test_longer_rows_than_a_machine_was_made_for_are_read_as_the_model_does():
    model, lengths = build("gemma3"), np.array([20, 3, 2])
    ids = random_ids(np.random.default_rng(0), 3, 20)
    got = CachedModel(model, WINDOW).hidden_at(ids, lengths, np.arange(3), lengths - 1)
    assert difference(model, got, ids, lengths) < 1e-4


def test_rows_with_the_same_text_are_prefilled_once_and_share_their_state():
    model = build("jamba")
    forwards, machine = Forwards(model), CachedModel(model, 24)
    ids = random_ids(np.random.default_rng(3), 2, 24)[[0, 1, 0, 0]]
    machine.last_hidden(ids, np.array([6, 6, 6, 1]))
    assert sorted(forwards.take()) == [(1, 1), (2, 6)]
    ids[np.arange(4), [6, 6, 6, 1]] = np.arange(4) + 5
    got = machine.last_hidden(ids, np.array([7, 7, 7, 2]))
    assert forwards.take() == [(4, 1)]
    assert difference(model, got, ids, np.array([7, 7, 7, 2])) < 1e-4


@pytest.mark.parametrize("name", ["jamba", "qwen3_next"])
def test_an_interrupted_forward_leaves_no_half_made_state(name):
    model = build(name)
    machine, ids, lengths = CachedModel(model, 24), random_ids(np.random.default_rng(0), 3, 24), np.array([5, 9, 2])
    machine.last_hidden(ids, lengths)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        machine.last_hidden(ids, lengths + 1)
    hook.remove()
    assert difference(model, machine.last_hidden(ids, lengths + 1), ids, lengths + 1) < 1e-4


def test_more_rows_leave_the_states_of_others_alone():
    model = build("falcon_h1")
    forwards, machine = Forwards(model), CachedModel(model, 24)
    ids, lengths = random_ids(np.random.default_rng(0), 6, 24), np.array([5, 5, 5, 7, 7, 7])
    machine.last_hidden(ids[:3], lengths[:3])
    machine.last_hidden(ids, lengths + (np.arange(6) < 3))
    assert sorted(forwards.take()) == [(3, 1), (3, 5), (3, 7)]
    assert difference(model, machine.last_hidden(ids, lengths + 2), ids, lengths + 2) < 1e-4


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: tiny_model("llama"), CachedModel),
        (lambda: build("jamba"), CachedModel),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)).eval(),
            GroupedModel,
        ),
    ],
    ids=["llama", "jamba", "mamba"],
)
def test_a_machine_in_use_can_be_pickled(make, kind):
    model = make()
    machine, ids, lengths = kind(model, 12), random_ids(np.random.default_rng(0), 2, 12), np.array([5, 8])
    machine.last_hidden(ids, lengths)
    again = pickle.loads(pickle.dumps(machine))
    torch.testing.assert_close(again.last_hidden(ids, lengths + 1), machine.last_hidden(ids, lengths + 1))


def test_what_a_token_sees():
    positions, keys = torch.tensor([[0, 3, 6]]), torch.arange(7)
    seen = {
        FULL: [[0], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]],
        Reach(window=3): [[0], [1, 2, 3], [4, 5, 6]],
        Reach(chunk=3): [[0], [3], [6]],
        Reach(chunk=4): [[0], [0, 1, 2, 3], [4, 5, 6]],
    }
    for reach, expected in seen.items():
        assert [row.nonzero().flatten().tolist() for row in reach.visible(positions, keys)[0]] == expected


def test_windows_that_rows_never_reach_need_no_masks_of_their_own():
    config = Gemma3TextConfig(**SHAPE, sliding_window=WINDOW, layer_types=TWO_KINDS)
    assert attention_reach(config, WINDOW) == FULL
    reach = attention_reach(config, WINDOW + 1)
    assert isinstance(reach, dict)
    assert (reach["full_attention"], reach["sliding_attention"]) == (FULL, Reach(window=WINDOW))
    assert attention_reach(MistralConfig(**SHAPE, sliding_window=WINDOW), 9) == Reach(window=WINDOW)
    assert attention_reach(MistralConfig(**SHAPE, sliding_window=None), 9) == FULL
