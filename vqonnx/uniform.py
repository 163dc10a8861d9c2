"""Uniform mid-tread scalar quantisers without dead zone, with a step for each row, searched on the error that counts.

Young et al. 2021 (arXiv 2009.01174): ``q = step * clip(round(x / step), -2^(bits-1), 2^(bits-1) - 1)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.form import Coded

DEEPEST = 8  # bits

# Steps that are tried: powers of 2^(1/4) from this exponent below the row's root mean square times 2^(1 - bits), and
# then those beside the best, ever nearer: the farthest value of a row may be clipped by one step and not by the next.
_CANDIDATES = 16
_FIRST = -2
_NEARER = (1 / 8, 1 / 16, 1 / 32)
# Below this root mean square the steps of 8 bits would be too coarse in float16, and above the other they overflow.
_SMALLEST, _LARGEST = 2.0**-8, 2.0**11

Array = NDArray[np.float64]


def book(bits: int) -> NDArray[np.int8]:
    """The codebook ``[2**bits, 1]``: the whole numbers ``-2^(bits-1) .. 2^(bits-1) - 1``, the same for all layers.

    >>> book(2).ravel().tolist()
    [-2, -1, 0, 1]
    """
    return np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8)[:, None]


def search_steps(rows: Array, bits: int, weights: Array) -> NDArray[Any]:
    """The step of each row ``[n]``, float16 or float32 as it is stored, that errs least.

    Args:
        rows: ``[n, cols]``.
        bits: 1 to 8.
        weights: What the square of an error counts: an array that broadcasts to ``[n, cols]``.
    """
    sizes = np.sqrt(np.mean(rows**2, axis=1))
    kind = np.float16 if _SMALLEST <= sizes.max(initial=0) <= _LARGEST else np.float32
    best = np.full(len(rows), np.inf)
    steps = np.ones(len(rows), kind)

    def attempt(wide: Array) -> None:
        tried = wide.astype(kind)
        usable = tried > 0  # not a row of zeros, nor one whose step is lost in float16
        errors = np.sum((rows - dequantise(rows, tried, bits)) ** 2 * weights, axis=1)
        better = usable & (errors < best)
        best[better], steps[better] = errors[better], tried[better]

    for candidate in range(_CANDIDATES):
        attempt(sizes * 2.0 ** ((candidate + _FIRST) / 4 + 1 - bits))
    for exponent in _NEARER:
        middle = steps.astype(np.float64)
        for beside in (2.0**-exponent, 2.0**exponent):
            attempt(middle * beside)
    return steps


def quantise(rows: Array, steps: NDArray[Any], bits: int) -> NDArray[np.float64]:
    """The whole numbers ``[n, cols]`` that stand for the rows."""
    wide = np.where(steps > 0, steps, 1).astype(np.float64)[:, None]
    return np.clip(np.rint(rows / wide), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


def dequantise(rows: Array, steps: NDArray[Any], bits: int) -> NDArray[np.float64]:
    """The rows after quantisation."""
    return quantise(rows, steps, bits) * steps.astype(np.float64)[:, None]


def coded(rows: Array, steps: NDArray[Any], bits: int) -> Coded:
    """The quantised rows as a form."""
    return form_of(quantise(rows, steps, bits), steps, bits)


def form_of(levels: NDArray[np.float64], steps: NDArray[Any], bits: int) -> Coded:
    """Whole numbers ``[n, cols]`` as a form: codes, the `book` of ``bits``, and the steps as scales."""
    assert 1 <= bits <= DEEPEST, bits
    return Coded.one_stage(codes=levels + 2 ** (bits - 1), codebook=book(bits), scales=steps[:, None])
