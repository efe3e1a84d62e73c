"""Answering requests in JSON over HTTP, within limits: what serving a reward and serving a reply share.

Anyone who reaches the port can use it: there is no authentication, so the default is to listen to this machine only.
Reach it from others through an SSH tunnel, or put a proxy that checks who asks before it. :class:`RequestLimits` bounds
what clients can make it hold; programs are held off, not attackers.

Needs the extra ``serve`` (Starlette and uvicorn).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textgym.checks import check_int, check_number, shown
from textgym.encodable_text import well_formed
from textgym.extras import import_extra

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
    """What clients may ask of a server; what goes beyond is refused, and others are served meanwhile.

    :param max_bytes: longest request that is read; a longer one is answered with 413
    :param max_texts: most texts in a request; more are answered with 413
    :param max_requests: how many may be read, wait or be answered at once; further ones are answered with 503 and
        Retry-After, which ``RemoteReward`` and ``RemoteReply`` honour
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


def as_limits(limits: Any) -> RequestLimits:
    """What a user may pass as ``limits=``; None for the defaults.

    :raises TypeError: for anything else
    """
    if not isinstance(limits, RequestLimits | None):
        raise TypeError(f"limits={shown(limits)} must be RequestLimits(...), or None for the defaults")
    return limits or RequestLimits()


class BadRequest(Exception):
    """What a client sent can't be answered."""

    def __init__(self, problem: str, status: int = 400) -> None:
        super().__init__(problem)
        self.status = status


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def json_app(
    answer: Callable[[dict[str, Any]], dict[str, Any]],
    paths: Sequence[str],
    health: dict[str, Any],
    refusals: type[Exception],
    limits: RequestLimits,
    what: str,
) -> Starlette:
    """An ASGI application that answers ``POST`` requests, one after the other, in a thread of their own.

    What can't be answered gets a status and ``{"error": ...}``: 400 for a request of another form, 408 for one that
    does not arrive in time, 413 for one that is too large, 415 for another content type than JSON (a page in a browser
    can post any other to this machine unasked), 422 where ``answer`` refuses it, 503 while there are too many. One
    whose client has gone by then is left out.

    :param answer: makes the answer of a request's object; raises :class:`BadRequest` where that has another form
    :param paths: where it is reached
    :param health: the answer to ``GET /health``
    :param refusals: what else ``answer`` may raise, with a message for the client
    :param limits: of requests
    :param what: is served, for errors: ``"serving a reward"``
    :raises ModuleNotFoundError: if Starlette is not installed
    """
    applications = import_extra("starlette.applications", "serve", what)
    responses = import_extra("starlette.responses", "serve", what)
    routing = import_extra("starlette.routing", "serve", what)
    desk = _Desk(limits)
    turn = asyncio.Lock()  # a model's caches are for one caller

    async def answered(request: Request) -> Response:
        try:
            async with desk.accepted(request) as body:
                content = _content(body)
                async with turn:
                    if await request.is_disconnected():
                        raise ClientGone
                    found = await asyncio.get_running_loop().run_in_executor(None, answer, content)
        except BadRequest as error:
            # The connection may hold the rest of what was refused; nothing more is read from it.
            headers = {"Connection": "close", **({"Retry-After": "1"} if error.status == 503 else {})}
            return responses.JSONResponse({"error": well_formed(str(error))}, status_code=error.status, headers=headers)
        except refusals as error:
            return responses.JSONResponse({"error": well_formed(str(error))}, status_code=422)
        except ClientGone:
            return responses.Response(status_code=499)  # goes nowhere; the number is what nginx logs
        return responses.JSONResponse(found)

    async def healthy(request: Request) -> Response:
        return responses.JSONResponse(health)

    routes = [routing.Route(path, answered, methods=["POST"]) for path in paths]
    return applications.Starlette(routes=[*routes, routing.Route("/health", healthy, methods=["GET"])])


class _Desk:
    """Takes requests in, within limits."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self._inside = 0

    @contextlib.asynccontextmanager
    async def accepted(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts as being here until the end of the block.

        :raises BadRequest: if it is refused; what it holds has been read by then, so that the answer arrives
        :raises ClientGone: if the client went before all of it was here
        """
        refusal = self._refusal(request)
        self._inside += refusal is None
        try:
            yield await self._body(request, refusal)
        finally:
            self._inside -= refusal is None

    def _refusal(self, request: Request) -> BadRequest | None:
        """Why a request is refused whatever it holds."""
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            return BadRequest(f"the content type is {kind[:60]!r}, expected application/json", 415)
        if self._inside >= self.limits.max_requests:
            return BadRequest(f"{self.limits.max_requests} requests are here already; try again in a moment", 503)
        return None

    async def _body(self, request: Request, refusal: BadRequest | None) -> bytes:
        from starlette.requests import ClientDisconnect

        parts: list[bytes] = []
        size, limit = 0, self.limits.max_bytes

        async def read() -> None:
            nonlocal size, refusal
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    refusal = refusal or BadRequest(
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
            raise ClientGone from error
        except asyncio.TimeoutError as error:  # in Python 3.10 another class than TimeoutError
            problem = f"the request did not arrive within {self.limits.timeout:g} s"
            raise refusal or BadRequest(problem, 408) from error
        if refusal is not None:
            raise refusal
        return b"".join(parts)


def run_app(app: Starlette, host: str, port: int, log_level: str, limits: RequestLimits | None, what: str) -> None:
    """Serve an application until the process is interrupted.

    :param log_level: of uvicorn
    :raises ModuleNotFoundError: if uvicorn is not installed
    """
    uvicorn = import_extra("uvicorn", "serve", what)
    protocol = protocol_of(as_limits(limits).timeout)
    uvicorn.run(app, host=host, port=port, log_level=log_level, http=protocol, ws="none", lifespan="off")


class AppServer:
    """An application served from a thread of this process, between ``with`` and the end of its block.

    :param app: the application
    :param path: where it is reached
    :param host: address to listen on
    :param port: TCP port; 0 takes a free one
    :param limits: of requests; None for the defaults
    :param what: is served, for errors
    :raises ModuleNotFoundError: if uvicorn is not installed
    :raises OSError: at the beginning of the block, if the port is taken
    """

    def __init__(
        self, app: Starlette, path: str, host: str, port: int, limits: RequestLimits | None, what: str
    ) -> None:
        uvicorn = import_extra("uvicorn", "serve", what)
        protocol = protocol_of(as_limits(limits).timeout)
        config = uvicorn.Config(
            app, log_level="critical", http=protocol, ws="none", lifespan="off", timeout_graceful_shutdown=1
        )
        self.host = host
        self.port = port
        self._path = path
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"http://{self.host}:{self.port}{self._path}"

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
            target=self._server.run, args=([listening],), name="textgym-server", daemon=True
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


def protocol_of(timeout: float) -> type:
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
        raise BadRequest(f"the request is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadRequest(f"the request is a {type(content).__name__}, expected an object")
    return content


def list_of_texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise BadRequest(f"{name!r} must be a list of texts, got {type(value).__name__}")
    if not all(isinstance(text, str) for text in value):
        raise BadRequest(f"{name!r} must be a list of texts, but not all of its entries are texts")
    return value
