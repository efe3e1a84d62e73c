"""Losses and metrics of reward models, against those of other libraries and worked examples."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from torch.nn import functional
from trl.trainer.reward_trainer import RewardTrainer

from textgym.reward_training import (
    binary_cross_entropy_loss,
    bradley_terry_loss,
    cross_entropy_loss,
    huber_loss,
    mse_loss,
)
from textgym.reward_training.report import (
    area_under_curve,
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    regression_metrics,
)

RNG = np.random.default_rng(0)


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
