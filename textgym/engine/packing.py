"""Rows that begin alike are read as one tree, and trees and short rows stand one after the other in longer rows.

The completions of one prompt, texts under one system prompt or the prefixes of one text have most of their tokens in
common: a forward need read those only once. And completions end at very different lengths: padded to the longest, most
of a batch may be padding. So a teacher-forced pass reads *packed rows*::

    rows        a b c d     a b c e f     a b x     a b     u v
    packed      a b c d e f x u v           one row, each token once
    positions   0 1 2 3 3 4 2 0 1           counted in each token's own text

An attention mask shows each token those before it in its own text, wherever they stand, so that its hidden state is
the one that it would have in a row by itself. A token that several texts share gets the gradients of all of them.

Attention costs the square of the width. What is packed together is therefore planned by what it costs, see
:func:`cost`: many or long completions of one prompt become several trees, each with a copy of the prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from textgym.engine.micro_batches import micro_batches

WIDEST = 2.0  # most width of packed rows, over that of the largest tree
WIDTHS = 12  # how many widths are tried up to there
# Widths are multiples of this, so that minibatches have few shapes: for a shape not seen before some libraries generate
# code first (oneDNN, in bf16 on a CPU).
WIDTH_STEP = 8
END = b"\xff" * 8  # the bytes of no token
WORTHWHILE = 0.8  # rows are packed where that costs less than this share of what they cost as they are


def cost(tokens: np.ndarray | float, seen: np.ndarray | float, balance: float) -> np.ndarray | float:
    """What a pass over so many tokens costs, in a unit of its own.

    :param tokens: N
    :param seen: how many keys attention computes for each of them
    :param balance: for how many keys attention costs as much as everything else in the model
    """
    return tokens * (balance + seen)


@dataclass(frozen=True)
class Tree:
    """Rows that are read as one: the first whole, of each other row what follows its beginning.

    - ``rows``: ``(n,)`` which rows, those that begin alike next to each other
    - ``shared``: ``(n,)`` with how many tokens each begins as the one before it does; 0 for the first
    - ``size``: how many tokens that are, each counted once
    """

    rows: np.ndarray
    shared: np.ndarray
    size: int


@dataclass(frozen=True)
class PackedRows:
    """B rows of tokens in R packed rows of width W.

    - ``input_ids`` and ``positions``: ``(R, W)``
    - ``branches``: ``(R, W)`` the branch that each token stands in, of D: what one row adds to its tree; -1 in padding
    - ``shared``: ``(D + 1, D + 1)`` with how many tokens the texts of two branches begin alike; 0 in different trees,
      and for -1, padding
    - ``into``: ``(B,)`` the packed row that a row is in
    - ``places``: ``(B, L)`` where in it each of its tokens stands
    """

    input_ids: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    shared: np.ndarray
    into: np.ndarray
    places: np.ndarray

    def together(self) -> np.ndarray:
        """``(R, W, W)`` bool, which tokens (last axis) are in the text of each token's branch; those that come later
        in it than the token itself are for the caller to leave out. Padding is by itself."""
        rows, width = self.branches.shape
        together = np.empty((rows, width, width), dtype=bool)
        for packed, (branches, positions) in enumerate(zip(self.branches, self.positions, strict=True)):
            # A text has the tokens of another branch up to where they part.
            together[packed] = positions < self.shared[branches][:, branches]
        return together | np.eye(width, dtype=bool)


def as_trees(texts: Sequence[np.ndarray], balance: float) -> list[Tree]:
    """How rows are cheapest to read: each row in one tree, by itself where it shares too little. ::

        >>> texts = [np.array(list(text.encode())) for text in ("abcd", "uv", "ab", "abcef", "abx")]
        >>> [(tree.rows.tolist(), tree.shared.tolist(), tree.size) for tree in as_trees(texts, balance=100)]
        [([0, 3, 4, 2], [0, 3, 2, 2], 7), ([1], [0], 2)]
        >>> [tree.rows.tolist() for tree in as_trees(texts, balance=0)]
        [[0, 3], [4, 2], [1]]

    :param texts: B rows of token ids, of any lengths from 1 on
    :param balance: see :func:`cost`
    """
    order = in_order(texts)
    pairs = itertools.pairwise(order.tolist())
    shared = np.array([0, *(shared_tokens(texts[before], texts[row]) for before, row in pairs)])[: len(order)]
    lengths = np.array([len(texts[row]) for row in order], dtype=np.int64)

    # Rows without a token of their own go where the one before them goes; where the D others go is to be decided.
    branches = np.flatnonzero(lengths > shared)  # (D,)
    whole, ends = lengths[branches], np.append(0, np.cumsum((lengths - shared)[branches]))
    # The first j branches cost least, cheapest[j], if the last of their trees begins with branch first[j].
    cheapest, first = np.zeros(len(branches) + 1), np.zeros(len(branches) + 1, dtype=np.int64)
    for j in range(1, len(branches) + 1):
        sizes = whole[:j] + ends[j] - ends[1 : j + 1]  # (j,) of the tree from each branch on
        costs = cheapest[:j] + cost(sizes, sizes, balance)
        first[j] = costs.argmin()
        cheapest[j] = costs[first[j]]

    bounds = np.append(branches, len(order))
    trees, end = [], len(branches)
    while end:
        part = slice(int(bounds[first[end]]), int(bounds[end]))
        inside = shared[part].copy()
        inside[0] = 0
        trees.append(Tree(order[part], inside, int((lengths[part] - inside).sum())))
        end = int(first[end])
    return trees[::-1]


def in_order(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Indices of rows ``(B,)`` such that those with the same first tokens are neighbours, and one that is the beginning
    of others comes behind them."""
    # However bytes order tokens, the same ones come together.
    keys = [text.astype(np.int64, copy=False).tobytes() + END for text in texts]
    return np.array(sorted(range(len(texts)), key=keys.__getitem__), dtype=np.int64)


def shared_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """With how many tokens two rows begin alike."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def passes(texts: Sequence[np.ndarray], most_tokens: int, balance: float) -> Iterator[np.ndarray]:
    """Indices of the rows that have any tokens, in groups for a pass each; those that begin alike are together.

    :param texts: B rows of token ids
    :param most_tokens: of a pass, padding included; a tree that is larger makes a pass of its own
    :param balance: see :func:`cost`
    """
    rows = np.flatnonzero([len(text) for text in texts])
    trees = as_trees([texts[row] for row in rows.tolist()], balance)
    for part in micro_batches([tree.size for tree in trees], most_tokens):
        yield rows[np.concatenate([trees[i].rows for i in part])]


def pack(ids: np.ndarray, lengths: np.ndarray, balance: float) -> PackedRows:
    """Rows as trees, and these in packed rows.

    The largest tree goes first, each into the first packed row with room for it (first-fit decreasing), of the width
    that costs least.

    :param ids: ``(B, L)`` right-padded
    :param lengths: ``(B,)`` how many tokens of each are real, at least 1
    :param balance: see :func:`cost`
    """
    trees = as_trees([row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)], balance)
    sizes = np.array([tree.size for tree in trees])
    widths = np.unique([round_up(int(sizes.max() * WIDEST ** (k / WIDTHS))) for k in range(WIDTHS + 1)])
    into, offset, rows, width = min(
        (first_fit(sizes, int(width)) for width in widths),
        key=lambda fitted: cost(fitted[2] * fitted[3], fitted[3], balance),
    )
    count = sum(int((tree.shared < lengths[tree.rows]).sum()) for tree in trees)  # D
    packed = PackedRows(
        input_ids=np.zeros((rows, width), dtype=np.int64),
        positions=np.zeros((rows, width), dtype=np.int64),
        branches=np.full((rows, width), -1),
        shared=np.zeros((count + 1, count + 1), dtype=np.int32),
        into=np.zeros(len(ids), dtype=np.int64),
        places=np.zeros(ids.shape, dtype=np.int64),
    )
    branch = 0
    for tree, bin_, place in zip(trees, into.tolist(), offset.tolist(), strict=True):
        branch = _put(packed, tree, ids, lengths, branch, bin_, place)
    return packed


def _put(
    packed: PackedRows, tree: Tree, ids: np.ndarray, lengths: np.ndarray, branch: int, bin_: int, place: int
) -> int:
    """Write a tree into a packed row, from a place on.

    :param branch: the number of its first branch
    :return: the number of the next tree's
    """
    before, first = tree.rows[0], branch
    with_earlier = np.zeros(0, dtype=np.int32)  # tokens that the row has in common with each branch so far
    for row, shared in zip(tree.rows.tolist(), tree.shared.tolist(), strict=True):
        packed.into[row] = bin_
        packed.places[row, :shared] = packed.places[before, :shared]
        with_earlier = np.minimum(with_earlier, shared)  # two rows share what all between them do
        own = slice(shared, int(lengths[row]))
        if own.start < own.stop:
            there = slice(place, place + own.stop - own.start)
            packed.places[row, own] = np.arange(there.start, there.stop)
            packed.input_ids[bin_, there] = ids[row, own]
            packed.positions[bin_, there] = np.arange(own.start, own.stop)
            packed.branches[bin_, there] = branch
            packed.shared[branch, first:branch] = packed.shared[first:branch, branch] = with_earlier
            packed.shared[branch, branch] = own.stop
            with_earlier = np.append(with_earlier, own.stop)
            branch, place = branch + 1, there.stop
        before = row
    return branch


def worth_packing(packed: PackedRows, lengths: np.ndarray, balance: float) -> bool:
    """Whether packed rows cost so much less than rows as they are, padded to the longest.

    :param lengths: ``(B,)`` of the rows as they are
    """
    rows, width = packed.input_ids.shape
    longest = int(lengths.max())
    # Without a mask, attention leaves out the half of the keys that come later.
    padded = cost(len(lengths) * longest, longest / 2, balance)
    return bool(cost(rows * width, width, balance) < WORTHWHILE * padded)


def round_up(width: int) -> int:
    """The next multiple of ``WIDTH_STEP``, or the width itself if it is one."""
    return -(-width // WIDTH_STEP) * WIDTH_STEP


def first_fit(sizes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Where trees go: into which packed rows ``(n,)``, and where they begin there ``(n,)``; how many packed rows that
    takes, and their width. ::

        >>> first_fit(np.array([2, 5, 3, 4]), 6)
        (array([1, 0, 2, 1]), array([4, 0, 0, 0]), 3, 6)

    :param sizes: ``(n,)`` at most ``width``
    """
    room: list[int] = []  # left in each packed row
    into, offset = np.zeros(len(sizes), dtype=np.int64), np.zeros(len(sizes), dtype=np.int64)
    for tree in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[tree])
        bin_ = next((i for i, left in enumerate(room) if left >= size), len(room))
        if bin_ == len(room):
            room.append(width)
        into[tree], offset[tree] = bin_, width - room[bin_]
        room[bin_] -= size
    return into, offset, len(room), width
