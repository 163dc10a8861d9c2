"""Bases that make the rows of a weight independent: Karhunen-Loeve (KLT) and end-to-end learned (ELT) transforms.

Young et al. 2021 (arXiv 2009.01174). A matrix ``A [n, cols]`` becomes ``S @ T``: the columns of the synthesis basis
``S [n, n]`` have unit norm, and ``T = inverse(S) @ A`` are the coefficients, the most important row first.

On several threads the last bits may differ from run to run: callers set one, as asking for it takes milliseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Part of the largest eigenvalue that is added to the sensitivity's diagonal, as in the authors' code.
DAMPING = 0.01

Array = NDArray[np.float64]


def klt(rows: Array) -> Array:
    """The orthogonal synthesis basis ``[n, n]`` of eigenvectors of the second moment of the columns of ``rows``."""
    vectors = np.linalg.eigh(_second_moment(rows))[1]
    return _signed(vectors[:, ::-1], rows)


def elt(rows: Array, sensitivity: Array) -> Array:
    """The synthesis basis ``[n, n]`` that diagonalises the weights and what their errors do, both at once.

    With the weights' second moment ``Ctt`` and the damped sensitivity ``Cgg = L L^T``: ``L^T Ctt L = Q Lambda Q^T``,
    ``U = L Q`` and ``S = inverse(U)^T``, so that ``U^T Ctt U`` and ``U^T inverse(Cgg) U`` are diagonal.

    Args:
        rows: ``A [n, cols]``.
        sensitivity: ``[n, n]``: what an error ``e`` of a column does is ``e^T sensitivity e``.
    """
    lower = np.linalg.cholesky(damped(sensitivity))
    turned = np.linalg.eigh(lower.T @ _second_moment(rows) @ lower)[1][:, ::-1]
    basis = coefficients(lower.T, turned)
    return _signed(np.asarray(basis / np.linalg.norm(basis, axis=0)), rows)


def damped(sensitivity: Array) -> Array:
    """The sensitivity with `DAMPING` of its largest eigenvalue on the diagonal; the identity where all of it is 0."""
    largest = float(np.linalg.eigvalsh(sensitivity)[-1])
    if largest <= 0:
        return np.eye(len(sensitivity))
    return sensitivity + DAMPING * largest * np.eye(len(sensitivity))


def coefficients(basis: Array, rows: Array) -> Array:
    """``T`` with ``basis @ T = rows``."""
    return np.asarray(np.linalg.solve(basis, rows))


def projected(basis: Array, rows: Array, sensitivity: Array) -> Array:
    """``T [k, cols]`` with ``basis [n, k] @ T`` as near to the rows as it gets, by what the difference does."""
    metric = basis.T @ damped(sensitivity)
    return np.asarray(np.linalg.solve(metric @ basis, metric @ rows))


def variances(basis: Array, rows: Array, sensitivity: Array) -> Array:
    """``sigma_k^2``, ``[n]``: the energy of each coefficient times what an error of it does."""
    energy = np.mean(coefficients(basis, rows) ** 2, axis=1)
    weight = np.einsum("ik,ij,jk->k", basis, sensitivity, basis)
    return np.asarray(energy * weight)


def coding_gain_db(basis: Array, rows: Array, sensitivity: Array) -> float | None:
    """How much less error the basis makes at the same high rate: the ratio of geometric means of `variances`, in dB.

    6.02 dB are worth a bit. None where a variance is zero, so that the gain has no bound.
    """
    plain, turned = (variances(one, rows, sensitivity) for one in (np.eye(len(rows)), basis))
    if min(plain.min(), turned.min()) <= 1e-12 * max(plain.max(), turned.max()):
        return None
    return float(10 * np.mean(np.log10(plain) - np.log10(turned)))


def _second_moment(rows: Array) -> Array:
    return np.asarray(rows @ rows.T / rows.shape[1])


def _signed(basis: Array, rows: Array) -> Array:
    """The basis with signs such that the longer tail of each coefficient is negative, where quantisers reach further.

    An eigenvector has no sign of its own; this also makes it the same on every machine.
    """
    skew = np.sum(coefficients(basis, rows) ** 3, axis=1)
    return basis * np.where(skew > 0, -1.0, 1.0)
