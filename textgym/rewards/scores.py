"""What a reward may return: one finite number, or None, for each completion.

"Not applicable", None, travels as NaN inside this package; a NaN that a reward returns is an error before it gets that
far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.rewards.errors import RewardError, RewardValueError
from textgym.rewards.prefixes import PrefixBatch

if TYPE_CHECKING:
    from textgym.rewards.base import Reward

LARGEST_POTENTIAL = float(np.finfo(np.float32).max) / 2  # of which differences are float32, too
_EXPECTED = "expected one finite number or None for each completion"


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
        raise failure(reward.name, error, completions) from error
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
                name, f"returned {described(result)}, whose numbers can't be read ({error}); {_EXPECTED}"
            ) from error
        if result.ndim != 1:
            raise RewardError(name, f"returned an array of shape {result.shape}; {_EXPECTED}")
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, (str, bytes)):
        raise RewardError(name, f"returned {described(result)}, not a list; {_EXPECTED}")
    if len(result) != len(completions):
        raise RewardError(name, f"returned {len(result)} scores for {len(completions)} completions; {_EXPECTED}")
    scores = np.empty(len(result))
    for i, value in enumerate(result):
        try:
            scores[i] = math.nan if value is None else _as_float(value)
        except (TypeError, ValueError, OverflowError) as error:
            row = i if rows is None else int(rows[i])
            kind = RewardError if isinstance(error, TypeError) else RewardValueError
            raise kind(name, f"returned {described(value)}; {_EXPECTED}", row=row, completion=completions[i]) from None
    return scores


def wanted_per_row(batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[int]:
    """How many prefixes of each row are wanted."""
    if len(at) != len(batch):
        raise ValueError(f"at has {len(at)} entries for a batch of {len(batch)} rows; expected one per row")
    return [len(row) for row in at]


def checked_values(
    reward: Reward, method: str, values: Any, count: int, batch: PrefixBatch, row: int | None = None
) -> np.ndarray:
    """What a reward's own ``potentials`` or ``prefix_potentials`` gave of a batch, or of one of its rows."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        problem = f"{method} returned {described(values)}; expected an array of finite numbers"
        raise RewardError(reward.name, problem) from error
    if array.shape != (count,):
        raise RewardError(
            reward.name,
            f"{method} returned {described(values)} of shape {array.shape}; expected shape ({count},)",
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


def failure(name: str, error: Exception, completions: Sequence[str], hint: str = "") -> RewardError:
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


def described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
