"""Codes in strips: the bytes of up to 256 rows side by side, so that the library computes from them as they are stored.

A strip holds ``lanes`` neighbouring rows of the codes, byte by byte: ``[stages, rows, row_bytes]`` becomes ``[stages,
rows / lanes, row_bytes, lanes]``. Lookups take the codes of up to 256 outputs together; from rows they need a copy in
another order, as large as the codes, for as long as the model is loaded. Only fused ops have codes in strips.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from vqonnx.ops import int64_lines, slice_lines

_SET = 64  # rows that a lookup takes at once
_MOST_SETS = 1  # of a strip

_LEAST_BYTES = 1 << 18  # of a layer's codes, for it to matter
_MOST_WIDTH = 64  # that lookups have tables for, and most stages
_AXES = 4


def to_strips(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes ``[stages, rows, row_bytes]`` as ``[stages, rows / lanes, row_bytes, lanes]``.

    ``rows`` is a multiple of 64; ``lanes`` is the largest of 256, 192, 128 and 64 that divides it.
    """
    stages, rows, row_bytes = codes.shape
    lanes = max(_SET * sets for sets in range(1, _MOST_SETS + 1) if rows % (_SET * sets) == 0)
    return np.ascontiguousarray(codes.reshape(stages, rows // lanes, lanes, row_bytes).transpose(0, 1, 3, 2))


def to_rows(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo `to_strips`."""
    stages, strips, row_bytes, lanes = codes.shape
    return np.ascontiguousarray(codes.transpose(0, 1, 3, 2).reshape(stages, strips * lanes, row_bytes))


def in_strips(shape: Sequence[int]) -> bool:
    """Whether codes of this shape are in strips."""
    return len(shape) == _AXES


def suits(
    codes: Sequence[int], codebooks: Sequence[int], layout: Sequence[int], perm: Sequence[int], output_axis: int
) -> bool:
    """Whether lookups can read a layer's codes where they are stored, and these are so many that it matters.

    Args:
        codes: Shape of the codes, by rows.
        codebooks: Shape of the codebooks.
        layout: The values of that input of ``Decode``.
        perm: The attribute of ``Decode``.
        output_axis: Axis of the decoded weight that counts outputs; the other ones are inputs and taps.
    """
    stages, rows, _ = codes
    _, books, _, width = codebooks
    bits, cols, *split = layout
    if prod(codes) < _LEAST_BYTES or rows % _SET or stages > _MOST_WIDTH:
        return False
    if perm[output_axis] != 0 or split[0] != rows:
        return False  # rows are something else than outputs
    if bits not in (1, 2, 4, 8) or (bits < 8 and books > 1):
        return False
    width *= 8 // bits  # a byte is a code of a longer word
    input_axis = 1 - output_axis
    inputs = split[perm[input_axis]]
    if width > _MOST_WIDTH:
        return False
    if inputs == cols:
        return True
    *taps, last = (perm.index(axis) for axis in range(1, len(split)))  # axes of the weight, the last one fastest
    return last == input_axis and taps == sorted(taps) and not inputs % width and not inputs // width % books


def row_lines(source: str, result: str, opset: int) -> list[str]:
    """Steps of a function's body: codes in strips or by rows, as a value of rank 4 or 3, become codes by rows."""
    return [
        *int64_lines("lane", [1], opset),
        *int64_lines("any", [-1], opset),
        f"stored = Shape ({source})",
        "padded = Concat <axis = 0> (stored, lane)",  # rows are strips of one
        *slice_lines("extents", "padded", 0, _AXES, opset),
        f"strips = Reshape ({source}, extents)",
        "beside = Transpose <perm: ints = [0, 1, 3, 2]> (strips)",
        *slice_lines("outer", "extents", 0, 1, opset),
        *slice_lines("inner", "extents", 2, 3, opset),
        "by_rows = Concat <axis = 0> (outer, any, inner)",
        f"{result} = Reshape (beside, by_rows)",
    ]
