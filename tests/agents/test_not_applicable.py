"""A reward that says None, "not applicable", of some completions; and rewards that say what can't be paid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from prefix_batches import text_batch
from text_envs import make_vec
from tiny_agents import tiny_vector_env
from tiny_models import tiny_tokenizer

from textgym.agents import GRPO, REINFORCE, RLOO
from textgym.agents.common.groups import group_relative_advantages, leave_one_out_advantages
from textgym.agents.common.ranking import best_and_worst, best_of_groups
from textgym.rewards import DistinctN, PrefixBatch, Reward, RewardError, as_reward

JUDGED = np.array([False, False, True, True])


def test_a_group_is_compared_without_those_that_nobody_judged():
    returns = np.array([[0.0], [0.0], [1.0], [3.0]])
    np.testing.assert_allclose(leave_one_out_advantages(returns, 4, JUDGED).ravel(), [0, 0, -2, 2])
    relative = group_relative_advantages(returns, returns[:, 0], 4, "group", JUDGED).ravel()
    np.testing.assert_allclose(relative, np.array([0, 0, -1, 1]) / np.sqrt(2), atol=1e-3)
    np.testing.assert_allclose(
        relative[2:], group_relative_advantages(returns[2:], returns[2:, 0], 2, "group").ravel(), rtol=1e-12
    )
    equal = np.array([[0.0], [0.0], [1.0], [1.0]])
    assert not group_relative_advantages(equal, equal[:, 0], 4, "group", JUDGED).any()


@pytest.mark.parametrize("judged", [np.zeros(4, dtype=bool), np.array([True, False, False, False])])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_with_nothing_to_compare_nothing_is_learned(judged, scale):
    returns = np.array([[2.0], [0.5], [1.0], [3.0]])
    assert not leave_one_out_advantages(returns, 4, judged).any()
    assert not group_relative_advantages(returns, returns[:, 0], 4, scale, judged).any()
    assert not best_and_worst(returns[:, 0], 4, judged=judged).any()


def test_the_best_of_a_group_are_among_those_that_were_judged():
    returns = np.array([9.0, 8.0, 1.0, 3.0])
    assert best_of_groups(returns, 4, 1, JUDGED).tolist() == [False, False, False, True]
    assert best_of_groups(returns, 4, 3, JUDGED).tolist() == [False, False, True, True]
    assert best_and_worst(returns, 4, judged=JUDGED).tolist() == [0, 0, -1, 1]


class Sometimes:
    """1.0 for a completion of an even number of calls' row, None for the others; or None for all."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        return [float(len(text)) if hash_of(text) < self.share else None for text in completions]


def hash_of(text: str) -> float:
    return sum(map(ord, text)) % 7 / 7


@pytest.mark.parametrize("scoring", ["deferred", "instant"])
@pytest.mark.parametrize("agent", [GRPO, RLOO])
def test_episodes_that_the_reward_says_nothing_about_have_no_advantage(agent, scoring):
    reward = Sometimes(0.6)
    envs = tiny_vector_env(8, reward=reward, kl_coef=0.1)
    model = agent("LanguageModelPolicy", envs, group_size=4, scoring=scoring, seed=0, learning_rate=0.0)
    model.learn(1)
    applies = {e["row"]: e["applies"] for e in model.finished_episodes}
    texts = {e["row"]: e["completion"] for e in model.finished_episodes}
    assert applies == {row: hash_of(text) < 0.6 for row, text in texts.items()}
    assert set(applies.values()) == {True, False}
    buffer = model.rollout_buffer
    for segment in buffer.segments:
        advantages = buffer.advantages[segment.start : segment.start + segment.steps, segment.row]
        if not applies[segment.row]:
            assert not advantages.any()


@pytest.mark.parametrize("agent", [GRPO, RLOO, REINFORCE])
def test_a_reward_that_never_applies_moves_nothing(agent):
    envs = tiny_vector_env(8, reward=Sometimes(0.0), kl_coef=0.1)
    arguments = {"baseline": "mean"} if agent is REINFORCE else {"group_size": 4}
    model = agent("LanguageModelPolicy", envs, seed=0, learning_rate=0.1, **arguments)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


class Own(Reward):
    """A reward with potentials of its own."""

    def __init__(self, value: Any, prefixes: Any = None) -> None:
        self.value, self.prefixes = value, prefixes

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [0.0] * len(completions)

    def potentials(self, batch: PrefixBatch) -> Any:
        return self.value(len(batch)) if callable(self.value) else self.value

    def prefix_potentials(self, batch: PrefixBatch, at: Any) -> Any:
        return [self.potentials(batch.at([i] * len(row), row)) for i, row in enumerate(at)]


WRONG = [
    lambda n: np.full(n, np.nan),
    lambda n: np.full(n, np.inf),
    lambda n: np.full(n, 3e38),
    lambda n: np.full(n, -1e300),
    lambda n: np.zeros(n + 1),
    lambda n: ["good"] * n,
    lambda n: [[0.0]] * n,
    None,
    "abc",
    {"a": 1},
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("deferred", [False, True])
def test_what_a_rewards_own_potentials_say_is_judged_before_it_is_paid(wrong, deferred):
    envs = make_vec(2, reward=Own(wrong))

    def play() -> None:
        envs.begin_rollout(defer_scoring=deferred)
        envs.reset(seed=0)
        envs.step(np.array([5, 5]))
        envs.scores()

    with pytest.raises(RewardError, match="reward 'Own'"):
        play()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_function_whose_scores_do_not_fit_float32_is_an_error_and_not_infinity(sign):
    envs = make_vec(2, reward=lambda completions: [sign * 3e38] * len(completions))
    with pytest.raises(RewardError, match="paid as float32.*clip or scale it"):
        envs.reset(seed=0)


def test_tensors_whose_numbers_can_not_be_read_are_named():
    for tensor in (torch.zeros(1, device="meta"), torch.zeros(1, 1).to_sparse()):
        reward = as_reward(lambda completions, tensor=tensor: tensor)
        with pytest.raises(RewardError, match=r"(?s)returned .*one finite number"):
            reward(prompts=["p"], completions=["c"])


@pytest.mark.parametrize(
    ("prompts", "completions", "error"),
    [
        (["p"], ["a", "b"], ValueError),
        (["p"], "a", TypeError),
        ("p", ["a"], TypeError),
        (None, ["a"], TypeError),
        (["p"], 3, TypeError),
    ],
)
def test_rewards_take_lists_of_one_length(prompts, completions, error):
    for reward in (DistinctN(1), 2 * DistinctN(1), as_reward(lambda completions: [0.0] * len(completions))):
        with pytest.raises(error, match=r"prompts|completions"):
            reward(prompts=prompts, completions=completions)


def test_the_batch_of_a_reward_model_is_scored_as_before():
    batch = text_batch(tiny_tokenizer(), ["the film"], ["is good"])
    assert as_reward(lambda completions: [None]).potentials(batch).tolist() == [0.0]
