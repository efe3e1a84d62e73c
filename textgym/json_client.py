"""Asking servers elsewhere: JSON over HTTP, with time limits, and tried again where that may help.

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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urlsplit

from typing_extensions import TypedDict

from textgym.checks import check_int, check_number, check_text

RETRIED = (408, 425, 429, 500, 502, 503, 504)  # the server may do better in a moment
_CHUNK = 1 << 16

T = TypeVar("T")


class ClientArguments(TypedDict, total=False):
    """What a :class:`JsonClient` takes besides its address."""

    concurrency: int
    timeout: float
    retries: int
    pause: float
    max_pause: float
    max_bytes: int
    headers: Mapping[str, str] | None


class RemoteError(Exception):
    """A server stays away, refuses a request, or answers with something else than JSON."""


class JsonClient:
    """Sends JSON to one address and reads JSON.

    What may be better in a moment (no connection, a timeout, the statuses in ``RETRIED``) is tried again after a pause
    that doubles each time and is shortened at random by up to half, so that many clients do not come back together; a
    server's Retry-After is honoured up to ``max_pause``.

    :param url: where to POST to
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
        *,
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
        for name, number, least in (
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("max_bytes", max_bytes, 1),
        ):
            check_int(name, number, low=least)
        for name, seconds in (("timeout", timeout), ("pause", pause), ("max_pause", max_pause)):
            check_number(name, seconds, low=0.0, open_low=True, unit="seconds")
        self.url = url
        self.host = parts.netloc
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.pause = pause
        self.max_pause = max_pause
        self.max_bytes = max_bytes
        self.headers = dict(headers or {})
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._random = random.Random()  # for the pauses only: no seed of a training is touched

    def ask_all(self, bodies: Sequence[bytes], read: Callable[[int, Any], T]) -> list[T]:
        """Send several requests, some at once, and read their answers.

        :param bodies: of the requests, such as :func:`as_json` makes
        :param read: makes something of the answer to the request with a number; what it raises ends the others
        :return: what it made, in the order of the requests
        :raises RemoteError: if the server gives no answer in JSON to one of them
        """
        given_up = threading.Event()

        def ask(number: int) -> T:
            return read(number, self._parsed(self.post(bodies[number], given_up)))

        if len(bodies) < 2:
            return [ask(number) for number in range(len(bodies))]
        with ThreadPoolExecutor(min(self.concurrency, len(bodies)), "textgym-remote") as pool:
            futures = [pool.submit(ask, number) for number in range(len(bodies))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                given_up.set()  # nobody waits for the others any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def post(self, body: bytes, given_up: threading.Event) -> bytes:
        """The answer to a request, which may be tried several times.

        :param given_up: set where nobody waits for it any more
        :raises RemoteError: if there is none
        """
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
                    raise RemoteError(problem) from error
                last: Exception = error
            except (OSError, HTTPException) as error:  # no connection, a timeout, or one that broke off
                reason = str(getattr(error, "reason", error)) or type(error).__name__
                problem, last = f"{self.url} did not answer: {_plain(reason)}", error
            if attempt < self.retries:
                pause = self.pause * 2**attempt * self._random.uniform(0.5, 1.0)
                if given_up.wait(min(self.max_pause, max(pause, asked or 0.0))):
                    break
        raise RemoteError(f"{problem} (tried {attempt + 1} times)") from last

    def _parsed(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            found = quoted(body.decode("utf-8", "replace"))
            raise RemoteError(f"{self.url} did not answer with JSON ({error}): {found}") from error

    def _send(self, request: urllib.request.Request) -> bytes:
        """The answer to one request. A socket's timeout starts anew with every byte; this one doesn't."""
        deadline = time.monotonic() + self.timeout
        parts, size = [], 0
        with self._opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(_CHUNK):
                parts.append(part)
                size += len(part)
                if size > self.max_bytes:
                    raise RemoteError(f"{self.url} answered with more than max_bytes={self.max_bytes}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not finished after {self.timeout:g} s")
            expected = response.length  # what the head promised and the body lacked
        if expected:
            raise ConnectionError(f"broke off {expected} bytes before the end")
        return b"".join(parts)


def as_json(content: Any) -> bytes:
    """Plain data as the body of a request.

    :raises TypeError: if it is not plain data
    :raises ValueError: if it has numbers that JSON lacks
    """
    return json.dumps(content, allow_nan=False).encode()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, or send texts to a host that nobody named."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def quoted(value: Any) -> str:
    """What a server answered, as messages show it."""
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 200 else text[:197] + "...")


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
        return quoted(body)
    if isinstance(answer, dict) and isinstance(answer.get("error"), str):
        return _plain(answer["error"][:1000])
    return quoted(body)


def _plain(text: str) -> str:
    """The text, with escapes where it has what a terminal would obey."""
    return text if text.isprintable() else repr(text)
