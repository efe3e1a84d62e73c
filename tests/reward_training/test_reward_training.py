"""Training reward models: how texts are read, learning, what is written and opens, options, and the command."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from tiny_models import EOS, PAD, tiny_causal_reward_model, tiny_model
from tiny_reward_training import (
    BAD,
    GOOD,
    NEUTRAL,
    QUICK,
    TOKENIZER,
    framing_tokenizer,
    labelled,
    pairs,
    scored,
    tiny_causal,
    tiny_encoder,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForTokenClassification
from typer.testing import CliRunner

from textgym.agents.cli.main import _plain_errors
from textgym.agents.cli.train_reward import add_train_reward
from textgym.language_model import LanguageModel
from textgym.reward_training import TextScorer, read_report, report_table, train_reward
from textgym.reward_training import trainer as trainer_module
from textgym.rewards import CausalRewardModel, ClassifierReward, Ensemble, as_reward
from textgym.rewards.reward_directory import open_reward

pytestmark = pytest.mark.usefixtures("frozen_garbage", "no_pictures")


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
    assert len(list((tmp_path / "interrupted" / "checkpoints").iterdir())) >= 1
    resumed = run("interrupted", resume=True)
    assert not (tmp_path / "interrupted" / "checkpoints").exists()  # they are of no more use, and large
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
        (scored, {"epochs": 0}, "epochs=0 must be a whole number, at least 1"),
        (scored, {"prefix_weight": 1.5}, "prefix_weight=1.5 must be a finite number greater than 0"),
        (scored, {"learning_rate": -1.0}, "learning_rate=-1.0 must be a finite number at least 0"),
        (scored, {"validation_share": 1.0}, "validation_share=1.0 must be a finite number"),
        (scored, {"device": "tpu"}, "device='tpu' must be one of 'auto', 'cpu'"),
        (scored, {"prefixes": "some"}, "prefixes='some' must be one of"),
        (scored, {"head": "big"}, "head='big' must be one of 'linear', 'mlp', 'cnn'"),
        (scored, {"head_size": 8}, "head_size=8 is for head='mlp' or 'cnn'"),
        (
            scored,
            {"head": "mlp", "head_dropout": 1.0},
            "head_dropout=1.0 must be a finite number at least 0",
        ),
        (scored, {"head_layers": "some"}, "head_layers='some' must be one of 'last', 'all'"),
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
