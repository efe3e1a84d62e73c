"""The slot cache gives what a plain forward gives, computes each token once, and notices when weights change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, CONTEXT, VOCABULARY, tiny_model
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)

from textgym.engine.cached_model import CachedModel
from textgym.vocabulary import context_limit

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@torch.no_grad()
def plain_hidden(model: PreTrainedModel, ids: np.ndarray, length: int) -> Tensor:
    """Hidden state at the last of ``length`` tokens of one row, ``(H,)``, from transformers alone."""
    return model.base_model(input_ids=torch.as_tensor(ids[None, :length])).last_hidden_state[0, -1]


@torch.no_grad()
def difference(model: PreTrainedModel, got: Tensor, ids: np.ndarray, lengths: np.ndarray) -> float:
    """Largest deviation from transformers' own forward of the rows, which attention being causal may stay padded."""
    assert len(got) == len(ids)
    hidden = model.base_model(input_ids=torch.as_tensor(ids)).last_hidden_state
    plain = hidden[torch.arange(len(ids)), torch.as_tensor(lengths) - 1]
    return float((got.float() - plain.float()).abs().max())


def random_ids(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    return rng.integers(0, len(VOCABULARY), (rows, width))


class Walk:
    """Rows of text that change between calls in every way a caller's rows can."""

    def __init__(self, rows: int, width: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.ids = random_ids(self.rng, rows, width)
        self.lengths = self.rng.integers(1, width // 2, rows)

    def change(self, row: int, kind: str) -> None:
        width, length = self.ids.shape[1], int(self.lengths[row])
        if kind == "one more":
            length += 1
        elif kind == "several more":
            length += int(self.rng.integers(2, 9))
        elif kind == "shorter":
            length = int(self.rng.integers(1, length + 1))
        elif kind == "another":
            self.ids[row] = random_ids(self.rng, 1, width)[0]
            length = int(self.rng.integers(1, width + 1))
        elif kind == "as a neighbour":  # for some tokens, then in another way
            self.ids[row, : width // 2] = self.ids[row - 1, : width // 2]
            self.ids[row, width // 2 :] = random_ids(self.rng, 1, width - width // 2)[0]
            length = int(self.rng.integers(1, width + 1))
        elif kind == "other end":
            self.ids[row, length - 1] = (self.ids[row, length - 1] + 1) % len(VOCABULARY)
        elif kind == "other middle":
            self.ids[row, length // 2] = (self.ids[row, length // 2] + 1) % len(VOCABULARY)
        else:
            assert kind == "same"
        self.lengths[row] = min(length, width)


KINDS = ("one more", "several more", "shorter", "another", "as a neighbour", "other end", "other middle", "same")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_random_walk_of_rows_equals_the_plain_forward(architecture, attention):
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    machine, walk = CachedModel(model, 12), Walk(rows=6, width=40, seed=1)
    for step in range(24):
        most = 2 + step // 4  # the number of rows grows
        rows = walk.rng.permutation(min(most, 6))[: walk.rng.integers(1, min(most, 6) + 1)]
        for row in rows:
            walk.change(int(row), str(walk.rng.choice(KINDS)))
        if walk.lengths[rows].max() > machine.context:  # what is cached stays where it is
            machine.widen(int(walk.lengths[rows].max()))
        got = machine.last_hidden(walk.ids[rows], walk.lengths[rows], rows)
        assert difference(model, got, walk.ids[rows], walk.lengths[rows]) < 2e-4, (step, rows)


def test_rows_that_outgrow_the_context_are_not_read_again():
    machine, forwards = CachedModel(LLAMA, 8), Forwards(LLAMA)
    ids = random_ids(np.random.default_rng(0), 2, 20)
    machine.last_hidden(ids, np.array([8, 5]))
    machine.widen(20)
    with pytest.raises(ValueError, match="context=100000 tokens is more than"):
        machine.widen(100_000)
    forwards.take()
    got = machine.last_hidden(ids, np.array([20, 6]))
    assert sorted(forwards.take()) == [(1, 1), (1, 12)]
    assert difference(LLAMA, got, ids, np.array([20, 6])) < 1e-4


LLAMA = tiny_model("llama")


@settings(max_examples=40)
@given(
    st.integers(0, 999),
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.sampled_from(KINDS)), min_size=1, unique_by=lambda change: change[0]),
        min_size=1,
        max_size=6,
    ),
)
def test_any_interleaving_of_changes_equals_the_plain_forward(seed, calls):
    machine, walk = CachedModel(LLAMA, 20), Walk(rows=5, width=20, seed=seed)
    for changes in calls:
        rows = np.array([row for row, _ in changes])
        for row, kind in changes:
            walk.change(row, kind)
        got = machine.last_hidden(walk.ids[rows], walk.lengths[rows], rows)
        assert difference(LLAMA, got, walk.ids[rows], walk.lengths[rows]) < 2e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_teacher_forced_hidden_states_of_padded_rows_equal_the_plain_forward(architecture):
    model, rng = tiny_model(architecture), np.random.default_rng(0)
    ids, lengths = random_ids(rng, 3, 30), np.array([30, 7, 1])
    hidden = CachedModel(model, 30).hidden_states(torch.as_tensor(ids))
    for row, length in enumerate(lengths.tolist()):
        for end in {1, length // 2 + 1, length}:
            assert (hidden[row, end - 1] - plain_hidden(model, ids[row], end)).abs().max() < 1e-4


def test_padding_is_never_read():
    rng = np.random.default_rng(0)
    ids, lengths = random_ids(rng, 2, 12), np.array([5, 9])
    other = ids.copy()
    for row, length in enumerate(lengths):
        other[row, length:] = random_ids(rng, 1, 12)[0, length:]
    machine = CachedModel(LLAMA, 12)
    assert torch.equal(machine.last_hidden(ids, lengths), CachedModel(LLAMA, 12).last_hidden(other, lengths))
    teacher_forced = [machine.hidden_states(torch.as_tensor(i))[[0, 1], lengths - 1] for i in (ids, other)]
    assert torch.equal(*teacher_forced)


def test_tensors_and_arrays_are_accepted_alike():
    ids, lengths = random_ids(np.random.default_rng(0), 2, 8), np.array([8, 3])
    from_arrays = CachedModel(LLAMA, 8).last_hidden(ids, lengths)
    assert torch.equal(from_arrays, CachedModel(LLAMA, 8).last_hidden(torch.as_tensor(ids), torch.as_tensor(lengths)))


def test_a_small_prefill_budget_changes_nothing(monkeypatch):
    ids, lengths = random_ids(np.random.default_rng(0), 5, 20), np.array([20, 3, 11, 2, 17])
    expected = CachedModel(LLAMA, 20).last_hidden(ids, lengths)
    monkeypatch.setattr("textgym.engine.cached_model.PREFILL_TOKENS", 25)
    assert (CachedModel(LLAMA, 20).last_hidden(ids, lengths) - expected).abs().max() < 1e-5


# --- what is computed


class Forwards:
    """Shapes ``(B, T)`` of what goes through a model's trunk."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def take(self) -> list[tuple[int, int]]:
        taken, self.shapes = self.shapes, []
        return taken


@pytest.fixture
def stepped():
    """A model, its counter of forwards, a machine that has seen 4 rows, and these rows."""
    model = tiny_model("llama")
    forwards, machine = Forwards(model), CachedModel(model, 30)
    ids, lengths = random_ids(np.random.default_rng(0), 4, 30), np.array([5, 9, 2, 7])
    machine.last_hidden(ids, lengths)
    assert forwards.take() == [(4, 9)]
    return model, forwards, machine, ids, lengths


def test_a_step_of_all_rows_is_one_forward_of_one_token_each(stepped):
    _, forwards, machine, ids, lengths = stepped
    for n in range(1, 4):
        machine.last_hidden(ids, lengths + n)
    assert forwards.take() == [(4, 1)] * 3


def test_rows_seen_before_cost_nothing(stepped):
    _, forwards, machine, ids, lengths = stepped
    first = machine.last_hidden(ids, lengths).clone()
    again = machine.last_hidden(ids[[2, 0]], lengths[[2, 0]], np.array([2, 0]))
    assert torch.equal(again, first[[2, 0]])
    assert forwards.take() == []


def test_a_step_of_few_rows_forwards_these_only(stepped):
    _, forwards, machine, ids, lengths = stepped
    machine.last_hidden(ids[[1]], lengths[[1]] + 1, np.array([1]))
    assert forwards.take() == [(1, 1)]


def test_a_short_row_that_begins_anew_is_read_in_the_step_of_the_others(stepped):
    model, forwards, machine, ids, lengths = stepped
    ids, lengths = ids.copy(), lengths + 1
    ids[1], lengths[1] = random_ids(np.random.default_rng(9), 1, 30)[0], 4
    got = machine.last_hidden(ids, lengths)
    assert forwards.take() == [(3 + 4, 1)]  # a token of each of three rows, and the four of the new one
    assert difference(model, got, ids, lengths) < 1e-4


def test_a_long_row_that_begins_anew_is_prefilled_beside_one_decode_of_the_others(stepped):
    model, forwards, machine, ids, lengths = stepped
    ids, lengths = ids.copy(), lengths + 1
    ids[1], lengths[1] = random_ids(np.random.default_rng(9), 1, 30)[0], 5  # more tokens than there are rows
    got = machine.last_hidden(ids, lengths)
    assert sorted(forwards.take()) == [(1, 5), (4, 1)]
    assert difference(model, got, ids, lengths) < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_begin_anew_among_others_equal_the_plain_forward(architecture, attention):
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    rng = np.random.default_rng(5)
    machine, ids, lengths = CachedModel(model, 30), random_ids(rng, 12, 30), rng.integers(2, 12, 12)
    machine.last_hidden(ids, lengths)
    forwards = Forwards(model)
    for begins in ([3], [0, 11], [5, 6, 7]):
        lengths = lengths + 1
        ids[begins], lengths[begins] = random_ids(rng, len(begins), 30), rng.integers(2, 5, len(begins))
        others = 12 - len(begins)
        got = machine.last_hidden(ids, lengths)
        assert forwards.take() == [(others + lengths[begins].sum(), 1)]
        assert difference(model, got, ids, lengths) < 2e-4
        forwards.take()


def test_only_what_follows_the_first_difference_is_forwarded(stepped):
    _, forwards, machine, ids, lengths = stepped
    ids = ids.copy()
    ids[1, 6] += 1  # of 9 tokens
    machine.last_hidden(ids, lengths)
    assert forwards.take() == [(1, 3)]


def test_rows_with_the_same_prompt_are_prefilled_once_and_then_go_their_own_ways(stepped):
    model, forwards, machine, _, _ = stepped
    prompts = random_ids(np.random.default_rng(3), 2, 30)
    ids, lengths = prompts[[0, 1, 0, 0, 1, 0]], np.array([6, 6, 6, 4, 6, 6])
    ids[2, 6:] = 0  # what lies behind a row's length makes it no other row
    ids[5, 3] += 1
    got = machine.last_hidden(ids, lengths)
    assert forwards.take() == [(4, 6)]
    assert difference(model, got, ids, lengths) < 1e-4
    forwards.take()
    ids[np.arange(6), lengths] = np.arange(6) + 5  # each goes on with a token of its own
    got = machine.last_hidden(ids, lengths + 1)
    assert forwards.take() == [(6, 1)]
    assert difference(model, got, ids, lengths + 1) < 1e-4
    forwards.take()
    # Beside rows that go on, some begin anew with the same prompt, another one.
    ids[[1, 4]], lengths = prompts[1, ::-1], np.array([8, 5, 8, 6, 5, 8])
    ids[[0, 2, 3, 5], lengths[[0, 2, 3, 5]] - 1] = 7
    got = machine.last_hidden(ids, lengths)
    assert forwards.take() == [(4 + 5, 1)]
    assert difference(model, got, ids, lengths) < 1e-4


def test_a_row_that_begins_as_another_slot_does_forwards_only_the_rest(stepped):
    model, forwards, machine, ids, _ = stepped  # of row 1, 9 tokens are cached
    old, ids = ids, ids.copy()
    ids[1] = old[1, ::-1]  # begins another text itself, of 2 tokens
    ids[2, :9] = old[1, :9]  # all of the old one
    ids[3, :6] = old[1, :6]  # and a part of it, with two tokens behind that
    lengths = np.array([6, 2, 9, 8])
    got = machine.last_hidden(ids, lengths)
    assert forwards.take() == [(1 + 2 + 1 + 2, 1)]
    assert difference(model, got, ids, lengths) < 1e-4
    forwards.take()
    got = machine.last_hidden(ids, lengths + 1)  # nothing of what was copied beyond that is read
    assert forwards.take() == [(4, 1)]
    assert difference(model, got, ids, lengths + 1) < 1e-4


def test_a_copy_that_is_interrupted_leaves_nothing_half_copied(stepped, monkeypatch):
    model, _, machine, ids, lengths = stepped
    begun, short = ids.copy(), lengths.copy()
    begun[3, :9], short[3] = ids[1, :9], 9
    copy = machine._cache.copy

    def interrupted(*arguments):
        copy(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(machine._cache, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine.last_hidden(begun, short)
    got = machine.last_hidden(ids, lengths)  # the old text, as if nothing had been
    assert difference(model, got, ids, lengths) < 1e-4
    got = machine.last_hidden(ids, lengths + 1)
    assert difference(model, got, ids, lengths + 1) < 1e-4


def test_a_shortened_row_forwards_its_last_token_again(stepped):
    model, forwards, machine, ids, _ = stepped
    got = machine.last_hidden(ids[[1]], np.array([4]), np.array([1]))
    assert forwards.take() == [(1, 1)]
    assert difference(model, got, ids[[1]], np.array([4])) < 1e-4


def test_more_rows_leave_the_cached_ones_alone(stepped):
    model, forwards, machine, ids, lengths = stepped
    ids, lengths = np.concatenate([ids, ids[:, ::-1]]), np.concatenate([lengths, lengths])
    got = machine.last_hidden(ids, lengths)
    assert forwards.take() == [(4, 9)]
    assert difference(model, got, ids, lengths) < 1e-4


# --- weights that change


def scale_in_place(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3.0)


def replace_data(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data * 3.0


def load_weights(model):
    model.load_state_dict(tiny_model("llama", seed=5).state_dict())


def assign_weights(model):
    model.load_state_dict(tiny_model("llama", seed=5).state_dict(), assign=True)


def optimizer_step(**options):
    def step(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
        optimizer.step()

    return step


CHANGES = {
    "in place": scale_in_place,
    "data replaced": replace_data,
    "load_state_dict": load_weights,
    "load_state_dict(assign=True)": assign_weights,
    "AdamW": optimizer_step(foreach=False),
    "AdamW(foreach)": optimizer_step(foreach=True),
    "AdamW(fused)": optimizer_step(fused=True),  # doesn't count its writes in Tensor._version
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_noticed(stepped, change):
    model, forwards, machine, ids, lengths = stepped
    before = machine.last_hidden(ids, lengths).clone()
    change(model)
    forwards.take()
    got = machine.last_hidden(ids, lengths)
    assert forwards.take() == [(4, 9)]
    assert difference(model, got, ids, lengths) < 1e-3
    assert (got - before).abs().max() > 0.1, "the change is too small to show anything"


def test_forgetting_is_for_changes_nobody_can_notice(stepped):
    model, _, machine, ids, lengths = stepped
    model.model.layers[0].mlp.up_proj.weight.data.mul_(3.0)  # .data has a version count of its own
    machine.forget()
    assert difference(model, machine.last_hidden(ids, lengths), ids, lengths) < 1e-3


def test_an_optimizer_of_other_weights_costs_no_forward(stepped):
    _, forwards, machine, ids, lengths = stepped
    other = tiny_model("llama", seed=3)
    optimizer_step(fused=True)(other)
    machine.last_hidden(ids, lengths)
    assert forwards.take() == []


def test_weights_that_were_nan_leave_no_trace(stepped):
    model, _, machine, ids, lengths = stepped
    good = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict({name: weight * torch.nan for name, weight in good.items()})
    machine.last_hidden(ids, lengths + 10)
    model.load_state_dict(good)
    assert difference(model, machine.last_hidden(ids, lengths), ids, lengths) < 1e-4


def test_another_dtype_begins_anew(stepped):
    model, _, machine, ids, lengths = stepped
    model.to(torch.bfloat16)
    assert machine.last_hidden(ids, lengths).dtype == torch.bfloat16
    model.to(torch.float32)
    got = machine.last_hidden(ids, lengths)
    assert got.dtype == torch.float32
    assert difference(model, got, ids, lengths) < 1e-4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("change", ["one more", "four more", "other texts"])
def test_an_interrupted_forward_is_done_again(stepped, error, change):
    model, _, machine, ids, lengths = stepped
    if change == "other texts":
        ids = (ids + 1) % len(VOCABULARY)
    else:
        lengths = lengths + {"one more": 1, "four more": 4}[change]

    def interrupt(*_):
        raise error

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        machine.last_hidden(ids, lengths)
    hook.remove()
    assert difference(model, machine.last_hidden(ids, lengths), ids, lengths) < 1e-4


def test_inference_mode_and_normal_mode_may_alternate(stepped):
    model, _, _, ids, lengths = stepped
    machine = CachedModel(model, 30)
    with torch.inference_mode():
        machine.last_hidden(ids, lengths)
    machine.last_hidden(ids, lengths + 1)
    with torch.inference_mode():
        got = machine.last_hidden(ids, lengths + 2)
    assert difference(model, got, ids, lengths + 2) < 1e-4


def test_a_model_made_in_inference_mode_works():
    with torch.inference_mode():
        model = tiny_model("llama")
    ids, lengths = random_ids(np.random.default_rng(0), 2, 9), np.array([4, 8])
    machine = CachedModel(model, 9)
    machine.last_hidden(ids, lengths)
    assert difference(model, machine.last_hidden(ids, lengths + 1), ids, lengths + 1) < 1e-4


def test_dropout_never_acts():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, bos_token_id=1, eos_token_id=2)
    )
    ids, lengths = random_ids(np.random.default_rng(0), 2, 12), np.array([4, 9])
    machine = CachedModel(model, 12)
    model.train()
    stepped = machine.last_hidden(ids, lengths)
    model.train()
    teacher_forced = machine.hidden_states(torch.as_tensor(ids))[[0, 1], lengths - 1].detach()
    model.eval()
    assert difference(model, stepped, ids, lengths) < 1e-4
    assert difference(model, teacher_forced, ids, lengths) < 1e-4


# --- gradients, dtypes, limits


def test_gradients_flow_through_the_teacher_forced_pass_and_not_through_the_cache(tiny_llama):
    machine = CachedModel(tiny_llama, 6)
    ids = random_ids(np.random.default_rng(0), 2, 6)
    assert not machine.last_hidden(ids, np.array([3, 6])).requires_grad
    machine.hidden_states(torch.as_tensor(ids)).sum().backward()
    assert all(p.grad is not None for p in tiny_llama.model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_stays_close_to_its_plain_forward(attention):
    model = tiny_model("llama").to(torch.bfloat16)
    model.set_attn_implementation(attention)
    machine, walk = CachedModel(model, 24), Walk(rows=3, width=24, seed=0)
    for _ in range(8):
        for row in range(3):
            walk.change(row, "one more")
        got = machine.last_hidden(walk.ids, walk.lengths)
        assert got.dtype == torch.bfloat16
        assert difference(model, got, walk.ids, walk.lengths) < 0.25  # of values around 3


def test_a_row_may_fill_the_whole_context():
    model, ids = tiny_model("gpt2"), random_ids(np.random.default_rng(0), 1, CONTEXT)
    machine = CachedModel(model, CONTEXT)
    machine.last_hidden(ids, np.array([CONTEXT - 1]))
    got = machine.last_hidden(ids, np.array([CONTEXT]))
    assert difference(model, got, ids, np.array([CONTEXT])) < 1e-4


def test_a_context_beyond_the_models_positions_is_refused():
    with pytest.raises(ValueError, match=r"context=129 .* LlamaForCausalLM .*\(128\)"):
        CachedModel(LLAMA, CONTEXT + 1)


def test_rows_may_be_longer_than_the_sliding_window():
    config = MistralConfig(vocab_size=64, **SHAPE, num_key_value_heads=1, sliding_window=8, initializer_range=0.2)
    model = MistralForCausalLM(config).eval()
    forwards, machine, walk = Forwards(model), CachedModel(model, 24), Walk(rows=3, width=24, seed=0)
    walk.lengths = np.array([10, 3, 7])
    for step in range(14):
        got = machine.last_hidden(walk.ids, walk.lengths)
        assert forwards.take() == [(3, 1 if step else 10)]
        assert difference(model, got, walk.ids, walk.lengths) < 1e-4
        forwards.take()
        walk.lengths += 1


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=100), 100),
        (MistralConfig(max_position_embeddings=100, sliding_window=30), 30),
        (MistralConfig(max_position_embeddings=100, sliding_window=None), 100),
        (Qwen2Config(max_position_embeddings=100, sliding_window=30), 100),  # use_sliding_window is off
        (
            Qwen2Config(max_position_embeddings=100, sliding_window=30, use_sliding_window=True, max_window_layers=0),
            30,
        ),
        (
            Phi3Config(
                max_position_embeddings=100,
                original_max_position_embeddings=40,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 48,
                    "long_factor": [2.0] * 48,
                    "original_max_position_embeddings": 40,
                },
                sliding_window=None,
            ),
            40,
        ),
    ],
    ids=["positions", "window", "no window", "window switched off", "window in use", "longrope"],
)
def test_the_context_limit_is_how_many_tokens_all_see_each_other(config, limit):
    assert context_limit(config) == limit


@pytest.mark.parametrize("lengths", [[3, 0], [3, 11]])
def test_empty_and_overlong_rows_are_errors(lengths):
    machine = CachedModel(LLAMA, 10)
    with pytest.raises(ValueError, match="lengths must lie between 1 and context=10"):
        machine.last_hidden(random_ids(np.random.default_rng(0), 2, 12), np.array(lengths))


def test_llama_with_grouped_heads_and_scaled_positions_is_exact():
    config = LlamaConfig(
        vocab_size=64,
        **SHAPE,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    )
    model, walk = LlamaForCausalLM(config).eval(), Walk(rows=3, width=40, seed=0)
    machine = CachedModel(model, 40)
    for _ in range(10):
        for row in range(3):
            walk.change(row, "several more")
        assert difference(model, machine.last_hidden(walk.ids, walk.lengths), walk.ids, walk.lengths) < 1e-4


def test_rows_that_start_together_under_one_system_prompt_read_it_once():
    ids, lengths = random_ids(np.random.default_rng(4), 6, 40), np.array([40, 38, 40, 31, 40, 40])
    ids[:5, :30] = ids[0, :30]
    ids[4] = ids[2]
    machine, forwards = CachedModel(LLAMA, 41), Forwards(LLAMA)
    got = machine.last_hidden(ids, lengths)
    begun = forwards.take()
    assert sorted(begun) == [(2, 40), (3, 10)]  # one of them and the last row, then what the others have of their own
    assert difference(LLAMA, got, ids, lengths) < 1e-4
    ids = np.concatenate([ids, random_ids(np.random.default_rng(5), 6, 1)], axis=1)
    ids[np.arange(6), lengths] = 7
    assert difference(LLAMA, machine.last_hidden(ids, lengths + 1), ids, lengths + 1) < 1e-4


def test_rows_that_share_little_are_read_in_one_forward():
    ids, lengths = random_ids(np.random.default_rng(4), 3, 40), np.array([40, 38, 40])
    ids[:, :10] = ids[0, :10]
    machine, forwards = CachedModel(LLAMA, 40), Forwards(LLAMA)
    machine.last_hidden(ids, lengths)
    assert forwards.take() == [(3, 40)]
