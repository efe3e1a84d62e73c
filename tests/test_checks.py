"""Argument checks name the argument, its value and what would be right."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from textgym.agents.runs.config import RunConfig
from textgym.checks import (
    LARGEST_INT,
    check_bool,
    check_choice,
    check_int,
    check_mapping,
    check_number,
    check_seed,
    check_temperature,
    check_text,
    check_texts,
    shown,
)
from textgym.rewards import (
    AdversarialReward,
    AnswerStore,
    FunctionReward,
    HashingDiscriminator,
    LanguageIdentity,
    Profanity,
    RewardServer,
)

HUGE = 10**5000  # Python refuses to write it in decimal, and it is beyond every float


class NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("broken")


@pytest.mark.parametrize(
    "value", [True, 1.0, "1", None, [1], np.array([1, 2]), np.bool_(True), NoRepr(), math.nan], ids=shown
)
def test_what_is_not_a_whole_number_is_a_type_error_that_names_the_argument(value):
    with pytest.raises(TypeError, match=r"^rows=.* must be a whole number, at least 1$"):
        check_int("rows", value, low=1)


@pytest.mark.parametrize("value", [0, -5, LARGEST_INT + 1, HUGE, np.int64(0)], ids=shown)
def test_impossible_whole_numbers_are_value_errors(value):
    with pytest.raises(ValueError, match=r"^rows=.* must be a whole number, at least 1"):
        check_int("rows", value, low=1)


def test_numpy_numbers_become_python_numbers():
    assert type(check_int("n", np.int32(3), low=1)) is int
    assert type(check_number("x", np.float32(0.5))) is float
    assert check_number("x", Fraction(1, 4)) == 0.25


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, HUGE, -0.1, 1.0, np.float64("nan")], ids=shown)
def test_numbers_must_be_finite_and_inside(value):
    with pytest.raises(ValueError, match=r"^p=.* must be a finite number at least 0 and less than 1$"):
        check_number("p", value, low=0.0, high=1.0, open_high=True)


@pytest.mark.parametrize("value", [True, "0.5", None, [0.5], 1j, np.array([0.5, 1.0])], ids=shown)
def test_what_is_not_a_real_number_is_a_type_error(value):
    with pytest.raises(TypeError, match=r"^p=.* must be a finite number"):
        check_number("p", value)


def test_a_temperature_that_float32_logits_can_not_be_divided_by_is_refused():
    assert check_temperature("temperature", 1e-6) == 1e-6
    with pytest.raises(ValueError, match="temperature=1e-300 must be a finite number at least 1e-06"):
        check_temperature("temperature", 1e-300)


@pytest.mark.parametrize("value", ["meen", None, 1, ["mean"], np.array(["mean", "min"])], ids=shown)
def test_a_choice_lists_what_there_is(value):
    with pytest.raises(ValueError, match=r"^aggregate=.* must be one of 'mean', 'min', 'max'"):
        check_choice("aggregate", value, ("mean", "min", "max"))


def test_a_misspelt_choice_names_the_near_one():
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        check_choice("aggregate", "meen", ("mean", "min", "max"))


def test_one_and_true_are_different_choices():
    assert check_choice("x", True, (True, False, "rollout")) is True
    with pytest.raises(ValueError, match="x=1 must be one of"):
        check_choice("x", 1, (True, False, "rollout"))


@pytest.mark.parametrize("value", [0, 1, "yes", None], ids=shown)
def test_only_true_and_false_are_switches(value):
    assert check_bool("mask", np.bool_(True)) is True
    with pytest.raises(TypeError, match=r"^mask=.* must be True or False$"):
        check_bool("mask", value)


def test_texts_are_whole_and_lists_of_texts_are_lists():
    with pytest.raises(ValueError, match="half of a surrogate pair at position 1"):
        check_text("prompt", "a\ud800")
    with pytest.raises(TypeError, match=r"prompt=b'a' must be a text"):
        check_text("prompt", b"a")
    with pytest.raises(ValueError, match="must not be empty"):
        check_text("prompt", "", empty=False)
    with pytest.raises(TypeError, match=r"for one text, texts=\['a'\]"):
        check_texts("texts", "a")
    with pytest.raises(TypeError, match="must be a list of texts"):
        check_texts("texts", ["a", 1])


def test_seeds_and_mappings():
    assert check_seed("seed", None) is None
    for wrong, error in ((-1, ValueError), (2**32, ValueError), (1.5, TypeError), (np.array([1, 2]), TypeError)):
        with pytest.raises(error, match="^seed="):
            check_seed("seed", wrong)
    assert check_mapping("policy_kwargs", None) == {}
    with pytest.raises(TypeError, match="policy_kwargs=3 must be a dictionary"):
        check_mapping("policy_kwargs", 3)


def test_long_values_are_cut_and_every_value_can_be_shown():
    assert len(shown("x" * 1000)) <= 80
    assert "bits" in shown(HUGE)
    assert "NoRepr" in shown(NoRepr())


@pytest.mark.parametrize("value", [math.inf, math.nan, "x", 1.5, True, [], "9" * 5000, HUGE], ids=shown)
def test_whole_numbers_of_a_configuration_are_whole_numbers(value):
    with pytest.raises(ValueError, match="^rows="):
        RunConfig.from_mapping({"rows": value})


@pytest.mark.parametrize(
    ("name", "value"), [("threads", 0), ("threads", -1), ("seed", -1), ("learning_rate", HUGE)], ids=shown
)
def test_impossible_numbers_of_a_configuration_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        RunConfig.from_mapping({name: value})


def test_numbers_of_a_configuration_may_be_texts_as_yaml_reads_them():
    config = RunConfig.from_mapping({"learning_rate": "1e-4", "rows": "8", "timesteps": 64.0})
    assert (config.learning_rate, config.rows, config.timesteps) == (1e-4, 8, 64)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: AnswerStore(3), "path"),  # type: ignore[arg-type]
        (lambda: AnswerStore(b"a.sqlite"), "path"),  # type: ignore[arg-type]
        (lambda: HashingDiscriminator(seed=2.5), "seed"),  # type: ignore[arg-type]
        (lambda: HashingDiscriminator(seed="3"), "seed"),  # type: ignore[arg-type]
        (lambda: LanguageIdentity("de", among=torch.tensor(3)), "among"),  # type: ignore[arg-type]
        (lambda: Profanity(torch.tensor(3)), "words"),  # type: ignore[arg-type]
        (lambda: AdversarialReward(np.array(3)), "human_texts"),  # type: ignore[arg-type]
        (lambda: FunctionReward(len, name=np.array([1, 2])), "name"),  # type: ignore[arg-type]
        (lambda: RewardServer(lambda completions: [0.0], limits=3), "limits"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_rewards_of_another_kind_are_named(make, argument):
    with pytest.raises(TypeError, match=rf"^{argument}=.* must be "):
        make()
