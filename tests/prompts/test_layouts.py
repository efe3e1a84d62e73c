"""The layouts in which people have prompts, answers and preferences: each is read as what it says."""

from __future__ import annotations

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tiny_models import tiny_model, tiny_tokenizer

from textgym.chat.chat_prompts import chat_prompt
from textgym.language_model import LanguageModel
from textgym.prompts.files import load_prompt_file
from textgym.prompts.layouts import read_row
from textgym.prompts.opening import as_prompt_source, split_prompts
from textgym.prompts.rows import PromptRow

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}"
    "{% for c in m.tool_calls %}call {{ c.function.name }}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
USER = {"role": "user", "content": "is it good ?"}
ANSWER = {"role": "assistant", "content": "very good"}
WORSE = {"role": "assistant", "content": "bad"}
ASKED = "<|user|> is it good ?<eos>\n<|assistant|> "


def chat_tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


def only(row: Any, tokenizer: Any) -> PromptRow:
    [read] = as_prompt_source([row], tokenizer)
    return read


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"conversation": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "is it good ?"}, {"from": "gpt", "value": "very good"}]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "very good"},
        {"prompt": [USER], "completion": [USER, ANSWER]},
        {"prompt": "is it good ?", "completion": [ANSWER]},
        {"prompt": "is it good ?", "messages": [USER, ANSWER]},
        {"instruction": "is it good ?", "input": "", "output": "very good"},
        {"instruction": "is it good ?", "context": None, "response": "very good"},
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        {"messages": str([USER, ANSWER])},
        {
            "messages": [
                {**USER, "content": [{"type": "text", "text": "is it "}, {"type": "text", "text": "good ?"}]},
                ANSWER,
            ]
        },
        {"messages": [{**USER, "name": None, "tool_calls": None}, ANSWER]},
    ],
)
def test_every_layout_of_one_exchange_gives_the_same_prompt_and_answer(row, tokenizer):
    read = only({**row, "n": 3}, tokenizer)
    assert (read.prompt, read.columns["completion"], read.columns["n"]) == (ASKED, "very good", 3)
    assert read.columns["messages"] == [USER]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"prompt": "is it good ?", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"prompt": "is it good ?", "chosen": [ANSWER], "rejected": [WORSE]},
        {"conversations": [{"from": "human", "value": "is it good ?"}], "chosen": ANSWER, "rejected": WORSE},
        {"prompt": [USER], "chosen": "very good", "rejected": "bad"},
        {"instruction": "is it good ?", "chosen": "very good", "rejected": "bad"},
        {"chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, WORSE])},
    ],
)
def test_every_layout_of_one_preference_gives_the_same_pair(row, tokenizer):
    read = only(row, tokenizer)
    assert read.prompt == ASKED
    assert (read.columns["chosen"], read.columns["rejected"]) == ("very good", "bad")


def test_pairs_of_conversations_share_all_turns_before_they_part(tokenizer):
    earlier = [USER, ANSWER, {"role": "user", "content": "why ?"}]
    read = read_row({"chosen": [*earlier, ANSWER], "rejected": [*earlier, WORSE]}, "row")
    assert (read.prompt, read.chosen, read.rejected) == (earlier, [ANSWER], [WORSE])
    read = read_row({"chosen": [*earlier, ANSWER], "rejected": [USER, WORSE]}, "row")
    assert (read.prompt, read.rejected) == ([USER], [WORSE])
    assert read.chosen == [ANSWER, {"role": "user", "content": "why ?"}, ANSWER]


@pytest.mark.parametrize(
    ("shared", "better", "worse"),
    [
        ("\n\nHuman: a ?\n\nAssistant:", " the film is good", " the film is bad"),
        ("\n\nHuman: a ?\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " yes", " no"),
        ("### Instruction:\na\n\n### Response:", "\nyes", "\nno"),
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "yes", "no"),
        ("<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n", "yes", "no"),
        ("", "the film is good", "the film is bad"),
        ("", "yes", "no"),
    ],
)
def test_texts_that_begin_alike_part_where_the_assistant_speaks(shared, better, worse):
    read = read_row({"chosen": shared + better, "rejected": shared + worse}, "row")
    assert (read.prompt or "", read.chosen, read.rejected) == (shared, better, worse)


def test_an_assistant_who_speaks_after_the_pair_has_parted_opens_no_answer():
    start = "\n\nHuman: a\n\nAssistant:"
    read = read_row({"chosen": f"{start} b\n\nHuman: c\n\nAssistant: d", "rejected": f"{start} e"}, "row")
    assert (read.prompt, read.rejected) == (start, " e")


def test_alpaca_without_a_chat_template_is_written_under_its_headings():
    row = {"instruction": "Say it.", "input": "good", "output": "bad"}
    read = only(row, tiny_tokenizer())
    assert read.prompt == "### Instruction:\nSay it.\n\n### Input:\ngood\n\n### Response:\n"
    assert read.columns == {"completion": "bad"}
    assert only({**row, "input": ""}, None).prompt == "### Instruction:\nSay it.\n\n### Response:\n"


def test_what_the_system_says_and_earlier_turns_come_first(tokenizer):
    row = {"instruction": "why ?", "system": "be fine", "history": [["is it good ?", "very good"]], "output": "so"}
    roles = [m["role"] for m in only(row, tokenizer).columns["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    row = {"system": "be fine", "conversations": [{"from": "human", "value": "is it good ?"}]}
    assert only(row, tokenizer).prompt == "<|system|> be fine<eos>\n" + ASKED


def test_a_prompt_that_ends_with_the_assistant_goes_on_there(tokenizer):
    read = only({"prompt": [USER, {"role": "assistant", "content": "very"}]}, tokenizer)
    assert read.prompt == ASKED + "very"
    assert "completion" not in read.columns


def test_tool_calls_have_no_content_and_are_written_by_the_template(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "film", "arguments": "{}"}}]}
    result = {"role": "tool", "content": "fine"}
    read = only({"messages": [USER, call, result, ANSWER]}, tokenizer)
    assert read.prompt == ASKED + "call film<eos>\n<|tool|> fine<eos>\n<|assistant|> "
    assert read.columns["completion"] == "very good"
    assert only({"messages": [USER, call]}, tokenizer).columns["completion"] == "call film"


def test_a_template_gets_the_tools_of_a_row():
    made = tiny_tokenizer()
    made.chat_template = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}" + CHATML
    tools = [{"name": "film"}]
    assert only({"messages": [USER], "tools": tools}, made).prompt == "[film]" + ASKED
    assert only({"messages": [USER], "tools": json.dumps(tools)}, made).prompt == "[film]" + ASKED
    assert only({"messages": [USER], "tools": None}, made).prompt == ASKED


@pytest.mark.parametrize(
    ("row", "error", "complaint"),
    [
        ({"messages": [USER, ANSWER], "completion": "x"}, ValueError, "there is a column 'completion', too; drop one"),
        ({"prompt": "other", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, ValueError, "is not a message of"),
        ({"chosen": [USER, ANSWER], "rejected": "x"}, TypeError, "must both be texts or both be messages"),
        ({"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "b"}, ANSWER]}, ValueError, "answer different"),
        ({"prompt": [USER], "completion": [USER]}, ValueError, "must begin with a message of the assistant"),
        ({"instruction": " ", "output": "x"}, ValueError, "'instruction' is an empty text"),
        ({"role": "user", "content": "x"}, ValueError, r"prompts=\[\[message, ...\], ...\]"),
    ],
)
def test_rows_whose_parts_do_not_fit_are_refused(row, error, complaint, tokenizer):
    with pytest.raises(error, match=complaint):
        as_prompt_source([row], tokenizer)


def test_a_prompt_stays_the_text_that_it_is_where_there_is_no_template():
    rows = [
        {"prompt": "is it good ?", "messages": [USER, ANSWER]},
        {"prompt": "is it good ?", "completion": [ANSWER]},
        {"prompt": "is it good ?", "messages": [USER, ANSWER, {"role": "user", "content": "why ?"}, WORSE]},
        {"prompt": "another", "messages": [USER, ANSWER]},
    ]
    read = as_prompt_source(rows, tiny_tokenizer())
    assert [row.prompt for row in read] == ["is it good ?"] * 3 + ["another"]
    assert [row.columns["completion"] for row in read] == [" very good", " very good", None, None]


def test_what_a_row_lacks_is_none(tmp_path):
    rows = [{"prompt": "a", "x": 1}, {"prompt": "b"}, {"prompt": "c", "y": 2}]
    expected = [{"x": 1, "y": None}, {"x": None, "y": None}, {"x": None, "y": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row.columns for row in load_prompt_file(tmp_path / "a.jsonl")] == expected
    assert [row.columns for row in as_prompt_source(rows)] == expected


# ---------------------------------------------------------------------------------------------- in memory


def test_conversations_in_memory_are_read_as_those_in_files(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": [USER], "n": i} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = list(load_prompt_file(tmp_path / "a.jsonl", tokenizer=tokenizer))
    assert expected[0] == PromptRow(ASKED, {"n": 0, "messages": [USER]})
    dataset = datasets.Dataset.from_list(rows)
    for source in (rows, dataset, dataset.to_iterable_dataset(), dataset.with_format("numpy", columns=["n"])):
        assert list(as_prompt_source(source, tokenizer)) == expected
    assert as_prompt_source(lambda rng: rows[1], tokenizer).sample(np.random.default_rng(0)) == expected[1]
    assert [row.prompt for row in as_prompt_source([[USER], [USER]], tokenizer)] == [ASKED] * 2
    train, held_out = split_prompts([{"prompt": [USER]}, {"prompt": [{**USER, "content": "why ?"}]}], 1, 0, tokenizer)
    assert len(train) == len(held_out) == 1


@pytest.mark.parametrize("form", ["pandas", "numpy", "torch", "arrow"])
def test_the_format_of_a_data_set_changes_nothing(form):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"prompt": ["a", "b"], "n": [[1, 2], [3]]})
    assert list(as_prompt_source(dataset.with_format(form))) == list(as_prompt_source(dataset))


def test_the_rows_of_a_transform_are_what_it_makes():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"prompt": ["a"]})
    dataset.set_transform(lambda batch: {"prompt": [text.upper() for text in batch["prompt"]]})
    assert [row.prompt for row in as_prompt_source(dataset)] == ["A"]


def test_a_stream_without_end_is_refused(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("textgym.prompts.row_files.STREAMED", 3)

    def forever() -> Any:
        while True:
            yield {"prompt": "a"}

    stream = datasets.IterableDataset.from_generator(forever)
    with pytest.raises(ValueError, match=r"prompts is a stream of more than 3 rows, .* prompts.take\(3\)"):
        as_prompt_source(stream)
    assert len(as_prompt_source(stream.take(3))) == 3


def nothing(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def test_an_episode_may_begin_with_a_conversation(tokenizer):
    model = LanguageModel(tiny_model("llama"), tokenizer)
    options: dict[str, Any] = {
        "language_model": model,
        "kl_coef": 0,
        "reward": lambda completions, **_: [0.0] * len(completions),
    }
    env = gym.make("TextGen-v0", prompts=[{"prompt": [USER]}], **options)
    assert env.reset(seed=0)[1]["prompt"] == ASKED
    other = [{"role": "user", "content": "why ?"}]
    assert env.reset(options={"prompt": other})[1]["prompt"] == chat_prompt(other, tokenizer)
    vec = gym.make_vec("TextGen-v0", num_envs=2, prompts=["the film"], **options)
    assert vec.reset(options={"prompt": other})[1]["prompt"].tolist() == [chat_prompt(other, tokenizer)] * 2
    assert vec.reset(options={"prompt": [[USER], "the film"]})[1]["prompt"].tolist() == [ASKED, "the film"]


def test_a_prompt_of_which_the_tokenizer_makes_no_token_is_refused_at_load(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: .prompt.: the tokenizer makes no token of the prompt . .$"):
        load_prompt_file(tmp_path / "a.jsonl", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="the tokenizer makes no token"):
        as_prompt_source(["a", "\n"], tokenizer)
