"""Prefix codes of many contexts, each the best there is (Huffman 1952), stored by how many codes of each length it has.

Codes of one length are consecutive numbers (canonical codes), so a tree is a count for each length and its values in
order. Contexts whose codes are alike share a tree where that saves bytes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import FormError

LONGEST = 14  # bits of a code; each is a step of the decoder
LONGEST_TAIL = 8  # of a code in tree 0, of which there are more

Counts = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trees:
    """Prefix codes of bytes, one for each tree.

    Attributes:
        roots: uint8 ``[classes]``: the tree of each class.
        counts: uint8 ``[trees, levels + 1]``: how many codes of a tree have 0, 1, 2.. bits; ``levels`` is even.
        leaves: uint8 ``[values]``: what the codes stand for, tree by tree, short codes first.
    """

    roots: NDArray[np.uint8]
    counts: NDArray[np.uint8]
    leaves: NDArray[np.uint8]

    def __post_init__(self) -> None:
        for name, array, axes in (("roots", self.roots, 1), ("counts", self.counts, 2), ("leaves", self.leaves, 1)):
            if array.dtype != np.uint8 or array.ndim != axes or not array.size:
                raise FormError(
                    f"{name} of the trees are {array.dtype}{list(array.shape)}; they must be uint8 with {axes} axes"
                )
        if int(self.roots.max()) >= len(self.counts):
            raise FormError(f"tree {int(self.roots.max())} of a class, but there are {len(self.counts)}")
        if self.levels < LONGEST_TAIL or self.levels % 2:
            raise FormError(f"the trees have {self.levels} levels; it must be an even number from {LONGEST_TAIL} on")
        if self.counts[0, LONGEST_TAIL + 1 :].any():
            raise FormError(f"a code of tree 0 has more than {LONGEST_TAIL} bits")
        if int(self.counts.sum()) != len(self.leaves):
            raise FormError(f"the trees have {int(self.counts.sum())} codes for {len(self.leaves)} values")
        for number, row in enumerate(self.counts):
            if row.any() and (row * 2.0 ** -np.arange(len(row))).sum() != 1:
                raise FormError(f"tree {number} has codes that begin others, or that stand for nothing")

    @property
    def levels(self) -> int:
        """Bits of the longest code, or more."""
        return int(self.counts.shape[1]) - 1

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.roots.nbytes + self.counts.nbytes + self.leaves.nbytes

    @cached_property
    def edges(self) -> Numbers:
        """``[trees, levels + 1]``: how many leaves come before codes with more bits."""
        return np.cumsum(self.counts.astype(np.int64)).reshape(self.counts.shape)

    @cached_property
    def codewords(self) -> tuple[Numbers, Numbers]:
        """``[trees, 256]``: bits of each value's code, -1 where there is none, and the code, first bit highest."""
        lengths = np.full((len(self.counts), 256), -1, np.int64)
        words = np.zeros_like(lengths)
        at = 0
        for tree, row in enumerate(self.counts.tolist()):
            word = 0
            for length, size in enumerate(row):
                word *= 2
                values = self.leaves[at : at + size]
                lengths[tree, values] = length
                words[tree, values] = word + np.arange(size)
                word, at = word + size, at + size
        return lengths, words


def grow(tails: Counts, contexts: Counts) -> Trees:
    """The best trees for values that occur so often.

    Args:
        tails: ``[values]``: for tree 0, all of whose codes have a bit or more; it may be empty.
        contexts: ``[classes, values]``: for the trees of the classes; what never occurs gets no code.
    """
    if np.count_nonzero(tails) == 1:
        tails = np.maximum(np.pad(tails, (0, max(0, 2 - len(tails)))), 1e-3 * (np.arange(max(len(tails), 2)) < 2))
    roots, merged = _merge(contexts)
    lengths = [code_lengths(tails, LONGEST_TAIL), *(code_lengths(row) for row in merged)]
    levels = max(LONGEST_TAIL, *(max(row.values(), default=0) for row in lengths))
    levels += levels % 2  # the decoder takes two at a time
    counts = np.zeros((len(lengths), levels + 1), np.uint8)
    leaves: list[int] = []
    for tree, row in enumerate(lengths):
        for value, length in sorted(row.items(), key=lambda item: (item[1], item[0])):
            counts[tree, length] += 1
            leaves.append(value)
    return Trees((roots + 1).astype(np.uint8), counts, np.array(leaves, np.uint8))


def _merge(contexts: Counts) -> tuple[Numbers, list[Counts]]:
    """A tree for each class, neighbours that are alike in one, and how often values occur in each."""
    groups = [([number], row) for number, row in enumerate(contexts) if row.any()]
    cost = [_bytes(row) for _, row in groups]
    while len(groups) > 1:
        together = [groups[at][1] + groups[at + 1][1] for at in range(len(groups) - 1)]
        prices = [_bytes(row) for row in together]
        saved = [cost[at] + cost[at + 1] - price for at, price in enumerate(prices)]
        best = int(np.argmax(saved))
        if saved[best] <= 0:
            break
        groups[best : best + 2] = [(groups[best][0] + groups[best + 1][0], together[best])]
        cost[best : best + 2] = [prices[best]]
    roots = np.zeros(len(contexts), np.int64)
    for tree, (classes, _) in enumerate(groups):
        roots[classes] = tree
    return roots, [row for _, row in groups]


def _bytes(row: Counts) -> float:
    """What a tree and its codes take, the codes as long as information theory allows."""
    used = row[row > 0]
    return float(len(used) + LONGEST + 1 - (used * np.log2(used / used.sum())).sum() / 8)


def code_lengths(row: Counts, longest: int = LONGEST) -> dict[int, int]:
    """Bits of the code of each value that occurs; none is longer than ``longest``."""
    values = np.flatnonzero(row > 0)
    if len(values) <= 1:
        return {int(value): 0 for value in values}
    weights = row[values].astype(np.float64)
    while True:
        order = count()
        heap: list[tuple[float, int, list[int]]] = [(float(w), next(order), [at]) for at, w in enumerate(weights)]
        heapq.heapify(heap)
        depth = np.zeros(len(values), np.int64)
        while len(heap) > 1:
            first, second = heapq.heappop(heap), heapq.heappop(heap)
            both = first[2] + second[2]
            depth[both] += 1
            heapq.heappush(heap, (first[0] + second[0], next(order), both))
        if depth.max() <= longest:
            return dict(zip(values.tolist(), depth.tolist(), strict=True))
        weights = weights + weights.sum() / 2**longest  # rare values get nearer to the others
