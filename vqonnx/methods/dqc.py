"""Powers of two: every weight is plus or minus ``2**k``, the exponents counted down from the largest weight.

The codebook and quantiser of dynamic quantisation coding (Rao et al. 2019, Acta Automatica Sinica 45(10), 1960-1968),
without its training. The search for the top exponent and the scales are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vqonnx.form import Coded, Matrix
from vqonnx.method import Layer, LeftAlone, Method, check_range
from vqonnx.refine import descend, feed_back, target_of

_LOWEST, _HIGHEST = -126, 127  # exponents of float32, without subnormals: some processors flush them
_LOWEST_HALF, _HIGHEST_HALF = -14, 15
_SHIFTS = (0, 1, -1, -2)  # what the search tries around the exponent of the largest weight; of equals the first wins
_GRID = (2 ** (np.arange(8) / 8)).astype(np.float16)  # scales within an octave
_SWEEPS = 3
_CHUNK = 2**20  # weights at a time, which keeps the temporaries at some 50 MB


@dataclass(frozen=True)
class DQC(Method):
    """Power-of-two codes (dynamic quantisation coding).

    Attributes:
        bits: Bits per weight.
        zero: Zero is one of the codes, and there is one magnitude less.
        fit: The largest magnitude is the power of two at or below the largest weight (``paper``), or the best of those
            around it (``search``).
        power: The search and the scales count squared errors times ``|w| ** power``, and times the mean square of the
            input where there are calibration data.
        scale: ``none``, or the best of eight factors within an octave for each ``row``.
        feedback: Where there are calibration data, choose the codes one after the other, and let the weights that
            follow make good each error in the layer's output; the bias takes up the mean.
    """

    id: ClassVar[str] = "dqc"
    bits: Literal[3, 4, 5] = 4
    zero: bool = True
    fit: Literal["paper", "search"] = "search"
    power: Literal[0, 1, 2] = 0
    scale: Literal["none", "row"] = "none"
    feedback: bool = True

    @property
    def pairs(self) -> bool:
        return self.feedback

    def __post_init__(self) -> None:
        check_range(self, "bits", 3, 5)

    def encode(self, layer: Layer) -> Coded:
        largest = float(np.abs(layer.weight).max())
        if largest == 0 and not self.zero:
            raise LeftAlone("all weights are zero, and the codebook has no zero; set zero=true")
        count = 2 ** (self.bits - 1) - self.zero
        anchor = int(np.frexp(largest)[1]) - 1 if largest else 0  # floor(log2(largest)), without rounding
        tops = [anchor + shift for shift in (_SHIFTS if self.fit == "search" else _SHIFTS[:1])]
        tops = [top for top in tops if top - count + 1 >= _LOWEST and top <= _HIGHEST]
        if not tops:
            raise LeftAlone(f"weights of at most {largest:.3g} are too small for {count} powers of two in float32")
        grid = _GRID if self.scale == "row" else _GRID[:1]
        squares = _input_squares(layer)
        errors = np.stack(
            [self._row_errors(layer.weight, squares, top, count, grid) for top in tops]
        )  # [tops, scales, rows]
        top = tops[int(np.argmin(errors.min(axis=1).sum(axis=1)))]
        scales = grid[np.argmin(errors[tops.index(top)], axis=0)][:, None]  # [rows, 1]
        book = power_book(top, count, zero=self.zero)
        if self.feedback and layer.moments is not None and layer.moments.rows:
            target = target_of(layer, 1, asymmetric=True, scales=scales[:, 0].astype(np.float64))
            words = book.astype(np.float64)
            codes = feed_back(target, words)
            for _ in range(_SWEEPS):
                codes = descend(target, codes, words)
        else:
            codes = power_codes(layer.weight / scales.astype(np.float32), top, count, zero=self.zero)
        return Coded.one_stage(
            codes=codes,
            codebook=book,
            scales=scales if self.scale == "row" else None,
        )

    def _row_errors(
        self, weight: Matrix, squares: NDArray[np.float64], top: int, count: int, grid: NDArray[np.float16]
    ) -> NDArray[np.float64]:
        """``[scales, rows]``: the error of each row under each scale."""
        book = power_book(top, count, zero=self.zero).astype(np.float64)[:, 0]
        rows, cols = weight.shape
        errors = np.zeros((len(grid), rows))
        step = max(1, _CHUNK // cols)
        for start in range(0, rows, step):
            part = weight[start : start + step]
            group = np.arange(start, start + len(part)) * len(squares) // rows
            importance = squares[group] * np.abs(part).astype(np.float64) ** self.power
            for number, scale in enumerate(grid):
                codes = power_codes(part / np.float32(scale), top, count, zero=self.zero)
                missed = part - np.float64(scale) * book[codes]
                errors[number, start : start + step] = np.sum(importance * missed**2, axis=1)
        return errors


def power_book(top: int, count: int, *, zero: bool) -> NDArray[Any]:
    """``count`` magnitudes down from ``2**top`` with both signs, ascending ``[words, 1]``; in float16 where exact.

    >>> power_book(1, 2, zero=True)[:, 0].tolist()
    [-2.0, -1.0, 0.0, 1.0, 2.0]
    """
    half = top - count + 1 >= _LOWEST_HALF and top <= _HIGHEST_HALF
    sizes = np.ldexp(1.0, np.arange(top - count + 1, top + 1))
    words = np.concatenate([-sizes[::-1], np.zeros(int(zero)), sizes])
    return words.astype(np.float16 if half else np.float32)[:, None]


def power_codes(weight: Matrix, top: int, count: int, *, zero: bool) -> NDArray[np.int64]:
    """The number in `power_book` of each weight: ``k = clip(floor(log2(4 |w| / 3)), n1, n2)``, and the sign of w.

    Rao et al. 2019: from ``3/4 * 2**k`` up to ``3/2 * 2**k`` a weight goes to ``2**k``; what is beyond the largest goes
    to the largest, what is below the smallest to zero where there is one, else to the smallest.
    """
    # In float64 a third of three times a power of two is that power again, so that the bounds are exact.
    exponents = np.frexp(4 * np.abs(weight.astype(np.float64)) / 3)[1].astype(np.int64) - 1
    lowest = top - count + 1
    exponents[weight == 0] = lowest - 1
    steps = np.clip(exponents, lowest, top) - lowest
    codes = np.where(weight >= 0, count + int(zero) + steps, count - 1 - steps)
    if zero:
        codes[exponents < lowest] = count
    return codes


def _input_squares(layer: Layer) -> NDArray[np.float64]:
    """``[groups, cols]``: the mean square of each input; ones where nothing is known."""
    if layer.moments is not None:
        squares = np.stack([np.concatenate([np.diag(block) for block in blocks]) for blocks in layer.moments.blocks])
        if squares.any():
            return np.asarray(squares / squares.mean(), np.float64)
    return np.ones((1, layer.weight.shape[1]))
