"""Second moments of a layer's input, streamed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqonnx.form import Matrix

# Above this many columns only blocks on the diagonal are kept: the full matrix of 25,088 columns would take 5 GB.
FULL_COLS = 8192
# A multiple of every width from 1 to 9, and of 12, 14, 16, 18 ..., so that no block of weights straddles two of them.
BLOCK_COLS = 5040
_ROWS_FOR_TARGET = 16

# An output of Sigmoid or Softmax that is nearly zero may err by so much, and by any share of itself.
ROUNDING = 2.0**-23


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over calibration rows ``x`` (one row is what one output of the layer sees: a column of im2col).

    Attributes:
        rows: Number of calibration rows.
        sums: float64 ``[groups, cols]``: sum of the rows, for each group of a convolution (one group otherwise).
        blocks: For each group the diagonal blocks of ``sum x x^T``, float64 ``[size, size]``; one block is the whole
            matrix up to `FULL_COLS` columns.
    """

    rows: int
    sums: NDArray[np.float64]
    blocks: tuple[tuple[NDArray[np.float64], ...], ...]

    @property
    def groups(self) -> int:
        return len(self.blocks)

    def energy(self, matrix: Matrix) -> float:
        """Mean squared output with weights ``matrix [rows, cols]``: ``trace(M H M^T)``, H the mean of ``x x^T``."""
        total = 0.0
        for part, blocks in zip(np.split(matrix.astype(np.float64), self.groups), self.blocks, strict=True):
            start = 0
            for block in blocks:
                columns = part[:, start : start + len(block)]
                total += float(np.einsum("ij,ij->", columns @ block, columns))
                start += len(block)
        return total / max(self.rows, 1)

    def covariances(self) -> tuple[NDArray[np.float64], ...]:
        """For each group the covariance of the input, float64 ``[cols, cols]``, shrunk towards a multiple of one.

        By ``cols / (cols + 2 rows)``: a classifier behind a global pooling sees one row an image, and trusts too few.
        Above `FULL_COLS` columns what lies outside the blocks on the diagonal counts as zero.
        """
        found = []
        for sums, blocks in zip(self.sums, self.blocks, strict=True):
            cols = len(sums)
            covariance = np.zeros((cols, cols))
            start = 0
            for block in blocks:
                at = slice(start, start + len(block))
                covariance[at, at] = block / self.rows - np.outer(sums[at], sums[at]) / self.rows**2
                start += len(block)
            mean = float(np.trace(covariance)) / cols
            found.append((1 - self.shrinkage) * covariance + self.shrinkage * mean * np.eye(cols))
        return tuple(found)

    @property
    def shrinkage(self) -> float:
        """How little the covariance is trusted, 0 to 1."""
        return self.cols / (self.cols + 2 * self.rows)

    @property
    def cols(self) -> int:
        return int(self.sums.shape[1])

    @property
    def mean_squares(self) -> NDArray[np.float64]:
        """``[groups, cols]``: the mean of each input squared."""
        squares = [np.concatenate([np.diagonal(block) for block in blocks]) for blocks in self.blocks]
        return np.stack(squares) / max(self.rows, 1)

    def row_energies(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[groups, rows]``: what each row of ``matrix [rows, cols]`` alone would put out in each group."""
        energies = np.zeros((self.groups, len(matrix)))
        for group, blocks in enumerate(self.blocks):
            start = 0
            for block in blocks:
                columns = matrix[:, start : start + len(block)]
                energies[group] += np.einsum("ij,ij->i", columns @ block, columns)
                start += len(block)
        return energies / max(self.rows, 1)

    def tap_grams(self, basis: NDArray[np.float64] | None, taps: int) -> NDArray[np.float64]:
        """``[groups, k, taps, taps]``: the second moment, over the taps of a kernel, of what each basis vector sees.

        ``basis [channels, k]`` combines the input channels of a group; None takes each channel for itself. Columns are
        in the order ``ihw``.
        """
        if basis is None:
            return self._own_grams(taps)
        grams = np.zeros((self.groups, basis.shape[1], taps, taps))
        for group, blocks in enumerate(self.blocks):
            start = 0
            for block in blocks:
                channel, tap = np.divmod(np.arange(start, start + len(block)), taps)
                for one in range(taps):
                    vectors = basis[channel[tap == one]]
                    for other in range(one, taps):
                        seen = block[np.ix_(tap == one, tap == other)] @ basis[channel[tap == other]]
                        grams[group, :, one, other] += np.einsum("ik,ik->k", vectors, seen)
                start += len(block)
        upper = np.triu(np.ones((taps, taps), bool), 1)
        grams.swapaxes(2, 3)[:, :, upper] = grams[:, :, upper]
        return grams / max(self.rows, 1)

    def _own_grams(self, taps: int) -> NDArray[np.float64]:
        grams = np.zeros((self.groups, self.cols // taps, taps, taps))
        for group, blocks in enumerate(self.blocks):
            start = 0
            for block in blocks:
                at = np.arange(start, start + len(block))
                for offset in range(min(taps, len(block))):  # pairs of columns so far apart, of one channel
                    first, second = at[: len(at) - offset], at[offset:]
                    same = first // taps == second // taps
                    first, second = first[same], second[same]
                    values = block[first - start, second - start]
                    grams[group, first // taps, first % taps, second % taps] = values
                    grams[group, first // taps, second % taps, first % taps] = values
                start += len(block)
        return grams / max(self.rows, 1)

    def channel_gram(self, taps: int) -> NDArray[np.float64]:
        """``[channels, channels]``: the second moment of the input channels of a group, a mean over taps and groups.

        Columns are in the order ``ihw``; channels that lie in different `blocks` count as unrelated.
        """
        channels = self.cols // taps
        gram = np.zeros((channels, channels))
        for blocks in self.blocks:
            start = 0
            for block in blocks:
                channel, tap = np.divmod(np.arange(start, start + len(block)), taps)
                for one in range(taps):
                    here = tap == one
                    gram[np.ix_(channel[here], channel[here])] += block[np.ix_(here, here)]
                start += len(block)
        return gram / max(self.rows * self.groups * taps, 1)

    def pooled_gram(self, width: int) -> NDArray[np.float64]:
        """``[width, width]``: the mean over the column blocks of width ``width`` of their part of ``sum x x^T / rows``.

        The metric of Stock et al.. Columns that the width does not divide count as zero inputs.
        """
        gram, count = np.zeros((width, width)), 0
        for blocks in self.blocks:
            for block in blocks:
                for start in range(0, len(block), width):
                    piece = block[start : start + width, start : start + width]
                    gram[: len(piece), : len(piece)] += piece
                    count += 1
        return gram / max(count * self.rows, 1)


class MomentsAccumulator:
    """Adds up calibration rows batch by batch."""

    def __init__(self, groups: int, cols: int) -> None:
        sizes = [cols] if cols <= FULL_COLS else [min(BLOCK_COLS, cols - at) for at in range(0, cols, BLOCK_COLS)]
        self._rows = 0
        self._sums = np.zeros((groups, cols))
        self._blocks = tuple(tuple(np.zeros((size, size)) for size in sizes) for _ in range(groups))

    def add(self, rows: NDArray[np.floating]) -> None:
        """Add rows ``[groups, n, cols]``."""
        self._rows += rows.shape[1]
        for group, part in enumerate(rows.astype(np.float64, copy=False)):
            self._sums[group] += part.sum(axis=0)
            start = 0
            for block in self._blocks[group]:
                columns = part[:, start : start + len(block)]
                block += columns.T @ columns
                start += len(block)

    def result(self) -> Moments:
        """The moments so far."""
        return Moments(self._rows, self._sums, self._blocks)


@dataclass(frozen=True, eq=False)
class Cross:
    """What the original model's layer sees at the same places: rows ``x`` beside the rows ``xh`` of `Moments`.

    Attributes:
        sums: float64 ``[groups, cols]``: sum of the rows x.
        products: For each group ``sum xh x^T``, float64 ``[cols, cols]``; empty above `FULL_COLS` columns.
    """

    sums: NDArray[np.float64]
    products: tuple[NDArray[np.float64], ...]

    def lost(self, before: Matrix, after: Matrix, moments: Moments) -> NDArray[np.float64]:
        """``[rows]``: how far the mean output falls when weights and inputs change: ``W mean(x) - What mean(xh)``."""
        parts = zip(
            np.split(before.astype(np.float64), moments.groups),
            np.split(after.astype(np.float64), moments.groups),
            self.sums,
            moments.sums,
            strict=True,
        )
        return np.concatenate([w @ x - what @ xh for w, what, x, xh in parts]) / max(moments.rows, 1)

    def target(self, weight: Matrix, moments: Moments, *, damping: float = 0.02) -> NDArray[np.float64]:
        """The weights that on xh come closest to W on x, means apart: ``(C + d)^-1 (Cx W^T + d W^T)``.

        The asymmetric target (``asym`` in the code of Li et al. 2021, arXiv 2102.05426) in covariances; ``d`` is
        ``damping`` times the mean of the diagonal, and draws towards W. W itself where there are fewer than
        `_ROWS_FOR_TARGET` rows for a column: they fit noise.
        """
        wanted = weight.astype(np.float64)
        if not self.products or moments.rows < _ROWS_FOR_TARGET * weight.shape[1]:
            return wanted
        found = []
        for part, product, x, xh, covariance in zip(
            np.split(wanted, moments.groups), self.products, self.sums, moments.sums, moments.covariances(), strict=True
        ):
            across = product / moments.rows - np.outer(xh, x) / moments.rows**2
            mean = float(np.trace(covariance)) / len(covariance)
            if mean <= 0:
                found.append(part)
                continue
            # What shrinks the covariance of xh with itself shrinks that with x: without a difference, W is the answer.
            across = (1 - moments.shrinkage) * across
            ridge = damping * mean
            drawn = (ridge + moments.shrinkage * mean) * part.T
            found.append(np.linalg.solve(covariance + ridge * np.eye(len(covariance)), across @ part.T + drawn).T)
        return np.concatenate(found)


def snr_db(signal: float, noise: float) -> float | None:
    """Signal to noise in dB; None if there is no noise, or no signal to compare it with."""
    return None if noise <= 0 or signal <= 0 else float(10 * np.log10(signal / noise))
