"""Prompts from files: what is read from each kind, and what is said about a file that is broken."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tiny_models import BOS, EOS, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from textgym.chat.chat_prompts import chat_prompt
from textgym.language_model import LanguageModel
from textgym.prompts.files import load_prompt_file
from textgym.prompts.opening import as_prompt_source
from textgym.prompts.rows import PromptRow

ROWS = [
    {"prompt": "the film", "answer": "good", "n": 3},
    {"prompt": 'a "story",\nin two lines', "answer": "", "n": -1},
    {"prompt": " das Ende für 猫 ", "answer": "x", "n": 0},
]
EXPECTED = [PromptRow(row["prompt"], {"answer": row["answer"], "n": row["n"]}) for row in ROWS]
CHAT = [{"role": "system", "content": "be fine"}, {"role": "user", "content": "is it good ?"}]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---------------------------------------------------------------------------------------------- kinds of files


def test_json_lines_are_the_rows_that_were_written_and_blank_lines_nothing(tmp_path):
    lines = [json.dumps(ROWS[0]), "", json.dumps(ROWS[1], ensure_ascii=False), "  ", json.dumps(ROWS[2])]
    assert list(load_prompt_file(written(tmp_path / "a.jsonl", "\n".join(lines)))) == EXPECTED
    assert list(load_prompt_file(written(tmp_path / "b.ndjson", "\r\n".join([*lines, ""])))) == EXPECTED


def test_a_line_separator_inside_a_json_text_ends_no_line(tmp_path):
    path = written(tmp_path / "a.jsonl", json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert [row.prompt for row in load_prompt_file(path)] == ["a\u2028b\x85c"]


def test_a_json_list_has_objects_or_texts(tmp_path):
    assert list(load_prompt_file(written(tmp_path / "a.json", json.dumps(ROWS, indent=1)))) == EXPECTED
    texts = load_prompt_file(written(tmp_path / "b.json", '["the film", "a story"]'))
    assert list(texts) == [PromptRow("the film"), PromptRow("a story")]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_separated_values_are_texts_and_may_hold_quotes_and_line_breaks(tmp_path, suffix, delimiter):
    path = tmp_path / f"a.{suffix}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["n", "prompt", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    expected = [PromptRow(row["prompt"], {"answer": row["answer"], "n": str(row["n"])}) for row in ROWS]
    assert list(load_prompt_file(path)) == expected


def test_csv_as_pandas_writes_it_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    assert [row.prompt for row in load_prompt_file(tmp_path / "a.csv")] == [row["prompt"] for row in ROWS]


def test_plain_text_is_a_prompt_a_line_with_its_spaces(tmp_path):
    path = written(tmp_path / "a.txt", "\ufeffthe film \r\n\n  \n a story\x0cwith a form feed")
    assert list(load_prompt_file(path)) == [PromptRow("the film "), PromptRow(" a story\x0cwith a form feed")]


@pytest.mark.parametrize("kind", ["folder", "splits", "parquet"])
def test_data_sets_on_disk_give_the_rows_they_were_made_from(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    dataset, split = datasets.Dataset.from_list(ROWS), None
    if kind == "folder":
        dataset.save_to_disk(tmp_path / "a")
    elif kind == "splits":
        datasets.DatasetDict(train=dataset.select([0]), test=dataset).save_to_disk(tmp_path / "a")
        with pytest.raises(ValueError, match=r"split=None: .* has the splits 'train', 'test'; give one"):
            load_prompt_file(tmp_path / "a")
        with pytest.raises(ValueError, match=r"split='valid': .* has the splits 'train', 'test'"):
            load_prompt_file(tmp_path / "a", split="valid")
        split = "test"
    path = tmp_path / "a"
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        dataset.to_parquet(path)
    else:
        with pytest.raises(ValueError, match=r"no column 'text'; its columns are 'prompt', 'answer', 'n'"):
            load_prompt_file(path, split=split, prompt_column="text")
    source = load_prompt_file(path, split=split)
    assert list(source) == EXPECTED
    assert source.sample(np.random.default_rng(0)) in EXPECTED


def test_a_data_set_may_call_its_prompts_otherwise(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"question": ["a", "b"], "answer": [1, 2]}).save_to_disk(tmp_path / "a")
    expected = [PromptRow("a", {"answer": 1}), PromptRow("b", {"answer": 2})]
    assert list(load_prompt_file(tmp_path / "a", prompt_column="question")) == expected
    lines = '{"question": "a", "answer": 1}\n{"question": "b", "answer": 2}\n'
    assert list(load_prompt_file(written(tmp_path / "a.jsonl", lines), prompt_column="question")) == expected


def test_a_data_set_that_the_hub_cannot_give_is_an_error_at_once(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="prompts='nobody/nothing' is not a file here, and can't be loaded from"):
        load_prompt_file("nobody/nothing")


# ---------------------------------------------------------------------------------------------- conversations


def chat_tokenizer(adds_bos: bool = False, template: str = CHATML) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return tokenizer


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_messages_become_the_text_that_the_template_makes_and_reach_the_reward(tmp_path, column):
    path = written(tmp_path / "a.jsonl", json.dumps({column: CHAT, "answer": "yes"}) + "\n")
    expected = PromptRow(
        "<|system|> be fine\n<|user|> is it good ?\n<|assistant|>", {"answer": "yes", "messages": CHAT}
    )
    tokenizer = chat_tokenizer()
    assert list(load_prompt_file(path, tokenizer=tokenizer)) == [expected]
    assert list(as_prompt_source(str(path), tokenizer)) == [expected]


def test_messages_in_a_data_set_become_texts_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"messages": CHAT, "n": 1}] * 2).save_to_disk(tmp_path / "a")
    source = load_prompt_file(tmp_path / "a", tokenizer=chat_tokenizer())
    assert [row.prompt for row in source] == ["<|system|> be fine\n<|user|> is it good ?\n<|assistant|>"] * 2
    assert source[1].columns["n"] == 1


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_that_begins_with_bos_gives_the_models_tokens_with_one_bos(adds_bos):
    tokenizer = chat_tokenizer(adds_bos, "{{ bos_token }}" + CHATML)
    meant = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert meant.count(BOS) == 1
    prompt = chat_prompt(CHAT, tokenizer)
    model = LanguageModel(tiny_model("llama"), tokenizer)
    assert model.encode(prompt) == meant
    assert prompt.startswith("<bos>") is not adds_bos


def test_no_bos_stands_before_what_a_template_begins_otherwise():
    tokenizer = chat_tokenizer(adds_bos=True)
    meant = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    model = LanguageModel(tiny_model("llama"), tokenizer)
    assert model.encode(chat_prompt(CHAT, tokenizer)) == meant
    assert BOS not in meant
    assert model.encode("the film")[0] == BOS


def test_a_bos_that_can_not_be_left_out_is_told():
    bare = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    with pytest.warns(UserWarning, match=r"begins with \['<bos>', .*the template itself asks for"):
        assert chat_prompt(CHAT, chat_tokenizer(True, bare)).startswith("be fine")


def test_a_template_that_ends_in_eos_gives_the_model_that_end():
    tokenizer = chat_tokenizer(template=CHATML + "{{ eos_token }}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt = chat_prompt(CHAT, tokenizer)
    assert tokenizer(prompt)["input_ids"][-1] == EOS
    assert LanguageModel(tiny_model("llama"), tokenizer).encode(prompt)[-1] == EOS


@pytest.mark.parametrize(
    ("messages", "error", "complaint"),
    [
        ([], ValueError, "a.jsonl:1: 'messages' has no messages"),
        (["hi"], TypeError, "message 1 must be an object with 'role' and 'content', got str"),
        ([{"role": "user"}], TypeError, "message 1 needs a text as 'content'; it has role"),
        ([{"role": "user", "content": None}], TypeError, "message 1 needs a text as 'content'; got NoneType"),
        ([{"from": "narrator", "value": "x"}], ValueError, "message 1 is from 'narrator'; known are human, user"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            ValueError,
            "a.jsonl:1: 'messages': message 1 has a part of type 'image_url'; only texts can be read",
        ),
        ([{"role": "tool", "content": "x"}], ValueError, "a.jsonl:1: .* refuses it: no tools here"),
    ],
)
def test_broken_conversations_are_refused_naming_the_line(tmp_path, messages, error, complaint):
    template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + CHATML
    path = written(tmp_path / "a.jsonl", json.dumps({"messages": messages}))
    with pytest.raises(error, match=complaint):
        load_prompt_file(path, tokenizer=chat_tokenizer(template=template))


def test_a_conversation_needs_a_tokenizer_with_a_template(tmp_path):
    path = written(tmp_path / "a.jsonl", json.dumps({"messages": CHAT}))
    with pytest.raises(ValueError, match=r"a.jsonl:1: 'messages' is a conversation; pass tokenizer="):
        load_prompt_file(path)
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "my/base-model"
    with pytest.raises(ValueError, match="the tokenizer 'my/base-model' has no chat template"):
        load_prompt_file(path, tokenizer=tokenizer)


# ---------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("name", "content", "error", "complaint"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', ValueError, r"a.jsonl:3 is broken JSON: .* at column 15"),
        ("a.jsonl", '{"prompt": "a"}\n"b"\n', TypeError, r"a.jsonl:2 must be an object with 'prompt', got str"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', ValueError, r"a.jsonl:2 has no column 'prompt'; .* 'text'\."),
        ("a.jsonl", "{}", ValueError, r"a.jsonl:1 has no column 'prompt'; its columns are none"),
        ("a.jsonl", '{"prompt": 3}', TypeError, r"a.jsonl:1: 'prompt' must be a text, got int"),
        ("a.jsonl", '{"prompt": null}', TypeError, r"a.jsonl:1: 'prompt' must be a text, got NoneType"),
        ("a.jsonl", '{"prompt": ""}', ValueError, r"a.jsonl:1: 'prompt' is an empty text"),
        ("a.jsonl", r'{"prompt": "a\ud800"}', ValueError, r"a.jsonl:1: 'prompt' has half of a surrogate pair at .* 2"),
        ("a.jsonl", '{"prompt": "a", "completions": 1}', ValueError, r"a.jsonl:1 has a column 'completions'"),
        (
            "a.jsonl",
            f'{{"prompt": "a"}}\n{{"prompt": "b", "n": {"9" * 5000}}}',
            ValueError,
            r"a.jsonl:2 can't be read: ",
        ),
        ("a.json", f'["a", {"9" * 5000}]', ValueError, r"a.json:1 can't be read: "),
        (
            "a.jsonl",
            '{"prompt": "[{\\"role\\": \\"user"}',
            ValueError,
            "a.jsonl:1: 'prompt' begins as a conversation in",
        ),
        ("a.jsonl.gz", "not packed", ValueError, "a.jsonl.gz can't be unpacked as .gz"),
        ("a.jsonl", "[" * 100_000, ValueError, "a.jsonl:1 is nested too deeply"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}', ValueError, r"a.jsonl:2 is not UTF-8 \(byte 28\)"),
        ("a.jsonl", "", ValueError, "a.jsonl' has no prompts"),
        ("a.json", '[\n"a",\n]', ValueError, r"a.json:\d is broken JSON"),
        ("a.json", '{"prompt": "a"}', TypeError, "a.json must be a list of texts or of objects, got dict"),
        ("a.json", '["a", 3]', TypeError, r"a.json\[1\] must be an object with 'prompt', got int"),
        ("a.json", "[]", ValueError, "a.json' has no prompts"),
        ("a.json", " ", ValueError, "a.json' has no prompts"),
        ("a.csv", "text,n\na,1\n", ValueError, r"a.csv:2 has no column 'prompt'; its columns are 'text', 'n'"),
        ("a.csv", 'prompt,n\n"a\nb",1\nc,1,2\n', ValueError, "a.csv:4 has 3 values for 2 columns"),
        ("a.csv", 'prompt,n\n"a"b,1\n', ValueError, "a.csv:2 is broken CSV"),
        ("a.csv", 'prompt,n\n"a,1\n', ValueError, "a.csv:2 is broken CSV: unexpected end of data"),
        ("a.csv", "prompt,prompt\na,1\n", ValueError, "a.csv:1 names the column 'prompt' twice"),
        ("a.csv", ",prompt\n0,a\n", ValueError, "a.csv:1: column 1 has no name"),
        ("a.csv", "prompt,n\n,1\n", ValueError, "a.csv:2: 'prompt' is an empty text"),
        ("a.csv", "prompt\n", ValueError, "a.csv' has no prompts"),
        ("a.csv", "", ValueError, "a.csv' has no prompts"),
        ("a.txt", "\n \n", ValueError, "a.txt' has no prompts"),
        ("a.txt", "a".encode("utf-16"), ValueError, "a.txt:1 is not UTF-8"),
        ("a.parquet", "PAR", ValueError, "a.parquet is not a Parquet file"),
        ("a.xlsx", "a", ValueError, r"a.xlsx' ends in '.xlsx'; a prompt file ends in one of .jsonl, .ndjson, .json,"),
        ("prompts", "a", ValueError, "prompts' ends in ''; a prompt file ends in one of"),
    ],
)
def test_broken_files_are_refused_naming_the_line(tmp_path, name, content, error, complaint):
    with pytest.raises(error, match=complaint):
        load_prompt_file(written(tmp_path / name, content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    for missing in (tmp_path / "nobody", tmp_path / "a.jsonl", "a.jsonl", "./nobody/nothing", "~/no/such"):
        with pytest.raises(FileNotFoundError, match=r"there is no file or folder '.*(nobody|a.jsonl|nothing|such)'"):
            load_prompt_file(missing)


def test_a_folder_that_is_no_data_set_and_a_split_of_a_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is none that datasets' save_to_disk wrote"):
        load_prompt_file(tmp_path)
    with pytest.raises(ValueError, match="split='train': .* is a single file"):
        load_prompt_file(written(tmp_path / "a.txt", "a"), split="train")


def test_two_columns_for_the_prompt_are_one_too_many(tmp_path):
    path = written(tmp_path / "a.jsonl", '{"prompt": "a", "question": "b"}')
    with pytest.raises(ValueError, match="a.jsonl:1 has a column 'prompt' beside prompt_column='question'"):
        load_prompt_file(path, prompt_column="question")


# ---------------------------------------------------------------------------------------------- the environment


def test_the_environment_takes_the_path_of_a_file(tmp_path):
    path = written(tmp_path / "mine.jsonl", '{"prompt": "the film", "wanted": "good"}\n')
    seen = []

    def reward(prompts: list[str], completions: list[str], wanted: list[str]) -> list[float]:
        seen.extend(wanted)
        return [float(w in c) for w, c in zip(wanted, completions, strict=True)]

    for prompts in (path, str(path)):
        env = gym.make("TextGen-v0", prompts=prompts, reward=reward, kl_coef=0, max_new_tokens=2)
        _, info = env.reset(seed=0)
        assert info["prompt"] == "the film"
        env.step(env.action_space.sample())
        env.close()
    assert set(seen) == {"good"}
    with pytest.raises(FileNotFoundError, match="there is no file or folder 'no-such.jsonl'"):
        gym.make("TextGen-v0", prompts="no-such.jsonl")
