"""Data of reward models: what files and rows hold, and their split."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from tiny_reward_training import pairs, scored

from textgym.reward_training import RewardData, RewardRow, load_reward_data, split_by_prompt, train_reward


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix, tmp_path):
    rows = pairs(5, margin=0.5)
    path = tmp_path / f"pairs.{suffix}"
    dataset = Dataset.from_list(rows)
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "parquet":
        dataset.to_parquet(path)
    else:
        separator = "," if suffix == "csv" else "\t"
        path.write_text("\n".join(separator.join(map(str, row)) for row in [rows[0], *(r.values() for r in rows)]))
    expected = tuple(RewardRow(r["prompt"], r["chosen"], r["rejected"], 0.5) for r in rows)
    assert load_reward_data(path).rows == load_reward_data(dataset).rows == load_reward_data(rows).rows == expected


def test_a_missing_column_is_named_with_the_columns_there_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n{"prompt": "x", "chosen": "a"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2 has no column 'rejected'; its columns are 'prompt', 'chosen'"):
        load_reward_data(path)
    with pytest.raises(ValueError, match=r"row 0 has no column 'rating'; its columns are 'text', 'score'"):
        load_reward_data([{"text": "a", "score": 1}], kind="scores", columns={"score": "rating"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data has no rows"),
        ([{"text": "a"}], "row 0 has neither a column 'chosen'"),
        ([{"text": "a", "score": 1, "label": "x"}], "could be scores or labels"),
        ([{"text": "a", "score": "much"}], "'score' must be a number, got 'much'"),
        ([{"text": "a", "score": float("nan")}], "must be a finite number, got nan"),
        ([{"text": " ", "score": 1}], "row 0 has no text"),
        ([{"text": "\ud800", "score": 1}], "half of a surrogate pair at character 1"),
        ([{"score": 1}], "has no column 'text'; its columns are 'score'"),
        ([{"completion": "a", "score": 1}], "has no column 'prompt'"),
        ([{"prompt": "p", "text": "a", "score": 1}], "has a prompt and a text, but no completion"),
        ([{"prompt": "p", "chosen": "a", "rejected": "a"}], "the same text 'a'"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}], "the margin is -1.0"),
        ([{"text": "a", "label": "x"}], "has the one class 'x'"),
    ],
)
def test_bad_rows_are_errors_that_say_where_and_what(rows, message):
    with pytest.raises(ValueError, match=message):
        load_reward_data(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a"], "row 0 must be an object"),
        ([{"text": 3, "score": 1}], "'text' must be a text, got int 3"),
        ([{"text": "a", "score": True}], "'score' must be a number, got bool"),
        ([{"text": "a", "label": 0.5}], "'label' must be a class, a text or a whole number, got float"),
    ],
)
def test_values_of_the_wrong_type_are_type_errors(rows, message):
    with pytest.raises(TypeError, match=message):
        load_reward_data(rows)


def test_broken_files_are_errors_that_name_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "score": 1}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a.jsonl:2 is broken JSON"):
        load_reward_data(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*b.csv"):
        load_reward_data(tmp_path / "b.csv")
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(ValueError, match=r"ends in '.txt'; it must end in one of .jsonl"):
        load_reward_data(path)


def test_classes_are_in_order_of_number_or_as_given_and_others_are_refused():
    rows = [{"text": "a", "label": label} for label in ("10", 9, "2")]
    assert load_reward_data(rows).classes == ("2", "9", "10")
    assert [row.target for row in load_reward_data(rows).rows] == [2, 1, 0]
    assert load_reward_data(rows, classes=["10", "9", "2"]).rows[0].target == 0
    with pytest.raises(ValueError, match=r"row 2: the label '2' is none of the classes '9', '10'"):
        load_reward_data(rows, classes=["9", "10"])


@pytest.mark.parametrize("seed", range(3))
def test_no_prompt_is_on_both_sides_of_a_split_and_no_row_is_lost(seed):
    data = load_reward_data(pairs(200))
    training, validation = split_by_prompt(data, 0.2, seed)
    prompts = [{row.prompt for row in part.rows} for part in (training, validation)]
    assert not prompts[0] & prompts[1]
    assert sorted(map(repr, training.rows + validation.rows)) == sorted(map(repr, data.rows))
    assert len(prompts[1]) == round(0.2 * len(prompts[0] | prompts[1]))
    assert split_by_prompt(data, 0.2, seed) == (training, validation)
    assert split_by_prompt(data, 0.2, seed + 1) != (training, validation)


def test_pairs_without_prompts_that_share_a_text_stay_together():
    chain = [RewardRow("", a, b, 0.0) for a, b in ("ab", "bc", "xy", "yz")]
    for seed in range(4):
        parts = split_by_prompt(RewardData("preferences", tuple(chain)), 0.5, seed)
        assert {part.rows for part in parts} == {tuple(chain[:2]), tuple(chain[2:])}
    with pytest.raises(ValueError, match="all share one prompt"):
        split_by_prompt(RewardData("preferences", tuple(chain[:2])), 0.5)


def test_validation_data_with_a_prompt_of_the_training_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1 prompts .* are in the training data, too, such as 'the film'"):
        train_reward(
            [*scored(20), {"text": "the film", "score": 1}], tmp_path, validation=[{"text": "the film", "score": 1}]
        )
