"""Data of reward models: what files and rows hold, and their split."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from datasets import Dataset
from tiny_models import chat_tokenizer, tiny_tokenizer
from tiny_reward_training import QUICK, TOKENIZER, pairs, scored, tiny_causal
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from textgym.agents.cli.main import app
from textgym.reward_training import RewardData, RewardRow, load_reward_data, split_by_prompt, train_reward
from textgym.reward_training.encoding import encode_pairs
from textgym.reward_training.measuring import Predictions, report_of
from textgym.reward_training.options import RewardTrainingOptions, resolved
from textgym.reward_training.scorer import TextScorer
from textgym.reward_training.trainer import EncodedRows
from textgym.rewards.opening import load_reward

OWN_MODEL = """
import torch
from transformers import LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class Own(LlamaConfig):
    model_type = "own"

class OwnForSequenceClassification(PreTrainedModel):
    config_class = Own
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask, **options):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        ends = attention_mask.sum(-1) - 1
        return SequenceClassifierOutput(logits=self.score(hidden)[torch.arange(len(ends)), ends])
"""


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


# ---------------------------------------------------------------------------------------------- layouts

USER = {"role": "user", "content": "is it good ?"}
BETTER, WORSE = {"role": "assistant", "content": "very good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"prompt": "is it good ?", "chosen": [USER, BETTER], "rejected": [USER, WORSE], "score_chosen": 8.0},
        {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([BETTER]), "rejected": json.dumps([WORSE])},
        {
            "chosen": "\n\nHuman: is it good ?\n\nAssistant: very good",
            "rejected": "\n\nHuman: is it good ?\n\nAssistant: bad",
        },
    ],
)
def test_every_layout_of_a_pair_gives_the_same_row(row):
    prompt = "\n\nHuman: is it good ?\n\nAssistant:"
    assert load_reward_data([row]).rows == (RewardRow(prompt, " very good", " bad", 0.0),)


def test_conversations_go_through_the_template_of_the_reward_model():
    tokenizer = tiny_tokenizer()
    rows = [{"messages": [USER, BETTER], "score": 1}, {"prompt": [USER], "completion": [WORSE], "score": 0}]
    with pytest.warns(UserWarning, match="data has 2 conversations, and the tokenizer .* has no chat template"):
        assert load_reward_data(rows, tokenizer=tokenizer).rows[0].completion == " very good"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}@"
    expected = (RewardRow("<is it good ?>@", "very good", None, 1.0), RewardRow("<is it good ?>@", "bad", None, 0.0))
    assert load_reward_data(rows, tokenizer=tokenizer).rows == expected


def test_pairs_of_equal_texts_are_left_out_and_counted():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}]
    with pytest.warns(UserWarning, match="in 1 of 2 pairs 'chosen' and 'rejected' are the same text; they"):
        assert len(load_reward_data(rows)) == 1


@pytest.mark.parametrize(
    ("labels", "classes"),
    [((0.0, 1.0), ("0", "1")), ((False, True), ("False", "True")), (("no", "yes"), ("no", "yes"))],
)
def test_labels_may_be_numbers_truth_values_and_words(labels, classes):
    data = load_reward_data([{"text": "a", "label": labels[1]}, {"text": "b", "label": labels[0]}])
    assert (data.classes, [row.target for row in data.rows]) == (classes, [1.0, 0.0])


def test_splits_and_shards_are_read_as_those_of_prompts(tmp_path):
    for split in ("train", "test"):
        Dataset.from_list([{"text": split, "score": 1}]).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="split=None: .* has the splits 'test', 'train'"):
        load_reward_data(tmp_path)
    assert load_reward_data(tmp_path, split="test").rows[0].completion == "test"
    with pytest.raises(ValueError, match="split='test' is for files and folders"):
        load_reward_data([], split="test")


# ---------------------------------------------------------------------------------------------- cutting pairs


def encoded(prompt: str, chosen: str, rejected: str, limit: int, ends_in_eos: bool = True) -> tuple[str, str, int]:
    tokenizer = tiny_tokenizer()
    [pair], cut = encode_pairs(tokenizer, [prompt], [chosen], [rejected], limit, ends_in_eos)
    assert max(len(side.ids) for side in pair) <= limit
    return tokenizer.decode(pair[0].ids), tokenizer.decode(pair[1].ids), cut


def test_both_sides_of_a_long_pair_keep_the_prompt_and_their_beginnings():
    better, worse, cut = encoded("the film is", " good" * 60, " bad very bad", 16)
    assert (better, worse, cut) == ("the film is" + " good" * 13, "the film is bad very bad <eos>", 1)
    assert encoded("the film is", " good", " bad", 16) == ("the film is good <eos>", "the film is bad <eos>", 0)


def test_a_long_prompt_loses_the_same_beginning_on_both_sides():
    better, worse, _ = encoded("film " * 30 + "is", " good" * 3, " bad", 16)
    assert better == "film " * 11 + "is" + " good" * 3 + " <eos>"
    assert worse == "film " * 11 + "is" + " bad <eos>"


def test_pairs_that_are_equal_after_cutting_are_left_out_and_counted(tmp_path):
    same = " fine" * 60
    rows = [{"prompt": f"film {i}", "chosen": same + " good", "rejected": same + " bad"} for i in range(6)]
    scorer = TextScorer(tiny_causal(1), TOKENIZER, 32)
    with pytest.raises(ValueError, match="6 of 6 pairs are the same tokens on both sides; .* max_length=32"):
        EncodedRows(load_reward_data(rows), scorer)
    rows += [{"prompt": "film", "chosen": " good", "rejected": " bad"}]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        encoded_rows = EncodedRows(load_reward_data(rows), scorer)
    assert len(encoded_rows) == len(encoded_rows.data) == len(encoded_rows.targets) == 1
    assert [str(w.message)[:35] for w in told] == [
        "6 of 7 pairs are the same tokens on",
        "6 pairs are longer than 32 tokens a",
    ]


def test_a_tie_is_half_right():
    objective = resolved(RewardTrainingOptions(), load_reward_data(pairs(2)))[1]
    scores = np.zeros((2, 1))
    predictions = {1.0: Predictions((scores,), (np.array([[0.0], [-1.0]]),))}
    assert report_of(predictions, objective, load_reward_data(pairs(2))).metrics["accuracy"] == 0.75


# ---------------------------------------------------------------------------------------------- few rows


def test_of_few_rows_none_are_held_out_unsaid(tmp_path):
    with pytest.warns(UserWarning, match="validation_share=0.1 of 2 different prompts is none: all 2 rows"):
        report = train_reward(
            [{"text": "good film", "score": 0.9}, {"text": "bad film", "score": 0.8}],
            tmp_path / "a",
            model=tiny_causal(1),
            tokenizer=TOKENIZER,
            epochs=1,
            device="cpu",
        )
    assert report.rows == {"training": 2, "validation": 0}
    assert "On its 2 training rows" in (tmp_path / "a" / "README.md").read_text()
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_variables_of_the_chat_template_are_those_of_training_and_of_the_model(tmp_path):
    template = (
        "{% for message in messages %}{{ message['role'] + ' ' }}{% if tone is defined %}{{ tone + ' ' }}{% endif %}"
        "{{ message['content'] + ' ' }}{% endfor %}"
    )
    tokenizer = chat_tokenizer(template=template)
    tiny = LlamaConfig(**{**tiny_causal(1).config.to_dict(), "vocab_size": len(tokenizer), "pad_token_id": 1})
    LlamaForSequenceClassification(tiny).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"x{i}"}, {"role": "assistant", "content": f"t{i}"}], "score": i % 3}
        for i in range(8)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ["train-reward", str(tmp_path / "rows.json"), "-o", str(tmp_path / "out"), "--kind", "scores"]
    arguments += f"--model {tmp_path / 'model'} --epochs 1 --no-progress --device cpu".split()
    result = CliRunner().invoke(app, [*arguments, "--chat-template-kwargs", "tune=dry"])
    assert result.exit_code == 2
    assert "chat_template_kwargs has 'tune', which the chat template does not read" in result.output
    read = []
    with pytest.MonkeyPatch.context() as patch:
        encode = TextScorer.encode
        patch.setattr(TextScorer, "encode", lambda self, p, c: read.extend(p) or encode(self, p, c))
        result = CliRunner().invoke(app, [*arguments, "--chat-template-kwargs", "tone=dry"])
    assert result.exit_code == 0, result.output
    assert all("user dry x" in prompt for prompt in read)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "user dry x "


def test_code_of_a_checkpoint_is_run_only_where_that_is_said(tmp_path, monkeypatch):
    tiny_causal(1).save_pretrained(tmp_path / "own")
    TOKENIZER.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    classes = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.OwnForSequenceClassification"}
    config.update(model_type="own", auto_map=classes)
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text(OWN_MODEL)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked on the terminal"))
    told = "Python code of its own, which is run only where trust_remote_code=True"
    options = {**QUICK, "epochs": 1, "model": str(tmp_path / "own")}
    with pytest.raises(ValueError, match=told):
        train_reward(scored(24), tmp_path / "out", **options)
    train_reward(scored(24), tmp_path / "out", **options, trust_remote_code=True)
    with pytest.raises(ValueError, match=told):
        load_reward(str(tmp_path / "out"))
    reward = load_reward(str(tmp_path / "out"), trust_remote_code=True)
    assert reward(prompts=["the film"], completions=[" is good"])[0] is not None
