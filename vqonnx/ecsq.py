"""Whole multiples of a step for the weights of a layer, chosen for the error of its output and for the bits they take.

Uniform quantisation with entropy coding is within 0.25 bit of the best that any code can do (Gish and Pierce 1968).
Error feedback (METHODS 6.4) spreads what rounding does to one input over those that are still free; the choice between
neighbouring multiples counts bits as well (Sullivan 1996; METHODS 6.12).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from vqonnx.prefix import histogram, sum_classes
from vqonnx.refine import Array, Target

_SLOPE = 0.1155  # 2 ln 2 / 12: error saved by a bit, in units of step^2, where steps are small
_DAMPING = 0.01
_BLOCK = 64  # columns whose errors are fed back one by one; the rest follow in one matrix product
_PER_OCTAVE = 2  # classes
_UNIT = 6  # class of weights as large as the step
_MOST_CLASS = 40
_LEAST = 96  # weights of a class
_FITS = 4
LARGEST = 127

Levels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Quantised:
    """Multiples of a step.

    Attributes:
        levels: int64 ``[rows, cols]``.
        row_classes: uint8, one for each ``row_span`` rows; with `col_classes` they tell how large the weights are.
        col_classes: uint8, one for each ``col_span`` columns.
        row_span: Rows of a class.
        col_span: Columns of a class.
    """

    levels: Levels
    row_classes: NDArray[np.uint8]
    col_classes: NDArray[np.uint8]
    row_span: int
    col_span: int

    @property
    def classes(self) -> Levels:
        """``[rows, cols]``."""
        shape = (self.levels.shape[0], self.levels.shape[1])
        return sum_classes(shape, self.row_classes, self.col_classes, self.row_span, self.col_span)


def quantise(target: Target, step: float, taps: int, *, sweeps: int = 1) -> Quantised:
    """Multiples of the step, chosen for the output's error and for their bits.

    Args:
        target: The weight and the metrics; of width 1.
        step: What levels are multiples of.
        taps: Neighbouring columns that belong together.
        sweeps: Of coordinate descent after the error feedback.
    """
    rows, cols = target.weight.shape
    # A class takes a byte, so it is for as many weights as pay for that.
    spans = min(ceil(_LEAST / cols), rows), min(taps * ceil(_LEAST / (rows * taps)), cols)
    made = Quantised(np.zeros((rows, cols), np.int64), *_classes(target.weight / step, *spans), *spans)
    classes = made.classes
    bits = _prior(int(classes.max()) + 1)
    factors = [_factor(metric) for metric in target.metrics]
    levels = _feed_back(target, factors, step, classes, bits)
    bits = _learn(levels, classes, bits)
    levels = _feed_back(target, factors, step, classes, bits)
    for _ in range(sweeps):
        bits = _learn(levels, classes, bits)
        levels = _descend(target, factors, levels, step, classes, bits)
    return replace(made, levels=levels)


def _classes(weight: Array, row_span: int, col_span: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Classes of runs of rows and of columns, whose sum grows with the size of the weights, two an octave.

    Sizes are taken as products of one for the rows and one for the columns: root mean squares, the two in turn.
    """
    rows, cols = weight.shape
    starts = np.arange(0, rows, row_span), np.arange(0, cols, col_span)
    squares = np.add.reduceat(np.add.reduceat(weight**2, starts[0], axis=0), starts[1], axis=1)
    counts = np.outer(np.diff(np.append(starts[0], rows)), np.diff(np.append(starts[1], cols)))
    squares = squares / counts + 1e-12 * (squares.mean() + 1e-30)
    across = np.ones(squares.shape[1])
    for _ in range(_FITS):
        down = np.mean(squares / across, axis=1)
        across = np.mean(squares / down[:, None], axis=0)
    by_row, by_col = (np.round(_PER_OCTAVE / 2 * np.log2(part)).astype(np.int64) for part in (down, across))
    least = int(by_col.min())
    return (
        np.clip(by_row + least + _UNIT, 0, _MOST_CLASS).astype(np.uint8),
        np.clip(by_col - least, 0, _MOST_CLASS).astype(np.uint8),
    )


def _prior(classes: int) -> Array:
    """``[classes, 2 * LARGEST + 1]``: bits of each level, before any is known: halfway from Gauss to Laplace."""
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


def _learn(levels: Levels, classes: Levels, prior: Array) -> Array:
    """Bits from how often levels occur; what is not seen keeps some of what was believed before."""
    counts = histogram(levels + LARGEST, classes, (len(prior), 2 * LARGEST + 1))
    believed = 2.0**-prior
    weight = 8.0
    total = counts.sum(axis=1, keepdims=True) + weight
    learnt = (counts + weight * believed / believed.sum(axis=1, keepdims=True)) / total
    return np.asarray(-np.log2(learnt))


def _factor(metric: Array) -> Array:
    """U, upper triangular, with ``U^T U`` the inverse of the damped metric."""
    mean = float(np.trace(metric)) / len(metric)
    damped = metric + (_DAMPING * mean if mean > 0 else 1.0) * np.eye(len(metric))
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T)


def _feed_back(target: Target, factors: list[Array], step: float, classes: Levels, bits: Array) -> Levels:
    levels = np.zeros(target.weight.shape, np.int64)
    for (rows, _), upper in zip(target.parts(), factors, strict=True):
        cols = len(upper)
        weight = target.weight[rows] / step
        sensitivity = 1 / np.diag(upper) ** 2
        price = _SLOPE * float(sensitivity.mean())
        for start in range(0, cols, _BLOCK):
            stop = min(start + _BLOCK, cols)
            missed = np.empty((len(weight), stop - start))
            for col in range(start, stop):
                chosen = _choose(weight[:, col], classes[rows, col], bits, price / sensitivity[col])
                levels[rows, col] = chosen
                error = (weight[:, col] - chosen) / upper[col, col]
                weight[:, col + 1 : stop] -= np.outer(error, upper[col, col + 1 : stop])
                missed[:, col - start] = error
            weight[:, stop:] -= missed @ upper[start:stop, stop:]
    return levels


def _descend(target: Target, factors: list[Array], levels: Levels, step: float, classes: Levels, bits: Array) -> Levels:
    levels = levels.copy()
    for (rows, metric), upper in zip(target.parts(), factors, strict=True):
        price = _SLOPE * float(np.mean(1 / np.diag(upper) ** 2))
        wanted = target.weight[rows] / step
        influence = (wanted - levels[rows]) @ metric
        for col in range(metric.shape[0]):
            own = metric[col, col]
            if own <= 0:
                continue
            before = levels[rows, col]
            best = before + influence[:, col] / own
            chosen = _choose(best, classes[rows, col], bits, price / own)
            change = chosen - before
            if change.any():
                levels[rows, col] = chosen
                influence -= np.outer(change, metric[col])
    return levels


def _choose(wanted: Array, classes: Levels, bits: Array, price: float) -> Levels:
    """The level of least ``(wanted - level)^2 + price * bits`` of the two around, the next towards zero, and zero."""
    wanted = np.clip(wanted, -LARGEST, LARGEST)
    low = np.floor(wanted)
    inner = np.where(wanted > 0, np.maximum(low - 1, 0), np.minimum(low + 2, 0))
    offers = np.stack([low, np.minimum(low + 1, LARGEST), inner, np.zeros_like(low)]).astype(np.int64)
    cost = (wanted - offers) ** 2 + price * bits[classes, offers + LARGEST]
    return np.asarray(offers[np.argmin(cost, axis=0), np.arange(len(wanted))])
