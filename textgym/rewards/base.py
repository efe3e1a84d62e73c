"""The reward protocol: the base class, functions as rewards, and what counts as a valid score.

``None`` means "not applicable", as in TRL. It stays ``None`` through scaling, clipping, normalising and
products, adds nothing to a sum, and where a number is needed in the end (:meth:`Reward.potentials`) it counts
as 0.0. Inside this package it travels as NaN; a NaN that a reward returns is an error before it gets that
far.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.chat.chat_prompts import MESSAGES
from textgym.checks import check_choice, check_text, shown
from textgym.rewards.errors import RewardError, RewardValueError
from textgym.rewards.message_functions import (
    OF_OTHER_TYPES,
    as_messages,
    as_texts,
    as_watched_messages,
    is_annotated_with_messages,
)
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.waiting import wait_for

if TYPE_CHECKING:
    from textgym.rewards.arithmetic import Normalized

__all__ = ["FunctionReward", "PrefixBatch", "Reward", "RewardError", "as_reward"]

LARGEST_POTENTIAL = float(np.finfo(np.float32).max) / 2  # of which differences are float32, too
_EXPECTED = "expected one finite number or None for each completion"
_MAYBE_MESSAGES = "; completions are texts, for messages wrap it: FunctionReward(function, reads='messages')"


def _with_checked_texts(call: Callable[..., Any]) -> Callable[..., Any]:
    """A reward's ``__call__`` that takes lists of one length only, of texts or, as TRL gives them, of messages.

    :raises TypeError: in the call, if prompts or completions are a single text, or not a list of texts
    :raises ValueError: in the call, if there are not as many of the one as of the other
    """

    @functools.wraps(call)
    def checked(self: Reward, /, *, prompts: Any, completions: Any, **columns: Any) -> Any:
        for name, texts in (("prompts", prompts), ("completions", completions)):
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise TypeError(f"{name}={shown(texts)} must be a list of texts, one for each row")
        if len(prompts) != len(completions):
            raise ValueError(f"there are {len(prompts)} prompts for {len(completions)} completions; expected as many")
        given = as_texts(prompts, completions, columns)
        for name in ("prompts", "completions"):
            for i, text in enumerate(given[name]):
                if not isinstance(text, str):
                    raise TypeError(f"{name}[{i}]={shown(text)} must be a text, got {type(text).__name__}")
        return call(self, **given)

    return checked


class Reward(ABC):
    """Scores texts: a callable with TRL's signature that also scores prefixes and composes by arithmetic.

    A subclass needs :meth:`__call__` only. One that can score prefixes faster than by being called on their
    text overrides :meth:`potentials` and :meth:`prefix_potentials` as well.

    Rewards combine with each other, with plain callables and with finite numbers by ``+``, ``-``, ``*``,
    unary minus and, by numbers only, ``/``. Numbers act on the potential Φ itself: a constant that is added
    cancels in the differences of Φ that are paid token by token, but counts with ``reward_every="end"``,
    which pays Φ.

    "Not applicable", None, stays None through ``*``, ``/``, :meth:`clip` and :meth:`normalized`. It adds
    nothing to a sum, which is None only where both sides are; with a number added it is that number. In the
    end it counts 0.0.
    """

    max_batch: int = 1024
    """Most prefixes that :meth:`prefix_potentials` scores in one call."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "__call__" in cls.__dict__:
            cls.__call__ = _with_checked_texts(cls.__dict__["__call__"])  # type: ignore[method-assign]

    # Lets `np.float64(2) * reward` reach __rmul__ instead of being spread over an array.
    __array_ufunc__ = None

    @abstractmethod
    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """Score complete texts.

        :param prompts: B prompt texts
        :param completions: B completions
        :param columns: ``completion_ids`` and the extra columns of the prompt rows, each a list of length B
        :return: B scores; None where the reward does not apply
        """

    @property
    def name(self) -> str:
        """What errors call this reward."""
        return type(self).__name__

    def potentials(self, batch: PrefixBatch) -> np.ndarray:
        """Φ of each prefix; None counts as 0.0.

        :return: ``(B,)`` float64
        :raises RewardError: if the reward fails or returns anything but finite numbers and None
        """
        return np.nan_to_num(self._evaluate(batch))

    def prefix_potentials(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Φ of many prefixes of each row.

        :param batch: B rows
        :param at: for each row the completion lengths, in tokens, at which Φ is wanted; 0 is the prompt alone
        :return: for each row float64 values of Φ in the order of ``at``
        :raises RewardError: if the reward fails or returns anything but finite numbers and None
        :raises ValueError: if ``at`` does not fit the batch
        """
        return [np.nan_to_num(values) for values in self._evaluate_prefixes(batch, at)]

    def forget(self, rows: np.ndarray) -> None:  # noqa: B027  most rewards have nothing to forget
        """Drop what is cached of environment rows that were reset.

        The same seed shall give the same rewards to the last bit, whatever was scored before.

        :param rows: which rows
        """

    def state_dict(self) -> dict[str, Any]:
        """What this reward has learned or measured since it was made: plain data and arrays, kept in checkpoints.

        A reward that changes while it is used overrides this and :meth:`load_state_dict`, so that a run that is
        resumed goes on as if it had not been stopped. Models and caches are not part of it.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        :raises ValueError: if it is the state of another reward
        """
        if state:
            raise ValueError(f"reward {self.name!r} keeps no state, but was given {sorted(state)}: another reward's")

    @property
    def needs_calibration(self) -> bool:
        """Whether a ``.normalized()`` in this reward still waits for its mean and standard deviation."""
        return bool(self.uncalibrated())

    def uncalibrated(self) -> list[Normalized]:
        """The ``.normalized()`` parts that wait for calibration, inner ones before those around them."""
        return []

    def clip(self, low: float, high: float) -> Reward:
        """This reward with its values limited to [low, high].

        :raises ValueError: if ``low`` is not smaller than ``high`` or one of them is not finite
        """
        return _arithmetic().Clipped(self, low, high)

    def normalized(self, mean: float | None = None, std: float | None = None) -> Normalized:
        """``(Φ - mean) / std``.

        Without numbers it is calibrated once, by the environment or :meth:`Normalized.calibrate`, on the
        scores of complete texts sampled from the reference model, so that these have mean 0 and standard
        deviation 1.

        :raises ValueError: if only one of the two is given, one is not finite, or ``std`` is not positive
        """
        return _arithmetic().Normalized(self, mean, std)

    def __add__(self, other: Any) -> Reward:
        return _arithmetic().add(self, other)

    def __radd__(self, other: Any) -> Reward:
        return _arithmetic().add(other, self)

    def __sub__(self, other: Any) -> Reward:
        return _arithmetic().subtract(self, other)

    def __rsub__(self, other: Any) -> Reward:
        return _arithmetic().subtract(other, self)

    def __mul__(self, other: Any) -> Reward:
        return _arithmetic().multiply(self, other)

    def __rmul__(self, other: Any) -> Reward:
        return _arithmetic().multiply(other, self)

    def __truediv__(self, other: Any) -> Reward:
        return _arithmetic().divide(self, other)

    def __rtruediv__(self, other: Any) -> Reward:
        return _arithmetic().divide(other, self)

    def __neg__(self) -> Reward:
        return _arithmetic().multiply(-1, self)

    def __pos__(self) -> Reward:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Reward:
        return self  # Gymnasium deep-copies the kwargs of a spec; models and caches must be shared

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        """Φ of each prefix ``(B,)``, with NaN for None."""
        if len(batch) == 0:
            return np.zeros(0)
        columns = {"completion_ids": batch.completion_ids, **batch.columns}
        return scores_of(self, batch.prompts, batch.completions, columns, batch.rows)

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Φ of many prefixes of each row, with NaN for None."""
        counts = wanted_per_row(batch, at)
        indices = np.repeat(np.arange(len(batch)), counts)  # (K,)
        lengths = np.array([length for row in at for length in row], dtype=np.int64)  # (K,)
        chunks = [
            potentials_of(self, batch.at(indices[i : i + self.max_batch], lengths[i : i + self.max_batch]))
            for i in range(0, len(indices), self.max_batch)
        ]
        if not counts:
            return []
        return np.split(np.concatenate([np.zeros(0), *chunks]), np.cumsum(counts)[:-1])


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
                raise _failure(self.name, error, completions, "" if for_texts else _MAYBE_MESSAGES) from error
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


def as_reward(obj: Any) -> Reward:
    """Turn what a user may pass as ``reward=`` into a :class:`Reward`.

    :param obj: a :class:`Reward`; a callable with TRL's signature; a directory or hub id of a reward model or
        classifier, causal or encoder, or of an ensemble of them, see
        :func:`~textgym.rewards.reward_directory.open_reward`; a formula such as ``"0.5*coherence + 0.5*grammar"``, see
        :func:`~textgym.rewards.expressions.parse_reward`; or None for the embedded reward model
    :raises TypeError: for anything else
    :raises FileNotFoundError: if a path is not a directory
    :raises ValueError: if a directory holds no reward model, or a formula can't be read
    """
    if isinstance(obj, Reward):
        return obj
    if obj is None or isinstance(obj, (str, PathLike)):
        from textgym.rewards.opening import reward_named
        from textgym.rewards.reward_directory import open_reward

        if isinstance(obj, str):
            return reward_named(obj)
        if obj is None:
            from textgym.embedded import REWARD_MODEL

            obj = REWARD_MODEL
        return open_reward(obj)
    if hasattr(obj, "forward") and not inspect.isclass(obj) and hasattr(obj, "config"):
        raise TypeError(
            f"reward is the model {type(obj).__name__}, which also needs its tokenizer: "
            "CausalRewardModel(model, tokenizer)"
        )
    if callable(obj):
        return FunctionReward(obj)
    several = isinstance(obj, (list, tuple))
    raise TypeError(
        "reward must be a callable reward(prompts, completions, **columns) -> list[float | None], a textgym "
        "Reward, a path or hub id of a reward model, or None for the embedded one; got "
        + _described(obj)
        + ("; several rewards combine by arithmetic: 0.5 * a + 0.5 * b" if several else "")
    )


def potentials_of(reward: Reward, batch: PrefixBatch) -> np.ndarray:
    """Φ of each prefix ``(B,)``, checked, with NaN where the reward does not apply."""
    if type(reward).potentials is Reward.potentials:
        return reward._evaluate(batch)
    return _checked_values(reward, "potentials", reward.potentials(batch), len(batch), batch)


def prefix_potentials_of(reward: Reward, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Φ of many prefixes of each row, checked, with NaN where the reward does not apply."""
    if type(reward).prefix_potentials is Reward.prefix_potentials:
        return reward._evaluate_prefixes(batch, at)
    counts = wanted_per_row(batch, at)
    values: Any = reward.prefix_potentials(batch, at)
    if not isinstance(values, Sequence) or len(values) != len(counts):
        raise RewardError(
            reward.name,
            f"prefix_potentials returned {_described(values)}; expected {len(counts)} arrays in a list, one a row",
        )
    return [
        _checked_values(reward, "prefix_potentials", row, count, batch, i)
        for i, (row, count) in enumerate(zip(values, counts, strict=True))
    ]


def payable(reward: Reward, potentials: np.ndarray, batch: PrefixBatch, row: int | None = None) -> np.ndarray:
    """Potentials whose differences the environment can pay as float32.

    :param potentials: ``(B,)`` of the rows of a batch, or ``(K,)`` of prefixes of one of its rows; NaN where the reward
        does not apply
    :param row: which one
    :return: the potentials
    :raises RewardError: if one is too large
    """
    large = np.flatnonzero(np.abs(potentials) > LARGEST_POTENTIAL)
    if len(large):
        i = int(large[0]) if row is None else row
        raise RewardValueError(
            reward.name,
            f"returned {potentials[large[0]]:g}; rewards are paid as float32, so at most {LARGEST_POTENTIAL:.2g} "
            "either way: clip or scale it",
            row=int(batch.rows[i]),
            completion=batch.completions[i],
        )
    return potentials


def scores_of(
    reward: Reward,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, Any],
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Call a reward and check what it returns.

    :param rows: ``(B,)`` what errors call the rows; default 0 to B-1
    :return: ``(B,)`` float64, NaN where the reward does not apply
    """
    try:
        result = reward(prompts=prompts, completions=completions, **columns)
    except RewardError as error:
        if rows is not None and error.row is not None and error.row < len(rows):
            error.row = int(rows[error.row])  # the reward counted the rows of this call
        raise
    except Exception as error:
        raise _failure(reward.name, error, completions) from error
    return checked_scores(reward.name, result, completions, rows)


def checked_scores(name: str, result: Any, completions: Sequence[str], rows: np.ndarray | None = None) -> np.ndarray:
    """The scores a reward returned, as an array.

    :param result: a list, tuple, one-dimensional numpy array or torch tensor
    :param completions: the B completions that were scored
    :param rows: ``(B,)`` what errors call the rows; default 0 to B-1
    :return: ``(B,)`` float64, NaN for None
    :raises RewardError: if ``result`` is anything but one finite number or None for each completion
    """
    if hasattr(result, "detach") or hasattr(result, "__array__"):
        try:
            # A torch tensor, wherever it lives and whatever its precision, or what NumPy takes for an array.
            result = np.asarray(result.detach().cpu().double() if hasattr(result, "detach") else result)
        except Exception as error:  # sparse tensors, those without memory, arrays of other libraries
            raise RewardError(
                name, f"returned {_described(result)}, whose numbers can't be read ({error}); {_EXPECTED}"
            ) from error
        if result.ndim != 1:
            raise RewardError(name, f"returned an array of shape {result.shape}; {_EXPECTED}")
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, (str, bytes)):
        raise RewardError(name, f"returned {_described(result)}, not a list; {_EXPECTED}")
    if len(result) != len(completions):
        raise RewardError(name, f"returned {len(result)} scores for {len(completions)} completions; {_EXPECTED}")
    scores = np.empty(len(result))
    for i, value in enumerate(result):
        try:
            scores[i] = math.nan if value is None else _as_float(value)
        except (TypeError, ValueError, OverflowError) as error:
            row = i if rows is None else int(rows[i])
            kind = RewardError if isinstance(error, TypeError) else RewardValueError
            raise kind(name, f"returned {_described(value)}; {_EXPECTED}", row=row, completion=completions[i]) from None
    return scores


def wanted_per_row(batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[int]:
    """How many prefixes of each row are wanted."""
    if len(at) != len(batch):
        raise ValueError(f"at has {len(at)} entries for a batch of {len(batch)} rows; expected one per row")
    return [len(row) for row in at]


def _checked_values(
    reward: Reward, method: str, values: Any, count: int, batch: PrefixBatch, row: int | None = None
) -> np.ndarray:
    """What a reward's own ``potentials`` or ``prefix_potentials`` gave of a batch, or of one of its rows."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        problem = f"{method} returned {_described(values)}; expected an array of finite numbers"
        raise RewardError(reward.name, problem) from error
    if array.shape != (count,):
        raise RewardError(
            reward.name,
            f"{method} returned {_described(values)} of shape {array.shape}; expected shape ({count},)",
        )
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        i = int(wrong[0]) if row is None else row
        raise RewardValueError(
            reward.name,
            f"{method} returned {array[wrong[0]]}; expected finite numbers",
            row=int(batch.rows[i]),
            completion=batch.completions[i],
        )
    return array


def _failure(name: str, error: Exception, completions: Sequence[str], hint: str = "") -> RewardError:
    """The error for an exception in a reward's code. Any row may be the cause; the first is shown."""
    problem = f"raised {type(error).__name__}: {error}{hint}"
    if not completions:
        return RewardError(name, problem)
    if len(completions) > 1:
        problem += f" (in a batch of {len(completions)}, of which this is the first)"
    return RewardError(name, problem, row=0, completion=completions[0])


def as_list(scores: np.ndarray) -> list[float | None]:
    return [None if math.isnan(score) else score for score in scores.tolist()]


def _as_float(value: Any) -> float:
    """A finite float, from a number or a zero-dimensional array or tensor."""
    if not isinstance(value, Real):
        value = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(value, Real):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _arithmetic() -> ModuleType:
    from textgym.rewards import arithmetic  # it builds on this module

    return arithmetic


def _name_of(fn: Callable[..., Any]) -> str:
    if isinstance(fn, functools.partial):
        return _name_of(fn.func)
    return getattr(fn, "__name__", type(fn).__name__)
