"""KL estimators and the adaptive coefficient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from textgym.kl import KL_ESTIMATORS, AdaptiveKLController, kl_estimate


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [math.log(2), -math.log(2), 0.0]),
        ("k2", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2, 0.0]),
        ("k3", [0.5 - 1 + math.log(2), 2 - 1 - math.log(2), 0.0]),
    ],
)
def test_estimates_equal_the_formulas(estimator, expected):
    log_prob, ref_log_prob = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.4, 0.3])
    estimate = kl_estimate(log_prob, ref_log_prob, estimator)
    assert isinstance(estimate, np.ndarray)
    np.testing.assert_allclose(estimate, expected, atol=1e-15)
    tensor = kl_estimate(torch.tensor(log_prob), torch.tensor(ref_log_prob), estimator)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-15)
    assert kl_estimate(log_prob[0], ref_log_prob[0], estimator) == pytest.approx(expected[0])


def test_k1_and_k3_are_unbiased_and_k2_nearly_for_close_policies():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20)
    close = logits + 0.05 * rng.normal(size=20)
    log_policy, log_ref = (x - np.log(np.exp(x).sum()) for x in (logits, close))
    exact = (np.exp(log_policy) * (log_policy - log_ref)).sum()
    for estimator in KL_ESTIMATORS:
        expectation = (np.exp(log_policy) * kl_estimate(log_policy, log_ref, estimator)).sum()
        assert expectation == pytest.approx(exact, rel=0.05 if estimator == "k2" else 1e-9)


def test_k2_and_k3_are_never_negative_even_in_float32():
    log_prob = torch.linspace(-20, 0, 1001)
    for shift in (1e-4, -1e-4, 1e-7, 3.0):
        for estimator in ("k2", "k3"):
            assert (kl_estimate(log_prob, log_prob + shift, estimator) >= 0).all()


def test_gradients_flow_through_tensors():
    log_prob = torch.tensor([-1.0], requires_grad=True)
    ref_log_prob = torch.tensor([-2.0])
    for estimator, slope in {
        "k1": 1.0,
        "k2": 1.0,
        "k3": 1 - math.exp(-1),
    }.items():  # d/dx of d, d²/2, e^-d - 1 + d
        (gradient,) = torch.autograd.grad(kl_estimate(log_prob, ref_log_prob, estimator).sum(), log_prob)
        assert gradient.item() == pytest.approx(slope)


def test_an_unknown_estimator_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="kl_estimator='k4' must be one of 'k1', 'k2', 'k3'"):
        kl_estimate(np.zeros(1), np.zeros(1), "k4")


@pytest.mark.parametrize(
    ("kl", "n", "expected"),
    [
        (6.0, 100, 0.1),  # on target
        (6.6, 100, 0.1 * (1 + 0.1 * 0.1)),  # 10 % above
        (5.4, 100, 0.1 * (1 - 0.1 * 0.1)),
        (60.0, 100, 0.1 * (1 + 0.2 * 0.1)),  # clipped
        (0.0, 100, 0.1 * (1 - 0.2 * 0.1)),
        (-3.0, 100, 0.1 * (1 - 0.2 * 0.1)),  # k1 measures may be negative
        (60.0, 0, 0.1),
    ],
)
def test_the_coefficient_moves_as_in_ziegler_et_al(kl, n, expected):
    controller = AdaptiveKLController(init_kl_coef=0.1, target=6.0, horizon=1000)
    assert controller.update(kl, n) == pytest.approx(expected, rel=1e-12)
    assert controller.kl_coef == pytest.approx(expected, rel=1e-12)


def test_the_controller_finds_the_coefficient_that_gives_the_target():
    controller = AdaptiveKLController(init_kl_coef=1.0, target=6.0, horizon=1000)
    for _ in range(2000):
        controller.update(kl=3.0 / controller.kl_coef, n=64)  # a policy whose KL is inverse to the coefficient
    assert controller.kl_coef == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("name", ["init_kl_coef", "target", "horizon"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_controller_arguments_must_be_finite_and_positive(name, value):
    arguments = {"init_kl_coef": 0.1, "target": 6.0, "horizon": 1000.0, name: value}
    with pytest.raises(ValueError, match=f"{name}=.* must be a finite number greater than 0"):
        AdaptiveKLController(**arguments)


def test_updates_that_make_no_sense_are_refused():
    controller = AdaptiveKLController(0.1, 6.0, 1000)
    with pytest.raises(ValueError, match="kl=nan must be a finite number"):
        controller.update(math.nan, 1)
    for n in (-1, 5000):
        with pytest.raises(ValueError, match=rf"less than 5 \* horizon = 5000, got {n}"):
            controller.update(1.0, n)
    assert controller.kl_coef == 0.1
