"""Whole multiples of a step for the weights of a layer, chosen for the error of its output and for the bits they take.

Uniform quantisation with entropy coding is within 0.25 bit of the best that any code can do (Gish and Pierce 1968).
Error feedback (Frantar et al. 2022, arXiv 2210.17323) spreads what rounding does to one input over those that are still
free; the choice between neighbouring multiples counts bits as well (Sullivan 1996).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from vqonnx.feedback import LARGEST, WORDS, Frame, Levels, Problem
from vqonnx.prefix import MOST_CLASS, TRIPLE, histogram, sum_classes
from vqonnx.refine import Array, Target

_PER_OCTAVE = 2  # classes
_UNIT = 10  # class of weights as large as the step
_LOWEST = 6  # classes that columns may be below the middle one
_LEAST = 96  # weights of a class
_FITS = 4


@dataclass(frozen=True, eq=False)
class Quantised:
    """Multiples of a step.

    Attributes:
        levels: int64 ``[rows, cols]``.
        row_classes: uint8, one for each ``row_span`` rows; with `col_classes` they tell how large the weights are.
        col_classes: uint8, one for each ``col_span`` triples of columns.
        row_span: Rows of a class.
        col_span: Triples of a class.
    """

    levels: Levels
    row_classes: NDArray[np.uint8]
    col_classes: NDArray[np.uint8]
    row_span: int
    col_span: int

    @property
    def classes(self) -> Levels:
        """``[rows, triples]``."""
        rows, cols = self.levels.shape
        shape = (rows, -(-cols // TRIPLE))
        return sum_classes(shape, self.row_classes, self.col_classes, self.row_span, self.col_span)


def quantise(
    target: Target,
    step: float,
    taps: int,
    *,
    sweeps: int = 1,
    beam: int = 1,
    learn: bool = True,
    frame: Frame | None = None,
) -> Quantised:
    """Multiples of the step, chosen for the output's error and for their bits.

    Args:
        target: The weight and the metrics; of width 1.
        step: What levels are multiples of.
        taps: Neighbouring columns that belong together.
        sweeps: Of coordinate descent after the error feedback.
        beam: Choices that a row keeps during the error feedback.
        learn: Choose again when it is known how many bits the levels of the first choice take.
        frame: That of the target, where it is known.
    """
    rows, cols = target.weight.shape
    # A class takes half a byte, so it is for as many weights as pay for that.
    together = taps // TRIPLE if taps % TRIPLE == 0 else 1  # triples
    run = together * ceil(_LEAST / (rows * TRIPLE * together))
    spans = min(ceil(_LEAST / cols), rows), min(run, -(-cols // TRIPLE))
    made = Quantised(np.zeros((rows, cols), np.int64), *_classes(target.weight / step, *spans), *spans)
    frame = frame or Frame.of(target)
    classes = frame.turn(np.repeat(made.classes, TRIPLE, axis=1)[:, :cols])
    problem = Problem(frame, frame.turn(target.weight / step), classes)
    bits = _prior(int(classes.max()) + 1)
    levels = problem.feed_back(bits, 1)
    if learn:
        bits = _learn(levels, classes, bits)
        levels = problem.feed_back(bits, beam)
    for _ in range(sweeps):
        bits = _learn(levels, classes, bits)
        levels = problem.descend(levels, bits)
    return replace(made, levels=frame.turn_back(levels))


def _classes(weight: Array, row_span: int, col_span: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Classes of runs of rows and of triples, whose sum grows with the size of the weights, two an octave.

    Sizes are taken as products of one for the rows and one for the columns: root mean squares, the two in turn.
    """
    rows, cols = weight.shape
    starts = np.arange(0, rows, row_span), np.arange(0, cols, TRIPLE * col_span)
    squares = np.add.reduceat(np.add.reduceat(weight**2, starts[0], axis=0), starts[1], axis=1)
    counts = np.outer(np.diff(np.append(starts[0], rows)), np.diff(np.append(starts[1], cols)))
    squares = squares / counts + 1e-12 * (squares.mean() + 1e-30)
    across = np.ones(squares.shape[1])
    for _ in range(_FITS):
        down = np.mean(squares / across, axis=1)
        across = np.mean(squares / down[:, None], axis=0)
    by_row, by_col = (np.round(_PER_OCTAVE / 2 * np.log2(part)).astype(np.int64) for part in (down, across))
    least = max(int(by_col.min()), int(np.median(by_col)) - _LOWEST)  # columns without weight must not shift the others
    return (
        np.clip(by_row + least + _UNIT, 0, MOST_CLASS).astype(np.uint8),
        np.clip(by_col - least, 0, MOST_CLASS).astype(np.uint8),
    )


def _prior(classes: int) -> Array:
    """``[classes, WORDS]``: bits of each level, before any is known: halfway from Gauss to Laplace."""
    number = np.arange(-LARGEST, LARGEST + 1)
    table = np.empty((classes, len(number)))
    for at in range(classes):
        ratio = 2 ** ((at - _UNIT) / _PER_OCTAVE)  # weights to step
        scale = ratio / np.sqrt(2)
        upper, lower = (np.abs(number) + 0.5) / scale, np.maximum(np.abs(number) - 0.5, 0) / scale
        laplace = np.where(number == 0, 1 - np.exp(-0.5 / scale), 0.5 * (np.exp(-lower) - np.exp(-upper)))
        gauss = np.exp(-0.5 * (number / max(ratio, 0.2)) ** 2)
        table[at] = -np.log2(0.5 * laplace + 0.5 * gauss / gauss.sum() + 1e-9)
    return table


@cache
def _rates() -> tuple[Array, Array]:
    """Entropies in ascending order, and the exponents of 2 for the steps that belong to them."""
    table = _prior(4 * _UNIT)
    share = 2.0**-table
    share /= share.sum(axis=1, keepdims=True)
    return np.asarray(-(share * np.log2(share)).sum(axis=1)), (_UNIT - np.arange(len(table))) / _PER_OCTAVE


def exponent_of(bits: float) -> float:
    """Of 2, for the step in units of the root mean square of the weights that usually takes so many bits a weight."""
    return float(np.interp(bits, *_rates()))


def _learn(levels: Levels, classes: Levels, prior: Array) -> Array:
    """Bits from how often levels occur; what is not seen keeps some of what was believed before."""
    counts = histogram(levels + LARGEST, classes, (len(prior), WORDS))
    believed = 2.0**-prior
    weight = 8.0
    total = counts.sum(axis=1, keepdims=True) + weight
    learnt = (counts + weight * believed / believed.sum(axis=1, keepdims=True)) / total
    return np.asarray(-np.log2(learnt))
