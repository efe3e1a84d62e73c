"""Serving a reward over HTTP, so that one machine with a GPU scores for many environments.

It speaks the protocol of OpenRLHF's reward server: see :class:`~textgym.rewards.remote.RemoteReward`, the other end.
Anyone who reaches the port can use it: there is no authentication, so the default is to listen to this machine only.
Reach it from others through an SSH tunnel, or put a proxy that checks who asks before it.

Needs the extra ``serve`` (Starlette and uvicorn).
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from textgym.rewards.base import as_list, as_reward, scores_of
from textgym.rewards.errors import RewardError
from textgym.rewards.extras import import_extra
from textgym.rewards.text_units import well_formed

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from typing_extensions import Self

HOST, PORT = "127.0.0.1", 8700
MAX_BYTES = 1 << 24
_START = 30.0  # seconds that a server in a thread may take to begin and to end


class _BadRequest(Exception):
    """What a client sent can't be scored."""

    def __init__(self, problem: str, status: int = 400) -> None:
        super().__init__(problem)
        self.status = status


def reward_app(reward: Any, label_column: str = "labels", max_bytes: int = MAX_BYTES) -> Starlette:
    """An ASGI application that serves a reward.

    - ``POST /get_reward`` or ``/``: ``{"query": [...], "prompts": [...], "labels": [...]}`` → ``{"rewards": [...]}``. A
      query is prompt and completion together, and must begin with its prompt; without ``prompts`` it is a completion
      alone. The reward gets the labels as a column. Not applicable is null.
    - ``GET /health``: ``{"reward": name}``

    What can't be scored is answered with a status and ``{"error": ...}``: 400 for what is no such request, 413 for one
    that is too large, 422 where the reward raises :class:`RewardError`. Requests are scored one after the other, in a
    thread of their own.

    :param reward: what ``as_reward`` takes
    :param label_column: the column's name under which the reward gets ``labels``
    :param max_bytes: longest request that is read
    :raises ModuleNotFoundError: if Starlette is not installed
    """
    applications = import_extra("starlette.applications", "serve", "serving a reward")
    responses = import_extra("starlette.responses", "serve", "serving a reward")
    routing = import_extra("starlette.routing", "serve", "serving a reward")
    served = as_reward(reward)
    turn = threading.Lock()  # a model's caches are for one caller

    def score(content: dict[str, Any]) -> list[float | None]:
        prompts, completions, columns = _texts(content, label_column)
        with turn:
            return as_list(scores_of(served, prompts, completions, columns))

    async def get_reward(request: Request) -> Response:
        try:
            content = _content(await _body(request, max_bytes))
            rewards = await asyncio.get_running_loop().run_in_executor(None, score, content)
        except _BadRequest as error:
            return responses.JSONResponse({"error": well_formed(str(error))}, status_code=error.status)
        except RewardError as error:
            return responses.JSONResponse({"error": well_formed(str(error))}, status_code=422)
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


def serve_reward(
    reward: Any, host: str = HOST, port: int = PORT, label_column: str = "labels", log_level: str = "info"
) -> None:
    """Serve a reward until the process is interrupted, see :func:`reward_app`.

    :param reward: what ``as_reward`` takes
    :param host: address to listen on; the default is this machine only
    :param port: TCP port
    :param label_column: the column's name under which the reward gets ``labels``
    :param log_level: of uvicorn
    :raises ModuleNotFoundError: if Starlette or uvicorn is not installed
    """
    uvicorn = import_extra("uvicorn", "serve", "serving a reward")
    app = reward_app(reward, label_column)
    uvicorn.run(app, host=host, port=port, log_level=log_level, ws="none", lifespan="off")


class RewardServer:
    """A reward served from a thread of this process, between ``with`` and the end of its block.

        >>> import json, urllib.request
        >>> with RewardServer(lambda completions: [float(len(text)) for text in completions]) as server:
        ...     request = json.dumps({"query": ["the film is warm"], "prompts": ["the film"]}).encode()
        ...     with urllib.request.urlopen(server.url, request) as answer:
        ...         json.load(answer)
        {'rewards': [8.0]}

    :param reward: what ``as_reward`` takes
    :param host: address to listen on
    :param port: TCP port; 0 takes a free one
    :param label_column: the column's name under which the reward gets ``labels``
    :param max_bytes: longest request that is read
    :raises ModuleNotFoundError: if Starlette or uvicorn is not installed
    :raises OSError: at the beginning of the block, if the port is taken
    """

    def __init__(
        self, reward: Any, host: str = HOST, port: int = 0, label_column: str = "labels", max_bytes: int = MAX_BYTES
    ) -> None:
        uvicorn = import_extra("uvicorn", "serve", "serving a reward")
        app = reward_app(reward, label_column, max_bytes)
        config = uvicorn.Config(app, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1)
        self.host = host
        self.port = port
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where :class:`~textgym.rewards.remote.RemoteReward` reaches it."""
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


async def _body(request: Request, max_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise _BadRequest(f"the request has more than {max_bytes} bytes; send fewer texts at once", 413)
        parts.append(part)
    return b"".join(parts)


def _content(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _BadRequest(f"the request is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise _BadRequest(f"the request is a {type(content).__name__}, expected an object with a list 'query'")
    return content


def _texts(content: dict[str, Any], label_column: str) -> tuple[list[str], list[str], dict[str, Any]]:
    """Prompts, completions and columns of a request."""
    queries = _list_of_texts("query", content.get("query"))
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
