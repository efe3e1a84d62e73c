"""Replies that are made elsewhere, over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import Unpack

from textgym.checks import check_int, check_text, check_texts
from textgym.handed_on import hands_on
from textgym.json_client import ClientArguments, JsonClient, RemoteError, as_json, quoted
from textgym.replies.base import Reply, ReplyResult, Transcript
from textgym.replies.errors import ReplyError

_FIELDS = {"text", "reward", "done"}


@hands_on(JsonClient)
class RemoteReply(Reply):
    """Replies from a server, in JSON.

    POST ``{"episodes": [...], "prompts": [...], "transcripts": [[{"role": ..., "content": ...}]], "columns": {...}}``
    is answered by ``{"replies": [...]}``: for each transcript a text, ``{"text": ..., "reward": 0.0, "done": false}``,
    or null, which ends the episode. :func:`~textgym.replies.serve_reply` is such a server.

    A server needs no memory, as transcripts are whole. One that keeps some, such as the state of a game, knows an
    episode by its entry of ``episodes``, a text of its own. A request may be sent twice where its answer was lost: then
    the transcript is as long as before.

    Turns go out in batches, several at once. A server that is busy or can't be reached is asked again, as
    :class:`~textgym.json_client.JsonClient` does it, which also says what the further arguments mean; one that stays
    away raises :class:`ReplyError`, and the step can be taken again.

        >>> from textgym.replies import ReplyServer
        >>> with ReplyServer(lambda transcripts: [t[-1]["content"].upper() for t in transcripts]) as server:
        ...     remote = RemoteReply(server.url)
        ...     remote.reply(np.arange(1), ["hi"], [[{"role": "assistant", "content": "hello"}]], {})
        ['HELLO']

    :param url: where to POST to, such as ``http://gpu-box:8701/get_reply``
    :param columns: names of the columns of the prompt rows that are sent
    :param role: whose message a reply is in a chat template
    :param batch_size: turns in a request
    :raises ValueError: if an argument is impossible
    """

    def __init__(
        self,
        url: str,
        columns: Sequence[str] = (),
        role: str = "user",
        *,
        batch_size: int = 64,
        **arguments: Unpack[ClientArguments],
    ) -> None:
        self.columns = check_texts("columns", columns)
        self.role = check_text("role", role, empty=False)
        self.batch_size = check_int("batch_size", batch_size, low=1)
        self._client = JsonClient(url, **arguments)
        self._episodes: dict[int, str] = {}  # of the rows

    @property
    def name(self) -> str:
        return f"remote {self._client.host}"

    def begin(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            self._episodes.pop(row, None)

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> list[str | ReplyResult | None]:
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise ReplyError(self.name, f"needs a column {missing[0]!r} of the prompts; there are {list(columns)}")
        episodes = [self._episodes.setdefault(row, uuid.uuid4().hex) for row in rows.tolist()]
        batches = [slice(start, start + self.batch_size) for start in range(0, len(rows), self.batch_size)]
        bodies = []
        for batch in batches:
            content = {
                "episodes": episodes[batch],
                "prompts": prompts[batch],
                "transcripts": transcripts[batch],
                "columns": {name: columns[name][batch] for name in self.columns},
            }
            try:
                bodies.append(as_json(content))
            except (TypeError, ValueError) as error:
                raise ReplyError(self.name, f"the columns {self.columns} can't be sent as JSON: {error}") from error

        def read(number: int, answer: Any) -> list[str | ReplyResult | None]:
            return self._read(answer, rows[batches[number]])

        try:
            said = self._client.ask_all(bodies, read)
        except RemoteError as error:
            raise ReplyError(self.name, str(error)) from error
        return [one for part in said for one in part]

    def _read(self, answer: Any, rows: np.ndarray) -> list[str | ReplyResult | None]:
        replies = answer.get("replies") if isinstance(answer, dict) else None
        if not isinstance(replies, list) or len(replies) != len(rows):
            problem = f'{self._client.url} answered without a list of {len(rows)} "replies": {quoted(answer)}'
            raise ReplyError(self.name, problem)
        return [self._one(reply, row) for reply, row in zip(replies, rows.tolist(), strict=True)]

    def _one(self, reply: Any, row: int) -> str | ReplyResult | None:
        if reply is None or isinstance(reply, str):
            return reply
        if not isinstance(reply, dict) or not set(reply) <= _FIELDS or "text" not in reply:
            problem = (
                f'answered with {quoted(reply)}; expected a text, null, or an object of "text", "reward" and "done"'
            )
            raise ReplyError(self.name, f"{self._client.url} {problem}", row=row)
        return ReplyResult(**reply)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self._episodes), "episodes": list(self._episodes.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._episodes = dict(zip(map(int, state["rows"]), map(str, state["episodes"]), strict=True))
