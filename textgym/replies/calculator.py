"""A calculator for texts that nobody trusts: numbers, parentheses and the four operations, evaluated by hand.

No expression can do more than compute: there are no names, and length, nesting and exponents are bounded.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

LONGEST = 200  # characters of an expression
DEEPEST = 50  # parentheses and signs within each other
LARGEST_EXPONENT = 64
LARGEST = Fraction(10) ** 30

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|(\*\*|//|[-+*/%^()]))")


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, exact where it is a whole number and rounded to 10 digits elsewhere. ::

        >>> calculate("2 * (3 + 4)"), calculate("1 / 3"), calculate("2 ** 10")
        ('14', '0.3333333333', '1024')

    :param expression: of numbers, ``+ - * / // % ** ^`` and parentheses
    :raises ValueError: saying what is wrong with it
    """
    if len(expression) > LONGEST:
        raise ValueError(f"an expression of {len(expression)} characters is longer than {LONGEST}")
    reader = _Reader(expression)
    value = reader.sum(0)
    if reader.token is not None:
        raise ValueError(f"expected an operator before {reader.token!r}")
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


class _Reader:
    """Reads an expression from left to right: sums are made of products, products of powers, powers of numbers."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self.token: str | None = None
        self._next()

    def _next(self) -> None:
        rest = self._text[self._at :]
        if not rest.strip():
            self.token = None
            return
        found = _TOKEN.match(rest)
        if found is None:
            raise ValueError(f"can't read {rest.strip()[:20]!r}")
        self._at += found.end()
        self.token = found.group(1) or found.group(2)

    def _take(self) -> str:
        taken = self.token
        if taken is None:
            raise ValueError("the expression ends too early")
        self._next()
        return taken

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self.token in ("+", "-"):
            value = value + self._product(depth) if self._take() == "+" else value - self._product(depth)
        return _bounded(value)

    def _product(self, depth: int) -> Fraction:
        value = self._signed(depth)
        while self.token in ("*", "/", "//", "%"):
            operator, other = self._take(), self._signed(depth)
            if operator != "*" and other == 0:
                raise ValueError("division by zero")
            if operator == "*":
                value = value * other
            elif operator == "/":
                value = value / other
            else:
                whole = Fraction(math.floor(value / other))
                value = whole if operator == "//" else value - whole * other
            value = _bounded(value)
        return value

    def _signed(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} parentheses and signs within each other")
        if self.token in ("+", "-"):
            sign = self._take()
            value = self._signed(depth + 1)
            return -value if sign == "-" else value
        return self._power(depth)

    def _power(self, depth: int) -> Fraction:
        base = self._number(depth)
        if self.token not in ("**", "^"):
            return base
        self._take()
        exponent = self._signed(depth + 1)
        if exponent.denominator != 1 or abs(exponent) > LARGEST_EXPONENT:
            raise ValueError(f"an exponent must be a whole number of at most {LARGEST_EXPONENT}")
        if base == 0 and exponent < 0:
            raise ValueError("division by zero")
        return _bounded(base ** int(exponent))

    def _number(self, depth: int) -> Fraction:
        token = self._take()
        if token == "(":
            value = self.sum(depth + 1)
            if self._take() != ")":
                raise ValueError("a parenthesis is not closed")
            return value
        if not token[0].isdigit() and token[0] != ".":
            raise ValueError(f"expected a number before {token!r}")
        return Fraction(token)


def _bounded(value: Fraction) -> Fraction:
    if abs(value) > LARGEST or value.denominator > LARGEST:
        raise ValueError("the value is too large, or too fine")
    return value
