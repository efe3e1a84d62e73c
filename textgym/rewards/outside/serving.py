"""Serving a reward over HTTP, so that one machine with a GPU scores for many environments.

It speaks the protocol of OpenRLHF's reward server: see :class:`~textgym.rewards.outside.remote.RemoteReward`, the other
end, and :mod:`textgym.json_server` for who can reach it. Needs the extra ``serve`` (Starlette and uvicorn).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textgym.json_server import (
    HOST,
    PORT,
    AppServer,
    BadRequest,
    RequestLimits,
    as_limits,
    json_app,
    list_of_texts,
    run_app,
)
from textgym.rewards.errors import RewardError
from textgym.rewards.opening import as_reward
from textgym.rewards.scores import as_list, scores_of

if TYPE_CHECKING:
    from starlette.applications import Starlette

_WHAT = "serving a reward"


def reward_app(reward: Any, label_column: str = "labels", limits: RequestLimits | None = None) -> Starlette:
    """An ASGI application that serves a reward.

    - ``POST /get_reward`` or ``/``: ``{"query": [...], "prompts": [...], "labels": [...]}`` → ``{"rewards": [...]}``. A
      query is prompt and completion together, and must begin with its prompt; without ``prompts`` it is a completion
      alone. The reward gets the labels as a column. Not applicable is null.
    - ``GET /health``: ``{"reward": name}``

    What can't be scored is answered with a status and ``{"error": ...}``, see :func:`~textgym.json_server.json_app`.

    :param reward: what ``as_reward`` takes
    :param label_column: the column's name under which the reward gets ``labels``
    :param limits: of requests; None for the defaults
    :raises ModuleNotFoundError: if Starlette is not installed
    """
    served = as_reward(reward)
    limits = as_limits(limits)

    def answer(content: dict[str, Any]) -> dict[str, Any]:
        prompts, completions, columns = _texts(content, label_column, limits.max_texts)
        return {"rewards": as_list(scores_of(served, prompts, completions, columns))}

    return json_app(answer, ["/get_reward", "/"], {"reward": served.name}, RewardError, limits, _WHAT)


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
    run_app(reward_app(reward, label_column, limits), host, port, log_level, limits, _WHAT)


class RewardServer(AppServer):
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
        super().__init__(reward_app(reward, label_column, limits), "/get_reward", host, port, limits, _WHAT)


def _texts(content: dict[str, Any], label_column: str, max_texts: int) -> tuple[list[str], list[str], dict[str, Any]]:
    """Prompts, completions and columns of a request."""
    queries = list_of_texts("query", content.get("query"))
    if len(queries) > max_texts:
        raise BadRequest(f"'query' has {len(queries)} texts, at most {max_texts} can be sent at once", 413)
    prompts, labels = content.get("prompts"), content.get("labels")
    prompts = [""] * len(queries) if prompts is None else list_of_texts("prompts", prompts)
    columns = {} if labels is None else {label_column: labels}
    for name, values in (("prompts", prompts), ("labels", labels)):
        if values is not None and (not isinstance(values, list) or len(values) != len(queries)):
            raise BadRequest(f"{name!r} must be a list of {len(queries)} entries, one for each query")
    for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        if not query.startswith(prompt):
            raise BadRequest(f"query {i} does not begin with its prompt: {query[:60]!r}, {prompt[:60]!r}", 422)
    completions = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    return prompts, completions, columns
