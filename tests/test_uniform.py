"""The uniform quantiser follows the paper's formula, its steps suit the errors that count, and forms decode to it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqonnx.uniform import book, coded, dequantise, quantise, search_steps


def rows_of(seed: int, rows: int = 6, cols: int = 200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_t(5, (rows, cols)) * np.logspace(-2, 1, rows)[:, None]


def lost(rows: np.ndarray, steps: np.ndarray, bits: int) -> np.ndarray:
    return np.sum((rows - dequantise(rows, steps, bits)) ** 2, axis=1)


@given(st.floats(-100, 100), st.sampled_from([0.25, 0.5, 1.0, 3.0]), st.integers(1, 8))
def test_the_formula_of_the_paper(value: float, step: float, bits: int) -> None:
    found = dequantise(np.array([[value]]), np.array([step]), bits).item()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert found == step * min(max(round(value / step), low), high)
    if low * step <= value <= high * step:
        assert abs(found - value) <= step / 2 * (1 + 1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_book_holds_the_whole_numbers_that_are_quantised_to(bits: int) -> None:
    words = book(bits).ravel()
    assert words.dtype == np.int8
    assert words.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert set(quantise(rows_of(0), np.full(6, 0.01), bits).ravel()) <= set(words.tolist())


@given(st.integers(0, 50), st.integers(1, 8), st.integers(-6, 6))
@settings(max_examples=40)
def test_a_form_decodes_to_the_quantised_rows(seed: int, bits: int, exponent: int) -> None:
    rows = rows_of(seed) * 10.0**exponent
    steps = search_steps(rows, bits, np.ones((1, 1)))
    form = coded(rows, steps, bits)
    np.testing.assert_array_equal(form.decode(), dequantise(rows, steps, bits).astype(np.float32))
    assert form.bits == bits
    assert form.scales is not None
    assert form.scales.dtype == steps.dtype
    assert form.nbytes == 6 * (200 * bits // 8) + 2**bits + 6 * steps.itemsize


@given(st.integers(0, 50), st.integers(1, 8))
@settings(max_examples=30)
def test_no_other_step_is_much_better(seed: int, bits: int) -> None:
    rows = rows_of(seed)
    steps = search_steps(rows, bits, np.ones((1, 1)))
    found = lost(rows, steps, bits)
    for factor in np.geomspace(0.25, 4, 161):
        assert (found <= 1.4 * lost(rows, steps.astype(np.float64) * factor, bits)).all(), factor


def test_a_bit_is_worth_six_decibels() -> None:
    """Max (1960), uniform quantisers of a Gaussian: 9.25 dB at 2 bits, 14.27 at 3, 19.38 at 4; about 6 dB a bit later.

    Those have their levels around 0 and this one has one on it, and one more below: a little worse at few bits.
    """
    rows = np.random.default_rng(0).normal(size=(4, 20_000))
    known = {2: 9.25, 3: 14.27, 4: 19.38, 5: 24.57, 6: 29.83}
    for bits, best in known.items():
        found = 10 * np.log10(np.sum(rows**2) / lost(rows, search_steps(rows, bits, np.ones((1, 1))), bits).sum())
        assert best - 1.3 < found < best + 0.05, f"{bits} bits: {found:.2f} dB"


@given(st.integers(0, 50))
@settings(max_examples=20)
def test_more_bits_never_err_more(seed: int) -> None:
    rows = rows_of(seed)
    errors = [lost(rows, search_steps(rows, bits, np.ones((1, 1))), bits) for bits in range(1, 9)]
    assert all((after <= before * (1 + 1e-9)).all() for before, after in pairwise(errors))


def test_steps_suit_the_errors_that_count() -> None:
    """The left half is large and does not matter: steps for the right half, clipping the left."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([10 * rng.normal(size=(3, 100)), rng.normal(size=(3, 100))], axis=1)
    weights = np.concatenate([np.full(100, 1e-6), np.ones(100)])[None]
    steps = search_steps(rows, 3, weights)
    assert (steps < search_steps(rows, 3, np.ones((1, 1))) / 2).all()
    right = np.sum((rows - dequantise(rows, steps, 3))[:, 100:] ** 2)
    plain = np.sum((rows - dequantise(rows, search_steps(rows, 3, np.ones((1, 1))), 3))[:, 100:] ** 2)
    assert right < plain / 4


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e4, 1e30])
def test_steps_take_the_type_that_holds_them(scale: float) -> None:
    rows = rows_of(0) * scale
    steps = search_steps(rows, 4, np.ones((1, 1)))
    assert steps.dtype == (np.float16 if scale == 1 else np.float32)
    assert np.isfinite(steps).all()
    ratio = np.sum(rows**2) / lost(rows, steps, 4).sum()
    assert 10 * np.log10(ratio) > 15


def test_rows_of_zeros_stay_zero() -> None:
    rows = rows_of(0)
    rows[2] = 0
    form = coded(rows, search_steps(rows, 2, np.ones((1, 1))), 2)
    assert not form.decode()[2].any()
    nothing = np.zeros((3, 5))
    assert not coded(nothing, search_steps(nothing, 8, np.ones((1, 1))), 8).decode().any()
