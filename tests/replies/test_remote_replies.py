"""Replies over HTTP: both ends against each other over loopback, and each against others that misbehave."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
from fake_servers import Fake, said
from tiny_agents import tiny_vector_env

from textgym.replies import RemoteReply, Reply, ReplyError, ReplyResult, ReplyServer, as_reply
from textgym.replies.base import ask

FAST = {"pause": 0.01, "timeout": 5.0}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def later(text: str) -> list[dict[str, str]]:
    return [*turn("first"), {"role": "user", "content": "hm"}, *turn(text)]


class Counting(Reply):
    """Counts the turns of each episode by itself."""

    def __init__(self) -> None:
        self.turns: dict[int, int] = {}
        self.begun: list[int] = []

    def begin(self, rows: np.ndarray) -> None:
        self.begun += rows.tolist()
        self.turns.update(dict.fromkeys(rows.tolist(), 0))

    def reply(self, rows: np.ndarray, prompts: Any, transcripts: Any, columns: Any) -> list[Any]:
        for row in rows.tolist():
            self.turns[row] += 1
        return [f" {self.turns[row]}" for row in rows.tolist()]


def test_what_a_server_says_is_what_the_reply_says_here():
    kinds = {"text": " warm \U0001f600", "end": None, "paid": ReplyResult(" ok", 0.5), "empty": ""}
    kinds |= {"last": ReplyResult(" bye", -1.0, True), "quiet": ReplyResult(None), "won": ReplyResult(None, 2.0, True)}

    def reply(prompts, transcripts, points):
        return [kinds[transcript[-1]["content"]] for transcript in transcripts]

    rows, transcripts, columns = np.arange(len(kinds)), list(map(turn, kinds)), {"points": list(range(len(kinds)))}
    here = ask(as_reply(reply), rows, [*kinds], transcripts, columns)
    with ReplyServer(reply) as server:
        for size in (64, 2):
            remote = RemoteReply(server.url, columns=["points"], batch_size=size, **FAST)
            assert ask(remote, rows, [*kinds], transcripts, columns) == here


def test_a_served_game_knows_the_episodes_of_all_clients_apart():
    counting = Counting()
    with ReplyServer(counting) as server:
        one, other = RemoteReply(server.url, **FAST), RemoteReply(server.url, **FAST)
        rows = np.array([4, 7])
        for remote in (one, other):
            assert remote.reply(rows, ["p", "q"], [turn("a"), turn("b")], {}) == [" 1", " 1"]
        assert one.reply(rows[:1], ["p"], [later("a")], {}) == [" 2"]
        resumed = RemoteReply(server.url, **FAST)
        resumed.load_state_dict(one.state_dict())
        one.begin(rows[:1])
        assert one.reply(rows, ["p", "q"], [turn("c"), later("b")], {}) == [" 1", " 2"]
        assert other.reply(rows, ["p", "q"], [later("a"), later("b")], {}) == [" 2", " 2"]
        assert resumed.reply(rows[:1], ["p"], [later("a")], {}) == [" 2"]  # said already, and not counted again
        assert len(counting.begun) == 5


def test_a_server_forgets_what_is_over_first_and_then_what_is_oldest():
    def request(episode: str, talk: Any) -> Any:
        return {"episodes": [episode], "prompts": ["p"], "transcripts": [talk]}

    class Ending(Counting):
        def reply(self, rows: np.ndarray, prompts: Any, transcripts: Any, columns: Any) -> list[Any]:
            said = super().reply(rows, prompts, transcripts, columns)
            return [ReplyResult(one, done=t[-1]["content"] == "end") for one, t in zip(said, transcripts, strict=True)]

    ending = Ending()
    with ReplyServer(ending, max_episodes=2) as server:
        _post(server.url, request("a", turn("x")))
        _post(server.url, request("b", turn("end")))
        _post(server.url, request("c", turn("x")))  # instead of b
        assert _post(server.url, request("a", later("x"))) == {"replies": [" 2"]}
        _post(server.url, request("d", turn("x")))  # instead of c
        assert _post(server.url, request("a", [*later("x"), *later("y")])) == {"replies": [" 3"]}
        with pytest.raises(urllib.error.HTTPError) as refused:
            _post(server.url, request("c", later("x")))
        with refused.value as error:
            assert "episode 'c' goes on, but is not known here" in json.load(error)["error"]
        assert set(ending.turns) == {0, 1}


def test_an_episode_goes_on_where_a_checkpoint_was_taken():
    with ReplyServer(Counting()) as server:
        one, other = RemoteReply(server.url, **FAST), RemoteReply(server.url, **FAST)
        one.reply(np.arange(2), ["p", "q"], [turn("a"), turn("b")], {})
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert other.reply(np.arange(2), ["p", "q"], [later("a"), later("b")], {}) == [" 2", " 2"]


def test_a_request_whose_answer_was_lost_does_not_move_a_game_twice():
    counting = Counting()
    with ReplyServer(counting) as server:
        content = {"episodes": ["e"], "prompts": ["p"], "transcripts": [turn("a")]}
        assert [_post(server.url, content) for _ in range(3)] == [{"replies": [" 1"]}] * 3
        assert _post(server.url, content | {"transcripts": [later("b")]}) == {"replies": [" 2"]}
        # Without episodes each turn is one of its own.
        for _ in range(3):
            assert _post(server.url, {"prompts": ["p"], "transcripts": [turn("a")]}) == {"replies": [" 1"]}


def _post(url: str, content: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_requests_have_the_form_that_the_manual_says():
    with Fake(said({"replies": ["x"]})) as fake:
        remote = RemoteReply(fake.url, columns=["k"], headers={"Authorization": "Bearer b"}, **FAST)
        remote.reply(np.array([3]), ["p"], [turn("a")], {"k": [{"n": 1}], "other": [object()]})
        remote.begin(np.array([3]))
        remote.reply(np.array([3]), ["p"], [turn("b")], {"k": [None]})
    (_, headers, first), (_, _, second) = fake.requests
    assert headers["Authorization"] == "Bearer b"
    assert {name: first[name] for name in ("prompts", "transcripts", "columns")} == {
        "prompts": ["p"],
        "transcripts": [turn("a")],
        "columns": {"k": [{"n": 1}]},
    }
    assert first["episodes"] != second["episodes"]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"reply": ["x"]}, 'without a list of 1 "replies"'),
        ({"replies": ["x", "y"]}, 'without a list of 1 "replies"'),
        ([], 'without a list of 1 "replies"'),
        ({"replies": [3]}, "row 5: .*expected a text, null, or an object"),
        ({"replies": [{"text": "x", "points": 3}]}, "row 5: .*expected a text, null, or an object"),
        ({"replies": [{"reward": 1.0}]}, "expected a text, null, or an object"),
        ({"replies": [{"text": 3}]}, "expected a text"),
        ({"replies": [{"text": "x", "reward": "much"}]}, "expected a finite number"),
        ({"replies": [{"text": "x", "done": 1}]}, "expected True or False"),
        (b"<html>", "did not answer with JSON"),
    ],
)
def test_a_wrong_answer_is_an_error_that_shows_it(answer, complaint):
    with Fake(said(answer)) as fake, pytest.raises(ReplyError, match=complaint):
        ask(RemoteReply(fake.url, **FAST), np.array([5]), ["p"], [turn("a")], {})


def test_a_busy_server_is_asked_again_and_one_that_stays_away_is_an_error():
    with Fake(said({}, 503), said({"replies": ["x"]})) as fake:
        assert RemoteReply(fake.url, **FAST).reply(np.arange(1), ["p"], [turn("a")], {}) == ["x"]
    with pytest.raises(ReplyError, match=r"did not answer: .*\(tried 2 times\)"):
        RemoteReply(fake.url, retries=1, **FAST).reply(np.arange(1), ["p"], [turn("a")], {})


@pytest.mark.parametrize(
    ("content", "status", "complaint"),
    [
        ({"prompts": "p"}, 400, "'prompts' must be a list of texts"),
        ({"prompts": ["p"]}, 400, "'transcripts' must be a list of 1 entries"),
        ({"prompts": ["p"], "transcripts": [[]]}, 400, "must be a list of messages"),
        ({"prompts": ["p"], "transcripts": [[{"role": "user"}]]}, 400, "must be a list of messages"),
        ({"prompts": ["p"], "transcripts": [turn("a")], "columns": [1]}, 400, "'columns' must be an object"),
        ({"prompts": ["p"], "transcripts": [turn("a")], "columns": {"k": []}}, 400, "'k' must be a list of 1"),
        ({"prompts": ["p"] * 2, "transcripts": [turn("a")] * 2, "episodes": ["e", "e"]}, 400, "names one twice"),
        ({"prompts": ["p"] * 4, "transcripts": [turn("a")] * 4}, 413, "at most 3 can be answered"),
        ({"prompts": ["p"], "transcripts": [turn("a")]}, 422, "returned int 7"),
    ],
)
def test_the_server_answers_wrong_requests_with_what_is_wrong(content, status, complaint):
    with ReplyServer(lambda transcripts: [7], max_episodes=3) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            _post(server.url, content)
        with refused.value as error:
            assert error.code == status
            assert complaint in json.load(error)["error"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"url": "gpu-box:8701"}, "must begin with http"),
        ({"columns": "k"}, "columns='k' must be a list of texts"),
        ({"role": ""}, "role"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"retries": -1}, "retries=-1"),
        ({"timeout": 0}, "timeout=0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        RemoteReply(**{"url": "http://127.0.0.1/", **arguments})


def test_columns_that_are_missing_or_no_json_are_named():
    remote = RemoteReply("http://127.0.0.1:9/", columns=["k"])
    with pytest.raises(ReplyError, match=r"needs a column 'k' of the prompts; there are \['j'\]"):
        remote.reply(np.arange(1), ["p"], [turn("a")], {"j": [1]})
    with pytest.raises(ReplyError, match=r"columns \['k'\] can't be sent as JSON"):
        remote.reply(np.arange(1), ["p"], [turn("a")], {"k": [object()]})


def test_an_environment_loses_nothing_while_its_server_is_away():
    failing = [True]

    def reply(transcripts):
        if failing:
            failing.clear()
            raise RuntimeError("the game is not loaded yet")
        return [" very good"] * len(transcripts)

    with ReplyServer(reply) as server:
        env = tiny_vector_env(
            2, reply=RemoteReply(server.url, **FAST), max_turns=2, max_new_tokens=1, kl_coef=0.0, max_prompt_tokens=8
        )
        env.reset(seed=0)
        with pytest.raises(ReplyError, match="status 422 .*the game is not loaded yet"):
            env.step(np.array([9, 9]))
        _, _, _, _, info = env.step(np.array([9, 9]))
        assert info["reply"].tolist() == [" very good"] * 2
