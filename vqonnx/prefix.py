"""Codes of different lengths: prefix codes of many contexts, laid out so that all codes are read at the same time.

Frequent codes are short (Huffman 1952). Which tree a code belongs to follows from a class of its row and a class of its
column, so that where weights are small or inputs weak, codes are shorter still. The bits are stored level by level:
first the first bit of every code, then the second bit of every code that has one, and so on. A reader that knows how
many codes are not finished yet finds its bit by a running sum, without reading one code after the other; standard ONNX
operators can do that (`vqonnx.inflate`). ``docs/format.md`` says the same in words.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import FormError

LONGEST = 14  # bits of a code; each is a level of the decoder
_MOST_NODES = 2**15

Counts = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Trees:
    """Binary trees, one for each class. Node numbers below ``inner`` have two children; ``inner + c`` is the code c.

    Attributes:
        roots: uint16 ``[classes]``: where a code of each class begins.
        children: uint16 ``[2 * inner]``: the nodes that follow node n after a 0 and after a 1 are ``[2n]`` and
            ``[2n + 1]``.
    """

    roots: NDArray[np.uint16]
    children: NDArray[np.uint16]

    def __post_init__(self) -> None:
        for name, array in (("roots", self.roots), ("children", self.children)):
            if array.dtype != np.uint16 or array.ndim != 1 or not array.size:
                raise FormError(f"{name} of the trees are {array.dtype}{list(array.shape)}; they must be uint16 [n]")
        if self.children.size % 2:
            raise FormError(f"the trees have {self.children.size} children; every node has two")
        depths = self._depths()
        if depths is None:
            raise FormError("a node of the trees is reached twice, or never ends")

    @property
    def inner(self) -> int:
        """Nodes with children."""
        return self.children.size // 2

    @property
    def levels(self) -> int:
        """Bits of the longest code."""
        depths = self._depths()
        assert depths is not None
        return max(depths.values(), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.roots.nbytes + self.children.nbytes

    def codewords(self, words: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``[classes, words]``: the length of each code, -1 where there is none, and its bits, the first highest."""
        lengths = np.full((len(self.roots), words), -1, np.int64)
        bits = np.zeros((len(self.roots), words), np.int64)
        for number, root in enumerate(self.roots.tolist()):
            todo = [(root, 0, 0)]
            while todo:
                node, length, value = todo.pop()
                if node >= self.inner:
                    if node - self.inner < words:
                        lengths[number, node - self.inner], bits[number, node - self.inner] = length, value
                    continue
                for bit in (0, 1):
                    todo.append((int(self.children[2 * node + bit]), length + 1, 2 * value + bit))
        return lengths, bits

    def _depths(self) -> dict[int, int] | None:
        """The height above its leaves of each inner node that a root reaches; None if there is a cycle."""
        heights: dict[int, int] = {}
        for root in set(self.roots.tolist()):
            stack, path = [(root, False)], set()
            while stack:
                node, done = stack.pop()
                if node >= self.inner or (node in heights and not done):
                    continue
                pair = self.children[2 * node : 2 * node + 2].tolist()
                if done:
                    path.discard(node)
                    heights[node] = 1 + max(0 if child >= self.inner else heights[child] for child in pair)
                    continue
                if node in path:
                    return None
                path.add(node)
                stack.append((node, True))
                for child in pair:
                    if child < self.inner and child in path:
                        return None
                    stack.append((child, False))
        return heights


def grow(counts: Counts) -> Trees:
    """The best trees for codes that occur so often.

    Args:
        counts: ``[classes, words]``; what never occurs gets no code. A class in which nothing occurs gets the code of
            the most frequent word, of no bits.

    Raises:
        FormError: There are too many nodes for 16 bits.
    """
    roots: list[tuple[bool, int]] = []  # (is a leaf, number), as are the children in the pairs
    pairs: list[list[tuple[bool, int]]] = []
    common = int(np.argmax(counts.sum(axis=0)))
    for row in counts:
        alphabet = np.flatnonzero(row > 0)
        if len(alphabet) <= 1:
            roots.append((True, int(alphabet[0]) if len(alphabet) else common))
            continue
        tree = _huffman(row[alphabet])
        roots.append((False, len(pairs) + len(tree) - 1))
        base = len(pairs)
        pairs += [[(leaf, int(alphabet[at]) if leaf else base + at) for leaf, at in pair] for pair in tree]
    if not pairs:  # arrays are never empty
        pairs = [[(True, common), (True, common)]]
    inner = len(pairs)
    if inner + counts.shape[1] > _MOST_NODES:
        raise FormError(f"{inner + counts.shape[1]} nodes in the trees, {_MOST_NODES} at most; choose a larger step")
    flat = [number + inner * leaf for pair in pairs for leaf, number in pair]
    return Trees(np.array([number + inner * leaf for leaf, number in roots], np.uint16), np.array(flat, np.uint16))


def _huffman(counts: Counts) -> list[list[tuple[bool, int]]]:
    """The inner nodes of a tree over two or more words, children before parents; no code is longer than `LONGEST`."""
    weights = counts.astype(np.float64)
    while True:
        order = count()
        heap = [(float(weight), next(order), 0, (True, number)) for number, weight in enumerate(weights)]
        heapq.heapify(heap)
        nodes: list[list[tuple[bool, int]]] = []
        while len(heap) > 1:
            first, second = heapq.heappop(heap), heapq.heappop(heap)
            nodes.append([first[3], second[3]])
            depth = 1 + max(first[2], second[2])
            heapq.heappush(heap, (first[0] + second[0], next(order), depth, (False, len(nodes) - 1)))
        if heap[0][2] <= LONGEST:
            return nodes
        weights = weights + weights.sum() / 2**LONGEST  # rare words get nearer to the others


@dataclass(frozen=True, eq=False)
class Prefix:
    """How the codes of a matrix are stored as prefix codes.

    Code ``[r, c]`` belongs to tree ``row_classes[r // row_span] + col_classes[c // col_span]``.

    Attributes:
        shape: Rows and columns of the codes.
        row_classes: uint8 ``[ceil(rows / row_span)]``.
        col_classes: uint8 ``[ceil(cols / col_span)]``.
        row_span: Neighbouring rows of one class.
        col_span: Neighbouring columns of one class, such as the taps of a kernel in the order ``ihw``.
        trees: Layers share them.
        offset: What is added to a code to find it in the trees.
    """

    shape: tuple[int, int]
    row_classes: NDArray[np.uint8]
    col_classes: NDArray[np.uint8]
    row_span: int
    col_span: int
    trees: Trees
    offset: int = 0

    def __post_init__(self) -> None:
        spans = (self.row_span, self.col_span)
        for name, array, size, span in zip(
            ("rows", "columns"), (self.row_classes, self.col_classes), self.shape, spans, strict=True
        ):
            if array.dtype != np.uint8 or array.ndim != 1 or not array.size:
                raise FormError(f"classes of {name} are {array.dtype}{list(array.shape)}; they must be uint8 [n]")
            if span < 1 or -(-size // span) != len(array):
                raise FormError(f"{len(array)} classes for {size} {name}, {span} of them each")
        highest = int(self.row_classes.max()) + int(self.col_classes.max())
        if highest >= len(self.trees.roots):
            raise FormError(f"class {highest} of a code, but there are {len(self.trees.roots)} trees")
        if self.offset < 0:
            raise FormError(f"offset is {self.offset}; it must be 0 or more")

    @property
    def classes(self) -> NDArray[np.int64]:
        """``[rows, cols]``: the tree of each code."""
        return sum_classes(self.shape, self.row_classes, self.col_classes, self.row_span, self.col_span)

    def write(self, codes: NDArray[Any]) -> NDArray[np.uint8]:
        """The stored bits of codes ``[rows, cols]``, and one byte more, so that a reader may look beyond the end.

        Raises:
            FormError: A tree lacks a code that occurs, or the classes do not fit the codes.
        """
        if codes.shape != self.shape:
            raise FormError(f"codes are {list(codes.shape)}, but the classes are for {list(self.shape)}")
        numbers = codes.astype(np.int64) + self.offset
        lengths, bits = self.trees.codewords(int(numbers.max()) + 1)
        classes = self.classes
        length, word = lengths[classes, numbers].reshape(-1), bits[classes, numbers].reshape(-1)
        if (length < 0).any():
            at = int(np.argmin(length))
            raise FormError(f"tree {int(classes.flat[at])} has no code {int(numbers.flat[at])}")
        levels = [
            (word[length > level] >> (length[length > level] - 1 - level)) & 1 for level in range(length.max(initial=0))
        ]
        flat = np.concatenate([np.zeros(0, np.uint8), *(level.astype(np.uint8) for level in levels)])
        return np.append(np.packbits(flat, bitorder="little"), np.uint8(0))

    def read(self, stream: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Undo `write`: the codes ``[rows, cols]``.

        Raises:
            FormError: The stream is too short.
        """
        bits = np.unpackbits(stream, bitorder="little")
        node = self.trees.roots.astype(np.int64)[self.classes].reshape(-1)
        base, inner = 0, self.trees.inner
        for _ in range(self.trees.levels):
            alive = node < inner
            at = base + np.cumsum(alive) - alive
            base += int(alive.sum())
            if base > len(bits):
                raise FormError(f"the codes take {base} bits or more, but {len(bits)} are stored")
            bit = bits[np.minimum(at, len(bits) - 1)]
            node = np.where(alive, self.trees.children.astype(np.int64)[np.where(alive, 2 * node + bit, 0)], node)
        return (node - inner - self.offset).reshape(self.shape)


def sum_classes(
    shape: tuple[int, int], rows: NDArray[np.uint8], cols: NDArray[np.uint8], row_span: int, col_span: int
) -> NDArray[np.int64]:
    """``[rows, cols]``: the class of each code from those of runs of rows and of columns."""
    by_row = rows.astype(np.int64)[np.arange(shape[0]) // row_span]
    return by_row[:, None] + cols.astype(np.int64)[np.arange(shape[1]) // col_span]


def histogram(codes: NDArray[Any], classes: NDArray[Any], shape: tuple[int, int]) -> Counts:
    """How often each code occurs in each class, ``shape`` being (classes, words)."""
    flat = np.ravel(classes).astype(np.int64) * shape[1] + np.ravel(codes).astype(np.int64)
    return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def common_trees(parts: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Trees:
    """The best trees for several matrices of codes together, each with the classes of its codes."""
    listed: Sequence[tuple[NDArray[Any], NDArray[Any]]] = list(parts)
    shape = (
        max(int(classes.max()) for _, classes in listed) + 1,
        max(int(codes.max()) for codes, _ in listed) + 1,
    )
    return grow(np.sum([histogram(codes, classes, shape) for codes, classes in listed], axis=0))
