"""Reward models of several tasks on one backbone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import EOS
from tiny_reward_training import QUICK, TOKENIZER, review, tiny_causal, tiny_encoder
from transformers import AutoModelForSequenceClassification

from textgym.reward_training import Task, load_reward_data, read_report, train_reward
from textgym.rewards import Router, as_reward
from textgym.rewards.reward_directory import open_reward

pytestmark = pytest.mark.usefixtures("frozen_garbage", "no_pictures")


def of_tasks(count: int = 240) -> list[dict[str, Any]]:
    """How good a text is, as a number; whether it is long; and with which of three words it begins."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        good = rng.random() < 0.5
        words = review(good, rng).split()
        if i % 3 == 0:
            rows.append({"text": " ".join(words), "task": "quality", "score": 0.9 if good else -0.9, "label": None})
        elif i % 3 == 1:
            label = "good" if good else "bad"
            rows.append({"text": " ".join(words), "task": "verdict", "score": "", "label": label})
        else:
            topic = rng.choice(["film", "story", "music"])
            rows.append({"text": " ".join([*words, topic]), "task": "topic", "label": topic})
    return rows


def test_rows_of_tasks_have_the_kind_and_the_classes_of_their_task():
    data = load_reward_data(of_tasks(30), kind="tasks")
    assert data.several == (
        Task("quality", "scores"),
        Task("topic", "labels", ("film", "music", "story")),
        Task("verdict", "labels", ("bad", "good")),
    )
    for row, given in zip(data.rows, of_tasks(30), strict=True):
        task = data.tasks[row.task]
        assert task.name == given["task"]
        target = given["score"] if task.kind == "scores" else task.classes.index(given["label"])
        assert row.target == target


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "score": 1}, "row 2 has no column 'task'"),
        ({"text": "a", "task": "x", "score": 1, "label": "b"}, "either a score or a label, .* 'x' .* it has both"),
        ({"text": "a", "task": "x", "score": None}, "it has neither"),
        (
            {"text": "a", "task": "quality", "label": "b"},
            "has a label, but other rows of its task 'quality' have scores",
        ),
    ],
)
def test_rows_that_do_not_fit_their_task_are_errors(row, message):
    rows = [{"text": "a", "task": "quality", "score": 1}, {"text": "b", "task": "quality", "score": 0}]
    with pytest.raises(ValueError, match=message):
        load_reward_data([*rows, row], kind="tasks")


@pytest.mark.parametrize("model", ["causal", "encoder", "cnn"])
def test_one_backbone_learns_several_tasks_and_each_is_a_reward(model, tmp_path):
    backbone: Any = {"causal": lambda: tiny_causal(5), "encoder": lambda: tiny_encoder(5)}.get(model, tiny_encoder)()
    options = {**QUICK, "epochs": 6, "batch_size": 8, "activation": "tanh"}
    options["head"] = "cnn" if model == "cnn" else "linear"
    report = train_reward(of_tasks(), tmp_path, kind="tasks", model=backbone, tokenizer=TOKENIZER, **options)
    assert report.kind == "tasks"
    assert report.metrics["quality/pearson"] > 0.5
    assert report.metrics["verdict/auc"] > 0.8
    assert report.metrics["topic/accuracy"] > 0.6  # a third, by chance
    assert report.tasks["topic"].classes == ["film", "music", "story"]
    assert sum(part.rows["validation"] for part in report.tasks.values()) == report.rows["validation"]
    assert read_report(tmp_path)["tasks"]["verdict"]["metrics"]["auc"] == report.metrics["verdict/auc"]

    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    names = ["quality:score", "topic:film", "topic:music", "topic:story", "verdict:good"]
    assert [opened.config.id2label[i] for i in range(5)] == names
    texts = ["the film is good", "the story is bad"]
    scores = []
    for text in texts:
        ids = torch.tensor([TOKENIZER(text)["input_ids"] + [EOS] * (model == "causal")])
        with torch.no_grad():
            quality, *topic, verdict = opened(input_ids=ids).logits[0]
            if model == "causal":  # classes are read by ClassifierReward, which knows of no end of text
                topic = opened(input_ids=ids[:, :-1]).logits[0, 1:4]
        scores.append((torch.tanh(quality), torch.stack(list(topic)).softmax(0)[1], torch.sigmoid(verdict)))
    expected = np.array(scores)  # (texts, tasks)

    with pytest.raises(ValueError, match=r"task 'topic' of .* has 3 classes, 'film', 'music', 'story': say whose"):
        as_reward(tmp_path)
    by_column = open_reward(tmp_path, label={"topic": "music"})
    assert isinstance(by_column, Router)
    called = {
        "prompts": ["", "", ""],
        "completions": [texts[0], texts[1], texts[0]],
        "task": ["topic", "verdict", "quality"],
    }
    assert by_column(**called) == pytest.approx([expected[0, 1], expected[1, 2], expected[0, 0]], abs=1e-5)
    for number, (task, label) in enumerate((("quality", None), ("topic", "music"), ("verdict", None))):
        reward = open_reward(tmp_path, task=task, label=label)
        assert reward(prompts=[texts[0][:4]], completions=[texts[0][4:]]) == pytest.approx(
            [expected[0, number]], abs=1e-5
        )


def test_misuse_of_tasks_is_refused(tmp_path):
    def refused(message: str, rows: list[dict[str, Any]] | None = None, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            train_reward(
                rows or of_tasks(30), tmp_path / "x", kind="tasks", model=tmp_path, tokenizer=TOKENIZER, **options
            )

    refused("loss='bce': of several tasks those with scores", loss="bce")
    refused("class_weights must be 'balanced' or None", class_weights={"film": 1.0})
    refused("threshold=0.5 can't be that of several tasks", threshold=0.5)
    refused("scores of task 'quality' are from -0.9", activation="sigmoid")
    refused("the data has none", [row for row in of_tasks(30) if row["task"] == "topic"], activation="tanh")
    train_reward(
        [row for row in of_tasks(60) if row["task"] != "topic"],
        tmp_path / "two",
        kind="tasks",
        model=tiny_encoder(2),
        tokenizer=TOKENIZER,
        **{**QUICK, "epochs": 1},
    )
    assert isinstance(as_reward(tmp_path / "two"), Router)
    with pytest.raises(ValueError, match="task='topic' is none of those of .*: 'quality', 'verdict'"):
        open_reward(tmp_path / "two", task="topic")
    with pytest.raises(ValueError, match="say of which task, {'quality': 'good'}"):
        open_reward(tmp_path / "two", label="good")
    with pytest.raises(ValueError, match="label names the task 'topic'"):
        open_reward(tmp_path / "two", label={"topic": "film"})
