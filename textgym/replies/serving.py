"""Serving a reply over HTTP: a model on another machine, a game, or a tool that should not run beside the training.

It speaks the protocol of :class:`~textgym.replies.remote.RemoteReply`, the other end; :mod:`textgym.json_server` says
who can reach it. Needs the extra ``serve`` (Starlette and uvicorn).
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.checks import check_int
from textgym.json_server import HOST, AppServer, BadRequest, RequestLimits, as_limits, json_app, list_of_texts, run_app
from textgym.replies.base import Reply, ReplyResult, Transcript, ask
from textgym.replies.errors import ReplyError
from textgym.replies.opening import as_reply

if TYPE_CHECKING:
    from starlette.applications import Starlette

PORT = 8701
MAX_EPISODES = 256
_WHAT = "serving a reply"


def reply_app(reply: Any, limits: RequestLimits | None = None, max_episodes: int = MAX_EPISODES) -> Starlette:
    """An ASGI application that serves a reply.

    - ``POST /get_reply`` or ``/``: see :class:`~textgym.replies.remote.RemoteReply`. Only ``prompts`` and
      ``transcripts`` must be there; without ``episodes`` each turn is an episode of its own.
    - ``GET /health``: ``{"reply": name}``

    What can't be answered gets a status and ``{"error": ...}``, see :func:`~textgym.json_server.json_app`.

    :param reply: a function, or a :class:`Reply`. Its rows are those of all clients together
    :param limits: of requests; None for the defaults
    :param max_episodes: that are remembered at once. Room for others is made where the reply has ended one, then where
        nobody has asked for longest. A reply that keeps track of episodes refuses to go on with one that was forgotten
    :raises ModuleNotFoundError: if Starlette is not installed
    """
    limits = as_limits(limits)
    episodes = _Episodes(as_reply(reply), check_int("max_episodes", max_episodes, low=1))
    return json_app(episodes.answer, ["/get_reply", "/"], {"reply": episodes.reply.name}, ReplyError, limits, _WHAT)


def serve_reply(
    reply: Any,
    host: str = HOST,
    port: int = PORT,
    log_level: str = "info",
    limits: RequestLimits | None = None,
    max_episodes: int = MAX_EPISODES,
) -> None:
    """Serve a reply until the process is interrupted, see :func:`reply_app`.

    :param reply: a function, or a :class:`Reply`
    :param host: address to listen on; the default is this machine only
    :param port: TCP port
    :param log_level: of uvicorn
    :param limits: of requests; None for the defaults
    :param max_episodes: that are remembered at once
    :raises ModuleNotFoundError: if Starlette or uvicorn is not installed
    """
    run_app(reply_app(reply, limits, max_episodes), host, port, log_level, limits, _WHAT)


class ReplyServer(AppServer):
    """A reply served from a thread of this process, between ``with`` and the end of its block.

    :param reply: a function, or a :class:`Reply`
    :param host: address to listen on
    :param port: TCP port; 0 takes a free one
    :param limits: of requests; None for the defaults
    :param max_episodes: that are remembered at once
    :raises ModuleNotFoundError: if Starlette or uvicorn is not installed
    :raises OSError: at the beginning of the block, if the port is taken
    """

    def __init__(
        self,
        reply: Any,
        host: str = HOST,
        port: int = 0,
        limits: RequestLimits | None = None,
        max_episodes: int = MAX_EPISODES,
    ) -> None:
        super().__init__(reply_app(reply, limits, max_episodes), "/get_reply", host, port, limits, _WHAT)


class _Episodes:
    """The episodes of all clients, each in a row of one reply.

    :param reply: who replies
    :param most: episodes that are remembered at once
    """

    def __init__(self, reply: Reply, most: int) -> None:
        self.reply = reply
        self.most = most
        self._keeps_track = type(reply).begin is not Reply.begin
        self._rows: dict[str, int] = {}  # the one that was asked for longest ago comes first
        # Each one's newest turn and what was said to it: a client whose answer was lost asks again.
        self._said: dict[str, tuple[int, ReplyResult]] = {}

    def answer(self, content: dict[str, Any]) -> dict[str, Any]:
        """What is said to a request."""
        prompts, transcripts, columns, episodes = self._read(content)
        self._begin(episodes, transcripts)
        new = [i for i, e in enumerate(episodes) if e not in self._said or self._said[e][0] != len(transcripts[i])]
        if new:
            rows = np.array([self._rows[episodes[i]] for i in new])
            own = {name: [values[i] for i in new] for name, values in columns.items()}
            said = ask(self.reply, rows, [prompts[i] for i in new], [transcripts[i] for i in new], own)
            self._said.update({episodes[i]: (len(transcripts[i]), one) for i, one in zip(new, said, strict=True)})
        return {"replies": [_plain(self._said[episode][1]) for episode in episodes]}

    def _begin(self, episodes: list[str], transcripts: list[Transcript]) -> None:
        """Give each episode a row."""
        begun = [i for i, episode in enumerate(episodes) if episode not in self._rows]
        for i in begun if self._keeps_track else ():
            if len(transcripts[i]) > 1:
                raise BadRequest(
                    f"episode {episodes[i]!r} goes on, but is not known here: the server was started anew, or has had "
                    f"more than max_episodes={self.most} since"
                )
        for episode in episodes:
            if episode in self._rows:
                self._rows[episode] = self._rows.pop(episode)
        others = [episode for episode in self._rows if episode not in set(episodes)]
        over = [episode for episode in others if episode in self._said and self._said[episode][1].done]
        free = set(range(self.most)) - set(self._rows.values())
        for episode in [*over, *others]:
            if len(free) < len(begun) and episode in self._rows:
                free.add(self._rows.pop(episode))
                self._said.pop(episode, None)
        for i, row in zip(begun, sorted(free), strict=False):
            self._rows[episodes[i]] = row
        if begun:
            self.reply.begin(np.array([self._rows[episodes[i]] for i in begun]))

    def _read(self, content: dict[str, Any]) -> tuple[list[str], list[Transcript], dict[str, list[Any]], list[str]]:
        prompts = list_of_texts("prompts", content.get("prompts"))
        if len(prompts) > self.most:
            raise BadRequest(f"'prompts' has {len(prompts)} texts, at most {self.most} can be answered at once", 413)
        transcripts: Any = content.get("transcripts")
        columns = content.get("columns") or {}
        if not isinstance(columns, dict):
            raise BadRequest(f"'columns' must be an object of lists, got {type(columns).__name__}")
        given = content.get("episodes")
        episodes = [uuid.uuid4().hex for _ in prompts] if given is None else list_of_texts("episodes", given)
        for name, values in [("transcripts", transcripts), ("episodes", episodes), *columns.items()]:
            if not isinstance(values, list) or len(values) != len(prompts):
                raise BadRequest(f"{name!r} must be a list of {len(prompts)} entries, one for each prompt")
        if len(set(episodes)) < len(episodes):
            raise BadRequest("'episodes' names one twice")
        for transcript in transcripts:
            if not isinstance(transcript, list) or not transcript or not all(map(_is_message, transcript)):
                raise BadRequest("each of 'transcripts' must be a list of messages with a text 'role' and 'content'")
        return prompts, transcripts, columns, episodes


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _plain(result: ReplyResult) -> Any:
    if not result.reward and (result.text is None) == result.done:
        return result.text
    return {"text": result.text, "reward": result.reward, "done": result.done}
