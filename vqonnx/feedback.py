"""Whole numbers for the weights of a layer, whose errors make up for each other and whose bits count.

Error feedback (Frantar et al. 2022, arXiv 2210.17323) decides column after column and spreads what rounding does to one
over those that are still free. That is a search for the nearest point of a lattice that never turns back; here a row
keeps its best few choices so far instead of one (the M-algorithm; Anderson and Mohan 1984), and begins with the columns
that the others can make up for least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.refine import Array, Target

LARGEST = 127
WORDS = 2 * LARGEST + 1

_SLOPE = 0.1  # error saved by a bit, in units of step^2: 2 ln 2 / 12 = 0.1155 where steps are small, here measured
_DAMPING = 0.01
_BLOCK = 32  # columns whose errors are fed back one by one; the rest follow in one matrix product
_PIVOT_COLS = 1536  # above that many columns they go by their energy alone
_AT_ONCE = 2**22  # numbers that are kept for the rows of a search

Levels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Frame:
    """The metrics of a layer's groups, G of them, with their columns in the order in which they are decided.

    Attributes:
        order: int64 ``[G, cols]``.
        metrics: float64 ``[G, cols, cols]``.
        factors: U, upper triangular, with ``U^T U`` the inverse of the damped metric.
        price: Error that a bit may cost, in units of step^2; it is the same in all groups.
    """

    order: Levels
    metrics: Array
    factors: Array
    price: float

    @classmethod
    def of(cls, target: Target) -> Frame:
        """For a target of width 1."""
        metrics = np.stack(target.metrics)
        cols = metrics.shape[1]
        mean = np.trace(metrics, axis1=1, axis2=2) / cols
        damped = metrics + np.where(mean > 0, _DAMPING * mean, 1.0)[:, None, None] * np.eye(cols)
        if cols <= _PIVOT_COLS:
            order, factors = _pivoted(np.asarray(np.linalg.inv(damped), np.float64))
        else:
            order = np.argsort(-np.diagonal(metrics, axis1=1, axis2=2), axis=1, kind="stable")
            inverse = np.linalg.inv(_turned(damped, order))
            factors = np.linalg.cholesky(inverse).swapaxes(1, 2)
        sensitivity = 1 / np.diagonal(factors, axis1=1, axis2=2) ** 2
        return cls(order, _turned(metrics, order), factors, _SLOPE * float(sensitivity.mean()))

    def turn(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """``[G, R, cols]`` from ``[G * R, cols]``, columns in the order of the frame."""
        split = matrix.reshape(len(self.order), -1, matrix.shape[1])
        return np.asarray(np.take_along_axis(split, self.order[:, None], axis=2))

    def turn_back(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Undo `turn`."""
        back = np.argsort(self.order, axis=1)
        return np.asarray(np.take_along_axis(matrix, back[:, None], axis=2)).reshape(-1, matrix.shape[2])


def _turned(metrics: Array, order: Levels) -> Array:
    rows = np.take_along_axis(metrics, order[:, :, None], axis=1)
    return np.take_along_axis(rows, order[:, None], axis=2)


def _pivoted(inverse: Array) -> tuple[Levels, Array]:
    """Columns in the order in which those that are left make up for them least, and the factor of the inverse in it."""
    groups, cols, _ = inverse.shape
    number = np.arange(groups)
    order = np.empty((groups, cols), np.int64)
    factors = np.zeros((groups, cols, cols))
    free = np.diagonal(inverse, axis1=1, axis2=2).copy()
    done = np.zeros((groups, cols), bool)
    for at in range(cols):
        pivot = np.argmin(np.where(done, np.inf, free), axis=1)
        order[:, at] = pivot
        row = inverse[number, pivot]
        if at:
            row = row - (factors[number, :at, pivot][:, None] @ factors[:, :at])[:, 0]
        row = row / np.sqrt(row[number, pivot])[:, None]
        row[done] = 0
        done[number, pivot] = True
        factors[:, at] = row
        free -= row**2
    return order, np.take_along_axis(factors, order[:, None], axis=2)


@dataclass(frozen=True, eq=False)
class Problem:
    """What levels are chosen for.

    Attributes:
        frame: The metrics.
        weight: float64 ``[G, R, cols]``, in steps, columns in the order of the frame.
        classes: int64, the same.
    """

    frame: Frame
    weight: Array
    classes: Levels

    def feed_back(self, bits: Array, beam: int) -> Levels:
        """Levels ``[G, R, cols]`` of little error and few bits, one column after the other.

        Args:
            bits: ``[classes, WORDS]``: what levels from -127 on take.
            beam: Choices that a row keeps.
        """
        groups, rows, cols = self.weight.shape
        levels = np.empty(self.weight.shape, np.int64)
        step = max(1, _AT_ONCE // (cols * beam))
        if groups > 1:
            step = max(1, step // rows)
            for start in range(0, groups, step):
                at = slice(start, start + step)
                levels[at] = self._search(at, slice(None), bits, beam)
        else:
            for start in range(0, rows, step):
                at = slice(start, start + step)
                levels[:, at] = self._search(slice(None), at, bits, beam)
        return levels

    def _search(self, groups: slice, rows: slice, bits: Array, beam: int) -> Levels:
        weight = self.weight[groups, rows]
        shape = weight.shape
        cols = shape[2]
        count = shape[0] * shape[1]
        factors = self.frame.factors[groups]
        base = self.classes[groups, rows].reshape(count, cols) * WORDS + LARGEST
        table = bits.reshape(-1)
        row = np.arange(count)[:, None]
        free = weight.reshape(count, 1, cols).copy()  # what the columns should be, for each choice
        cost = np.zeros((count, 1))
        levels = np.zeros((count, 1, cols), np.int8)
        for start in range(0, cols, _BLOCK):
            stop = min(start + _BLOCK, cols)
            kept = free.shape[1]
            here = free[:, :, start:stop].copy()
            origin = np.broadcast_to(np.arange(kept), (count, kept))
            missed = np.zeros((count, kept, stop - start))
            chosen = np.zeros((count, kept, stop - start), np.int8)
            for col in range(start, stop):
                own = np.repeat(factors[:, col, col], shape[1])[:, None, None]
                wanted = np.clip(here[:, :, col - start], -LARGEST, LARGEST)
                offers = _offers(wanted)
                error = (here[:, :, col - start, None] - offers) / own
                price_of = table[base[:, col, None, None] + offers.astype(np.int64)]
                costs = cost[:, :, None] + error**2 + self.frame.price * price_of
                costs[:, :, 2][(offers[:, :, :2] == offers[:, :, 2:]).any(axis=2)] = np.inf  # no choice is kept twice
                costs = costs.reshape(count, -1)
                if costs.shape[1] > beam:
                    best = np.argpartition(costs, beam - 1, axis=1)[:, :beam]
                else:
                    best = np.broadcast_to(np.arange(costs.shape[1]), costs.shape)
                parent = best // offers.shape[2]
                cost = costs[row, best]
                if beam > 1:
                    here, origin = here[row, parent], origin[row, parent]
                    missed, chosen = missed[row, parent], chosen[row, parent]
                missed[:, :, col - start] = mistake = error.reshape(count, -1)[row, best]
                chosen[:, :, col - start] = offers.reshape(count, -1)[row, best]
                rest = np.repeat(factors[:, col, col + 1 : stop], shape[1] if shape[0] > 1 else 1, axis=0)
                here[:, :, col + 1 - start :] -= mistake[:, :, None] * rest[:, None]
            levels, free = levels[row, origin], free[row, origin]
            levels[:, :, start:stop] = chosen
            if stop < cols:
                spread = missed.reshape(shape[0], -1, stop - start) @ factors[:, start:stop, stop:]
                free[:, :, stop:] -= spread.reshape(count, -1, cols - stop)
        best = np.argmin(cost, axis=1)
        found: Levels = levels[np.arange(count), best].astype(np.int64)
        return found.reshape(shape)

    def descend(self, levels: Levels, bits: Array) -> Levels:
        """One sweep of coordinate descent."""
        levels = levels.copy()
        metrics, table = self.frame.metrics, bits.reshape(-1)
        influence = (self.weight - levels) @ metrics
        for col in range(levels.shape[2]):
            own = metrics[:, col, col, None]
            if (own <= 0).any():
                continue
            before = levels[:, :, col]
            wanted = np.clip(before + influence[:, :, col] / own, -LARGEST, LARGEST)
            offers = _offers(wanted)
            price_of = table[self.classes[:, :, col, None] * WORDS + LARGEST + offers.astype(np.int64)]
            costs = (wanted[:, :, None] - offers) ** 2 + (self.frame.price / own)[:, :, None] * price_of
            best = np.argmin(costs, axis=2)[:, :, None]
            chosen = np.take_along_axis(offers, best, axis=2)[:, :, 0].astype(np.int64)
            change = chosen - before
            if change.any():
                levels[:, :, col] = chosen
                influence -= change[:, :, None] * metrics[:, None, col]
        return levels


def _offers(wanted: Array) -> Array:
    """``[..., 3]``: the two whole numbers around, and the next towards zero; zero where that is one of them."""
    low = np.floor(wanted)
    inner = np.where(wanted > 0, np.maximum(low - 1, 0), np.minimum(low + 2, 0))
    return np.stack([low, np.minimum(low + 1, LARGEST), inner], axis=-1)
