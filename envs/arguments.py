"""What ``reset``, ``step`` and reports of log-probabilities are given, checked.

Errors name the argument, the row where there are several, the value and what would be right: a TypeError for what is
of another kind, a ValueError for what is impossible.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from textgym.chat.messages import is_one_conversation
from textgym.checks import check_int, check_mapping, check_text, shown


def seeds_of_rows(seed: Any, num_rows: int | None) -> list[int | None] | None:
    """A seed for each row, or None where none is given.

    :param seed: a number for the first row, which the following rows count on from; or one, or None, for each row
    :param num_rows: N; None for a single environment, whose seed is a number
    :raises TypeError: for other kinds
    :raises ValueError: for numbers below 0, and a wrong number of seeds
    """
    if seed is None:
        return None
    also = "or None" if num_rows is None else f"or a list of {num_rows} of them, or None"
    if num_rows is None or not isinstance(seed, list | tuple | np.ndarray) or np.ndim(seed) == 0:
        alone = seed.item() if isinstance(seed, np.ndarray) and not seed.ndim else seed
        number = check_int("seed", alone, 0, also=also)
        return [number + row for row in range(num_rows or 1)]
    if len(seed) != num_rows:
        raise ValueError(f"seed has {len(seed)} entries, expected one number or num_envs={num_rows}: {shown(seed)}")
    return [None if one is None else check_int(f"seed[{row}]", one, 0, also="or None") for row, one in enumerate(seed)]


def reset_options(options: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """The options of a reset.

    :param known: their names
    :raises TypeError: if they are not a dictionary
    :raises ValueError: if one is unknown
    """
    given = check_mapping("options", options)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown reset options {unknown}; known are {' and '.join(map(repr, known))}")
    return given


def reset_mask(mask: Any, num_rows: int) -> np.ndarray:
    """Which rows are reset, ``(N,)`` bool.

    :param num_rows: N
    :raises TypeError: if it is something else
    :raises ValueError: if there is no row among them
    """
    if not isinstance(mask, np.ndarray) or mask.shape != (num_rows,) or mask.dtype != np.bool_:
        raise TypeError(f"options['reset_mask']={shown(mask)} must be a bool array (NumPy) of shape ({num_rows},)")
    if not mask.any():
        raise ValueError("options['reset_mask'] selects no row")
    return mask


def check_start(name: str, prompt: Any) -> None:
    """What an episode may start from: a text, or a conversation.

    :raises TypeError: if it is something else
    :raises ValueError: if it is an empty text, or none that can be written as UTF-8
    """
    if not is_one_conversation(prompt):
        if not isinstance(prompt, str):
            raise TypeError(f"{name}={shown(prompt)} must be a text or a conversation, which is a list of messages")
        check_text(name, prompt, empty=False)


def token_ids(name: str, value: Any, shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Actions, int64.

    :param shape: ``(N,)``, or ``()`` for a single environment
    :param vocab_size: V
    :raises ValueError: if they have another shape, are not whole numbers or beyond the vocabulary
    """
    wanted = f"{shape[0]} token ids, whole numbers" if shape else "one token id, a whole number"
    array = _array(name, value, wanted)
    if array.shape != shape:
        raise ValueError(f"{name}={shown(value)} must be {wanted}: it has shape {array.shape}, expected {shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}={shown(value)} must be {wanted}; it holds {array.dtype}")
    wrong = np.argwhere((array < 0) | (array >= vocab_size))
    if len(wrong):
        at = tuple(wrong[0].tolist())
        place = "".join(f"[{i}]" for i in at)
        raise ValueError(f"{name}{place}={array[at]} is not a token id: expected 0 to {vocab_size - 1}")
    return array.astype(np.int64)


def log_probabilities(name: str, value: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Log-probabilities in nats, a float64 array of one's own.

    :param shape: ``(N,)``, or ``()`` for one; None: a number, or one for each of any number of tokens
    :raises TypeError: if they are not numbers
    :raises ValueError: if they have another shape, or one is not a log-probability
    """
    wanted = "a log-probability (finite, at most 0)"
    array = _array(name, value, wanted)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}={shown(value)} must be {wanted}; it holds {array.dtype}")
    if array.ndim > 1 if shape is None else array.shape != shape:
        expected = "a number or one for each token" if shape is None else str(shape)
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
    values = array.astype(np.float64)  # a copy: the caller's array may be used again before it counts
    wrong = np.argwhere(~np.isfinite(values) | (values > 1e-3))
    if len(wrong):
        at = tuple(wrong[0].tolist())
        place = "".join(f"[{i}]" for i in at)
        raise ValueError(f"{name}{place}={values[at]} is not {wanted}")
    return values


def _array(name: str, value: Any, wanted: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # ragged lists; tensors elsewhere
        raise TypeError(f"{name}={shown(value)} must be {wanted}: {error}") from error
