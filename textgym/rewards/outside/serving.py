"""Serving a reward over HTTP, so that one machine with a GPU scores for many environments.

It speaks the protocol of OpenRLHF's reward server: see :class:`~textgym.rewards.outside.remote.RemoteReward`, the other
end. Anyone who reaches the port can use it: there is no authentication, so the default is to listen to this machine
only. Reach it from others through an SSH tunnel, or put a proxy that checks who asks before it. :class:`RequestLimits`
bounds what clients can make it hold; programs are held off, not attackers.

Needs the extra ``serve`` (Starlette and uvicorn).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textgym.checks import check_int, check_number, shown
from textgym.encodable_text import well_formed
from textgym.rewards.errors import RewardError
from textgym.rewards.extras import import_extra
from textgym.rewards.opening import as_reward
from textgym.rewards.scores import as_list, scores_of

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from typing_extensions import Self

HOST, PORT = "127.0.0.1", 8700
_START = 30.0  # seconds that a server in a thread may take to begin and to end
_DRAINED = 8  # of a request that is refused, so many times max_bytes are still read: the sender then sees why


@dataclass(frozen=True)
class RequestLimits:
    """What clients may ask of a reward server; what goes beyond is refused, and others are served meanwhile.

    :param max_bytes: longest request that is read; a longer one is answered with 413
    :param max_texts: most texts in a request; more are answered with 413
    :param max_requests: how many may be read, wait or be scored at once; further ones are answered with 503 and
        Retry-After, which ``RemoteReward`` honours
    :param timeout: for a request to arrive, in seconds; then it is answered with 408
    :raises ValueError: if one is impossible
    """

    max_bytes: int = 1 << 24
    max_texts: int = 1 << 14
    max_requests: int = 64
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_texts", "max_requests"):
            check_int(name, getattr(self, name), low=1)
        check_number("timeout", self.timeout, low=0.0, open_low=True, unit="seconds")


class _BadRequest(Exception):
    """What a client sent can't be scored."""

    def __init__(self, problem: str, status: int = 400) -> None:
        super().__init__(problem)
        self.status = status


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


def reward_app(reward: Any, label_column: str = "labels", limits: RequestLimits | None = None) -> Starlette:
    """An ASGI application that serves a reward.

    - ``POST /get_reward`` or ``/``: ``{"query": [...], "prompts": [...], "labels": [...]}`` → ``{"rewards": [...]}``. A
      query is prompt and completion together, and must begin with its prompt; without ``prompts`` it is a completion
      alone. The reward gets the labels as a column. Not applicable is null.
    - ``GET /health``: ``{"reward": name}``

    What can't be scored is answered with a status and ``{"error": ...}``: 400 for a request of another form, 408 for
    one that does not arrive in time, 413 for one that is too large, 415 for another content type than JSON (a page in
    a browser can post any other to this machine unasked), 422 where the reward raises :class:`RewardError`, 503 while
    there are too many. Requests are scored one after the other, in a thread of their own; one whose client has gone by
    then is left out.

    :param reward: what ``as_reward`` takes
    :param label_column: the column's name under which the reward gets ``labels``
    :param limits: of requests; None for the defaults
    :raises ModuleNotFoundError: if Starlette is not installed
    """
    applications = import_extra("starlette.applications", "serve", "serving a reward")
    responses = import_extra("starlette.responses", "serve", "serving a reward")
    routing = import_extra("starlette.routing", "serve", "serving a reward")
    served = as_reward(reward)
    if not isinstance(limits, RequestLimits | None):
        raise TypeError(f"limits={shown(limits)} must be RequestLimits(...), or None for the defaults")
    desk = _Desk(limits or RequestLimits())
    turn = asyncio.Lock()  # a model's caches are for one caller

    def score(prompts: list[str], completions: list[str], columns: dict[str, Any]) -> list[float | None]:
        return as_list(scores_of(served, prompts, completions, columns))

    async def get_reward(request: Request) -> Response:
        try:
            async with desk.accepted(request) as body:
                texts = _texts(_content(body), label_column, desk.limits.max_texts)
                async with turn:
                    if await request.is_disconnected():
                        raise _ClientGone
                    rewards = await asyncio.get_running_loop().run_in_executor(None, score, *texts)
        except _BadRequest as error:
            # The connection may hold the rest of what was refused; nothing more is read from it.
            headers = {"Connection": "close", **({"Retry-After": "1"} if error.status == 503 else {})}
            return responses.JSONResponse({"error": well_formed(str(error))}, status_code=error.status, headers=headers)
        except RewardError as error:
            return responses.JSONResponse({"error": well_formed(str(error))}, status_code=422)
        except _ClientGone:
            return responses.Response(status_code=499)  # goes nowhere; the number is what nginx logs
        return responses.JSONResponse({"rewards": rewards})

    async def health(request: Request) -> Response:
        return responses.JSONResponse({"reward": served.name})

    return applications.Starlette(
        routes=[
            routing.Route("/", get_reward, methods=["POST"]),
            routing.Route("/get_reward", get_reward, methods=["POST"]),
            routing.Route("/health", health, methods=["GET"]),
        ]
    )


class _Desk:
    """Takes requests in, within limits."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self._inside = 0

    @contextlib.asynccontextmanager
    async def accepted(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts as being here until the end of the block.

        :raises _BadRequest: if it is refused; what it holds has been read by then, so that the answer arrives
        :raises _ClientGone: if the client went before all of it was here
        """
        refusal = self._refusal(request)
        self._inside += refusal is None
        try:
            yield await self._body(request, refusal)
        finally:
            self._inside -= refusal is None

    def _refusal(self, request: Request) -> _BadRequest | None:
        """Why a request is refused whatever it holds."""
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            return _BadRequest(f"the content type is {kind[:60]!r}, expected application/json", 415)
        if self._inside >= self.limits.max_requests:
            return _BadRequest(f"{self.limits.max_requests} requests are here already; try again in a moment", 503)
        return None

    async def _body(self, request: Request, refusal: _BadRequest | None) -> bytes:
        from starlette.requests import ClientDisconnect

        parts: list[bytes] = []
        size, limit = 0, self.limits.max_bytes

        async def read() -> None:
            nonlocal size, refusal
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    refusal = refusal or _BadRequest(
                        f"the request has more than {limit} bytes; send fewer texts at once", 413
                    )
                if refusal is not None:
                    parts.clear()
                    if size > _DRAINED * limit:
                        return
                else:
                    parts.append(part)

        try:
            await asyncio.wait_for(read(), self.limits.timeout)
        except ClientDisconnect as error:
            raise _ClientGone from error
        except asyncio.TimeoutError as error:  # in Python 3.10 another class than TimeoutError
            problem = f"the request did not arrive within {self.limits.timeout:g} s"
            raise refusal or _BadRequest(problem, 408) from error
        if refusal is not None:
            raise refusal
        return b"".join(parts)


def serve_reward(
    reward: Any,
    host: str = HOST,
    port: int = PORT,
    label_column: str = "labels",
    log_level: str = "info",
    limits: RequestLimits | None = None,
) -> None:
    """Serve a reward until the process is interrupted, see :func:`reward_app`.

    :param reward: what ``as_reward`` takes
    :param host: address to listen on; the default is this machine only
    :param port: TCP port
    :param label_column: the column's name under which the reward gets ``labels``
    :param log_level: of uvicorn
    :param limits: of requests; None for the defaults
    :raises ModuleNotFoundError: if Starlette or uvicorn is not installed
    """
    uvicorn = import_extra("uvicorn", "serve", "serving a reward")
    app = reward_app(reward, label_column, limits)
    protocol = _protocol((limits or RequestLimits()).timeout)
    uvicorn.run(app, host=host, port=port, log_level=log_level, http=protocol, ws="none", lifespan="off")


class RewardServer:
    """A reward served from a thread of this process, between ``with`` and the end of its block.

        >>> import json, urllib.request
        >>> with RewardServer(lambda completions: [float(len(text)) for text in completions]) as server:
        ...     body = json.dumps({"query": ["the film is warm"], "prompts": ["the film"]}).encode()
        ...     request = urllib.request.Request(server.url, body, {"Content-Type": "application/json"})
        ...     with urllib.request.urlopen(request) as answer:
        ...         json.load(answer)
        {'rewards': [8.0]}

    :param reward: what ``as_reward`` takes
    :param host: address to listen on
    :param port: TCP port; 0 takes a free one
    :param label_column: the column's name under which the reward gets ``labels``
    :param limits: of requests; None for the defaults
    :raises ModuleNotFoundError: if Starlette or uvicorn is not installed
    :raises OSError: at the beginning of the block, if the port is taken
    """

    def __init__(
        self,
        reward: Any,
        host: str = HOST,
        port: int = 0,
        label_column: str = "labels",
        limits: RequestLimits | None = None,
    ) -> None:
        uvicorn = import_extra("uvicorn", "serve", "serving a reward")
        app = reward_app(reward, label_column, limits)
        protocol = _protocol((limits or RequestLimits()).timeout)
        config = uvicorn.Config(
            app, log_level="critical", http=protocol, ws="none", lifespan="off", timeout_graceful_shutdown=1
        )
        self.host = host
        self.port = port
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where :class:`~textgym.rewards.outside.remote.RemoteReward` reaches it."""
        return f"http://{self.host}:{self.port}/get_reward"

    def __enter__(self) -> Self:
        listening = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self.host, self.port))
        except OSError:
            listening.close()
            raise
        self.port = listening.getsockname()[1]
        self._socket = listening
        self._thread = threading.Thread(
            target=self._server.run, args=([listening],), name="textgym-reward-server", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + _START
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                listening.close()
                raise RuntimeError(f"the server of {self.url} did not start")
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._thread is not None
        self._server.should_exit = True
        self._thread.join(_START)
        self._socket.close()


def _protocol(timeout: float) -> type:
    """uvicorn's HTTP protocol, which would wait for the head of a request for ever, and here waits so many seconds."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class WithTimeout(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:  # the head is here
                self._stop()
            elif self._waiting is None:
                self._waiting = self.loop.call_later(timeout, self.transport.close)

        def _stop(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return WithTimeout


def _content(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _BadRequest(f"the request is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _BadRequest(f"the request is a {type(content).__name__}, expected an object with a list 'query'")
    return content


def _texts(content: dict[str, Any], label_column: str, max_texts: int) -> tuple[list[str], list[str], dict[str, Any]]:
    """Prompts, completions and columns of a request."""
    queries = _list_of_texts("query", content.get("query"))
    if len(queries) > max_texts:
        raise _BadRequest(f"'query' has {len(queries)} texts, at most {max_texts} can be sent at once", 413)
    prompts, labels = content.get("prompts"), content.get("labels")
    prompts = [""] * len(queries) if prompts is None else _list_of_texts("prompts", prompts)
    columns = {} if labels is None else {label_column: labels}
    for name, values in (("prompts", prompts), ("labels", labels)):
        if values is not None and (not isinstance(values, list) or len(values) != len(queries)):
            raise _BadRequest(f"{name!r} must be a list of {len(queries)} entries, one for each query")
    for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        if not query.startswith(prompt):
            raise _BadRequest(f"query {i} does not begin with its prompt: {query[:60]!r}, {prompt[:60]!r}", 422)
    completions = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    return prompts, completions, columns


def _list_of_texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise _BadRequest(f"{name!r} must be a list of texts, got {type(value).__name__}")
    if not all(isinstance(text, str) for text in value):
        raise _BadRequest(f"{name!r} must be a list of texts, but not all of its entries are texts")
    return value
