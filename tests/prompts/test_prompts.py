"""Prompt sources: what is accepted, what is refused, and drawing from them."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgym import embedded
from textgym.prompts.opening import as_prompt_source, split_prompts
from textgym.prompts.rows import PromptRow

TEXTS = ["the film", "a story", "it is"]
ROWS = [{"prompt": text, "answer": i, "why": None} for i, text in enumerate(TEXTS)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("prompts", [TEXTS, tuple(TEXTS)])
def test_texts_become_rows_without_columns(prompts):
    source = as_prompt_source(prompts)
    assert len(source) == 3
    assert list(source) == [PromptRow(text, {}) for text in TEXTS]


def test_rows_keep_their_other_columns(rng):
    source = as_prompt_source(ROWS)
    assert list(source) == [PromptRow(text, {"answer": i, "why": None}) for i, text in enumerate(TEXTS)]
    assert source.sample(rng) in list(source)


def test_a_dataset_gives_the_same_rows_as_the_list_it_was_made_from():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    assert list(as_prompt_source(dataset)) == list(as_prompt_source(ROWS))
    with pytest.raises(TypeError, match=r"set of splits \(train\); pass one, e.g. dataset\['train'\]"):
        as_prompt_source(datasets.DatasetDict(train=dataset))
    with pytest.raises(ValueError, match="has no 'prompt'; its columns are text, answer"):
        as_prompt_source(datasets.Dataset.from_dict({"text": ["a"], "answer": [1]}))
    with pytest.raises(ValueError, match=r"prompts\[1\]\['prompt'\] is an empty text"):
        as_prompt_source(datasets.Dataset.from_dict({"prompt": ["a", ""]}))
    with pytest.raises(ValueError, match=r"prompts\[0\] is a conversation; pass tokenizer="):
        as_prompt_source(datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "hi"}]]}))
    with pytest.raises(ValueError, match="column 'completions'"):
        as_prompt_source(datasets.Dataset.from_dict({"prompt": ["a"], "completions": ["b"]}))
    with pytest.raises(ValueError, match="prompts is empty"):
        as_prompt_source(datasets.Dataset.from_dict({"prompt": []}))


def test_every_prompt_is_equally_likely(rng):
    source = as_prompt_source(TEXTS)
    counts = Counter(source.sample(rng).prompt for _ in range(3000))
    assert set(counts) == set(TEXTS)
    assert all(900 < count < 1100 for count in counts.values())  # standard deviation 26


def test_the_same_generator_draws_the_same_prompts():
    draws = [
        [as_prompt_source(TEXTS).sample(rng) for _ in range(20)]
        for rng in (np.random.default_rng(7), np.random.default_rng(7))
    ]
    assert draws[0] == draws[1]


def test_a_function_is_given_the_generator(rng):
    source = as_prompt_source(lambda rng: f"{rng.integers(10)} plus {rng.integers(10)} is")
    expected = np.random.default_rng(0)
    assert source.sample(rng).prompt == f"{expected.integers(10)} plus {expected.integers(10)} is"
    assert not hasattr(source, "__len__")
    source = as_prompt_source(lambda rng: {"prompt": "2 plus 2 is", "answer": 4})
    assert source.sample(rng) == PromptRow("2 plus 2 is", {"answer": 4})


def test_prompt_rows_may_be_handed_on(rng):
    row = PromptRow("2 plus 2 is", {"answer": 4})
    assert as_prompt_source(lambda rng: row).sample(rng) == row
    assert list(as_prompt_source([row, row])) == [row, row]
    assert list(as_prompt_source(list(as_prompt_source(ROWS)))) == list(as_prompt_source(ROWS))


@pytest.mark.parametrize(
    ("made", "error", "complaint"),
    [
        (3, TypeError, "what the prompt function 'make' returned must be a text or a dict .* got int"),
        ("", ValueError, "what the prompt function 'make' returned is an empty text"),
        ({"prompt": 3}, TypeError, "'make' returned must be a text, got int"),
        ({"text": "a"}, ValueError, "'make' returned has no 'prompt'; its columns are text"),
        ({"prompt": "a", "prompts": 1}, ValueError, "'make' returned has a column 'prompts'"),
    ],
)
def test_a_function_that_returns_something_else_is_named(rng, made, error, complaint):
    def make(rng):
        return made

    with pytest.raises(error, match=complaint):
        as_prompt_source(make).sample(rng)


def test_a_function_must_keep_its_columns(rng):
    rows = iter([{"prompt": "a", "answer": 1}, "b"])
    source = as_prompt_source(lambda rng: next(rows))
    source.sample(rng)
    with pytest.raises(ValueError, match=r"has the columns \[\], the first row has \['answer'\]"):
        source.sample(rng)


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_none_and_split_names_mean_the_embedded_prompts(monkeypatch, split):
    monkeypatch.setattr(embedded, "load_prompts", lambda split: [f"{split} prompt"])
    assert [row.prompt for row in as_prompt_source(split)] == [f"{split or 'train'} prompt"]


@pytest.mark.parametrize(
    ("prompts", "error", "complaint"),
    [
        ([], ValueError, "prompts is empty"),
        (["a", ""], ValueError, r"prompts\[1\] is an empty text"),
        (["a", 3], TypeError, r"prompts\[1\] must be a text, as prompts\[0\] is, got int"),
        (["a", {"prompt": "b"}], TypeError, r"prompts\[1\] must be a text, as prompts\[0\] is, got dict"),
        ([3], TypeError, r"prompts\[0\] must be a text or a dict with a 'prompt', got int"),
        (
            [{"prompt": "a"}, "b"],
            TypeError,
            r"prompts\[1\] must be a text or a dict with a 'prompt', got str",
        ),
        ([{"prompt": "a"}, {"prompt": None}], TypeError, r"prompts\[1\] must be a text, got NoneType"),
        ([{"text": "a"}], ValueError, r"prompts\[0\] has no 'prompt'; its columns are text"),
        ([{"prompt": "a", 3: 1}], TypeError, r"prompts\[0\] has the column 3; column names must be texts"),
        ("the film", TypeError, r"'the film' is a single text; pass a list, \['the film'\]"),
        (b"the film", TypeError, "prompts must be a list of texts, .* got bytes"),
        (3, TypeError, "prompts must be a list of texts, .* got int"),
        (iter(["a"]), TypeError, "prompts must be a list of texts, .* got list_iterator"),
        (dict, TypeError, "prompts must be a list of texts, .* got type"),
        *[
            ([{"prompt": "a", name: 1}], ValueError, rf"prompts\[0\] has a column '{name}'.*rename it")
            for name in ("prompts", "completions", "completion_ids")
        ],
    ],
)
def test_bad_prompts_are_refused_naming_where(prompts, error, complaint):
    with pytest.raises(error, match=complaint):
        as_prompt_source(prompts)


def test_white_space_is_a_prompt():
    assert [row.prompt for row in as_prompt_source(["\n", " "])] == ["\n", " "]


def test_index_out_of_range():
    with pytest.raises(IndexError, match="prompt 3 of 3"):
        as_prompt_source(TEXTS)[3]


def test_deep_copies_share_the_prompts():
    source = as_prompt_source(ROWS)
    assert copy.deepcopy({"prompts": source})["prompts"] is source
    assert as_prompt_source(source) is source


def test_later_changes_to_the_list_change_nothing():
    texts = list(TEXTS)
    source = as_prompt_source(texts)
    texts.clear()
    assert len(source) == 3


SOME_TEXTS = st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=40)


@given(SOME_TEXTS, st.integers(0, 2**40), st.data())
def test_a_prompt_is_never_in_both_parts_whatever_the_order_of_the_rows(texts, seed, data):
    different = len(set(texts))
    if different < 2:
        return
    held_out = data.draw(st.integers(1, different - 1))
    rows = [{"prompt": text, "row": i} for i, text in enumerate(texts)]
    train, kept = split_prompts(rows, held_out, seed)
    assert {row.prompt for row in train}.isdisjoint(row.prompt for row in kept)
    assert sorted(row.columns["row"] for part in (train, kept) for row in part) == list(range(len(texts)))
    assert len({row.prompt for row in kept}) == held_out
    assert [row.columns["row"] for row in train] == sorted(row.columns["row"] for row in train)
    _, again = split_prompts(data.draw(st.permutations(texts)), held_out, seed)
    assert {row.prompt for row in again} == {row.prompt for row in kept}


def test_the_held_out_prompts_are_the_same_everywhere_and_others_with_another_seed():
    texts = [f"prompt {i}" for i in range(200)]
    held = {seed: {row.prompt for row in split_prompts(texts, seed=seed)[1]} for seed in range(20)}
    assert all(len(prompts) == 20 for prompts in held.values())
    assert len(set(map(frozenset, held.values()))) == 20
    counts = Counter(prompt for prompts in held.values() for prompt in prompts)
    assert max(counts.values()) <= 8  # each prompt is held out by 2 of 20 seeds on average
    # Python's own hashes would differ from process to process.
    assert [row.prompt for row in split_prompts(list("abcdefgh"), 3, seed=5)[1]] == ["a", "e", "g"]


def test_a_data_set_is_split_without_reading_it_into_memory():
    datasets = pytest.importorskip("datasets")
    texts = [f"prompt {i % 50}" for i in range(100)]
    train, held_out = split_prompts(datasets.Dataset.from_dict({"prompt": texts, "n": list(range(100))}), 0.2)
    assert len(train) == 80
    assert len(held_out) == 20
    assert [row.prompt for row in train] == [texts[row.columns["n"]] for row in train]


@pytest.mark.parametrize(
    ("prompts", "held_out", "error", "complaint"),
    [
        (TEXTS, 0.1, ValueError, "held_out=0.1 of 3 different prompts leaves none in the held-out part; .* 1 to 2"),
        (TEXTS, 0.9, ValueError, "held_out=0.9 of 3 different prompts leaves none in the training part"),
        (TEXTS, 3, ValueError, "held_out=3 of 3 different prompts leaves none in the training part"),
        (["a", "a"], 1, ValueError, "held_out=1: there is only one prompt, 'a', which can't be in both parts"),
        (TEXTS, 0, ValueError, "held_out=0 must be a share greater than 0 and less than 1, or a whole number"),
        (TEXTS, -2, ValueError, "held_out=-2 must be"),
        (TEXTS, 1.0, ValueError, "held_out=1.0 must be"),
        (TEXTS, float("nan"), ValueError, "held_out=nan must be"),
        (TEXTS, "2", TypeError, "held_out='2' must be a share"),
        (TEXTS, True, TypeError, "held_out=True must be a share"),
        (lambda rng: "a", 1, TypeError, "a PromptFunction has no fixed prompts to divide"),
    ],
)
def test_a_split_with_an_empty_part_is_refused(prompts, held_out, error, complaint):
    with pytest.raises(error, match=complaint):
        split_prompts(prompts, held_out)


def test_the_seed_of_a_split_is_a_whole_number():
    with pytest.raises(TypeError, match="seed=None must be a whole number"):
        split_prompts(TEXTS, 1, seed=None)
