"""What an error of a weight, or of its coefficients in a basis, does to the output of its layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vqonnx.moments import Moments

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Metric:
    """The energy of the output that errors of a weight ``A = basis @ coefficients`` cause.

    Attributes:
        rows: Rows of the weight: input channels of a group where ``by_input``, outputs otherwise.
        taps: Taps of the kernel; 1 without one.
        by_input: Rows are inputs (the view order ``ohw``).
        moments: Second moments of the input in the order ``ihw``; None counts errors of the weight itself.
        basis: ``[rows, k]``; None: the coefficients are the rows.
    """

    rows: int
    taps: int
    by_input: bool
    moments: Moments | None
    basis: Array | None = None

    def within(self, basis: Array | None) -> Metric:
        """The same for coefficients in a basis."""
        return replace(self, basis=basis)

    @property
    def sensitivity(self) -> Array:
        """``[rows, rows]``: what an error ``e`` of one column of the weight does is ``e^T sensitivity e``.

        ``Cgg`` of Young et al. 2021 (arXiv 2009.01174), taken for the layer's output instead of the network's, so that
        it is the second moment of the input channels, spatial lags ignored. Outputs count alike.
        """
        if self.moments is None:
            return np.eye(self.rows)
        if self.by_input:
            return self.moments.channel_gram(self.taps)
        return np.diag(np.repeat(self.moments.mean_squares.sum(axis=1), self.rows // self.moments.groups))

    def energies(self, errors: Array) -> Array:
        """``[k]``: the energy by an error of each row of coefficients ``errors [k, cols]`` alone."""
        if self.moments is None:
            return np.asarray(self._norms[:, 0] * np.sum(errors**2, axis=1))
        if self.by_input:
            parts = errors.reshape(len(errors), len(self._grams), -1, self.taps).swapaxes(0, 1)
            return np.asarray(np.einsum("gkot,gkot->k", parts @ self._grams, parts))
        return np.asarray(np.sum(self._norms.T * self.moments.row_energies(errors), axis=0))

    def weights(self, cols: int) -> Array:
        """``[k, cols]``, or what broadcasts to it: what the square of each error counts, if errors are unrelated."""
        if self.moments is None:
            return self._norms
        if self.by_input:
            squares = np.diagonal(self._grams, axis1=2, axis2=3)  # [groups, k, taps]
            each = np.repeat(squares[:, :, None], cols // (len(squares) * self.taps), axis=2)
            return np.asarray(each.swapaxes(0, 1).reshape(-1, cols))
        return self._norms @ self.moments.mean_squares

    @cached_property
    def _grams(self) -> Array:
        """``[groups, k, taps, taps]``."""
        assert self.moments is not None
        return self.moments.tap_grams(self.basis, self.taps)

    @cached_property
    def _norms(self) -> Array:
        """``[k, groups]``: energy of each basis vector among the outputs of each group; one group for inputs."""
        squares = np.eye(self.rows) if self.basis is None else self.basis**2
        groups = 1 if self.moments is None or self.by_input else self.moments.groups
        return np.asarray(squares.reshape(groups, -1, squares.shape[1]).sum(axis=1).T)
