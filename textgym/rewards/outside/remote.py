"""Reward models that are served elsewhere, over HTTP.

Requests are sent with the standard library, a thread each: what a request waits for is the server.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from http.client import HTTPException
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from textgym.checks import check_choice, check_int, check_number, check_text
from textgym.rewards.base import Reward
from textgym.rewards.errors import RewardError

Protocol = Literal["openrlhf", "vllm"]
RETRIED = (408, 425, 429, 500, 502, 503, 504)  # the server may do better in a moment
_CHUNK = 1 << 16


class RemoteReward(Reward):
    """Scores from a server, over one of two JSON protocols.

    ``"openrlhf"``: that of OpenRLHF's reward server, which ``textgym serve-reward`` speaks, too. POST
    ``{"query": [prompt and completion together], "prompts": [...], "labels": [...]}``, answered by
    ``{"rewards": [...]}``. A reward may be null: not applicable.

    ``"vllm"``: vLLM's ``/classify``. POST ``{"model": ..., "input": [prompt and completion together]}``, answered by
    ``{"data": [{"index": 0, "probs": [...]}, ...]}``. Φ is the probability of class ``label``.

    Texts go out in batches, several at once. What may be better in a moment (no connection, a timeout, statuses 408,
    425, 429, 500, 502, 503 and 504) is tried again after a pause that doubles each time and is shortened at random by
    up to half, so that many clients do not come back together; a server's Retry-After is honoured up to ``max_pause``.
    Anything else that is not one finite number (or null) for each text raises :class:`RewardError`, and so does a
    server that stays away; training state is untouched by that, and scoring can be tried again.

    Range: whatever is served; [0, 1] for ``"vllm"``.

        >>> from textgym.rewards import FunctionReward, RewardServer
        >>> length = FunctionReward(lambda completions: [len(text) for text in completions])
        >>> with RewardServer(length) as server:
        ...     RemoteReward(server.url)(prompts=["the film", "a"], completions=[" is warm", ""])
        [8.0, 0.0]

    :param url: where to POST to, such as ``http://gpu-box:8700/get_reward``
    :param protocol: ``"openrlhf"`` or ``"vllm"``
    :param label_column: ``"openrlhf"``: the column of the prompt rows that is sent as ``labels``; without it they are
        empty texts
    :param model: ``"vllm"``: the name of the served model; None leaves it out
    :param label: ``"vllm"``: which class
    :param batch_size: texts per request
    :param concurrency: requests at once
    :param timeout: for one attempt, in seconds
    :param retries: attempts after the first
    :param pause: before the second attempt, in seconds
    :param max_pause: longest pause, in seconds
    :param max_bytes: longest answer that is read
    :param headers: further headers, such as ``{"Authorization": "Bearer ..."}``
    :raises ValueError: if an argument is impossible
    """

    def __init__(
        self,
        url: str,
        protocol: Protocol = "openrlhf",
        *,
        label_column: str | None = None,
        model: str | None = None,
        label: int = 1,
        batch_size: int = 64,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 4,
        pause: float = 0.5,
        max_pause: float = 30.0,
        max_bytes: int = 1 << 24,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        parts = urlsplit(check_text("url", url, empty=False))
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"url={url!r} must begin with http:// or https:// and name a host")
        if "@" in parts.netloc:
            raise ValueError("url holds a name or password, which would show in messages; send them as headers=")
        check_choice("protocol", protocol, get_args(Protocol))
        for name, number, least in [
            ("batch_size", batch_size, 1),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("label", label, 0),
            ("max_bytes", max_bytes, 1),
        ]:
            check_int(name, number, low=least)
        for name, seconds in (("timeout", timeout), ("pause", pause), ("max_pause", max_pause)):
            check_number(name, seconds, low=0.0, open_low=True, unit="seconds")
        self.url = url
        self.protocol = protocol
        self.label_column = label_column
        self.model = model
        self.label = label
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.pause = pause
        self.max_pause = max_pause
        self.max_bytes = max_bytes
        self.headers = dict(headers or {})
        self._host = parts.netloc
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._random = random.Random()  # for the pauses only: no seed of a training is touched

    @property
    def name(self) -> str:
        return f"remote {self._host}"

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        if not completions:
            return []
        labels: list[Any] = [""] * len(prompts)
        if self.label_column is not None:
            if self.label_column not in columns:
                available = ", ".join(["prompts", "completions", *columns])
                raise RewardError(
                    self.name,
                    f"needs {self.label_column!r}, which the prompts have no column for; available: {available}",
                )
            labels = list(columns[self.label_column])
        queries = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        starts = range(0, len(queries), self.batch_size)
        given_up = threading.Event()

        def score(start: int) -> list[float | None]:
            batch = slice(start, start + self.batch_size)
            content = self._content(queries[batch], prompts[batch], labels[batch])
            return self._scores(self._post(content, given_up), completions[batch], start)

        if len(starts) == 1:
            return score(0)
        with ThreadPoolExecutor(min(self.concurrency, len(starts)), "textgym-remote-reward") as pool:
            futures = [pool.submit(score, start) for start in starts]
            try:
                return [value for future in futures for value in future.result()]
            except BaseException:
                given_up.set()  # nobody waits for the others any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _content(self, queries: list[str], prompts: list[str], labels: list[Any]) -> bytes:
        """What is sent for one batch."""
        if self.protocol == "openrlhf":
            content: dict[str, Any] = {"query": queries, "prompts": prompts, "labels": labels}
        else:
            content = {"input": queries} if self.model is None else {"model": self.model, "input": queries}
        try:
            return json.dumps(content, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(self.name, f"the column {self.label_column!r} can't be sent as JSON: {error}") from error

    def _scores(self, body: bytes, completions: list[str], start: int) -> list[float | None]:
        """The scores in an answer to a batch, whose first row is row ``start`` of the call."""
        answer = self._parsed(body)
        values = self._rewards(answer) if self.protocol == "openrlhf" else self._probabilities(answer)
        if len(values) != len(completions):
            raise RewardError(self.name, f"{self.url} answered with {len(values)} scores for {len(completions)} texts")
        scores: list[float | None] = []
        for i, value in enumerate(values):
            if value is not None and not _is_finite(value):
                problem = f"{self.url} answered with {value!r}; expected one finite number or null for each text"
                raise RewardError(self.name, problem, row=start + i, completion=completions[i])
            scores.append(None if value is None else float(value))
        return scores

    def _rewards(self, answer: Any) -> list[Any]:
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise RewardError(self.name, f'{self.url} answered without a list of "rewards": {_shown(answer)}')
        return rewards

    def _probabilities(self, answer: Any) -> list[Any]:
        data = answer.get("data") if isinstance(answer, dict) else None
        try:
            if not isinstance(data, list):
                raise TypeError("no list of data")
            by_index = {item["index"]: item["probs"] for item in data}
            if sorted(by_index) != list(range(len(data))):
                raise ValueError(f"the indices are {sorted(by_index)}")
            probabilities = [by_index[i] for i in range(len(data))]
        except (TypeError, KeyError, ValueError) as error:
            raise RewardError(
                self.name, f"{self.url} did not answer as vLLM's /classify does ({error!r}): {_shown(answer)}"
            ) from error
        for row in probabilities:
            if not isinstance(row, list) or len(row) <= self.label:
                raise RewardError(self.name, f"label={self.label}, but {self.url} answered with probs={_shown(row)}")
        return [row[self.label] for row in probabilities]

    def _parsed(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RewardError(
                self.name, f"{self.url} did not answer with JSON ({error}): {_shown(body.decode('utf-8', 'replace'))}"
            ) from error

    # One request, and trying again

    def _post(self, body: bytes, given_up: threading.Event) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self.headers}
        problem = ""
        for attempt in range(self.retries + 1):
            asked: float | None = None
            try:
                return self._send(urllib.request.Request(self.url, body, headers, method="POST"))
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"{self.url} answered with status {error.code} {error.reason}: {_detail(error)}"
                    asked = _seconds(error.headers.get("Retry-After"))
                if error.code not in RETRIED:
                    raise RewardError(self.name, problem) from error
                last: Exception = error
            except (OSError, HTTPException) as error:  # no connection, a timeout, or one that broke off
                reason = str(getattr(error, "reason", error)) or type(error).__name__
                problem, last = f"{self.url} did not answer: {_plain(reason)}", error
            if attempt < self.retries:
                pause = self.pause * 2**attempt * self._random.uniform(0.5, 1.0)
                if given_up.wait(min(self.max_pause, max(pause, asked or 0.0))):
                    break
        raise RewardError(self.name, f"{problem} (tried {attempt + 1} times)") from last

    def _send(self, request: urllib.request.Request) -> bytes:
        """The answer to one request. A socket's timeout starts anew with every byte; this one doesn't."""
        deadline = time.monotonic() + self.timeout
        parts, size = [], 0
        with self._opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(_CHUNK):
                parts.append(part)
                size += len(part)
                if size > self.max_bytes:
                    raise RewardError(self.name, f"{self.url} answered with more than max_bytes={self.max_bytes}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not finished after {self.timeout:g} s")
            expected = response.length  # what the head promised and the body lacked
        if expected:
            raise ConnectionError(f"broke off {expected} bytes before the end")
        return b"".join(parts)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, or send texts to a host that nobody named."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _seconds(header: str | None) -> float | None:
    try:
        seconds = float(header or "")
    except ValueError:  # none, or a date
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _detail(error: urllib.error.HTTPError) -> str:
    """What a server says is wrong: the text under "error" in its answer, where it has one, else the answer."""
    try:
        body = error.read(_CHUNK).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return "it broke off there"
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return _shown(body)
    if isinstance(answer, dict) and isinstance(answer.get("error"), str):
        return _plain(answer["error"][:1000])
    return _shown(body)


def _plain(text: str) -> str:
    """The text, with escapes where it has what a terminal would obey."""
    return text if text.isprintable() else repr(text)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 200 else text[:197] + "...")
