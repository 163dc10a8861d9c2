"""KLT and ELT: what they diagonalise, and the determinant bound that only the ELT attains."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vqonnx.bases import coding_gain_db, coefficients, damped, elt, klt, variances

Array = NDArray[np.float64]


def problem(n: int, seed: int, spread: float = 3.0) -> tuple[Array, Array]:
    """Rows ``[n, cols]`` that hang together, and a sensitivity that has nothing to do with them."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, n)) @ (rng.normal(size=(n, 6 * n + 5)) * rng.uniform(0.1, spread, (n, 1)))
    inputs = rng.normal(size=(n, n)) @ (rng.normal(size=(n, 50 * n)) * rng.uniform(0.1, spread, (n, 1)))
    return rows, inputs @ inputs.T / inputs.shape[1]


def off_diagonal(matrix: Array) -> float:
    return float(np.abs(matrix - np.diag(np.diag(matrix))).max() / np.abs(np.diag(matrix)).max())


cases = given(st.integers(1, 12), st.integers(0, 99))


@cases
@settings(max_examples=40)
def test_klt_is_orthogonal_and_makes_the_rows_uncorrelated(n: int, seed: int) -> None:
    rows, _ = problem(n, seed)
    basis = klt(rows)
    np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=1e-9)
    turned = coefficients(basis, rows)
    assert off_diagonal(turned @ turned.T) < 1e-9
    energies = np.sum(turned**2, axis=1)
    assert (np.diff(energies) <= 1e-9 * energies.max()).all(), "the largest first"


@cases
@settings(max_examples=40)
def test_elt_diagonalises_the_weights_and_the_sensitivity_at_once(n: int, seed: int) -> None:
    rows, sensitivity = problem(n, seed)
    basis = elt(rows, sensitivity)
    turned = coefficients(basis, rows)
    assert off_diagonal(turned @ turned.T) < 1e-7
    assert off_diagonal(basis.T @ damped(sensitivity) @ basis) < 1e-7
    np.testing.assert_allclose(np.linalg.norm(basis, axis=0), 1)
    found = variances(basis, rows, damped(sensitivity))
    assert (np.diff(found) <= 1e-7 * found.max()).all(), "the largest first"


@cases
@settings(max_examples=40)
def test_elt_attains_the_determinant_bound_and_nothing_is_below(n: int, seed: int) -> None:
    """The geometric mean of the variances is ``det(Cgg Ctt)^(1/n)``: Young et al. 2021."""
    rows, sensitivity = problem(n, seed)
    metric = damped(sensitivity)
    bound = (np.linalg.slogdet(metric)[1] + np.linalg.slogdet(rows @ rows.T / rows.shape[1])[1]) / n
    found = {
        name: float(np.mean(np.log(variances(basis, rows, metric))))
        for name, basis in {"elt": elt(rows, sensitivity), "klt": klt(rows), "none": np.eye(n)}.items()
    }
    assert found["elt"] == pytest.approx(bound, abs=1e-6)
    assert min(found.values()) >= bound - 1e-6, found
    gain = coding_gain_db(elt(rows, sensitivity), rows, metric)
    assert gain == pytest.approx(10 * (found["none"] - found["elt"]) / np.log(10), abs=1e-6)
    assert gain >= -1e-6


def test_the_klt_can_lose_where_the_sensitivity_is_far_from_white() -> None:
    """Young et al. 2021: only the ELT never loses. The KLT mixes a loud input into all components."""
    rng = np.random.default_rng(0)
    rows = np.linalg.cholesky(np.array([[1.0, 0.3], [0.3, 1.0]])) @ rng.normal(size=(2, 1000))
    sensitivity = np.diag([100.0, 1.0])
    klt_gain, elt_gain = (coding_gain_db(basis, rows, sensitivity) for basis in (klt(rows), elt(rows, sensitivity)))
    assert klt_gain is not None
    assert elt_gain is not None
    assert klt_gain < -5
    assert 0.2 < elt_gain < 1


def test_white_inputs_make_the_elt_a_klt() -> None:
    rows, _ = problem(6, 3)
    np.testing.assert_allclose(elt(rows, 7 * np.eye(6)), klt(rows), atol=1e-7)


def test_dead_inputs_and_zero_weights_have_a_basis() -> None:
    rows, _ = problem(5, 0)
    np.testing.assert_allclose(elt(rows, np.zeros((5, 5))), klt(rows), atol=1e-9)
    for basis in (elt(np.zeros((4, 9)), np.eye(4)), klt(np.zeros((4, 9)))):
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
        assert coding_gain_db(basis, np.zeros((4, 9)), np.eye(4)) is None


@cases
@settings(max_examples=30)
def test_the_longer_tail_is_negative(n: int, seed: int) -> None:
    rows, sensitivity = problem(n, seed)
    rows = np.abs(rows)  # skewed
    for basis in (klt(rows), elt(rows, sensitivity)):
        skew = np.sum(coefficients(basis, rows) ** 3, axis=1)
        assert (skew <= 1e-9 * np.abs(skew).max()).all()
