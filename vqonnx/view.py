"""How a weight tensor is seen as a matrix ``[rows, cols]`` (rows are outputs) and brought back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import OptionError
from vqonnx.form import Matrix

Order = Literal["ihw", "hwi"]


@dataclass(frozen=True)
class View:
    """A reshape and a transpose between a matrix and a tensor.

    ``tensor = reshape(transpose(reshape(matrix, split), perm), shape)``

    Attributes:
        rows: Outputs of the layer.
        cols: Weights of one output.
        split: Sizes that the matrix is reshaped to (``layout[2:]`` in docs/format.md).
        perm: The transpose that follows.
        shape: Shape of the tensor.
    """

    rows: int
    cols: int
    split: tuple[int, ...]
    perm: tuple[int, ...]
    shape: tuple[int, ...]

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


def conv_view(shape: tuple[int, ...], order: Order) -> View:
    """Conv weight ``[O, I, *kernel]``; I counts the channels of one group."""
    outputs, inputs, *kernel = shape
    spatial = len(kernel)
    if _checked(order) == "ihw":
        split, perm = shape, tuple(range(2 + spatial))
    else:
        split, perm = (outputs, *kernel, inputs), (0, 1 + spatial, *range(1, 1 + spatial))
    return View(outputs, math.prod(shape[1:]), split, perm, shape)


def conv_transpose_view(shape: tuple[int, ...], group: int, order: Order) -> View:
    """ConvTranspose weight ``[G*I, O, *kernel]``: rows are the ``G*O`` outputs."""
    all_inputs, outputs, *kernel = shape
    inputs, spatial = all_inputs // group, len(kernel)
    if _checked(order) == "ihw":
        split, perm = (group, outputs, inputs, *kernel), (0, 2, 1, *range(3, 3 + spatial))
    else:
        split, perm = (group, outputs, *kernel, inputs), (0, 2 + spatial, 1, *range(2, 2 + spatial))
    if group == 1:  # the common case needs neither the group axis nor a reshape after the transpose
        split, perm = split[1:], tuple(axis - 1 for axis in perm[1:])
    return View(group * outputs, inputs * math.prod(kernel), split, perm, shape)


def matmul_view(shape: tuple[int, ...], *, outputs_first: bool) -> View:
    """Gemm or MatMul weight ``[*batch, I, O]``, or ``[O, I]`` with ``outputs_first`` (Gemm with ``transB``)."""
    if outputs_first:
        return View(shape[0], shape[1], shape, (0, 1), shape)
    *batch, inputs, outputs = shape
    axes = range(len(batch))
    split, perm = (*batch, outputs, inputs), (*axes, len(batch) + 1, len(batch))
    return View(math.prod(batch) * outputs, inputs, split, perm, shape)


def _checked(order: Order) -> Order:
    if order not in get_args(Order):
        raise OptionError(f"order '{order}' is unknown; choose one of {', '.join(get_args(Order))}")
    return order
