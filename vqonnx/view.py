"""How a weight tensor is seen as a matrix ``[rows, cols]`` and brought back.

Rows are outputs, except in the order ``ohw``, where they are inputs: transforms of the input channels work on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import OptionError
from vqonnx.form import Matrix

# Orders of the columns where rows are outputs: what an output sees of the input has one of them too.
Order = Literal["ihw", "hwi"]
# ``ohw``: rows are the input channels of a group, columns (output, kernel); a group's basis is the same for all.
ViewOrder = Literal["ihw", "hwi", "ohw"]


@dataclass(frozen=True)
class View:
    """A reshape and a transpose between a matrix and a tensor.

    ``tensor = reshape(transpose(reshape(matrix, split), perm), shape)``

    Attributes:
        rows: Outputs of the layer, or input channels of one group where ``by_input``.
        cols: Weights of one row.
        split: Sizes that the matrix is reshaped to (``layout[2:]`` in docs/format.md).
        perm: The transpose that follows.
        shape: Shape of the tensor.
        by_input: Rows are inputs.
    """

    rows: int
    cols: int
    split: tuple[int, ...]
    perm: tuple[int, ...]
    shape: tuple[int, ...]
    by_input: bool = False

    @property
    def transposed(self) -> tuple[int, ...]:
        """Shape after the transpose; differs from `shape` only for a grouped ConvTranspose."""
        return tuple(self.split[axis] for axis in self.perm)

    def matrix(self, tensor: NDArray[Any]) -> Matrix:
        """The tensor as a contiguous float32 matrix ``[rows, cols]``."""
        split = tensor.astype(np.float32).reshape(self.transposed).transpose(np.argsort(self.perm))
        return np.ascontiguousarray(split.reshape(self.rows, self.cols))

    def tensor(self, matrix: Matrix) -> Matrix:
        """The matrix brought back into the shape of the tensor."""
        return np.ascontiguousarray(matrix.reshape(self.split).transpose(self.perm)).reshape(self.shape)


def conv_view(shape: tuple[int, ...], order: ViewOrder) -> View:
    """Conv weight ``[O, I, *kernel]``; I counts the channels of one group."""
    outputs, inputs, *kernel = shape
    spatial = len(kernel)
    if _checked(order) == "ohw":
        split, perm = (inputs, outputs, *kernel), (1, 0, *range(2, 2 + spatial))
        return View(inputs, outputs * math.prod(kernel), split, perm, shape, by_input=True)
    if order == "ihw":
        split, perm = shape, tuple(range(2 + spatial))
    else:
        split, perm = (outputs, *kernel, inputs), (0, 1 + spatial, *range(1, 1 + spatial))
    return View(outputs, math.prod(shape[1:]), split, perm, shape)


def conv_transpose_view(shape: tuple[int, ...], group: int, order: ViewOrder) -> View:
    """ConvTranspose weight ``[G*I, O, *kernel]``: the layer has ``G*O`` outputs."""
    all_inputs, outputs, *kernel = shape
    inputs, spatial = all_inputs // group, len(kernel)
    if _checked(order) == "ohw":
        split, perm = (inputs, group, outputs, *kernel), (1, 0, *range(2, 3 + spatial))
    elif order == "ihw":
        split, perm = (group, outputs, inputs, *kernel), (0, 2, 1, *range(3, 3 + spatial))
    else:
        split, perm = (group, outputs, *kernel, inputs), (0, 2 + spatial, 1, *range(2, 2 + spatial))
    if group == 1:  # the common case needs neither the group axis nor a reshape after the transpose
        place = perm[0]
        split = split[:place] + split[place + 1 :]
        perm = tuple(axis - (axis > place) for axis in perm[1:])
    if order == "ohw":
        return View(inputs, group * outputs * math.prod(kernel), split, perm, shape, by_input=True)
    return View(group * outputs, inputs * math.prod(kernel), split, perm, shape)


def matmul_view(shape: tuple[int, ...], *, outputs_first: bool, order: ViewOrder = "ihw") -> View:
    """Gemm or MatMul weight ``[*batch, I, O]``, or ``[O, I]`` with ``outputs_first`` (Gemm with ``transB``).

    All matrices of a stack have the same inputs in the order ``ohw``.
    """
    by_input = _checked(order) == "ohw"
    if outputs_first:
        if by_input:
            return View(shape[1], shape[0], shape[::-1], (1, 0), shape, by_input=True)
        return View(shape[0], shape[1], shape, (0, 1), shape)
    *batch, inputs, outputs = shape
    axes = range(len(batch))
    if by_input:
        split, perm = (inputs, *batch, outputs), (*(axis + 1 for axis in axes), 0, len(batch) + 1)
        return View(inputs, math.prod(batch) * outputs, split, perm, shape, by_input=True)
    split, perm = (*batch, outputs, inputs), (*axes, len(batch) + 1, len(batch))
    return View(math.prod(batch) * outputs, inputs, split, perm, shape)


def _checked(order: ViewOrder) -> ViewOrder:
    if order not in get_args(ViewOrder):
        raise OptionError(f"order '{order}' is unknown; choose one of {', '.join(get_args(ViewOrder))}")
    return order
