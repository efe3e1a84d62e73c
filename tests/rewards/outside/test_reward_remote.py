"""Remote rewards: client and server against each other over loopback, and against servers that misbehave."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from fake_servers import Fake, said
from tiny_agents import count_liked, tiny_ppo, tiny_vector_env

from textgym.rewards import FunctionReward, RemoteReward, RequestLimits, RewardError, RewardServer

PROMPTS = ["the film", "a", ""]
COMPLETIONS = [" is good", "", " warm"]
FAST = {"pause": 0.01, "timeout": 5.0}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def score(reward, completions=COMPLETIONS, prompts=None, **columns):
    prompts = prompts or (PROMPTS if completions is COMPLETIONS else ["p"] * len(completions))
    return reward(prompts=prompts, completions=completions, **columns)


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


# --- both ends


def test_a_served_reward_scores_as_it_does_here():
    def reward(prompts, completions, labels):
        return [None if label is None else len(p) + 10 * len(c) + label for p, c, label in zip(
            prompts, completions, labels, strict=True)]  # fmt: skip

    columns = {"answer": [0.5, None, -1.0]}
    with RewardServer(reward) as server:
        remote = RemoteReward(server.url, label_column="answer", **FAST)
        expected = reward(PROMPTS, COMPLETIONS, columns["answer"])
        assert score(remote, **columns) == expected
        assert expected[1] is None
        with pytest.raises(RewardError, match="needs 'answer', which the prompts have no column for; available:"):
            score(remote)
        assert score(remote, []) == []
    with RewardServer(FunctionReward(lambda completions, task: task), label_column="task") as server:
        assert score(RemoteReward(server.url, label_column="t"), t=[1, 2, 3]) == [1.0, 2.0, 3.0]


def test_strange_texts_arrive_as_they_were_sent():
    strange = ["", "\x00", "\ud800 lone", "\U0001f600", "\u05e9\u05dc\u05d5\u05dd", "x" * 10_000]
    seen = []

    def reward(prompts, completions):
        seen.extend(completions)
        return [0.0] * len(completions)

    with RewardServer(reward) as server:
        score(RemoteReward(server.url, **FAST), strange, strange)
    assert seen == strange


def test_batches_go_out_several_at_once_and_come_back_in_order():
    running, most, sizes = 0, 0, []
    lock = threading.Lock()

    def answer(body):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            sizes.append(len(body["query"]))
        time.sleep(0.05)
        with lock:
            running -= 1
        return said({"rewards": [int(text[1:]) for text in body["query"]]})

    with Fake(answer) as fake:
        remote = RemoteReward(fake.url, batch_size=3, concurrency=4, **FAST)
        assert score(remote, [str(i) for i in range(20)]) == list(range(20))
    assert sorted(sizes) == [2, 3, 3, 3, 3, 3, 3]
    assert 1 < most <= 4


def test_requests_are_in_openrlhfs_form():
    with Fake(said({"rewards": [1, 2], "scores": [0, 0], "extra_logs": {}})) as fake:
        remote = RemoteReward(fake.url, headers={"Authorization": "Bearer secret"}, label_column="y", **FAST)
        assert score(remote, ["a", "b"], y=["u", "v"]) == [1.0, 2.0]
        [(path, headers, body)] = fake.requests
    assert path == "/score"
    assert body == {"query": ["pa", "pb"], "prompts": ["p", "p"], "labels": ["u", "v"]}
    assert headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(remote) + remote.name


def test_vllms_classify_gives_the_probability_of_the_label():
    data = [{"index": 1, "label": "x", "probs": [0.9, 0.1]}, {"index": 0, "label": "y", "probs": [0.25, 0.75]}]
    with Fake(said({"object": "list", "data": data})) as fake:
        assert score(RemoteReward(fake.url, "vllm", model="judge", **FAST), ["a", "b"]) == [0.75, 0.1]
        assert fake.requests[0][2] == {"model": "judge", "input": ["pa", "pb"]}
        assert score(RemoteReward(fake.url, "vllm", label=0, **FAST), ["a", "b"]) == [0.25, 0.9]
        with pytest.raises(RewardError, match=r"label=2, but .* answered with probs=.*0.25, 0.75"):
            score(RemoteReward(fake.url, "vllm", label=2, **FAST), ["a", "b"])


# --- servers that misbehave


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (said({"rewards": [1.0]}), "answered with 1 scores for 2 texts"),
        (said(b"<html>busy</html>"), r"did not answer with JSON .*<html>busy"),
        (said(b""), "did not answer with JSON"),
        (said(b"[" * 100_000), "did not answer with JSON"),
        (said([1.0, 2.0]), 'answered without a list of "rewards"'),
        (said({"rewards": None}), 'answered without a list of "rewards"'),
        (said(b'{"rewards": [1.0, NaN]}'), r"row 1 \(completion 'b'\): .* answered with nan; expected one finite"),
        (said(b'{"rewards": [Infinity, 1.0]}'), r"row 0 \(completion 'a'\): .* answered with inf"),
        (said(b'{"rewards": [1' + b"0" * 400 + b", 1.0]}"), "row 0 .* answered with 1000"),
        (said({"rewards": [True, 1.0]}), "row 0 .* answered with True"),
        (said({"rewards": ["1", 1.0]}), "row 0 .* answered with '1'"),
        (said({"rewards": [[1.0], 1.0]}), r"row 0 .* answered with \[1.0\]"),
        (said({"rewards": [1.0, 2.0], "x": "y" * 2000}), "answered with more than max_bytes=1000"),
        (said({"error": "no such model"}, 404), r"status 404 Not Found: .*no such model"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "status 302"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(answer, complaint):
    with Fake(answer) as fake:
        remote = RemoteReward(fake.url, max_bytes=1000 if "max_bytes" in complaint else 1 << 20, **FAST)
        with pytest.raises(RewardError, match=complaint) as caught:
            score(remote, ["a", "b"])
        assert caught.value.reward == f"remote 127.0.0.1:{fake.server.server_port}"
        assert len(fake.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        {"data": 3},
        {"data": [{"index": 0, "probs": [1.0]}, {"index": 0, "probs": [1.0]}]},
        {"data": [{"probs": [1.0]}, {"index": 1}]},
        {"data": [{"index": [], "probs": 1}]},
        [],
    ],
)
def test_an_answer_that_is_not_vllms_is_an_error(answer):
    with Fake(said(answer)) as fake, pytest.raises(RewardError, match=r"did not answer as vLLM's|scores for 2 texts"):
        score(RemoteReward(fake.url, "vllm", label=0, **FAST), ["a", "b"])


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(status):
    with Fake(said({"error": "busy"}, status), said({"error": "busy"}, status), said({"rewards": [1.0]})) as fake:
        assert score(RemoteReward(fake.url, **FAST), ["a"]) == [1.0]
        assert len(fake.requests) == 3
    with Fake(said({"error": "busy"}, status)) as fake:
        with pytest.raises(RewardError, match=rf"status {status} .*busy.*\(tried 3 times\)"):
            score(RemoteReward(fake.url, retries=2, **FAST), ["a"])
        assert len(fake.requests) == 3


def test_pauses_double_vary_and_honour_retry_after(monkeypatch):
    pauses = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: pauses.append(timeout) or False)
    busy = said({}, 503)
    with Fake(busy) as fake:
        remote = RemoteReward(fake.url, pause=1.0, max_pause=6.0, retries=4)
        with pytest.raises(RewardError):
            remote(prompts=["p"], completions=["c"])
    chosen = [pause for pause in pauses if pause is not None and pause >= 0.5]
    for pause, most in zip(chosen[:4], [1.0, 2.0, 4.0, 8.0], strict=True):
        assert min(most / 2, 6.0) <= pause <= min(most, 6.0)
    pauses.clear()
    with Fake((503, {"Retry-After": "5"}, b""), (503, {"Retry-After": "60"}, b""), said({"rewards": [0.0]})) as fake:
        RemoteReward(fake.url, pause=0.6, max_pause=7.0)(prompts=["p"], completions=["c"])
    assert [pause for pause in pauses if pause is not None and pause >= 0.5][:2] == [5.0, 7.0]


def test_a_server_that_hangs_trickles_or_breaks_off_is_given_up():
    def silent(connection):
        time.sleep(2)

    def trickling(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.03)

    def broken(connection):
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"rewards": [1.0]}')

    def gibberish(connection):
        connection.sendall(b"\x00\x01\x02\r\n\r\n")

    for behave, complaint in [
        (silent, "timed out"),
        (trickling, "not finished after 0.2 s"),
        # On a busy machine the connection may be gone before the first byte is read.
        (broken, "(broke off 982 bytes before the end|Connection reset)"),
        (gibberish, r"did not answer: ('.x00|.*Connection reset)"),
    ]:
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def serve(listening=listening, behave=behave):
                for _ in range(2):
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(1 << 16)
                        with contextlib.suppress(OSError):  # the client has gone, as it should
                            behave(connection)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            started = time.monotonic()
            with pytest.raises(RewardError, match=rf"{complaint}.*\(tried 2 times\)"):
                score(RemoteReward(url, timeout=0.2, retries=1, pause=0.01), ["a"])
            assert time.monotonic() - started < 60, "a server that never ends its answer would hold it for ever"
            thread.join()


def test_nobody_there_is_an_error_that_says_so():
    with pytest.raises(RewardError, match=r"did not answer: .*refused.*\(tried 2 times\)"):
        score(RemoteReward(f"http://127.0.0.1:{free_port()}/", retries=1, **FAST))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"url": "ftp://host/"}, "must begin with http:// or https://"),
        ({"url": "http:///path"}, "name a host"),
        ({"url": "http://me:secret@host/"}, "url holds a name or password"),
        ({"protocol": "grpc"}, "protocol='grpc' must be one of 'openrlhf', 'vllm'"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
        ({"retries": -1}, "retries=-1"),
        ({"concurrency": 1.5}, "concurrency=1.5"),
        ({"url": 3}, "url=3 must be a text"),
        ({"timeout": 0}, "timeout=0 must be a finite number greater than 0, in seconds"),
        ({"pause": math.inf}, "pause=inf"),
    ],
)
def test_impossible_arguments_are_refused(arguments, complaint):
    with pytest.raises((TypeError, ValueError), match=complaint) as caught:
        RemoteReward(**{"url": "http://host/", **arguments})
    assert "secret" not in str(caught.value)


def test_a_column_that_is_no_json_is_named():
    with pytest.raises(RewardError, match=r"the column 'y' can't be sent as JSON: .*set"):
        score(RemoteReward("http://127.0.0.1:1/", label_column="y"), ["a"], y=[{1}])


# --- the server


JSON = {"Content-Type": "application/json"}


def post(server, body, path="/get_reward", headers=JSON):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_the_server_answers_wrong_requests_with_what_is_wrong():
    def strict(prompts, completions):
        return [float("nan") if text == "bad" else 1.0 for text in completions]

    with RewardServer(strict, limits=RequestLimits(max_bytes=1000, max_texts=3)) as server:
        for body, status, problem in [
            (b"{", 400, "the request is not JSON"),
            (b"\xff", 400, "the request is not JSON"),
            ([], 400, "the request is a list, expected an object"),
            ({}, 400, "'query' must be a list of texts, got NoneType"),
            ({"query": ["a", 3]}, 400, "'query' must be a list of texts"),
            ({"query": ["a"], "prompts": "a"}, 400, "'prompts' must be a list of texts, got str"),
            ({"query": ["a"], "prompts": []}, 400, "'prompts' must be a list of 1 entries"),
            ({"query": ["a"], "labels": {}}, 400, "'labels' must be a list of 1 entries"),
            ({"query": ["a \ud800"], "prompts": ["b"]}, 422, "query 0 does not begin with its prompt"),
            ({"query": ["bad"]}, 422, "reward 'strict', row 0 .*returned float nan"),
            ({"query": ["x" * 2000]}, 413, "more than 1000 bytes"),
            ({"query": ["x"] * 4}, 413, "'query' has 4 texts, at most 3"),
        ]:
            got, content = post(server, body)
            assert got == status
            assert re.search(problem, content["error"]), content
        assert post(server, {"query": ["p and more"], "prompts": ["p"]}) == (200, {"rewards": [1.0]})
        assert post(server, {"query": ["alone"]}, path="/") == (200, {"rewards": [1.0]})
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"reward": "strict"}
        connection.close()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; x=y"])
def test_what_a_page_in_a_browser_can_send_unasked_is_refused(kind):
    with RewardServer(length) as server:
        status, content = post(server, {"query": ["a"]}, headers={"Content-Type": kind})
        assert (status, "application/json" in content["error"]) == (415, True)
        assert post(server, {"query": ["a"]}, headers={"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


def test_a_request_that_is_too_large_is_answered_and_not_tried_again():
    """The sender writes all of it before it looks for an answer, so the server has to read it."""
    with RewardServer(length, limits=RequestLimits(max_bytes=1 << 20)) as server:
        attempts = []
        remote = RemoteReward(server.url, **FAST)
        send = remote._client._send
        remote._client._send = lambda request: attempts.append(1) or send(request)
        with pytest.raises(RewardError, match=r"status 413 .*more than 1048576 bytes"):
            score(remote, ["x" * (6 << 20)])
        assert len(attempts) == 1


HEAD = "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


HALF = f'{HEAD}Content-Length: 100\r\n\r\n{{"query"'.encode()


def half_sent(server, text=HALF):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(text)
    return connection


def test_unfinished_requests_end_and_hold_up_nobody():
    with RewardServer(length, limits=RequestLimits(timeout=0.5)) as server:
        halves = [half_sent(server) for _ in range(20)] + [half_sent(server, b"POST / HT") for _ in range(5)]
        assert post(server, {"query": ["abc"]}) == (200, {"rewards": [3.0]})
        for half in halves[:20]:
            assert half.recv(1000).startswith(b"HTTP/1.1 408")
        for half in halves:
            while half.recv(1000):
                pass  # until the server closes the connection
            half.close()


def test_requests_beyond_the_limit_are_asked_to_come_again():
    with RewardServer(length, limits=RequestLimits(max_requests=1)) as server:
        half = half_sent(server)
        status, content = 200, {}
        while status == 200:  # until the half request is there
            status, content = post(server, {"query": ["a"]})
        assert (status, "try again" in content["error"]) == (503, True)
        half.close()
        assert score(RemoteReward(server.url, retries=50, pause=0.01, max_pause=0.05), ["abc"], ["p"]) == [3.0]


def test_a_client_that_leaves_is_neither_scored_nor_logged(capfd):
    """It waits behind another request when it goes; and one goes before all of its request is there."""
    scored, begun, go_on = [], threading.Event(), threading.Event()

    def reward(completions):
        begun.set()
        go_on.wait(60)
        scored.extend(completions)
        return [0.0] * len(completions)

    with RewardServer(reward) as server:
        first = threading.Thread(target=post, args=(server, {"query": ["first"]}))
        first.start()
        assert begun.wait(60)
        body = json.dumps({"query": ["gone"]})
        for promised in (len(body), 900):
            half_sent(server, f"{HEAD}Content-Length: {promised}\r\n\r\n{body}".encode()).close()
        time.sleep(1.0)  # a server that has not seen them leave would answer them
        go_on.set()
        first.join(60)
        assert post(server, {"query": ["last"]}) == (200, {"rewards": [0.0]})
    assert scored == ["first", "last"]
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"max_bytes": 0}, "max_bytes=0"), ({"max_texts": 1.5}, "max_texts=1.5"), ({"timeout": 0}, "timeout=0")],
)
def test_impossible_limits_are_refused(arguments, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        RequestLimits(**arguments)


def test_what_the_served_reward_complains_of_reaches_the_client():
    careless = FunctionReward(lambda completions: [1 / 0], name="careless")
    complaint = r"status 422 .*reward 'careless', row 0 .*ZeroDivisionError"
    with RewardServer(careless) as server, pytest.raises(RewardError, match=complaint):
        score(RemoteReward(server.url, **FAST), ["a"])


def test_requests_are_scored_one_after_the_other():
    running = []

    def reward(completions):
        running.append(1)
        assert len(running) == 1
        time.sleep(0.02)
        running.pop()
        return [0.0] * len(completions)

    with RewardServer(reward) as server:
        assert score(RemoteReward(server.url, batch_size=1, concurrency=6, **FAST), list("abcdef")) == [0.0] * 6


def test_a_taken_port_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        RewardServer(length, port=taken.getsockname()[1]).__enter__()


def test_without_starlette_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(ModuleNotFoundError, match=r"serving a reward needs .*textgym\[serve\]"):
        RewardServer(length)


def test_a_training_survives_its_server():
    """The server dies between two rollouts; training raises, and goes on with that rollout when the server is back."""
    local = tiny_ppo(tiny_vector_env(4, reward=count_liked))
    local.learn(48)
    local.learn(48, reset_num_timesteps=False)
    port = free_port()
    remote = RemoteReward(f"http://127.0.0.1:{port}/get_reward", retries=1, **FAST)
    env = tiny_vector_env(4, reward=remote)
    model = tiny_ppo(env)
    with RewardServer(count_liked, port=port):
        model.learn(48)
    with pytest.raises(RewardError, match="did not answer"):
        model.learn(48, reset_num_timesteps=False)
    with RewardServer(count_liked, port=port):
        model.learn(48, reset_num_timesteps=False)
    assert model.num_timesteps == 96
    for ours, undisturbed in zip(model.policy.parameters(), local.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, undisturbed)
    env.close()


@pytest.mark.slow
def test_the_command_serves_a_reward_to_other_processes(tmp_path):
    (tmp_path / "mine.py").write_text("def words(completions): return [len(text.split()) for text in completions]\n")
    port = free_port()
    command = [sys.executable, "-m", "textgym.agents.cli", "serve-reward", f"{tmp_path}/mine.py:words", "--port"]
    process = subprocess.Popen([*command, str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        remote = RemoteReward(f"http://127.0.0.1:{port}/get_reward", retries=60, pause=0.5, max_pause=0.5)
        assert score(remote) == [2.0, 0.0, 1.0]
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=20)
    assert "Serving words at" in output
