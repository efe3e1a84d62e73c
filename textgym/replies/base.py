"""Who speaks when a turn has ended: another model, a tool, a game, a person, a function of yours."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from textgym.checks import check_text
from textgym.replies.errors import ReplyError
from textgym.waiting import wait_for

Transcript = list[dict[str, Any]]
"""The messages after a prompt: ``{"role": "assistant", "content": ...}`` is the policy's, others are replies."""


@dataclass(frozen=True)
class ReplyResult:
    """What somebody else says to a turn, and what else comes of it.

    :param text: what they say; None for nothing
    :param reward: is paid to the action that ended the turn, such as the points of a game
    :param done: whether the episode ends with it
    """

    text: str | None
    reward: float = 0.0
    done: bool = False


class Reply(ABC):
    """Somebody who speaks after each of the policy's turns.

    A reply that remembers something of its episodes learns from :meth:`begin` when one begins, and says in
    :meth:`state_dict` what it remembers, so that a training that was stopped goes on exactly.
    """

    role = "user"
    """Whose message it is in a chat template: ``"user"``, or ``"tool"``."""

    @property
    def name(self) -> str:
        """What errors call it."""
        return type(self).__name__

    @abstractmethod
    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> Sequence[str | ReplyResult | None]:
        """What is said to turns that have just ended.

        :param rows: ``(B,)`` the rows of the environment that wait
        :param prompts: their B prompts
        :param transcripts: their B conversations after the prompt; the last message is the turn that ended
        :param columns: the other columns of their prompt rows, each a list of B
        :return: for each row a text, a :class:`ReplyResult`, or None, which ends the episode
        """

    def begin(self, rows: np.ndarray) -> None:  # noqa: B027 (most replies remember nothing)
        """Episodes begin anew in these rows, ``(B,)``: forget the old ones."""

    def seed(self, seed: int) -> None:  # noqa: B027 (most replies draw nothing)
        """Draw random numbers anew: after the same seed the same is said to the same turns."""

    def forget_cached(self) -> None:  # noqa: B027
        """Drop what models have cached, so that what is said next does not depend, in its last bits, on when."""

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of the running episodes, as arrays and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        :raises ValueError: if it is the state of another reply
        """
        if state:
            raise ValueError(f"reply {self.name!r} keeps no state, but was given {sorted(state)}: another reply's")

    def __deepcopy__(self, memo: dict[int, Any]) -> Reply:
        return self  # Gymnasium deep-copies the kwargs of a spec; models and games must be shared


class FunctionReply(Reply):
    """A plain function as a reply; ``async`` ones are waited for.

    It is called with keyword arguments only: ``prompts``, ``transcripts`` and every extra column. A function without
    ``**kwargs`` gets those that its signature names. ::

        >>> def echo(transcripts, **columns):
        ...     return [transcript[-1]["content"].upper() for transcript in transcripts]
        >>> reply = FunctionReply(echo)
        >>> reply.reply(np.arange(1), ["p"], [[{"role": "assistant", "content": "hm"}]], {})
        ['HM']

    :param fn: ``fn(prompts, transcripts, **columns) -> list[str | ReplyResult | None]``
    :param role: whose message it is in a chat template
    :raises TypeError: if ``fn`` is a class or not callable
    """

    def __init__(self, fn: Callable[..., Any], role: str = "user") -> None:
        if inspect.isclass(fn):
            raise TypeError(f"reply is the class {fn.__name__}; pass an instance of it: {fn.__name__}(...)")
        if not callable(fn):
            raise TypeError(f"a reply function must be callable, got {type(fn).__name__} {fn!r}")
        self.fn = fn
        self.role = check_text("role", role, empty=False)
        self._named: set[str] | None = None
        try:
            parameters = inspect.signature(fn).parameters.values()
        except (TypeError, ValueError):  # some C functions have no signature
            return
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise TypeError(
                f"reply function {self.name!r} has positional-only parameters; replies are called with keyword "
                "arguments: def reply(prompts, transcripts, **columns)"
            )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            self._named = {p.name for p in parameters}

    @property
    def name(self) -> str:
        return str(getattr(self.fn, "__name__", type(self.fn).__name__))

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> Sequence[str | ReplyResult | None]:
        given = {"prompts": prompts, "transcripts": transcripts, **columns}
        if self._named is not None:
            given = {name: value for name, value in given.items() if name in self._named}
        said: Any = self.fn(**given)
        return wait_for(said) if inspect.isawaitable(said) else said


@contextmanager
def aside(reply: Reply | None, seed: int | None = None) -> Iterator[None]:
    """Let a reply speak in other episodes than those it is in. Afterwards it is as it was before.

    :param reply: who speaks; None for nobody
    :param seed: of what is drawn there
    """
    if reply is None:
        yield
        return
    state = copy.deepcopy(reply.state_dict())
    if seed is not None:
        reply.seed(seed)
    try:
        yield
    finally:
        reply.load_state_dict(state)


def ask(
    reply: Reply,
    rows: np.ndarray,
    prompts: list[str],
    transcripts: list[Transcript],
    columns: Mapping[str, list[Any]],
) -> list[ReplyResult]:
    """What a reply says to B turns, checked; None is :class:`ReplyResult` without text that ends the episode.

    :raises ReplyError: if the reply raises, or does not return one text, ``ReplyResult`` or None for each row
    """
    try:
        said = reply.reply(rows, prompts, transcripts, columns)
    except ReplyError:
        raise
    except Exception as error:
        raise ReplyError(reply.name, f"raised {type(error).__name__}: {error}") from error
    if isinstance(said, str) or not isinstance(said, Sequence):
        raise ReplyError(
            reply.name, f"returned {type(said).__name__} {said!r:.60}; expected a list of {len(rows)} texts"
        )
    if len(said) != len(rows):
        raise ReplyError(reply.name, f"returned {len(said)} replies for {len(rows)} turns; expected one for each")
    return [_checked(reply, one, row) for one, row in zip(said, rows.tolist(), strict=True)]


def _checked(reply: Reply, said: Any, row: int) -> ReplyResult:
    if said is None:
        return ReplyResult(None, done=True)
    result = said if isinstance(said, ReplyResult) else ReplyResult(said)
    if not isinstance(result.text, str | None):
        raise ReplyError(
            reply.name,
            f"returned {type(said).__name__} {said!r:.60}; expected a text, a ReplyResult, or None to end the episode",
            row=row,
        )
    try:
        (result.text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"its text has half of a surrogate pair at character {error.start + 1}, which no tokenizer can read"
        raise ReplyError(reply.name, problem, row=row) from None
    number = isinstance(result.reward, int | float | np.number) and not isinstance(result.reward, bool)
    if not number or not math.isfinite(result.reward):
        raise ReplyError(reply.name, f"paid reward={result.reward!r}; expected a finite number", row=row)
    if not isinstance(result.done, bool | np.bool_):
        raise ReplyError(reply.name, f"said done={result.done!r}; expected True or False", row=row)
    return ReplyResult(result.text, float(result.reward), bool(result.done))
