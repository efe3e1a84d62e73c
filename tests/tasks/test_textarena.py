"""Games of TextArena as replies, against the package itself."""

from __future__ import annotations

import random
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("textarena", reason="needs textgym[textarena]")

import textarena

from textgym.continuation import continuation_ids
from textgym.replies import ReplyResult
from textgym.replies.base import ask
from textgym.tasks import TextArenaGame


def transcript(words: list[str]) -> list[dict[str, str]]:
    talk = []
    for text in words:
        talk += [{"role": "assistant", "content": text}, {"role": "user", "content": "..."}]
    return talk[:-1]


def play(game: TextArenaGame, seed: int, words: list[str], row: int = 0) -> list[ReplyResult]:
    """What is said to each of some words."""
    return [
        ask(game, np.array([row]), ["p"], [transcript(words[:n])], {"game": [seed]})[0]
        for n in range(1, len(words) + 1)
    ]


def numbers(seed: int) -> int:
    """The number to guess, as the package itself draws it."""
    state = random.getstate()
    env = textarena.make("GuessTheNumber-v0-raw")
    env.reset(num_players=1, seed=seed)
    random.setstate(state)
    return int(env.game_number)


def test_what_the_game_says_is_the_reply_and_its_reward_is_paid():
    game = TextArenaGame("GuessTheNumber-v0", games=3, seed=2)
    assert [row["game"] for row in game.prompts] == [2, 3, 4]
    assert game.prompts[0]["prompt"].startswith("You are Player 0. You are playing Guess The Number.")
    assert game.prompts[0]["prompt"].endswith("\n")
    number = numbers(3)
    other = 1 if number > 1 else 20
    results = play(game, 3, [f" I say [{other}]", "what?", f"[{number}]"])
    assert results[0] == ReplyResult(f"\nThe target number is {'higher' if other == 1 else 'lower'}.\n")
    assert "You attempted an invalid move" in results[1].text
    assert results[2] == ReplyResult("\nCongratulations! You guessed the correct number.\n", 1.0, True)


def test_an_invalid_move_too_many_ends_the_game_with_the_reward_that_it_gives():
    result = play(TextArenaGame("GuessTheNumber-v0", says="{}"), 0, ["[5]", "x", "y"])[-1]
    assert (result.done, result.text) == (True, "Invalid Move: " + result.text.removeprefix("Invalid Move: "))
    assert 0.0 <= result.reward <= 1.0


def test_a_game_that_fails_at_the_words_of_its_player_ends(monkeypatch):
    from textarena.envs.GuessTheNumber.env import GuessTheNumberEnv

    def fail(self: Any, action: str) -> Any:
        raise IndexError("no such place")

    game = TextArenaGame("GuessTheNumber-v0", says="{}")
    monkeypatch.setattr(GuessTheNumberEnv, "step", fail)
    assert play(game, 1, ["[5]"]) == [ReplyResult("error: no such place", 0.0, True)]


@pytest.mark.parametrize("name", ["2048-v0", "Blackjack-v0", "FrozenLake-v0-random"])
def test_games_draw_the_same_in_another_row_and_touch_no_generator(name):
    words = ["[up]", "[left]", "[hit]", "[down]", "[right]", "[stand]", "[up]"]
    one = TextArenaGame(name, games=2)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    said: list[Any] = []
    for n in range(1, len(words) + 1):
        random.random()
        said.append(ask(one, np.array([0]), ["p"], [transcript(words[:n])], {"game": [1]})[0])
        if said[-1].done:
            break
    # Another reply, without memory of it, plays it again and goes on alike.
    random.seed(4)
    for n in range(1, len(said) + 1):
        assert ask(TextArenaGame(name), np.array([0]), ["p"], [transcript(words[:n])], {"game": [1]})[0] == said[n - 1]
    random.seed(3)
    TextArenaGame(name, games=2).prompts  # noqa: B018
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002


def test_an_environment_plays_a_game():
    game = TextArenaGame("GuessTheNumber-v0", games=1, seed=3, says="{}\n")
    options = {"prompts": game.prompts, "reply": game, "max_turns": 2, "stop": "]", "max_prompt_tokens": 192}
    options |= {"max_new_tokens": 6, "max_reply_tokens": 26, "kl_coef": 0.0}
    env = gym.make("TextGen-v0", reward=lambda completions: [0.0] * len(completions), **options)
    env.reset(seed=0)
    vocabulary = env.unwrapped.vocabulary
    so_far = vocabulary.encode(game.prompts[0]["prompt"])
    for token in continuation_ids(vocabulary, so_far, f"[{numbers(3)}]"):
        _, reward, terminated, _, info = env.step(token)
    assert terminated
    assert reward == pytest.approx(1.0)
    assert info["reply"] == "Congratulations! You guessed the correct number.\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"game": "GuessANumber"}, "TextArena has no game='GuessANumber'"),
        ({"game": "TicTacToe-v0"}, "'TicTacToe-v0' can't be played by one player"),
        ({"game": "GuessTheNumber-v0", "numbers": 3}, "can't be played by one player with {'numbers': 3}"),
        ({"game": "GuessTheNumber-v0", "says": "x"}, "must have {} where the message goes"),
    ],
)
def test_impossible_games_are_refused(arguments, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        TextArenaGame(**arguments)
