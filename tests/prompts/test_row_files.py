"""Files of rows as people have them: compressed, in lines or lists, in shards and splits, with columns of any type."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from textgym.agents.callbacks.state_files import read_state, write_state
from textgym.prompts.files import load_prompt_file
from textgym.prompts.row_files import read_rows
from textgym.prompts.rows import PromptRow

ROWS = [{"prompt": "the film", "n": 1}, {"prompt": "a story", "n": 2}]
EXPECTED = [PromptRow("the film", {"n": 1}), PromptRow("a story", {"n": 2})]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def parquet(path: Path, table: dict[str, Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(pyarrow.table(table), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.json", "\n" + LINES + "\n\n"),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", json.dumps({"version": "1", "rows": ROWS, "columns": ["prompt", "n"]}, indent=1)),
        ("a.jsonl", json.dumps({"data": ROWS}, indent=1)),
        ("a.jsonl", "\ufeff" + LINES),
    ],
)
def test_lines_and_lists_are_told_apart_by_what_is_in_the_file(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert list(load_prompt_file(tmp_path / name)) == EXPECTED


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize(("kind", "content"), [("jsonl", LINES), ("json", json.dumps(ROWS))])
def test_compressed_files_hold_the_same_rows(tmp_path, suffix, pack, kind, content):
    path = tmp_path / f"a.{kind}.{suffix}"
    path.write_bytes(pack(content.encode()))
    assert list(load_prompt_file(path)) == EXPECTED
    path.write_bytes(pack(content.encode())[:-9])
    with pytest.raises(ValueError, match=rf"a.{kind}.{suffix} can't be unpacked as .{suffix}"):
        load_prompt_file(path)


def test_a_compressed_csv_file_and_a_cell_of_any_length(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(f'prompt,n\n"{long}",1\n'.encode()))
    assert list(load_prompt_file(tmp_path / "a.csv.gz")) == [PromptRow(long, {"n": "1"})]


def test_splits_within_one_file_are_chosen_by_name(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert list(load_prompt_file(tmp_path / "a.json", split="test")) == EXPECTED[:1]
    with pytest.raises(ValueError, match="split=None: .* has the splits 'train', 'test'; give one of them"):
        load_prompt_file(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["part-0.parquet", "part-1.parquet"], None),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], None),
        (
            ["train-00000-of-00002-a1b2.parquet", "train-00001-of-00002-c3d4.parquet", "test-00000-of-00001.parquet"],
            "train",
        ),
        (
            ["train_prefs-00000-of-00002.parquet", "train_prefs-00001-of-00002.parquet", "test_sft.parquet"],
            "train_prefs",
        ),
        (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"], "train"),
    ],
)
def test_a_folder_of_shards_is_one_data_set_with_its_splits(tmp_path, names, split):
    for i, name in enumerate(names):
        row = ROWS[i] if i < 2 else {"prompt": "another", "n": 3}
        parquet(tmp_path / name, {key: [value] for key, value in row.items()})
    (tmp_path / "README.md").write_text("# data")
    assert list(load_prompt_file(tmp_path, split=split)) == EXPECTED
    if split is not None:
        with pytest.raises(ValueError, match=f"split=None: .* has the splits .*'{split}'"):
            load_prompt_file(tmp_path)


def test_shards_of_lines_are_read_as_those_of_parquet_and_kinds_do_not_mix(tmp_path):
    for i, row in enumerate(ROWS):
        (tmp_path / f"part-{i}.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert list(load_prompt_file(tmp_path)) == EXPECTED
    (tmp_path / "more.csv").write_text("prompt,n\na,1\n")
    with pytest.raises(ValueError, match="has files of several kinds, .csv, .jsonl; name one"):
        load_prompt_file(tmp_path)


def test_a_column_that_a_shard_lacks_is_none_there(tmp_path):
    parquet(tmp_path / "0.parquet", {"prompt": ["a"], "n": [1]})
    parquet(tmp_path / "1.parquet", {"prompt": ["b"]})
    assert [row.columns["n"] for row in load_prompt_file(tmp_path)] == [1, None]


def test_columns_may_be_dropped_and_renamed(tmp_path):
    rows = [{"prompt": "a", "completions": ["b"], "n": 1}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    parquet(tmp_path / "a.parquet", {name: [value] for name, value in rows[0].items()})
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        with pytest.raises(ValueError, match=r"column 'completions', .* --rename-column completions=.*--drop-column"):
            load_prompt_file(path)
        assert load_prompt_file(path, drop_columns=["completions"])[0].columns == {"n": 1}
        assert load_prompt_file(path, rename_columns={"completions": "others"})[0].columns == {"others": ["b"], "n": 1}
        for options in ({"drop_columns": ["m"]}, {"rename_columns": {"m": "k"}}):
            with pytest.raises(ValueError, match=r"_columns names 'm', but .* its columns are 'prompt', 'compl"):
                load_prompt_file(path, **options)


def test_columns_of_any_type_are_what_a_checkpoint_gives_back(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    zone = datetime.timezone.utc
    columns = {
        "day": pyarrow.array([datetime.date(2026, 11, 27)]),
        "at": pyarrow.array([datetime.datetime(2026, 11, 27, 22, 1, 2, 3000)], pyarrow.timestamp("ns")),
        "there": pyarrow.array([datetime.datetime(2026, 11, 27, tzinfo=zone)], pyarrow.timestamp("us", "UTC")),
        "time": pyarrow.array([datetime.time(1, 2, 3, 4)], pyarrow.time64("us")),
        "took": pyarrow.array([datetime.timedelta(days=1, microseconds=5)], pyarrow.duration("us")),
        "price": pyarrow.array([Decimal("1.50")], pyarrow.decimal128(5, 2)),
        "raw": pyarrow.array([b"\x00\xff"]),
        "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "nested": [{"when": datetime.date(2026, 1, 1), "list": [1.5, None]}],
    }
    path = parquet(tmp_path / "a.parquet", {"prompt": ["a"], **columns})
    [row] = load_prompt_file(path)
    assert row.columns["at"] == datetime.datetime(2026, 11, 27, 22, 1, 2, 3000)
    assert row.columns["map"] == [("a", 1)]
    write_state(tmp_path, row.columns)
    assert read_state(tmp_path) == row.columns


def test_a_column_that_a_checkpoint_cannot_hold_is_refused_at_load(tmp_path):
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    fine = pyarrow.array([1_234_567_890_123_456_789], pyarrow.timestamp("ns"))
    path = parquet(tmp_path / "a.parquet", {"prompt": ["a"], "when": fine})
    with pytest.raises(ValueError, match=r"a.parquet: the column 'when' has timestamp\[ns\].* --drop-column when"):
        load_prompt_file(path)
    assert load_prompt_file(path, drop_columns=["when"])[0] == PromptRow("a")
    features = datasets.Features(prompt=datasets.Value("string"), picture=datasets.Image())
    dataset = datasets.Dataset.from_dict({"prompt": ["a"], "picture": [None]}, features)
    dataset.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved: the column 'picture' holds images, .* --drop-column picture"):
        load_prompt_file(tmp_path / "saved")
    assert load_prompt_file(tmp_path / "saved", drop_columns=["picture"])[0] == PromptRow("a")


def test_broken_pages_of_parquet_name_the_file(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"prompt": [f"prompt {i}" for i in range(1000)]})
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.parquet is not a Parquet file, or is broken: "):
        load_prompt_file(path)


def test_rows_of_a_table_are_read_in_slices_as_alone(tmp_path):
    rows = read_rows(parquet(tmp_path / "a.parquet", {"prompt": list("abcde")})).rows
    assert [row["prompt"] for row in rows[1:4]] == ["b", "c", "d"]
    assert [row["prompt"] for row in rows[::-2]] == ["e", "c", "a"]
    assert rows[4] == {"prompt": "e"}
    with pytest.raises(IndexError):
        rows[5]


def test_json_of_messages_in_a_cell_or_a_column_of_texts_is_a_conversation(tmp_path):
    from test_layouts import ASKED, USER, chat_tokenizer

    text = json.dumps([USER])
    (tmp_path / "a.csv").write_text("prompt\n" + '"' + text.replace('"', '""') + '"\n')
    path = parquet(tmp_path / "a.parquet", {"prompt": [text]})
    for source in (tmp_path / "a.csv", path):
        assert load_prompt_file(source, tokenizer=chat_tokenizer())[0].prompt == ASKED
