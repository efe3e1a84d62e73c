"""reasoning-gym's questions as prompts and its scores as a reward, against the package itself."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

pytest.importorskip("reasoning_gym", reason="needs textgym[reasoning-gym]")

import reasoning_gym
from reasoning_gym.factory import DATASETS

from textgym.rewards import RewardError
from textgym.tasks import ReasoningGym


def score(task: ReasoningGym, rows: list[dict[str, Any]], answers: list[str]) -> Any:
    columns = {name: [row[name] for row in rows] for name in ("task", "index", "answer")}
    return task(prompts=[row["prompt"] for row in rows], completions=answers, **columns)


def test_questions_and_scores_are_those_of_the_package():
    settings = {"chain_sum": {"min_terms": 2, "max_terms": 2}, "leg_counting": {}}
    task = ReasoningGym(settings, size=3, seed=4, prompt="{} Answer:")
    assert [row["task"] for row in task.prompts] == ["chain_sum"] * 3 + ["leg_counting"] * 3
    for row in task.prompts:
        theirs = reasoning_gym.create_dataset(row["task"], seed=4, size=3, **settings[row["task"]])
        entry = theirs[row["index"]]
        assert row["prompt"] == f"{entry['question']} Answer:"
        for answer in (entry["answer"], f"it is {entry['answer']}", "7", ""):
            assert score(task, [row], [f" {answer}\n"]) == [theirs.score_answer(answer, entry)]


def test_an_answer_may_stand_in_a_tag():
    task = ReasoningGym("chain_sum", size=2, answer_tag="answer")
    row = task.prompts[0]
    right = f"<answer>{row['answer']}</answer>"
    texts = [right, f"<answer>0.5</answer> no: {right}.", f"{right} <answer>no</answer>", row["answer"], ""]
    assert [score(task, [row], [text])[0] == 1.0 for text in texts] == [True, True, False, False, False]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"composite"}))
def test_every_task_asks_and_scores_whatever_is_answered(name):
    task = ReasoningGym(name, size=1, seed=1)
    row = task.prompts[0]
    scores = [score(task, [row], [text])[0] for text in ("", "1", "xyz \n", "[[1, 2], [3, 4]]", "<answer>")]
    assert all(0.0 <= value <= 1.0 for value in scores)
    if row["answer"] is not None:
        assert score(task, [row], [row["answer"]]) == [1.0]


def test_an_environment_asks_its_questions_and_pays_its_scores():
    task = ReasoningGym("chain_sum", size=1, prompt="{} ")
    env = gym.make(
        "TextGen-v0", prompts=task.prompts, reward=task, kl_coef=0.0, max_prompt_tokens=96, max_new_tokens=12
    )
    env.reset(seed=0)
    vocabulary = env.unwrapped.vocabulary
    total, done = 0.0, False
    for token in [*vocabulary.turns.tokenizer(task.prompts[0]["answer"])["input_ids"], vocabulary.eos_token_id]:
        _, reward, done, _, info = env.step(token)
        total += reward
    assert done
    assert info["score"] == 1.0
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"tasks": "chain_sums"}, "no task 'chain_sums'; did you mean chain_sum"),
        ({"tasks": "?"}, "DATASETS lists them"),
        ({"tasks": {}}, "must be the name of a task, or a dict"),
        ({"tasks": {"chain_sum": {"terms": 3}}}, "'chain_sum' does not take {'terms': 3}"),
        ({"tasks": {"chain_sum": {"min_terms": 0}}}, "'chain_sum' does not take {'min_terms': 0}"),
        ({"tasks": "chain_sum", "size": 0}, "size=0"),
        ({"tasks": "chain_sum", "prompt": "Answer:"}, "must have {} where the question goes"),
        ({"tasks": "chain_sum", "answer_tag": ""}, "answer_tag"),
    ],
)
def test_impossible_arguments_are_refused(arguments, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        ReasoningGym(**arguments)


def test_rows_that_are_not_its_own_are_named():
    with pytest.raises(RewardError, match="needs 'task', which the prompts have no column for"):
        ReasoningGym("chain_sum", size=1)(prompts=["p"], completions=["c"])
