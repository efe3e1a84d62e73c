"""Checks of arguments: each error names the argument, its value and what would be right.

A value of the wrong kind is a TypeError, one of the right kind that is impossible a ValueError. Numbers may be NumPy's;
True and False are not numbers here. Each check returns the value as plain Python has it.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LARGEST_INT = 2**63 - 1  # of an int64
LARGEST_SEED = 2**32 - 1  # of NumPy's global generator, which Stable-Baselines3 seeds
SMALLEST_TEMPERATURE = 1e-6  # float32 logits divided by less can overflow

_SHOWN = 80


def shown(value: Any) -> str:
    """A value as messages show it: its representation, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than some thousand digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    except Exception:
        text = f"a {type(value).__name__} without a repr"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def check_int(name: str, value: Any, low: int | None = None, high: int = LARGEST_INT, also: str = "") -> int:
    """A whole number in ``[low, high]``.

    :param low: default none but what an int64 holds
    :param also: what else would be right, such as ``"or 'end'"``
    :raises TypeError: if it is not a whole number
    :raises ValueError: if it is too small or too large
    """
    bounds = "" if low is None else f", at least {low}"
    if high != LARGEST_INT:
        bounds += f"{' and' if bounds else ','} at most {high}"
    problem = f"{name}={shown(value)} must be a whole number{bounds} {also}".rstrip()
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(problem)
    number = int(value)
    if number < (-LARGEST_INT - 1 if low is None else low) or number > high:
        raise ValueError(problem if high != LARGEST_INT or number <= high else f"{problem}, and fit in 64 bits")
    return number


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    unit: str = "",
) -> float:
    """A finite number in ``[low, high]``.

    :param open_low: ``low`` itself is not allowed
    :param open_high: nor is ``high``
    :param unit: what it is measured in, such as ``"seconds"``
    :raises TypeError: if it is not a real number
    :raises ValueError: if it is not finite, or outside
    """
    bounds = []
    if low > -math.inf:
        bounds.append(f"{'greater than' if open_low else 'at least'} {low:g}")
    if high < math.inf:
        bounds.append(f"{'less than' if open_high else 'at most'} {high:g}")
    wanted = f"a finite number {' and '.join(bounds)}".rstrip() + (f", in {unit}" if unit else "")
    problem = f"{name}={shown(value)} must be {wanted}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(problem)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(problem) from None
    inside = (number > low if open_low else number >= low) and (number < high if open_high else number <= high)
    if not math.isfinite(number) or not inside:
        raise ValueError(problem)
    return number


def check_temperature(name: str, value: Any) -> float:
    """What logits are divided by.

    :raises TypeError: if it is not a real number
    :raises ValueError: if it is not finite, or so small that float32 logits divided by it overflow
    """
    return check_number(name, value, low=SMALLEST_TEMPERATURE)


def check_schedule(name: str, value: Any, open_low: bool = False) -> None:
    """A hyperparameter that may be a number, not negative, or a function of the remaining progress.

    :raises TypeError: if it is neither
    :raises ValueError: if it is a number that is negative, not finite, or 0 with ``open_low``
    """
    if not callable(value):
        check_number(name, value, low=0.0, open_low=open_low)


def check_bool(name: str, value: Any) -> bool:
    """:raises TypeError: unless ``value`` is True or False, of Python or NumPy"""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise TypeError(f"{name}={shown(value)} must be True or False")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """One of a few values.

    :return: the choice
    :raises ValueError: if it is none of them; names the closest one
    """
    known = tuple(choices)
    for choice in known:
        if value is choice or (isinstance(choice, str) and isinstance(value, str) and value == choice):
            return choice
    names = [choice for choice in known if isinstance(choice, str)]
    close = difflib.get_close_matches(value, names, 1) if isinstance(value, str) and len(names) > 2 else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{name}={shown(value)} must be one of {', '.join(map(repr, known))}{hint}")


def check_text(name: str, value: Any, empty: bool = True) -> str:
    """A text that can be written as UTF-8.

    :param empty: whether it may be empty
    :raises TypeError: if it is not a text
    :raises ValueError: if it is empty and must not be, or has half of a surrogate pair
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} must be a text (str), got {type(value).__name__}")
    if not value and not empty:
        raise ValueError(f"{name}={value!r} must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={shown(value)} has half of a surrogate pair at position {error.start}: it is not a text"
        ) from None
    return value


def check_texts(name: str, value: Any, empty: bool = True, least: int = 0) -> list[str]:
    """A list of texts.

    :param empty: whether one of them may be empty
    :param least: how many there must be
    :raises TypeError: if it is not a list or tuple of texts; a single text is a likely mistake
    :raises ValueError: if there are too few, or one is empty and must not be
    """
    if isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} must be a list of texts; for one text, {name}=[{shown(value)}]")
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{name}={shown(value)} must be a list of texts")
    if len(value) < least:
        raise ValueError(f"{name}={shown(value)} must have at least {least} {'text' if least == 1 else 'texts'}")
    if not empty and not all(value):
        raise ValueError(f"{name}={shown(value)} must not have an empty text")
    return list(value)


def listed(value: Any) -> Any:
    """The values of a set, a generator or the like as a list; what has none is left to the check of its kind."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    try:
        return list(value)
    except TypeError:  # an array without dimensions
        return value


def check_path(name: str, value: Any) -> Path:
    """A path, with ``~`` for the user's home.

    :raises TypeError: if it is neither a text nor a path
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name}={shown(value)} must be a path (str or pathlib.Path)")
    return Path(value).expanduser()


def check_seed(name: str, value: Any) -> int | None:
    """A seed of random numbers, or None for a new one each time.

    :raises TypeError: if it is not a whole number
    :raises ValueError: if it is negative or beyond 32 bits
    """
    return None if value is None else check_int(name, value, low=0, high=LARGEST_SEED, also="or None")


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """A dictionary with texts as keys; None is an empty one.

    :raises TypeError: for anything else
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}={shown(value)} must be a dictionary with names as keys, or None")
    return dict(value)
