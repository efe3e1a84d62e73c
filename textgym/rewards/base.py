"""The reward protocol: what scores texts and their prefixes.

``None`` means "not applicable", as in TRL. It stays ``None`` through scaling, clipping, normalising and
products, adds nothing to a sum, and where a number is needed in the end (:meth:`Reward.potentials`) it counts
as 0.0.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.checks import shown
from textgym.rewards.errors import RewardError
from textgym.rewards.message_functions import as_texts
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import checked_values, described, scores_of, wanted_per_row

if TYPE_CHECKING:
    from textgym.rewards.arithmetic import Normalized


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
        if batch.replies is not None:
            columns["transcripts"] = batch.transcripts
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


def potentials_of(reward: Reward, batch: PrefixBatch) -> np.ndarray:
    """Φ of each prefix ``(B,)``, checked, with NaN where the reward does not apply."""
    if type(reward).potentials is Reward.potentials:
        return reward._evaluate(batch)
    return checked_values(reward, "potentials", reward.potentials(batch), len(batch), batch)


def prefix_potentials_of(reward: Reward, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Φ of many prefixes of each row, checked, with NaN where the reward does not apply."""
    if type(reward).prefix_potentials is Reward.prefix_potentials:
        return reward._evaluate_prefixes(batch, at)
    counts = wanted_per_row(batch, at)
    values: Any = reward.prefix_potentials(batch, at)
    if not isinstance(values, Sequence) or len(values) != len(counts):
        raise RewardError(
            reward.name,
            f"prefix_potentials returned {described(values)}; expected {len(counts)} arrays in a list, one a row",
        )
    return [
        checked_values(reward, "prefix_potentials", row, count, batch, i)
        for i, (row, count) in enumerate(zip(values, counts, strict=True))
    ]


def _arithmetic() -> ModuleType:
    from textgym.rewards import arithmetic  # it builds on this module

    return arithmetic
