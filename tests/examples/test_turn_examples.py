"""The examples of turns keep their rules, and train."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType

import pytest
from places import EXAMPLES

from textgym.replies import LanguageModelReply
from textgym.small_model import small_model


@pytest.fixture
def guessing_game(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return opened("guessing_game", monkeypatch)


@pytest.fixture
def calculator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return opened("calculator", monkeypatch)


def opened(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_hints_leave_as_many_numbers_as_they_must(guessing_game: ModuleType) -> None:
    cases = [
        (talk(), 16, 0),
        (talk(" 7."), 16, 0),
        (talk(" 7.", " higher."), 8, 1),
        (talk(" 7.", " higher.", " 11.", " lower."), 3, 2),
        (talk(" 7.", " higher.", " 3.", " higher."), 8, 2),
        (talk(" 7.", " right."), 1, 1),
        (talk(" 7 7", " higher."), 16, 1),
    ]
    found = guessing_game.knowledge([case[0] for case in cases])
    assert found == pytest.approx([(left == 1) - math.log2(left) - 0.1 * guesses for _, left, guesses in cases])


def test_the_game_ends_with_the_right_number(guessing_game: ModuleType) -> None:
    said = guessing_game.game([talk(" 7."), talk(" 3."), talk(" 9."), talk("9")], [7, 7, 7, 7])
    assert [(one.text, one.done) for one in said] == [
        (" right.", True),
        (" higher.", False),
        (" lower.", False),
        (" higher.", False),
    ]


def test_lessons_never_say_what_a_sum_is_unless_the_tool_has(calculator: ModuleType) -> None:
    for question in calculator.questions(20, seed=0):
        assert eval("+".join(str(int(n)) for n in question["prompt"][:-1].split("+"))) == int(question["answer"][:-1])
        guess, call, read = calculator.lessons(**question)
        assert guess["completion"].endswith((".", "</calculate>"))
        assert (
            call["prompt"] + call["completion"]
            == f"{question['prompt']}<calculate>{question['prompt'][:-1]}</calculate>"
        )
        assert read["prompt"].endswith(f"<result>{question['answer'][:-1]}</result>")


@pytest.mark.parametrize("name", ["guessing_game", "calculator"])
def test_they_train_from_start_to_end(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = opened(name, monkeypatch)
    pieces = [*map(chr, range(32, 127)), "guess:", " right.", " higher.", " lower."]
    environment, agent = module.environment, module.PPO
    monkeypatch.setattr(module, "beginner", lambda: small_model(pieces, hidden_size=8, heads=1))
    monkeypatch.setattr(module, "environment", lambda model: environment(model, num_envs=4))
    monkeypatch.setattr(module, "PPO", lambda *a, **options: agent(*a, **{**options, "n_steps": 40, "batch_size": 80}))
    module.main(640)
    assert capsys.readouterr().out.count(", such as") == 2


def test_a_mood_is_that_of_the_other_ones_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = opened("cheer_up", monkeypatch)
    said = ["What a warm, funny delight", "How dull and boring"]
    own = ["a dull mess", "a delight"]
    talks = [talk(*both) for both in zip(own, said, strict=True)]
    wanted = module.liking(prompts=["", ""], completions=[text.lower() for text in said])
    assert module.mood([talks[0], talk("a delight"), [], talks[1]]) == pytest.approx([wanted[0], 0.0, 0.0, wanted[1]])
    assert wanted[0] > 0 > wanted[1]


def test_cheering_up_shows_what_is_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = opened("cheer_up", monkeypatch)
    agent, environment = module.GRPO, module.environment
    small = {"episodes": 8, "group_size": 4, "batch_size": 64}
    monkeypatch.setattr(module, "other", lambda: LanguageModelReply("embedded", max_new_tokens=4))
    monkeypatch.setattr(module, "environment", lambda reply: environment(reply, num_envs=8))
    monkeypatch.setattr(module, "GRPO", lambda *a, **options: agent(*a, **{**options, **small}))
    module.main(64)
    shown = capsys.readouterr().out.splitlines()
    assert sum("answers to held-out openings" in line for line in shown) == 2
    assert sum(" | " in line for line in shown) == 10
