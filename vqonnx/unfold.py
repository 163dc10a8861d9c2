"""What each output of a linear layer sees of its input: the rows of im2col, for every kind of layer.

A layer is ``y = W x`` for each row ``x`` that is given here, with ``W [rows, cols]`` in the same column order. Where
there are many positions in an image, a random choice of them stands for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.view import Order

Attributes = Mapping[str, Any]


def unfold(
    op_type: str,
    attributes: Attributes,
    shape: tuple[int, ...],
    x: NDArray[Any],
    *,
    order: Order = "ihw",
    positions: int | None = None,
    rng: np.random.Generator | None = None,
) -> NDArray[np.floating]:
    """The rows that the layer sees: ``[groups, n, cols]``.

    Args:
        op_type: Conv, ConvTranspose, Gemm or MatMul.
        attributes: The layer's ONNX attributes.
        shape: Shape of its weight tensor.
        x: Its input.
        order: Column order of a convolution.
        positions: Take at most so many output positions of each image (rows of each matrix), at random; None takes all.
        rng: Source of that choice.
    """
    rng = rng or np.random.default_rng(0)
    if op_type == "Conv":
        return _unfold_conv(_Conv(attributes, shape[2:], x.shape[2:]), shape[1], x, order, positions, rng)
    if op_type == "ConvTranspose":
        geometry = _ConvTranspose(attributes, shape[2:], x.shape[2:])
        return _unfold_conv(geometry, shape[0] // geometry.group, x, order, positions, rng)
    if op_type == "Gemm" and attributes.get("transA", 0):
        x = x.T
    return _unfold_matmul(shape[:-2], x, positions, rng)


class _Conv:
    """Which input an output position sees through a tap of the kernel, for Conv."""

    def __init__(self, attributes: Attributes, kernel: Sequence[int], size: Sequence[int]) -> None:
        axes = len(kernel)
        self.kernel = tuple(kernel)
        self.size = tuple(size)
        self.group = int(attributes.get("group", 1))
        self.strides = list(attributes.get("strides", [1] * axes))
        self.dilations = list(attributes.get("dilations", [1] * axes))
        self.reach = [d * (k - 1) + 1 for d, k in zip(self.dilations, kernel, strict=True)]
        self.pads = list(attributes.get("pads", [0] * 2 * axes))
        self._mode = attributes.get("auto_pad", b"NOTSET")
        self._mode = self._mode.decode() if isinstance(self._mode, bytes) else self._mode
        self.output = self._place(attributes)

    def _place(self, attributes: Attributes) -> list[int]:
        axes = len(self.kernel)
        if self._mode == "VALID":
            self.pads = [0] * 2 * axes
        if self._mode.startswith("SAME"):
            output = [-(-size // stride) for size, stride in zip(self.size, self.strides, strict=True)]
            spread = zip(output, self.strides, self.reach, self.size, strict=True)
            self._split_pads([max((out - 1) * stride + reach - size, 0) for out, stride, reach, size in spread])
            return output
        padded = [size + self.pads[a] + self.pads[axes + a] for a, size in enumerate(self.size)]
        return [(padded[a] - self.reach[a]) // self.strides[a] + 1 for a in range(axes)]

    def _split_pads(self, totals: list[int]) -> None:
        upper = self._mode == "SAME_UPPER"
        begin = [total // 2 if upper else total - total // 2 for total in totals]
        self.pads = begin + [total - first for total, first in zip(totals, begin, strict=True)]

    def source(self, axis: int, output: NDArray[np.int64], tap: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Input coordinate for each output coordinate, and whether it is inside the input."""
        at = output * self.strides[axis] + tap * self.dilations[axis] - self.pads[axis]
        return at, (at >= 0) & (at < self.size[axis])


class _ConvTranspose(_Conv):
    """The same for ConvTranspose: an output sees only the taps that fall on an input."""

    def _place(self, attributes: Attributes) -> list[int]:
        axes = len(self.kernel)
        extra = list(attributes.get("output_padding", [0] * axes))
        full = [self.strides[a] * (self.size[a] - 1) + extra[a] + self.reach[a] for a in range(axes)]
        if self._mode == "VALID":
            self.pads = [0] * 2 * axes
        output = list(attributes.get("output_shape", []))[-axes:]
        if self._mode.startswith("SAME") or output:
            wanted = output or [self.size[a] * self.strides[a] for a in range(axes)]
            self._split_pads([max(full[a] - wanted[a], 0) for a in range(axes)])
        if output:
            return [int(size) for size in output]
        return [full[a] - self.pads[a] - self.pads[axes + a] for a in range(axes)]

    def source(self, axis: int, output: NDArray[np.int64], tap: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        reached = output + self.pads[axis] - tap * self.dilations[axis]
        at = reached // self.strides[axis]
        return at, (reached % self.strides[axis] == 0) & (at >= 0) & (at < self.size[axis])


def _unfold_conv(
    geometry: _Conv, channels: int, x: NDArray[Any], order: Order, positions: int | None, rng: np.random.Generator
) -> NDArray[np.floating]:
    batch, total = x.shape[0], prod(geometry.output)
    chosen = np.broadcast_to(np.arange(total), (batch, total))
    if positions is not None and positions < total:
        chosen = np.stack([rng.choice(total, positions, replace=False) for _ in range(batch)])
    outputs = np.unravel_index(chosen, geometry.output)  # one array [batch, positions] for each axis
    image = np.arange(batch)[:, None]
    taps = []
    for tap in np.ndindex(*geometry.kernel):
        inside = np.ones(chosen.shape, bool)
        where = []
        for axis, (output, offset) in enumerate(zip(outputs, tap, strict=True)):
            at, valid = geometry.source(axis, output, offset)
            where.append(np.where(valid, at, 0))
            inside &= valid
        index: tuple[Any, ...] = (image, slice(None), *where)
        values = x[index]  # [batch, positions, channels of all groups]
        taps.append(np.where(inside[..., None], values, 0).reshape(chosen.size, geometry.group, channels))
    stacked = np.stack(
        taps, axis=3 if order == "ihw" else 2
    )  # [n, groups, channels, taps] or [n, groups, taps, channels]
    return np.ascontiguousarray(stacked.reshape(chosen.size, geometry.group, -1).transpose(1, 0, 2))


def _unfold_matmul(
    stack: tuple[int, ...], x: NDArray[Any], positions: int | None, rng: np.random.Generator
) -> NDArray[np.floating]:
    """Rows for each matrix of a stacked weight (one matrix otherwise)."""
    x = x[None] if x.ndim == 1 else x
    cols = x.shape[-1]
    if stack:
        x = np.broadcast_to(x, (*np.broadcast_shapes(x.shape[:-2], stack), *x.shape[-2:]))
        outer = x.ndim - 2 - len(stack)
        shared = [outer + axis for axis, size in enumerate(stack) if size == 1]  # all of x along them meets one matrix
        axes = [outer + axis for axis, size in enumerate(stack) if size > 1]
        x = x.transpose(*axes, *range(outer), *shared, x.ndim - 2, x.ndim - 1)
    rows = x.reshape(prod(stack), -1, cols)
    limit = None if positions is None else positions * max(1, x.shape[0] if not stack else 1)
    if limit is not None and limit < rows.shape[1]:
        rows = rows[:, np.sort(rng.choice(rows.shape[1], limit, replace=False))]
    return rows
