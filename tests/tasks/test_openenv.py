"""OpenEnv in both directions, against the package's own servers and clients."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("openenv", reason="needs textgym[openenv]")

import uvicorn
from openenv.core import GenericEnvClient
from openenv.core.env_server import Action, Environment, Observation, State, create_app
from tiny_agents import tiny_language_model, tiny_vector_env

from textgym.envs.openenv import openenv_app
from textgym.replies import ReplyError, ReplyResult
from textgym.replies.base import ask
from textgym.tasks import OpenEnvGame

# Of the package's own code and of what it uses.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@contextmanager
def served(app: Any) -> Iterator[str]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


class Said(Action):
    words: str


class Heard(Observation):
    answer: str


class Words(Environment):
    """Answers with a word that the seed draws, and pays for the same word."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None) -> Heard:
        self.random, self.count = random.Random(seed), 0
        return Heard(answer="the film")

    def step(self, action: Said, timeout_s: float | None = None) -> Heard:
        self.count += 1
        if action.words == "fail":
            raise RuntimeError("no such word")
        word = self.random.choice(["good", "great", "fine", "warm", "dull"])
        return Heard(answer=f" {word}", reward=float(word in action.words), done=self.count == 3)

    @property
    def state(self) -> State:
        return State(step_count=self.count)


def words_app(sessions: int = 8) -> Any:
    return create_app(Words, Said, Heard, env_name="words", max_concurrent_envs=sessions)


def transcript(*words: str) -> list[dict[str, str]]:
    talk = []
    for text in words:
        talk += [{"role": "assistant", "content": text}, {"role": "user", "content": "..."}]
    return talk[:-1]


def test_an_environment_of_openenv_replies_and_pays():
    drawn = random.Random(4)
    words = [drawn.choice(["good", "great", "fine", "warm", "dull"]) for _ in range(3)]
    with served(words_app()) as url:
        game = OpenEnvGame(url, action="words", observation="answer", games=2, seed=3)
        assert game.prompts == [{"prompt": "the film", "game": 3}, {"prompt": "the film", "game": 4}]
        said = [words[0], "nothing", words[2]]
        for n, paid, done in ((1, 1.0, False), (2, 0.0, False), (3, 1.0, True)):
            result = ask(game, np.array([0]), ["the film"], [transcript(*said[:n])], {"game": [4]})[0]
            assert result == ReplyResult(f" {words[n - 1]}", paid, done)
        with pytest.raises(ReplyError, match="no such word"):
            ask(game, np.array([0]), ["the film"], [transcript("fail")], {"game": [4]})
        assert ask(game, np.array([0]), ["the film"], [transcript("x")], {"game": [4]})[0].text == f" {words[0]}"
        wrong = OpenEnvGame(url, action=lambda text: {"words": text}, observation="text")
        with pytest.raises(ReplyError, match="observation='text' must name a text of the observations"):
            ask(wrong, np.array([0]), ["the film"], [transcript("x")], {"game": [4]})


def test_rows_of_an_environment_play_on_a_server():
    with served(words_app(sessions=3)) as url:
        game = OpenEnvGame(url, action="words", observation="answer", games=3)
        turns = {"max_turns": 4, "max_new_tokens": 1}
        envs = tiny_vector_env(3, prompts=game.prompts, reply=game, kl_coef=0.0, **turns)
        envs.reset(seed=0)
        ended = 0
        for _ in range(7):
            _, _, terminated, _, info = envs.step(np.array([9, 10, 11]))
            ended += int(terminated.sum())
            assert all(text.strip() for text in info.get("final_info", info)["reply"])
        assert ended == 6


def test_textgym_is_an_environment_of_openenv():
    options: dict[str, Any] = {"language_model": tiny_language_model(), "kl_coef": 0.0, "max_new_tokens": 6}
    options["reward"] = lambda completions: [float(len(text.split())) for text in completions]
    here = gym.make("TextWrite-v0", **options)
    with served(openenv_app(max_concurrent_envs=2, **options)) as url:
        with GenericEnvClient(base_url=url).sync() as one, GenericEnvClient(base_url=url).sync() as other:
            assert one.reset(seed=3).observation["text"] == here.reset(seed=3)[0]
            assert other.reset(prompt="the film").observation["text"] == "the film"
            for action in (" good", " great movie", ""):
                text, reward, terminated, truncated, info = here.step(action)
                result = one.step({"text": action})
                assert (result.observation["text"], result.reward) == (text, reward)
                assert result.done == (terminated or truncated)
            assert result.observation["finish_reason"] == info["finish_reason"] == "eos"
            assert result.observation["score"] == info["score"] == 3.0
            assert other.step({"text": " good"}).observation["text"] == "the film good"
        with GenericEnvClient(base_url=url).sync() as again:  # in a session that is free again
            assert again.reset(prompt="the film").observation["text"] == "the film"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: OpenEnvGame("", "words", "answer"), "url"),
        (lambda: OpenEnvGame("http://127.0.0.1:9", "", "answer"), "action"),
        (lambda: OpenEnvGame("http://127.0.0.1:9", "words", ""), "observation"),
        (lambda: OpenEnvGame("http://127.0.0.1:9", "words", "answer", timeout=0), "timeout=0"),
        (lambda: openenv_app(max_concurrent_envs=0), "max_concurrent_envs=0"),
        (lambda: openenv_app(max_new_tokens=0), "max_new_tokens=0"),
    ],
)
def test_impossible_arguments_are_refused(make, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        make()
