"""Training reward models: data and its split, losses and metrics against other libraries, learning, what is saved."""

from __future__ import annotations

import io
import json
import random
from collections import defaultdict
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
from textgym.reward_training import training as training_module
from textgym.reward_training.report import (
    area_under_curve,
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    regression_metrics,
)
from textgym.rewards import CausalRewardModel, ClassifierReward

TOKENIZER = tiny_tokenizer()
GOOD = "good great fine warm funny clever moving fresh".split()
BAD = "bad dull slow weak cold empty silly hate".split()
NEUTRAL = "the a film movie story plot cast actor scene and it is was".split()
QUICK: dict[str, Any] = {"learning_rate": 3e-3, "epochs": 5, "device": "cpu", "validation_share": 0.25}
RNG = np.random.default_rng(0)


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
    torch.testing.assert_close(scorer.logits(rows, batch_size=2), expected, atol=1e-5, rtol=1e-5)


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
    train_reward(labelled(60), tmp_path, model=model, tokenizer=TOKENIZER, frozen=True, **{**QUICK, "epochs": 1})
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"score.weight"}


def test_prefix_training_calibrates_scores_of_unfinished_texts(tmp_path):
    """The last word alone tells; before it the best guess is the mean, 0."""
    rng = random.Random(2)
    rows = []
    for _ in range(600):
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
    assert errors["all"] < 0.6 * errors["none"]


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


def test_the_report_is_a_table_json_and_a_picture(tmp_path):
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

    evaluate = training_module._RewardTrainer.evaluate
    calls = []

    def dies_in_the_third_epoch(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return evaluate(self, *arguments, **keywords)

    monkeypatch.setattr(training_module._RewardTrainer, "evaluate", dies_in_the_third_epoch)
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


def test_the_command_says_in_one_line_what_is_wrong(app, tmp_path):
    result = CliRunner().invoke(app, ["train-reward", str(tmp_path / "a.csv"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "there is no file or folder" in result.output
    result = CliRunner().invoke(app, ["train-reward", "a.csv", "-o", "out", "--column", "score"])
    assert "--column 'score' must be NAME=COLUMN" in result.output
