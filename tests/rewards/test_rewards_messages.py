"""Rewards written for conversations, whose completions are lists of one assistant's message."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from text_envs import make_vec

from textgym.rewards import DistinctN, ExactMatch, FunctionReward, KeywordPresence, RewardError, Router, as_reward

MESSAGES = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What now?"}]]


def annotated(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


class Annotated:
    def __call__(self, prompts: Any, completions: list[list[dict[str, str]]]) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]


def either(completions: list[str] | list[list[dict[str, str]]]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def texts(completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("fn", [annotated, functools.partial(annotated, weight=1)])
def test_a_function_annotated_with_messages_gets_messages(fn):
    assert as_reward(fn)(prompts=["What now?"], completions=["Wait."]) == [5.0]


def test_prompts_are_the_conversation_of_the_row_or_a_users_message():
    reward = as_reward(Annotated())
    assert reward(prompts=["rendered"], completions=["Wait."], messages=MESSAGES) == [2.0]
    assert reward(prompts=["What now?"], completions=["Wait."]) == [1.0]


@pytest.mark.parametrize("fn", [texts, either, lambda completions: [float(len(c)) for c in completions]])
def test_other_functions_get_texts(fn):
    assert as_reward(fn)(prompts=["p"], completions=["Wait."], messages=MESSAGES) == [5.0]


def test_reads_says_it_for_functions_without_annotation():
    def fn(completions):
        return [float(len(c[0]["content"])) for c in completions]

    assert FunctionReward(fn, reads="messages")(prompts=["p"], completions=["Wait."]) == [5.0]
    assert FunctionReward(texts, reads="texts")(prompts=["p"], completions=["Wait."]) == [5.0]
    with pytest.raises(RewardError, match=r"raised TypeError: .*; completions are texts, for messages wrap it"):
        as_reward(fn)(prompts=["p"], completions=["Wait."])
    with pytest.raises(ValueError, match="reads='conversations' must be one of None, 'texts', 'messages'"):
        FunctionReward(fn, reads="conversations")


async def awaited(completions, **columns):
    return [float(len(completion[-1].get("content"))) for completion in completions]


@pytest.mark.parametrize("completion", ["", "Wait."])
@pytest.mark.parametrize(
    "fn",
    [
        lambda completions, **columns: [float(len(completion[0]["content"])) for completion in completions],
        functools.partial(lambda scale, completions: [scale * len(c[0]["content"]) for c in completions], 1.0),
        awaited,
    ],
)
def test_a_function_without_annotation_that_reads_messages_gets_them_of_conversations(fn, completion):
    reward = as_reward(fn)
    for _ in range(2):
        assert reward(prompts=["rendered"], completions=[completion], messages=MESSAGES) == [len(completion)]


def test_the_prompts_of_such_a_function_are_the_conversations():
    reward = as_reward(lambda prompts, completions, **columns: [float(len(p[-1]["content"])) for p in prompts])
    assert reward(prompts=["rendered"], completions=["Wait."], messages=MESSAGES) == [len("What now?")]


def test_a_function_that_fails_on_some_texts_is_not_taken_for_one_that_reads_messages():
    reward = as_reward(lambda completions, **columns: [float(completion[0] == "W") for completion in completions])
    with pytest.raises(RewardError, match="raised IndexError"):
        reward(prompts=["rendered"], completions=[""], messages=MESSAGES)
    assert reward(prompts=["rendered"], completions=["Wait."], messages=MESSAGES) == [1.0]


def test_trls_own_format_reward_scores_texts_of_an_environment():
    rewards = pytest.importorskip("trl.rewards")
    reward = as_reward(rewards.think_format_reward)
    good, bad = "<think>\nhm\n</think>\n4", "4"
    assert reward(prompts=["2 + 2?"] * 2, completions=[good, bad]) == [1.0, 0.0]
    envs = make_vec(2, reward=rewards.think_format_reward, kl_coef=0.0)
    envs.reset(seed=0)
    _, paid, *_ = envs.step(envs.action_space.sample())
    assert paid.tolist() == [0.0, 0.0]


COMPLETIONS = [[{"role": "assistant", "content": "a good good film"}], [{"role": "assistant", "content": "dull"}]]


@pytest.mark.parametrize(
    "reward",
    [
        DistinctN(1),
        0.5 * DistinctN(1) + KeywordPresence(["good"]),
        ExactMatch(column="answer"),
        Router("answer", {"dull": DistinctN(1), "fine": texts}, normalise=False),
        as_reward(annotated),
        as_reward(texts),
    ],
    ids=lambda reward: reward.name,
)
def test_rewards_score_messages_as_their_texts(reward):
    """TRL's trainers hand conversations to reward functions, and other things that aren't columns."""
    columns = {"answer": ["fine", "dull"], "trainer_state": object(), "log_metric": None}
    written = [messages[0]["content"] for messages in COMPLETIONS]
    expected = reward(prompts=["What now?"] * 2, completions=written, **columns)
    asked = [[{"role": "user", "content": "What now?"}]] * 2
    assert reward(prompts=asked, completions=COMPLETIONS, **columns) == expected
    assert len(set(expected)) == 2


def test_a_conversation_that_is_scored_is_what_functions_for_messages_get():
    assert as_reward(Annotated())(prompts=MESSAGES, completions=COMPLETIONS[:1]) == [2.0]
