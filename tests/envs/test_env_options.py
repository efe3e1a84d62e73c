"""TextGen-v0 as a single environment: options that are wrong are named, with their value."""

from __future__ import annotations

import re
import warnings

import pytest
from text_envs import make
from tiny_models import VOCABULARY

V = len(VOCABULARY)


def test_an_unknown_option_is_an_error_with_a_suggestion():
    with pytest.raises(
        TypeError, match="TextGen-v0 got an unexpected keyword argument 'max_new_token'; did you mean max_new_tokens"
    ):
        make(max_new_token=3)
    with pytest.raises(TypeError, match="argument 'zzz'; the options are language_model, .*render_mode"):
        make(zzz=3)


NAN, INF = float("nan"), float("inf")
WRONG = [
    ("reward_every", 0, ValueError),
    ("reward_every", -1, ValueError),
    ("reward_every", 1.5, TypeError),
    ("reward_every", "END", TypeError),
    ("reward_every", True, TypeError),
    ("kl_coef", -0.1, ValueError),
    ("kl_coef", NAN, ValueError),
    ("kl_coef", INF, ValueError),
    ("kl_coef", "0.1", TypeError),
    ("kl_coef", None, TypeError),
    ("kl_estimator", "k4", ValueError),
    ("kl_estimator", 1, ValueError),
    ("max_new_tokens", 0, ValueError),
    ("max_new_tokens", 2.0, TypeError),
    ("max_new_tokens", None, TypeError),
    ("min_new_tokens", -1, ValueError),
    ("min_new_tokens", 9, ValueError),
    ("max_prompt_tokens", 0, ValueError),
    ("max_prompt_tokens", "5", TypeError),
    ("prompt_overflow", "ignore", ValueError),
    ("stop", "", ValueError),
    ("stop", ["!", ""], ValueError),
    ("stop", ["!", 3], ValueError),
    ("stop", 3, TypeError),
    ("missing_eos_penalty", -1.0, ValueError),
    ("missing_eos_penalty", NAN, ValueError),
    ("temperature", 0.0, ValueError),
    ("temperature", -1.0, ValueError),
    ("temperature", INF, ValueError),
    ("temperature", True, TypeError),
    ("action_masking", 1, TypeError),
    ("action_masking", None, TypeError),
    ("top_k", -1, ValueError),
    ("top_k", 1.5, TypeError),
    ("top_k", 5, ValueError),  # needs action_masking
    ("top_p", 0.0, ValueError),
    ("top_p", 1.1, ValueError),
    ("top_p", 0.9, ValueError),  # needs action_masking
    ("seed", -1, ValueError),
    ("seed", "1", TypeError),
    ("render_mode", "video", ValueError),
    ("device", "gpu", ValueError),
    ("device", "cuda:99", ValueError),
    ("dtype", "int8", ValueError),
    ("dtype", "float33", ValueError),
    ("language_model", 3, TypeError),
    ("language_model", "./nothing", FileNotFoundError),
    ("tokenizer", 3, TypeError),
    ("reward", 3, TypeError),
    ("reward", "./nothing", FileNotFoundError),
]


@pytest.mark.parametrize("kl_coef", [0.05, 0])
@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_a_wrong_option_is_an_error_that_names_it_and_its_value(name, value, error, kl_coef):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*render_mode.*")  # gymnasium's own complaint comes first
        with pytest.raises(error) as raised:
            make(**{"kl_coef": kl_coef, name: value})
    text = str(raised.value)
    assert name.split("_")[0] in text
    assert re.search(re.escape(repr(value).strip("'./")), text)


def test_autoreset_belongs_to_vector_environments():
    with pytest.raises(TypeError, match="autoreset_mode is an option of vector environments"):
        make(autoreset_mode="SameStep")
