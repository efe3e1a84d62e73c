"""Prompt sources: what is accepted, what is refused, and drawing from them."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest

from textgym import embedded
from textgym.prompts import PromptRow, as_prompt_source

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
    with pytest.raises(ValueError, match="no column 'prompt'; its columns are text, answer"):
        as_prompt_source(datasets.Dataset.from_dict({"text": ["a"], "answer": [1]}))
    with pytest.raises(ValueError, match=r"prompts\[1\]\['prompt'\] is an empty text"):
        as_prompt_source(datasets.Dataset.from_dict({"prompt": ["a", ""]}))
    with pytest.raises(TypeError, match=r"prompts\[0\]\['prompt'\] must be a text, got list"):
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
        (
            [{"prompt": "a", "x": 1}, {"prompt": "b"}],
            ValueError,
            r"prompts\[1\] has the columns \[\].*\['x'\]",
        ),
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
