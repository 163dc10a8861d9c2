"""Codes and codewords that make a layer's output error small, by closed forms and exact searches; no gradients.

All of it minimises ``trace(E H E^T)`` with ``E = W - What`` and H the second moment of the layer's input, centred where
a bias takes up the mean: the mean squared error of the layer's output on the calibration data. Codes and words by
k-means with one metric for each block (Stock et al. 2020 have one for all), by coordinate descent over the codes, by
the least-squares codebook, and by error feedback from block to block (Frantar et al. 2022 for single weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from vqonnx.method import Layer

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

_RIDGE = 1e-6  # times the mean of the diagonal: keeps words that nobody uses where they are
_PLAIN = 1e-3  # times the mean of the diagonal, added to every metric
_AT_ONCE = 2**20  # numbers that are kept for blocks which are worked on at the same time
_TOGETHER = 64  # columns whose changes reach the others in one matrix product
_CG_STEPS = 60
_CG_TOLERANCE = 1e-7


@dataclass(frozen=True, eq=False)
class Target:
    """A weight to approximate, cut into blocks, and the metric of its input.

    Attributes:
        weight: float64 ``[rows, groups * width]``, filled up with zeros.
        metrics: For each group of a convolution H, float64 ``[cols, cols]``, also filled up; positive semi-definite.
        width: Columns of a block.
        scales: float64 ``[rows]``: a decoded row is its words times its scale.
    """

    weight: Array
    metrics: tuple[Array, ...]
    width: int
    scales: Array

    @classmethod
    def of(
        cls, weight: NDArray[np.floating], metrics: tuple[Array, ...], width: int, scales: Array | None = None
    ) -> Target:
        """Fill up what the width does not divide."""
        rows, cols = weight.shape
        more = -cols % width
        return cls(
            np.pad(weight.astype(np.float64), ((0, 0), (0, more))),
            tuple(np.pad(metric, ((0, more), (0, more))) for metric in metrics),
            width,
            np.ones(rows) if scales is None else scales.astype(np.float64),
        )

    @property
    def groups(self) -> int:
        """Blocks of a row."""
        return int(self.weight.shape[1]) // self.width

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """The rows of each group of the convolution, and their metric."""
        size = len(self.weight) // len(self.metrics)
        for number, metric in enumerate(self.metrics):
            yield slice(number * size, (number + 1) * size), metric

    def blocks(self, matrix: Array) -> Array:
        """``[groups, rows, width]`` from ``[rows, groups * width]``."""
        found: Array = matrix.reshape(len(matrix), -1, self.width).swapaxes(0, 1)
        return found

    def panels(self) -> Iterator[tuple[slice, slice]]:
        """Runs of blocks, each with its columns, whose effect on what follows is one matrix product."""
        for some in _runs(self.groups, max(1, _TOGETHER // self.width)):
            yield some, slice(some.start * self.width, some.stop * self.width)

    def columns(self, block: int) -> slice:
        """The columns of a block."""
        return slice(block * self.width, (block + 1) * self.width)

    def decode(self, codes: Codes, words: Array) -> Array:
        """``[rows, groups * width]`` from codes ``[rows, groups]`` and words ``[k, width]``."""
        return self.scales[:, None] * words[codes].reshape(len(codes), -1)

    def error(self, codes: Codes, words: Array) -> float:
        """``trace(E H E^T)``."""
        return self.distance(self.decode(codes, words))

    def distance(self, decoded: NDArray[np.floating]) -> float:
        """``trace(E H E^T)`` for any matrix ``[rows, groups * width]`` in the place of the weight."""
        missed = self.weight - decoded
        return float(sum(np.einsum("ij,ij->", missed[rows] @ metric, missed[rows]) for rows, metric in self.parts()))


def target_of(layer: Layer, width: int, *, asymmetric: bool, scales: Array | None = None) -> Target:
    """What the codes of a layer aim at, in the centred metric of its input; the plain weight where it is unknown.

    Args:
        layer: The layer.
        width: Columns of a block.
        asymmetric: Aim at the output of the original layer on the original input, where that is known.
        scales: Factors of the rows.
    """
    if layer.moments is None or not layer.moments.rows:
        return Target.of(layer.weight, (np.eye(layer.weight.shape[1]),), width, scales)
    weight = layer.weight.astype(np.float64)
    if asymmetric and layer.cross is not None:
        weight = layer.cross.target(layer.weight, layer.moments)
    metrics = []
    for covariance in layer.moments.covariances():  # a little of the plain distance, for inputs that were always zero
        mean = float(np.trace(covariance)) / len(covariance)
        metrics.append(covariance + (_PLAIN * mean if mean > 0 else 1.0) * np.eye(len(covariance)))
    return Target.of(weight, tuple(metrics), width, scales)


def assign(target: Target, words: Array) -> Codes:
    """Each block's best word on its own, in the metric of the block; of equals the first."""
    codes = np.empty((len(target.weight), target.groups), np.int64)
    for rows, metric in target.parts():
        scales = target.scales[rows]
        for some in _runs(target.groups, _AT_ONCE // max(len(scales) * len(words), 1)):
            own = _own(metric, target.width, some)
            points = target.blocks(target.weight[rows])[some]
            cost = _costs(points @ own, words, _energies(words, own), scales[:, None])
            codes[rows, some] = np.argmin(cost, axis=2).T
    return codes


def update_words(target: Target, codes: Codes, words: Array) -> Array:
    """The best words for given codes, blocks taken on their own (the M-step with one metric for each block)."""
    size, width = words.shape
    left, right = np.zeros((size, width, width)), np.zeros((size, width))
    for rows, metric in target.parts():
        scales = target.scales[rows]
        for some in _runs(target.groups, _AT_ONCE // (size * width)):
            own = _own(metric, target.width, some)
            wanted = scales[:, None] * target.blocks(target.weight[rows])[some]  # [blocks, rows, width]
            chosen = codes[rows, some].T + size * np.arange(len(own))[:, None]
            counts = _sums(_places(chosen, 1), np.broadcast_to(scales**2, chosen.shape), (len(own), size))
            sums = _sums(_places(chosen, width), wanted, (len(own), size, width))
            left += np.tensordot(counts, own, axes=(0, 0))
            right += np.sum(sums @ own, axis=0)
    return _solve(left, right, words)


def descend(target: Target, codes: Codes, words: Array) -> Codes:
    """One sweep of coordinate descent over all codes with the whole metric; never makes the error larger."""
    codes = codes.copy()
    missed = target.weight - target.decode(codes, words)
    for rows, metric in target.parts():
        influence = missed[rows] @ metric  # [rows, cols]
        scales = target.scales[rows][:, None]
        number = np.arange(len(scales))
        for some, columns in target.panels():
            near, within = influence[:, columns].copy(), metric[columns, columns]
            owns = _own(metric, target.width, some)
            changes = np.zeros(near.shape)
            for own, energy, block in zip(owns, _energies(words, owns), range(len(owns)), strict=True):
                if not own.any():
                    continue
                at = target.columns(block)
                before = codes[rows, some.start + block]
                made = scales * words[before]
                # With q what the block is to make, as the other blocks stand, words pull by G q.
                cost = _costs(near[:, at] + made @ own, words, energy, scales)
                chosen = cost.argmin(axis=1)
                if (chosen == before).all():
                    continue
                # Rounding must not turn a tie into a change, or sweeps would never settle.
                kept = cost[number, before]
                chosen = np.where(cost[number, chosen] < kept - 1e-12 * np.abs(kept), chosen, before)
                codes[rows, some.start + block] = chosen
                changes[:, at] = change = made - scales * words[chosen]
                near += change @ within[at]
            influence[:, columns.stop :] += changes @ metric[columns, columns.stop :]
    return codes


def refit(target: Target, codes: Codes, words: Array) -> Array:
    """The words of least error for given codes: ``(sum S^T H S + ridge) z = sum S^T H w + ridge z0``.

    Conjugate gradients from the present words, each product a gather, one matrix product and a scatter. Never makes the
    error larger.
    """
    size, width = words.shape
    places = _places(codes, width)

    def gathered(matrix: Array) -> Array:
        turned = np.concatenate([matrix[rows] @ metric for rows, metric in target.parts()])
        return _sums(places, target.scales[:, None] * turned, words.shape)

    mean = float(np.mean([np.trace(metric) / max(len(metric), 1) for metric in target.metrics]))
    ridge = _RIDGE * mean * max(1.0, codes.size / size)
    if ridge <= 0:
        return words

    def product(z: Array) -> Array:
        image: Array = gathered(target.decode(codes, z)) + ridge * z
        return image

    z = words.copy()
    residual = gathered(target.weight - target.decode(codes, z))
    # The blocks on the diagonal alone, as preconditioner.
    diagonals = [target.scales[rows, None] ** 2 * np.diag(metric) for rows, metric in target.parts()]
    weights = _sums(places, np.concatenate(diagonals), words.shape) + ridge
    turned = residual / weights
    direction, power = turned.copy(), float((residual * turned).sum())
    start = power
    for _ in range(_CG_STEPS):
        if power <= _CG_TOLERANCE * start:
            break
        image = product(direction)
        step = power / float((direction * image).sum())
        z += step * direction
        residual -= step * image
        turned = residual / weights
        before, power = power, float((residual * turned).sum())
        direction = turned + power / before * direction
    better: Array = z if target.error(codes, z) <= target.error(codes, words) else words
    return better


def feed_back(target: Target, words: Array, damping: float = 0.01) -> Codes:
    """Codes chosen block after block, each block's error made good by the weights that are still free.

    The exact form for blocks: with ``H^-1 = U^T U``, U upper triangular, the distance is ``|(w - c) U_BB^-1|`` and what
    follows moves by ``-(w - c) U_BB^-1 U_B,rest``.

    Args:
        target: The weight.
        words: ``[k, width]``.
        damping: Times the mean of the diagonal, added to it.
    """
    codes = np.empty((len(target.weight), target.groups), np.int64)
    for rows, metric in target.parts():
        diagonal = np.diag(metric).copy()
        mean = float(diagonal.mean())
        dead = diagonal <= 0
        # What a dead input is multiplied by must not matter, and must not make the matrix singular.
        damped = metric + np.diag(np.where(dead, _RIDGE * mean if mean > 0 else 1.0, damping * mean))
        upper = np.linalg.cholesky(np.linalg.inv(damped)).T
        weight = target.weight[rows].copy()
        scales = target.scales[rows][:, None]
        for some, columns in target.panels():
            near, within = weight[:, columns].copy(), upper[columns, columns]
            inverses = np.linalg.inv(_own(upper, target.width, some))
            owns = inverses @ inverses.swapaxes(1, 2)
            missed = np.zeros(near.shape)
            parts = zip(inverses, owns, _energies(words, owns), range(len(owns)), strict=True)
            for inverse, own, energy, block in parts:
                at = target.columns(block)
                chosen = _costs(near[:, at] @ own, words, energy, scales).argmin(axis=1)
                codes[rows, some.start + block] = chosen
                missed[:, at] = mistake = (near[:, at] - scales * words[chosen]) @ inverse
                near[:, at.stop :] -= mistake @ within[at, at.stop :]
            weight[:, columns.stop :] -= missed @ upper[columns, columns.stop :]
    return codes


def row_factors(target: Target, decoded: NDArray[np.floating]) -> Array:
    """What each row of ``decoded`` must be multiplied by for the least error, ``[rows]``; 1 where that is not positive.

    With Q what is decoded and w the row: ``(w H Q^T) / (Q H Q^T)``.
    """
    across, energy = np.zeros(len(decoded)), np.zeros(len(decoded))
    for rows, metric in target.parts():
        seen = decoded[rows] @ metric
        across[rows] = np.einsum("ij,ij->i", seen, target.weight[rows])
        energy[rows] = np.einsum("ij,ij->i", seen, decoded[rows])
    usable = (energy > 0) & (across > 0)
    return np.where(usable, across / np.where(usable, energy, 1.0), 1.0)


def alternate(
    target: Target, codes: Codes, words: Array, rounds: int, *, scaled: bool = False
) -> tuple[Target, Codes, Array]:
    """Coordinate descent, codewords and, where rows are ``scaled``, their scales in turn.

    Args:
        target: The weight.
        codes: Where to begin, ``[rows, groups]``.
        words: The same, ``[k, width]``.
        rounds: Of each of them.
        scaled: Whether the scales of the target may change.

    Returns:
        The target with its scales, the codes and the words.
    """
    for _ in range(rounds):
        codes = descend(target, codes, words)
        words = refit(target, codes, words)
        if scaled:
            target = replace(target, scales=target.scales * row_factors(target, target.decode(codes, words)))
    return target, codes, words


def _runs(groups: int, size: int) -> Iterator[slice]:
    """The blocks of a row, ``size`` of them at a time, or one."""
    step = max(1, size)
    for start in range(0, groups, step):
        yield slice(start, min(start + step, groups))


def _own(metric: Array, width: int, some: slice) -> Array:
    """The blocks on the diagonal, ``[blocks, width, width]``."""
    at = np.arange(some.start, some.stop)[:, None] * width + np.arange(width)
    found: Array = metric[at[:, :, None], at[:, None]]
    return found


def _energies(words: Array, owns: Array) -> Array:
    """``[blocks, k]``: ``c^T G c`` of each word in each metric."""
    return np.asarray(np.einsum("bkd,kd->bk", words @ owns, words))


def _costs(pulls: Array, words: Array, energies: Array, scales: Array) -> Array:
    """``(s c)^T G (s c) - 2 p^T (s c)`` for each word c: its error, but for what all words have in common.

    Args:
        pulls: p, ``[rows, width]``, or ``[blocks, rows, width]``.
        words: ``[k, width]``.
        energies: ``c^T G c``, ``[k]``, or ``[blocks, k]``.
        scales: s, ``[rows, 1]``.

    Returns:
        ``[rows, k]``, or ``[blocks, rows, k]``.
    """
    return np.asarray(scales**2 * energies[..., None, :] - (2 * scales * pulls) @ words.T)


def _places(codes: Codes, width: int) -> Codes:
    """Where the values of the words that codes stand for lie among those of all words, one after the other."""
    found: Codes = (codes[..., None] * width + np.arange(width)).reshape(-1)
    return found


def _sums(places: Codes, values: Array, shape: tuple[int, ...]) -> Array:
    """The sum of the values that each place of an array of that shape gets."""
    found = np.bincount(places, weights=values.reshape(-1), minlength=prod(shape))
    return np.asarray(found, np.float64).reshape(shape)


def _solve(left: Array, right: Array, words: Array) -> Array:
    """Least squares for each word; the old word where nothing, or nothing independent, speaks for a new one."""
    width = words.shape[1]
    scale = np.trace(left, axis1=1, axis2=2) / width
    used = scale > 0
    ridge = _RIDGE * scale[used]
    system = left[used] + ridge[:, None, None] * np.eye(width)
    found: Array = words.copy()
    found[used] = np.linalg.solve(system, (right[used] + ridge[:, None] * words[used])[..., None])[..., 0]
    return found
