"""Several short rows one after the other in one longer row, so that a forward computes hardly any padding.

Completions end at very different lengths; padded to the longest, most of a batch may be padding. Packed rows know
nothing of each other: an attention mask shows each token the tokens of its own row up to itself, and positions count
from the beginning of each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDER = 1.125  # most width of packed rows, over that of the longest row; more where that is not a multiple of the step
# Widths are multiples of this, so that minibatches have few shapes: for a shape not seen before some libraries generate
# code first (oneDNN, in bf16 on a CPU).
WIDTH_STEP = 8
WORTHWHILE = 0.8  # rows are packed where less than this share of the padded tokens is real


@dataclass(frozen=True)
class PackedRows:
    """B rows of tokens in R packed rows of width W.

    - ``input_ids`` and ``positions``: ``(R, W)``
    - ``members``: ``(R, W)`` which of the rows a token belongs to; -1 where there is none
    - ``into`` and ``offset``: ``(B,)`` the packed row that a row is in, and where it begins there
    """

    input_ids: np.ndarray
    positions: np.ndarray
    members: np.ndarray
    into: np.ndarray
    offset: np.ndarray

    def together(self) -> np.ndarray:
        """``(R, W, W)`` bool, which tokens (last axis) are of the same row as each token; padding is by itself."""
        same = self.members[:, :, None] == self.members[:, None, :]
        real = (self.members >= 0)[:, None, :]
        return (same & real) | np.eye(self.members.shape[1], dtype=bool)


def round_up(width: int) -> int:
    """The next multiple of ``WIDTH_STEP``, or the width itself if it is one."""
    return -(-width // WIDTH_STEP) * WIDTH_STEP


def worth_packing(lengths: np.ndarray, width: int) -> bool:
    """Whether rows of these lengths, padded to ``width``, are mostly padding."""
    return len(lengths) > 1 and int(lengths.sum()) < WORTHWHILE * len(lengths) * width


def pack(ids: np.ndarray, lengths: np.ndarray) -> PackedRows:
    """Pack rows, the longest first, each into the first packed row with room for it (first-fit decreasing).

    The packed rows are about as wide as the longest row, or up to an eighth wider where that leaves less padding, so
    that attention costs about what it does with padding.

    :param ids: ``(B, L)`` right-padded
    :param lengths: ``(B,)`` how many tokens of each are real, at least 1
    """
    longest = int(lengths.max())
    narrowest, widest = round_up(longest), int(longest * WIDER)
    widths = range(narrowest, max(narrowest, widest) + 1, round_up(max(1, longest // 64)))
    into, offset, rows, width = min(
        (first_fit(lengths, width) for width in widths), key=lambda packed: packed[2] * packed[3]
    )
    packed = np.zeros((rows, width), dtype=np.int64)
    positions = np.zeros_like(packed)
    members = np.full_like(packed, -1)
    for row, (bin_, start, length) in enumerate(zip(into.tolist(), offset.tolist(), lengths.tolist(), strict=True)):
        place = slice(start, start + length)
        packed[bin_, place] = ids[row, :length]
        positions[bin_, place] = np.arange(length)
        members[bin_, place] = row
    return PackedRows(packed, positions, members, into, offset)


def first_fit(lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Where rows go, ``into`` and ``offset`` ``(B,)`` as in :class:`PackedRows`, how many packed rows that takes, and
    their width. ::

        >>> first_fit(np.array([2, 5, 3, 4]), 6)
        (array([1, 0, 2, 1]), array([4, 0, 0, 0]), 3, 6)

    :param lengths: ``(B,)`` at most ``width``
    """
    room: list[int] = []  # left in each packed row
    into, offset = np.zeros(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        bin_ = next((i for i, left in enumerate(room) if left >= length), len(room))
        if bin_ == len(room):
            room.append(width)
        into[row], offset[row] = bin_, width - room[bin_]
        room[bin_] -= length
    return into, offset, len(room), width
