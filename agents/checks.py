"""Checks of hyperparameters that name the argument, its value and what would be right."""

from __future__ import annotations

import numbers
from typing import Any

from textgym.envs.options import check_number


def check_count(name: str, value: Any) -> None:
    """:raises ValueError: unless ``value`` is a whole number of at least 1"""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1")


def check_schedule(name: str, value: Any, open_low: bool = False) -> None:
    """Check a hyperparameter that may be a number or a function of the remaining progress.

    :raises ValueError: if it is a number that is negative, not finite, or 0 with ``open_low``
    """
    if not callable(value):
        check_number(name, value, low=0.0, open_low=open_low)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """:raises ValueError: unless ``value`` is one of the choices"""
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(repr(c) for c in choices)}")
