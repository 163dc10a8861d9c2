"""Codes in strips: the bytes of 64 rows side by side, so that the library computes from them as they are stored.

A strip holds 64 neighbouring rows of the codes, byte by byte: ``[stages, rows, row_bytes]`` becomes ``[stages,
rows / 64, row_bytes, 64]``. Lookups take the codes of 64 outputs at once; from rows they need a copy in another order,
as large as the codes or larger, for as long as the model is loaded. Only fused ops have codes in strips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from vqonnx.modelfile import to_array
from vqonnx.ops import int64_lines, slice_lines

_ROWS = 64  # of a strip
_LEAST_BYTES = 1 << 18  # of a layer's codes, for it to matter
_MOST_WIDTH = 64  # that lookups have tables for
_MOST_STAGES = 64  # the same
_MOST_UNPACKED_STAGES = 4  # of codes that are unpacked before they are looked up
_AXES = 4
_BYTE = 8


def to_strips(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes ``[stages, rows, row_bytes]`` as ``[stages, rows / 64, row_bytes, 64]``; 64 must divide ``rows``."""
    stages, rows, row_bytes = codes.shape
    return np.ascontiguousarray(codes.reshape(stages, rows // _ROWS, _ROWS, row_bytes).transpose(0, 1, 3, 2))


def to_rows(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo `to_strips`."""
    stages, strips, row_bytes, rows = codes.shape
    return np.ascontiguousarray(codes.transpose(0, 1, 3, 2).reshape(stages, strips * rows, row_bytes))


def rearrange(
    tensor: TensorProto, order: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], folder: Path = Path()
) -> None:
    """Store the codes of a tensor in another order, `to_strips` or `to_rows`; ``folder`` is for external data."""
    tensor.CopyFrom(numpy_helper.from_array(order(to_array(tensor, folder)), tensor.name))


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
    if prod(codes) < _LEAST_BYTES or rows % _ROWS or stages > _MOST_STAGES:
        return False
    if perm[output_axis] != 0 or split[0] != rows:
        return False  # rows are something else than outputs
    if bits > _BYTE or width > _MOST_WIDTH or (bits < _BYTE and stages > _MOST_UNPACKED_STAGES):
        return False
    input_axis = 1 - output_axis
    inputs = split[perm[input_axis]]
    if inputs == cols:
        return True
    # The same codes are looked up at each position; those of fewer bits would be unpacked again and again.
    *taps, last = (perm.index(axis) for axis in range(1, len(split)))  # axes of the weight, the last one fastest
    by_tap = last == input_axis and taps == sorted(taps) and not inputs % width and not inputs // width % books
    return bits == _BYTE and by_tap


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
