"""Functions as rewards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from os import PathLike
from typing import Any, TypeAlias

from textgym.chat.chat_prompts import MESSAGES
from textgym.checks import check_choice, check_text, shown
from textgym.rewards.base import Reward
from textgym.rewards.errors import RewardError
from textgym.rewards.message_functions import (
    OF_OTHER_TYPES,
    as_messages,
    as_watched_messages,
    is_annotated_with_messages,
)
from textgym.rewards.scores import as_list, checked_scores, failure
from textgym.waiting import wait_for

RewardLike: TypeAlias = Reward | Callable[..., Any]
"""What rewards that are made of rewards take. A formula opens the texts that it has for arguments so annotated."""

_MAYBE_MESSAGES = "; completions are texts, for messages wrap it: FunctionReward(function, reads='messages')"


class FunctionReward(Reward):
    """A plain function, or any callable, with TRL's signature; ``async`` ones are waited for.

    It is called with keyword arguments only: ``prompts``, ``completions``, ``completion_ids`` and every extra
    column. A function without ``**kwargs`` gets those that its signature names.

    Completions are texts, unless the function reads *messages*: it is annotated so, as TRL's own are,
    ``completions: list[list[dict[str, str]]]``, or ``reads="messages"`` says it, or the prompts are conversations and
    it fails on texts but not on messages. Then each completion is a list of one assistant's message,
    ``completion[0]["content"]``, and each prompt a list of messages: the row's conversation, or one of a user with
    the prompt's text. ::

        >>> def politeness(completions: list[list[dict[str, str]]]) -> list[float]:
        ...     return [float("please" in completion[0]["content"]) for completion in completions]
        >>> FunctionReward(politeness)(prompts=["What now?"], completions=[" Wait, please."])
        [1.0]
        >>> shorter = FunctionReward(lambda completions: [-len(c[0]["content"]) for c in completions], reads="messages")
        >>> shorter(prompts=["What now?"], completions=["Wait."])
        [-5.0]

    :param fn: the callable
    :param name: what errors call it; by default its own name
    :param reads: ``"texts"`` or ``"messages"``; None for what the annotation of ``completions`` or a trial says
    :raises TypeError: if ``fn`` is a class or not callable
    :raises ValueError: if ``reads`` is none of these
    """

    def __init__(self, fn: Callable[..., Any], name: str | None = None, *, reads: str | None = None) -> None:
        if inspect.isclass(fn):
            raise TypeError(f"reward is the class {fn.__name__}; pass an instance of it: {fn.__name__}(...)")
        if not callable(fn):
            raise TypeError(f"a reward function must be callable, got {type(fn).__name__} {fn!r}")
        self.fn = fn
        self._name = _name_of(fn) if name is None else check_text("name", name, empty=False)
        check_choice("reads", reads, (None, "texts", "messages"))
        self._is_told = reads is not None
        self.reads_messages = is_annotated_with_messages(fn) if reads is None else reads == "messages"
        try:
            parameters = list(inspect.signature(fn).parameters.values())
        except (TypeError, ValueError):  # some C functions have no signature
            self._named, self._required, self._takes_everything = set[str](), list[str](), True
            return
        keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._named = {p.name for p in keyword}
        self._required = [p.name for p in keyword if p.default is p.empty]
        self._takes_everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise TypeError(
                f"reward function {self._name!r} has positional-only parameters; rewards are called with "
                "keyword arguments: def reward(prompts, completions, **columns)"
            )

    @property
    def name(self) -> str:
        return self._name

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """Call the function and check what it returns.

        :raises RewardError: if the function raises, needs a column that is not there, or returns anything but
            one finite number or None for each completion
        """
        given = {"prompts": prompts, "completions": completions, **columns}
        missing = [name for name in self._required if name not in given]
        if missing:
            raise RewardError(
                self.name,
                f"needs {', '.join(map(repr, missing))}, which the prompts have no column for; "
                f"available: {', '.join(given)}",
            )
        try:
            result = self._result(as_messages(given) if self.reads_messages else given)
        except RewardError:
            raise
        except Exception as error:
            for_texts = self.reads_messages or self._is_told or not isinstance(error, OF_OTHER_TYPES)
            tried = None if for_texts else self._tried_on_messages(given)
            if tried is None:
                raise failure(self.name, error, completions, "" if for_texts else _MAYBE_MESSAGES) from error
            result = tried
        return as_list(checked_scores(self.name, result, completions))

    def _result(self, given: dict[str, Any]) -> Any:
        """What the function returns of those arguments that it takes."""
        if not self._takes_everything:
            given = {name: value for name, value in given.items() if name in self._named}
        result = self.fn(**given)
        return wait_for(result) if inspect.isawaitable(result) else result

    def _tried_on_messages(self, given: dict[str, Any]) -> Any | None:
        """What the function, which failed on texts, returns of messages, where prompts are conversations.

        Few functions that are written for conversations are annotated. One that does not fail on messages, and looks
        at their contents, was written for these, and gets them from now on.

        :return: None where it was not
        """
        if not given.get(MESSAGES):
            return None
        messages, seen = as_watched_messages(given)
        try:
            result = self._result(messages)
        except Exception:
            return None  # what to tell is the error that the texts made
        self.reads_messages = "content" in seen
        return result if self.reads_messages else None


def check_reward(name: str, value: Any) -> Reward:
    """A reward, or a function that becomes one.

    :param name: what errors call the argument
    :raises TypeError: if it is neither
    """
    if isinstance(value, Reward):
        return value
    if hasattr(value, "forward") and not inspect.isclass(value) and hasattr(value, "config"):
        raise TypeError(
            f"{name} is the model {type(value).__name__}, which also needs its tokenizer: "
            "CausalRewardModel(model, tokenizer)"
        )
    if callable(value):
        return FunctionReward(value)
    hint = f"; as_reward({shown(value)}) opens one" if value is None or isinstance(value, str | PathLike) else ""
    raise TypeError(f"{name}={shown(value)} must be a reward, or a function with the signature of one{hint}")


def _name_of(fn: Callable[..., Any]) -> str:
    if isinstance(fn, functools.partial):
        return _name_of(fn.func)
    return getattr(fn, "__name__", type(fn).__name__)
