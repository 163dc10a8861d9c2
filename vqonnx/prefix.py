"""Whole numbers in codes of different lengths, laid out so that all codes are read at the same time.

Three neighbouring numbers of a row are a *triple*: one code for their magnitudes, cut to 3, so that a number takes far
less than a bit where most are zero. Signs and what magnitudes have beyond 3 follow. Which tree a triple's code belongs
to follows from a class of its row and a class of its columns, so that where weights are small, codes are shorter still.

The bits are stored level by level: first the first bit of every code, then the second bit of every code that has one,
and so on. A reader that knows how many codes are not finished yet finds its bit by a running sum, without reading one
code after the other; standard ONNX operators can do that (`vqonnx.inflate`). ``docs/format.md`` says the same in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import FormError
from vqonnx.trees import LONGEST_TAIL, Counts, Numbers, Trees, grow

TRIPLE = 3
CUT = 3  # magnitudes from here on continue in a tail
MOST_CLASS = 15
_PLACES = (CUT + 1) ** np.arange(TRIPLE - 1, -1, -1)  # of a triple's digits
_VALUES = (CUT + 1) ** TRIPLE
_TAILS = 256 - CUT


@dataclass(frozen=True, eq=False)
class Prefix:
    """How the codes of a matrix are stored as prefix codes.

    Triple ``[r, t]`` belongs to class ``row_classes[r // row_span] + col_classes[t // col_span]``.

    Attributes:
        shape: (rows, cols).
        row_classes: uint8 ``[ceil(rows / row_span)]``, each at most 15.
        col_classes: uint8 ``[ceil(triples / col_span)]``, each at most 15; ``triples`` is ``ceil(cols / 3)``.
        row_span: Rows of a class.
        col_span: Triples of a class.
        trees: The codes.
        offset: The code that stands for the number 0.
    """

    shape: tuple[int, int]
    row_classes: NDArray[np.uint8]
    col_classes: NDArray[np.uint8]
    row_span: int
    col_span: int
    trees: Trees
    offset: int = 0

    def __post_init__(self) -> None:
        sizes = {"rows": self.shape[0], "triples": self.triples}
        spans = (self.row_span, self.col_span)
        for (name, size), array, span in zip(sizes.items(), (self.row_classes, self.col_classes), spans, strict=True):
            if array.dtype != np.uint8 or array.ndim != 1 or not array.size:
                raise FormError(f"classes of {name} are {array.dtype}{list(array.shape)}; they must be uint8 [n]")
            if int(array.max()) > MOST_CLASS:
                raise FormError(f"class {int(array.max())} of {name}; the largest is {MOST_CLASS}")
            if span < 1 or -(-size // span) != len(array):
                raise FormError(f"{len(array)} classes for {size} {name}, {span} of them each")
        highest = int(self.row_classes.max()) + int(self.col_classes.max())
        if highest >= len(self.trees.roots):
            raise FormError(f"class {highest} of a code, but there are {len(self.trees.roots)} trees")
        if not 0 <= self.offset <= 255:
            raise FormError(f"offset is {self.offset}; it must be 0 to 255")

    @property
    def triples(self) -> int:
        """Triples of a row."""
        return -(-self.shape[1] // TRIPLE)

    @property
    def classes(self) -> Numbers:
        """``[rows, triples]``."""
        return sum_classes(
            (self.shape[0], self.triples), self.row_classes, self.col_classes, self.row_span, self.col_span
        )

    @property
    def packed_classes(self) -> NDArray[np.uint8]:
        """The classes as stored: rows, then columns, two in a byte, the first in the low half."""
        both = np.concatenate([self.row_classes, self.col_classes])
        both = np.append(both, np.zeros(len(both) % 2, np.uint8)).reshape(-1, 2)
        return np.asarray(both[:, 0] | both[:, 1] << 4, np.uint8)

    def write(self, codes: NDArray[Any]) -> NDArray[np.uint8]:
        """The stored bits of codes ``[rows, cols]``, behind one that says nothing.

        Raises:
            FormError: A tree lacks a code that occurs, or the classes do not fit the codes.
        """
        if codes.shape != self.shape:
            raise FormError(f"codes are {list(codes.shape)}, but the classes are for {list(self.shape)}")
        numbers, triples, tails = parts_of(codes.astype(np.int64) - self.offset)
        bits = [np.zeros(1, np.uint8)]
        bits += self._bits(self.trees.roots[self.classes].reshape(-1), triples.reshape(-1))
        bits += self._bits(np.zeros(len(tails), np.int64), tails)
        bits.append((numbers[numbers != 0] < 0).astype(np.uint8))
        return np.packbits(np.concatenate(bits), bitorder="little")

    def _bits(self, trees: NDArray[Any], values: Numbers) -> Iterator[NDArray[np.uint8]]:
        """The bits of codes, level by level."""
        lengths, words = (table[trees, values] for table in self.trees.codewords)
        if (lengths < 0).any():
            at = int(np.argmin(lengths))
            raise FormError(f"tree {int(trees[at])} has no code for {int(values[at])}")
        for level in range(int(lengths.max(initial=0))):
            going = lengths > level
            yield (words[going] >> (lengths[going] - 1 - level) & 1).astype(np.uint8)

    def read(self, stream: NDArray[np.uint8]) -> Numbers:
        """Undo `write`: the codes ``[rows, cols]``.

        Raises:
            FormError: The stream is too short.
        """
        bits = _Bits(np.unpackbits(stream, bitorder="little").astype(np.int64))
        edges, leaves = self.trees.edges.reshape(-1), self.trees.leaves.astype(np.int64)
        at = self.trees.roots[self.classes].reshape(-1).astype(np.int64) * (self.trees.levels + 1)
        node = edges[at] - self.trees.counts.reshape(-1)[at]
        triples = leaves[self._descend(node, at, self.trees.levels, bits)]
        digits = (triples[:, None] // _PLACES % (CUT + 1)).reshape(-1)
        cut = digits // CUT
        found = self._descend(cut - 1, np.zeros(1, np.int64), LONGEST_TAIL, bits)
        numbers = digits + cut * leaves[found * cut]
        going = numbers > 0
        numbers[going] *= 1 - 2 * bits.take(int(going.sum()))
        return numbers.reshape(self.shape[0], -1)[:, : self.shape[1]] + self.offset

    def _descend(self, node: Numbers, at: Numbers, levels: int, bits: _Bits) -> Numbers:
        """The leaves at which codes end: from ``node``, with the edges of a tree beginning at ``at``."""
        edges = self.trees.edges.reshape(-1)
        for level in range(levels):
            edge = np.broadcast_to(edges[at + level], node.shape)
            going = node >= edge
            node = node.copy()
            node[going] = 2 * node[going] - edge[going] + bits.take(int(going.sum()))
        return node


class _Bits:
    """Takes bits from a stream in order, the first of which says nothing."""

    def __init__(self, bits: Numbers) -> None:
        self._bits, self._at = bits, 1

    def take(self, size: int) -> Numbers:
        self._at += size
        if self._at > len(self._bits):
            raise FormError(f"the codes take {self._at} bits or more, but {len(self._bits)} are stored")
        return self._bits[self._at - size : self._at]


def parts_of(numbers: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """What codes are made for, from numbers ``[rows, cols]``.

    Returns:
        The numbers with the last triple of each row filled up, ``[rows, 3 * triples]``; the triples ``[rows, triples]``
        as numbers below 64; and what magnitudes have beyond 3, row by row.
    """
    filled = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % TRIPLE)))
    size = np.abs(filled)
    digits = np.minimum(size, CUT).reshape(len(filled), -1, TRIPLE)
    return filled, digits @ _PLACES, size[size >= CUT] - CUT


def sum_classes(
    shape: tuple[int, int], rows: NDArray[np.uint8], cols: NDArray[np.uint8], row_span: int, col_span: int
) -> Numbers:
    """``[rows, cols]``: the class of each entry from those of runs of rows and of columns."""
    by_row = rows.astype(np.int64)[np.arange(shape[0]) // row_span]
    return by_row[:, None] + cols.astype(np.int64)[np.arange(shape[1]) // col_span]


def histogram(values: NDArray[Any], classes: NDArray[Any], shape: tuple[int, int]) -> Counts:
    """How often each value occurs in each class, ``shape`` being (classes, values)."""
    flat = np.ravel(classes).astype(np.int64) * shape[1] + np.ravel(values).astype(np.int64)
    return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def common_trees(matrices: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Trees:
    """The best trees for several matrices of numbers together, each with the classes of its triples."""
    tails = np.zeros(_TAILS)
    contexts = np.zeros((2 * MOST_CLASS + 1, _VALUES))
    highest = 0
    for numbers, classes in matrices:
        _, triples, more = parts_of(np.asarray(numbers, np.int64))
        contexts += histogram(triples, classes, contexts.shape)
        tails += np.bincount(more, minlength=_TAILS)
        highest = max(highest, int(classes.max()))
    return grow(tails, contexts[: highest + 1])
