"""Rows of like length together: passes that read many texts with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from textgym.checks import check_int

BATCH_TOKENS = 16_384  # most tokens, padding included, in one pass; bounds memory, not results


def check_batch_tokens(max_batch_tokens: int) -> None:
    """:raises ValueError: if it is less than one token"""
    check_int("max_batch_tokens", max_batch_tokens, low=1)


def micro_batches(lengths: Sequence[int] | np.ndarray, max_batch_tokens: int) -> Iterator[np.ndarray]:
    """Indices of the rows that have any tokens, longest first, in groups that fit when they are padded.

    A row that is longer than the limit makes a group of its own.

    :param lengths: ``(B,)`` tokens of each row
    :param max_batch_tokens: most tokens of a group, padding included

    >>> [part.tolist() for part in micro_batches([3, 9, 0, 4, 4], max_batch_tokens=8)]
    [[1], [3, 4], [0]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    start = 0
    while start < len(order):
        stop = start + max(1, max_batch_tokens // int(sizes[order[start]]))
        yield order[start:stop]
        start = stop
