"""What reset, step and reports of log-probabilities refuse, and in which words."""

from __future__ import annotations

import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from text_envs import DEFAULTS, make, make_vec

SURROGATE = "\ud800"
RESETS = [
    ({"options": 3}, TypeError, r"options=3 must be a dictionary"),
    ({"options": "x"}, TypeError, r"options='x' must be a dictionary"),
    ({"options": {1: 2}}, TypeError, r"options=\{1: 2\} must be a dictionary with names as keys"),
    ({"options": {"promt": "x"}}, ValueError, r"unknown reset options \['promt'\]; known are 'prompt'"),
    ({"options": {"prompt": ""}}, ValueError, r"options\['prompt'\]='' must not be empty"),
    ({"options": {"prompt": 3}}, TypeError, r"options\['prompt'\]=3 must be a text"),
    ({"options": {"prompt": SURROGATE}}, ValueError, r"options\['prompt'\]=.* half of a surrogate pair"),
    ({"seed": 1.5}, TypeError, r"seed=1.5 must be a whole number, at least 0"),
    ({"seed": True}, TypeError, r"seed=True must be a whole number"),
    ({"seed": "1"}, TypeError, r"seed='1' must be a whole number"),
    ({"seed": -1}, ValueError, r"seed=-1 must be a whole number, at least 0"),
    ({"seed": np.array([1, 2])}, (TypeError, ValueError), r"^seed.*array\(\[1, 2\]\)"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), RESETS)
@pytest.mark.parametrize("env_id", ["TextGen-v0", "TextWrite-v0"])
@pytest.mark.parametrize("num_envs", [None, 3], ids=["single", "vector"])
def test_wrong_arguments_of_reset_are_named_and_change_nothing(env_id, num_envs, arguments, kind, message):
    env = gym.make(env_id, **DEFAULTS) if num_envs is None else gym.make_vec(env_id, num_envs=num_envs, **DEFAULTS)
    message = message.replace(r"\['prompt'\]=", r"\['prompt'\](\[0\])?=")
    if num_envs is not None and arguments.get("options") == {"prompt": 3}:
        message = r"options\['prompt'\]=3 must be a (non-empty )?text"
    before, _ = env.reset(seed=0)
    with pytest.raises(kind, match=message):
        env.reset(**arguments)
    after, _ = env.reset(seed=0)
    assert str(before) == str(after)


@pytest.mark.parametrize(
    ("prompts", "kind", "message"),
    [
        (["a film"], ValueError, r"must be a non-empty text or a conversation, or 2 of them .*; it has 1 entries"),
        (["a film", ""], ValueError, r"options\['prompt'\]\[1\]='' must not be empty"),
        (["a film", 3], TypeError, r"options\['prompt'\]\[1\]=3 must be a text"),
        ([SURROGATE, "a film"], ValueError, r"options\['prompt'\]\[0\]=.* half of a surrogate pair"),
    ],
)
def test_wrong_prompts_of_a_row_are_named_with_it(prompts, kind, message):
    with pytest.raises(kind, match=message):
        make_vec(2).reset(options={"prompt": prompts})


@pytest.mark.parametrize(
    ("seed", "kind", "message"),
    [
        ([1], ValueError, r"seed has 1 entries, expected one number or num_envs=2: \[1\]"),
        ([1, -2], ValueError, r"seed\[1\]=-2 must be a whole number, at least 0 or None"),
        ([1.5, 2], TypeError, r"seed\[0\]=1.5 must be a whole number"),
    ],
)
def test_wrong_seeds_of_a_row_are_named_with_it(seed, kind, message):
    with pytest.raises(kind, match=message):
        make_vec(2).reset(seed=seed)


def test_seeds_of_numpy_are_those_of_python():
    envs = make_vec(2)
    expected, _ = envs.reset(seed=[3, 4])
    for seed in (np.int64(3), np.array([3, 4]), np.array(3), (3, np.uint8(4))):
        np.testing.assert_array_equal(envs.reset(seed=seed)[0]["input_ids"], expected["input_ids"])
    env = make()
    np.testing.assert_array_equal(env.reset(seed=np.int64(3))[0]["input_ids"], expected["input_ids"][0])


ODD = [None, "x", b"x", {}, [], [[1], [2, 3]], object(), 1j, np.array(["a"]), torch.ones(2, requires_grad=True)]


@pytest.mark.parametrize("odd", [*ODD, 2**70, 1.0, True], ids=lambda odd: type(odd).__name__)
def test_odd_actions_are_errors_that_name_them(odd):
    env, envs = make(), make_vec(2)
    env.reset(seed=0)
    envs.reset(seed=0)
    with pytest.raises((TypeError, ValueError), match="^action=.*token id"):
        env.step(odd)
    with pytest.raises((TypeError, ValueError), match="^actions.*token id"):
        envs.step(odd)
    env.step(5)
    envs.step([5, 5])


@pytest.mark.parametrize("odd", [*ODD, True], ids=lambda odd: type(odd).__name__)
def test_odd_log_probabilities_are_errors_that_name_them(odd):
    env, envs = make(), make_vec(2)
    env.reset(seed=0)
    envs.reset(seed=0)
    with pytest.raises((TypeError, ValueError), match="^log_prob(=| has shape)"):
        env.unwrapped.report_log_prob(odd)
    with pytest.raises((TypeError, ValueError), match="^log_probs(=| has shape)"):
        envs.report_log_probs(odd)
    with pytest.raises(ValueError, match=r"log_probs\[1\]=0.5 is not a log-probability \(finite, at most 0\)"):
        envs.report_log_probs([-1.0, 0.5])


def test_texts_for_rows_are_counted_and_named():
    envs = gym.make_vec("TextWrite-v0", num_envs=2, **DEFAULTS)
    envs.reset(seed=0)
    for actions, kind, message in (
        (3, TypeError, r"actions=3 must be 2 texts"),
        ("ab", TypeError, r"actions='ab' must be 2 texts"),
        ((" good",), ValueError, r"has 1 entries, expected 2 texts"),
        ((" good", 4), TypeError, r"actions\[1\]=4 must be a text"),
        ((SURROGATE, " good"), ValueError, r"actions\[0\]=.* half of a surrogate pair"),
    ):
        with pytest.raises(kind, match=message):
            envs.step(actions)
    with pytest.raises(ValueError, match="action=.* half of a surrogate pair"):
        envs.envs[0].step(SURROGATE)
    envs.step((" good", " film"))


def test_a_single_environment_speaks_of_itself_after_its_end():
    env = make(max_new_tokens=1)
    env.reset(seed=0)
    env.step(5)
    with pytest.raises(gym.error.ResetNeeded, match="finish_reason='length'") as error:
        env.step(5)
    assert "row" not in str(error.value)
    assert "reset_mask" not in str(error.value)


def test_a_vector_environment_of_texts_can_be_pickled_amid_an_episode():
    envs = gym.make_vec("TextWrite-v0", num_envs=2, **DEFAULTS)
    envs.reset(seed=0)
    envs.step((" good", " film"))
    again = pickle.loads(pickle.dumps(envs))
    expected, got = envs.step((" and", " this")), again.step((" and", " this"))
    assert got[0] == expected[0]
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)
