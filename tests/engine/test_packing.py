"""Rows that begin alike are read once, short ones stand one after the other, and each is read as if it were alone."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from textgym.agents.policy.gradient_checkpointing import checkpointed
from textgym.engine.cached_model import CachedModel
from textgym.engine.packing import as_trees, cost, pack, passes, worth_packing
from textgym.language_model import LanguageModel
from textgym.lora import add_lora
from textgym.teacher_forcing import forced_log_probs

BALANCE = 192.0  # of the tiny models, 32 wide
LLAMA = tiny_model("llama")


def random_ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 60, shape)


def groups(prompts: int, size: int, prompt: int, new: int) -> np.ndarray:
    """Token ids of ``size`` completions for each of some prompts, ``(prompts * size, prompt + new)``."""
    ids = random_ids(0, prompts * size, prompt + new)
    ids[:, :prompt] = np.repeat(random_ids(1, prompts, prompt), size, axis=0)
    return ids


def conversation() -> tuple[np.ndarray, np.ndarray]:
    """Texts that part at different places: under one system prompt, some with the same question, one cut short, one
    twice, and one of its own. Ids ``(8, 40)`` and lengths ``(8,)``."""
    ids = random_ids(2, 8, 40)
    ids[:7, :12] = ids[0, :12]
    ids[:4, :24] = ids[0, :24]
    ids[2, :30] = ids[1, :30]
    ids[3] = ids[1]
    ids[6] = ids[5]
    return ids, np.array([40, 38, 40, 33, 35, 40, 40, 9])


def everywhere(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All places of rows of these lengths: rows ``(M,)`` and positions ``(M,)``."""
    return np.repeat(np.arange(len(lengths)), lengths), np.concatenate([np.arange(n) for n in lengths])


def alone(model: PreTrainedModel, ids: np.ndarray, lengths: np.ndarray) -> Tensor:
    """Hidden states ``(M, H)`` everywhere, from a forward of the model's own for each row."""
    rows = [model.base_model(input_ids=torch.as_tensor(ids[i : i + 1, :n])) for i, n in enumerate(lengths)]
    return torch.cat([row.last_hidden_state[0] for row in rows])


def gradients(hidden: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    return [g for g in torch.autograd.grad((hidden * direction).sum(), parameters, allow_unused=True) if g is not None]


def check_gradients(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(got) == len(expected) > 0
    whole = torch.stack([gradient.norm() for gradient in expected]).norm()
    for one, other in zip(got, expected, strict=True):
        # The biases of keys have a gradient of 0, of which rounding leaves something.
        assert (one - other).norm() <= tolerance * (other.norm() + 0.01 * whole)


@contextlib.contextmanager
def forwarded(model: PreTrainedModel):
    """Shapes ``(B, L)`` of what goes through a model's trunk."""
    shapes: list[tuple[int, ...]] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, arguments, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


# --- the plan


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=9),
    st.sampled_from([0.0, 3.0, 30.0, 1e9]),
)
def test_every_token_sees_its_own_text_up_to_itself_and_nothing_else(texts, balance):
    lengths = np.array([len(text) for text in texts])
    ids = np.array([text + [7] * (int(lengths.max()) - len(text)) for text in texts])
    packed = pack(ids, lengths, balance)
    visible = packed.together() & (packed.positions[:, None, :] <= packed.positions[:, :, None])
    assert visible.any(2).all(), "padding sees itself: attention to nothing at all is NaN"
    for text, into, places in zip(texts, packed.into, packed.places, strict=True):
        places = places[: len(text)]
        assert packed.input_ids[into, places].tolist() == text
        assert packed.positions[into, places].tolist() == list(range(len(text)))
        for end, place in enumerate(places, start=1):
            assert np.flatnonzero(visible[into, place]).tolist() == sorted(places[:end])


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=6), st.floats(0, 50))
def test_trees_cost_least_among_all_ways_to_cut_the_rows_in_their_order(texts, balance):
    rows = [np.array(text) for text in texts]
    trees = as_trees(rows, balance)
    order = [int(row) for tree in trees for row in tree.rows]
    assert sorted(order) == list(range(len(rows)))

    def size(part: list[int]) -> int:  # each beginning of a text is one token of the tree
        return len({tuple(texts[row][:end]) for row in part for end in range(1, len(texts[row]) + 1)})

    def price(sizes: list[int]) -> float:
        return float(sum(cost(n, n, balance) for n in sizes))

    assert [tree.size for tree in trees] == [size(tree.rows.tolist()) for tree in trees]
    ways = []
    for cuts in range(2 ** (len(order) - 1)):
        parts, last = [], 0
        for end in range(1, len(order) + 1):
            if end == len(order) or cuts >> (end - 1) & 1:
                parts.append(order[last:end])
                last = end
        ways.append(price([size(part) for part in parts]))
    assert price([tree.size for tree in trees]) == pytest.approx(min(ways))


def test_many_or_long_completions_of_a_prompt_become_several_trees():
    def sizes(completions: int, new: int, balance: float) -> list[int]:
        texts = [np.append(np.arange(100), 1000 * (i + 1) + np.arange(new)) for i in range(completions)]
        return [tree.size for tree in as_trees(texts, balance)]

    assert sizes(8, 20, balance=1000) == [100 + 8 * 20]
    # Of the square root of P (P + balance), some 330, in completions; more would cost more in attention than it saves.
    assert sizes(160, 20, balance=1000) == [100 + 16 * 20] * 10
    assert sizes(4, 400, balance=1000) == [500] * 4


def test_short_rows_stand_one_after_the_other():
    lengths = np.array([30, 4, 11, 1, 17, 9, 26])
    packed = pack(random_ids(2, len(lengths), 30), lengths, BALANCE)
    assert worth_packing(packed, lengths, BALANCE)
    assert packed.input_ids.size < 1.2 * lengths.sum() < 0.6 * len(lengths) * 30


def test_rows_of_like_length_are_not_packed():
    for lengths in (np.array([10, 9, 10, 8]), np.array([3])):
        packed = pack(random_ids(2, len(lengths), 10), lengths, BALANCE)
        assert not worth_packing(packed, lengths, BALANCE)


def test_passes_have_the_rows_that_begin_alike_together_and_no_more_tokens_than_allowed():
    texts = list(groups(prompts=6, size=4, prompt=30, new=5)[np.random.default_rng(0).permutation(24)])
    texts[3] = texts[3][:0]  # nothing to read
    taken = [part.tolist() for part in passes(texts, 100, BALANCE)]
    assert sorted(itertools.chain(*taken)) == [i for i in range(24) if i != 3]
    for part in taken:
        assert len({texts[i][:30].tobytes() for i in part}) == 2  # of 50 tokens each


# --- what models make of it


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_have_the_hidden_states_and_gradients_of_rows_alone(architecture, attention):
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    ids, lengths = conversation()
    weights = [p for p in model.base_model.parameters() if p.requires_grad]
    with forwarded(model) as shapes:
        packed = CachedModel(model, 40).hidden_at(ids, lengths, *everywhere(lengths))
    assert sum(rows * width for rows, width in shapes) < 0.7 * lengths.sum()
    expected = alone(model, ids, lengths)
    assert (packed - expected).abs().max() < 2e-5 * (1 + expected.abs().max())
    check_gradients(gradients(packed, weights), gradients(expected, weights), 1e-5)


def test_a_prompt_is_forwarded_once_for_all_its_completions():
    ids, lengths = groups(prompts=3, size=8, prompt=24, new=8), np.full(24, 32)
    with forwarded(LLAMA) as shapes:
        CachedModel(LLAMA, 32).hidden_at(ids, lengths, np.arange(24), lengths - 1)
    assert sum(rows * width for rows, width in shapes) <= 3 * 24 + 24 * 8


def test_log_probs_of_completions_that_share_a_prompt_are_those_of_the_models_own_forward():
    lm, (ids, lengths) = LanguageModel(tiny_model("llama"), tiny_tokenizer()), conversation()
    rows, at = everywhere(lengths - 1)
    tokens = ids[rows, at + 1]
    got = forced_log_probs(lm, 40, ids, lengths, np.full(8, 4), rows, at, tokens, temperature=0.7)
    expected = []
    for row, length in enumerate(lengths):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.as_tensor(ids[row : row + 1, :length])).logits[0, :-1] / 0.7
        expected += logits.log_softmax(-1)[range(length - 1), ids[row, 1:length]].tolist()
    assert np.abs(got - np.array(expected)).max() < 1e-4


@pytest.mark.parametrize("way", ["checkpointed", "lora", "bfloat16"])
def test_gradients_of_packed_rows_are_those_of_rows_alone_also(way):
    lm, (ids, lengths) = LanguageModel(tiny_model("llama"), tiny_tokenizer()), conversation()
    if way == "lora":
        pytest.importorskip("peft")
        lm = add_lora(lm, {"r": 4})
        for name, weight in lm.model.named_parameters():
            if "lora_B" in name:  # zero at first, which stops gradients
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    weights = [p for p in lm.model.parameters() if p.requires_grad]
    context = {
        "checkpointed": lambda: checkpointed(lm.model),
        "lora": contextlib.nullcontext,
        "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    }[way]
    with context():
        packed = gradients(lm.cached(40).hidden_at(ids, lengths, *everywhere(lengths)).float(), weights)
        expected = gradients(alone(lm.model, ids, lengths).float(), weights)
    check_gradients(packed, expected, 5e-2 if way == "bfloat16" else 1e-5)
