"""Games as replies: played in rows, and again from their beginnings where a row has another one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tiny_agents import tiny_vector_env

from textgym.replies import GameReply, ReplyError, ReplyResult
from textgym.replies.base import ask


class Counting:
    """Says how often it was played, and its seed; counts the moves of all games."""

    moves = 0

    def reset(self, seed: int) -> str:
        self.seed, self.played = seed, 0
        return "the film"

    def step(self, text: str) -> ReplyResult:
        if "bad" in text:
            raise RuntimeError("no such move")
        Counting.moves += 1
        self.played += 1
        return ReplyResult(f" {self.seed} {self.played} {text}", reward=0.5, done=self.played == 4)


def transcript(*words: str) -> list[dict[str, str]]:
    talk = []
    for text in words:
        talk += [{"role": "assistant", "content": text}, {"role": "user", "content": "..."}]
    return talk[:-1]


def played(game: GameReply, rows: list[int], seeds: list[int], *talks: Any) -> list[str | None]:
    results = ask(game, np.array(rows), ["the film"] * len(rows), list(talks), {"game": seeds})
    return [result.text for result in results]


def test_a_row_plays_its_own_game_and_each_move_once():
    game, Counting.moves = GameReply(Counting, games=3, seed=5), 0
    assert game.prompts == [{"prompt": "the film", "game": seed} for seed in (5, 6, 7)]
    assert played(game, [0, 2], [5, 6], transcript("a"), transcript("b")) == [" 5 1 a", " 6 1 b"]
    assert played(game, [2], [6], transcript("b", "c")) == [" 6 2 c"]
    assert played(game, [0, 2], [5, 6], transcript("a", "d"), transcript("b", "c", "e")) == [" 5 2 d", " 6 3 e"]
    assert Counting.moves == 5
    # Another game in the row, and another course of the same one.
    assert played(game, [0], [7], transcript("a")) == [" 7 1 a"]
    assert played(game, [2], [6], transcript("x", "y")) == [" 6 2 y"]
    assert played(game, [9], [6], transcript("x", "y", "z")) == [" 6 3 z"]


def test_a_game_that_fails_is_named_and_played_again():
    game = GameReply(Counting)
    played(game, [0], [5], transcript("a"))
    with pytest.raises(ReplyError, match="GameReply.*raised RuntimeError: no such move"):
        played(game, [0], [5], transcript("a", "bad"))
    assert played(game, [0], [5], transcript("a", "c")) == [" 5 2 c"]
    with pytest.raises(ReplyError, match="needs a column 'game' of the prompts"):
        ask(game, np.arange(1), ["p"], [transcript("a")], {})


class Words:
    """A game with words of the tiny tokenizer, drawn with the seed."""

    def reset(self, seed: int) -> str:
        self.random = random.Random(seed)
        return "the film"

    def step(self, text: str) -> ReplyResult:
        word = self.random.choice(["good", "great", "fine", "warm", "dull"])
        return ReplyResult(f" {word}", reward=float(word in text))


def test_an_environment_pays_a_game_and_resumes_amid_it():
    def make() -> Any:
        game = GameReply(Words, games=4)
        turns = {"max_turns": 3, "max_new_tokens": 2}
        return tiny_vector_env(3, prompts=game.prompts, reply=game, kl_coef=0.0, **turns)

    envs, again = make(), make()
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    moves = rng.integers(4, 40, (13, 3))
    for actions in moves[:5]:
        envs.step(actions)
    again.load_state_dict(envs.state_dict())
    said = []
    for actions in moves[5:]:
        (_, reward, *_, info), (_, same, *_, same_info) = envs.step(actions), again.step(actions)
        np.testing.assert_array_equal(reward, same)
        assert list(info.get("reply", [])) == list(same_info.get("reply", []))
        said += [text for text in info.get("reply", []) if text]
    assert len(set(said)) > 1


@pytest.mark.parametrize(
    ("arguments", "complaint"), [({"games": 0}, "games=0"), ({"seed": -1}, "seed=-1"), ({"role": ""}, "role")]
)
def test_impossible_arguments_are_refused(arguments, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        GameReply(Counting, **arguments)
