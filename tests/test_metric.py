"""What an error of one row does to the output, checked against the output's energy by the whole second moment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import vqonnx.moments
from vqonnx.metric import Metric
from vqonnx.moments import Moments, MomentsAccumulator

Array = NDArray[np.float64]


def observed(groups: int, channels: int, taps: int, seed: int) -> Moments:
    rng = np.random.default_rng(seed)
    cols = channels * taps
    accumulator = MomentsAccumulator(groups, cols)
    accumulator.add(rng.normal(size=(groups, 60, cols)) @ rng.normal(size=(groups, cols, cols)) + 1)
    return accumulator.result()


def by_output(matrix: Array, taps: int) -> Array:
    """``[channels, (output, tap)]`` as ``[outputs, (channel, tap)]``."""
    channels = len(matrix)
    return matrix.reshape(channels, -1, taps).swapaxes(0, 1).reshape(-1, channels * taps)


sizes = {
    "groups": st.integers(1, 3),
    "channels": st.integers(1, 4),
    "taps": st.integers(1, 5),
    "outputs": st.integers(1, 3),
    "seed": st.integers(0, 99),
    "based": st.booleans(),
}


@given(**sizes)
@settings(max_examples=80)
def test_energies_of_input_rows(groups: int, channels: int, taps: int, outputs: int, seed: int, based: bool) -> None:
    rng = np.random.default_rng(seed)
    moments = observed(groups, channels, taps, seed)
    basis = rng.normal(size=(channels, channels)) if based else None
    metric = Metric(channels, taps, True, moments).within(basis)
    errors = rng.normal(size=(channels, groups * outputs * taps))
    each = [
        moments.energy(by_output(np.outer(np.eye(channels)[k] if basis is None else basis[:, k], errors[k]), taps))
        for k in range(channels)
    ]
    np.testing.assert_allclose(metric.energies(errors), each, rtol=1e-4)


@given(**sizes)
@settings(max_examples=80)
def test_energies_of_output_rows(groups: int, channels: int, taps: int, outputs: int, seed: int, based: bool) -> None:
    rng = np.random.default_rng(seed)
    moments, rows = observed(groups, channels, taps, seed), groups * outputs
    basis = rng.normal(size=(rows, rows)) if based else None
    metric = Metric(rows, taps, False, moments).within(basis)
    errors = rng.normal(size=(rows, channels * taps))
    each = [moments.energy(np.outer(np.eye(rows)[k] if basis is None else basis[:, k], errors[k])) for k in range(rows)]
    np.testing.assert_allclose(metric.energies(errors), each, rtol=1e-4)


@given(**sizes, by_input=st.booleans())
@settings(max_examples=60)
def test_weights_are_the_energies_of_single_errors(
    groups: int, channels: int, taps: int, outputs: int, seed: int, based: bool, by_input: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = (channels, groups * outputs * taps) if by_input else (groups * outputs, channels * taps)
    basis = rng.normal(size=(rows, rows)) if based else None
    for moments in (None, observed(groups, channels, taps, seed)):
        metric = Metric(rows, taps, by_input, moments, basis)
        weights = np.broadcast_to(metric.weights(cols), (rows, cols))
        for column in range(cols):
            errors = np.zeros((rows, cols))
            errors[:, column] = 2
            np.testing.assert_allclose(metric.energies(errors), 4 * weights[:, column], rtol=1e-9)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=40)
def test_sensitivity_is_what_an_error_of_one_tap_does_on_average(channels: int, taps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    moments = observed(1, channels, taps, seed)
    error = rng.normal(size=channels)
    each = []
    for tap in range(taps):
        column = np.zeros((channels, taps))
        column[:, tap] = error
        each.append(moments.energy(by_output(column, taps)))
    sensitivity = Metric(channels, taps, True, moments).sensitivity
    assert error @ sensitivity @ error == pytest.approx(np.mean(each), rel=1e-4)


def test_outputs_count_alike_but_for_their_group() -> None:
    moments = observed(2, 3, 4, 0)
    sensitivity = Metric(6, 4, False, moments).sensitivity
    assert np.count_nonzero(sensitivity - np.diag(np.diag(sensitivity))) == 0
    assert sensitivity[0, 0] == sensitivity[2, 2] != sensitivity[3, 3] == sensitivity[5, 5]
    np.testing.assert_array_equal(Metric(6, 4, True, None).sensitivity, np.eye(6))


@pytest.mark.parametrize("taps", [1, 3, 4, 7, 12])
def test_blocks_that_cut_channels_lose_only_what_lies_between_them(taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = observed(2, 5, taps, 0)
    monkeypatch.setattr(vqonnx.moments, "FULL_COLS", 4)
    monkeypatch.setattr(vqonnx.moments, "BLOCK_COLS", 6)
    cut = observed(2, 5, taps, 0)
    sizes = [len(block) for block in cut.blocks[0]]
    assert sum(sizes) == 5 * taps
    at = np.repeat(np.arange(len(sizes)), sizes)
    dense = Moments(
        whole.rows, whole.sums, tuple((blocks[0] * (at[:, None] == at),) for blocks in whole.blocks)
    )  # the same second moment with zeros between the blocks
    basis = np.random.default_rng(1).normal(size=(5, 5))
    for one in (None, basis):
        np.testing.assert_allclose(cut.tap_grams(one, taps), dense.tap_grams(one, taps), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(cut.channel_gram(taps), dense.channel_gram(taps), rtol=1e-9, atol=1e-9)
    matrix = np.random.default_rng(2).normal(size=(4, 5 * taps))
    np.testing.assert_allclose(cut.row_energies(matrix), dense.row_energies(matrix), rtol=1e-9)
    assert cut.row_energies(matrix)[0].sum() + cut.row_energies(-matrix)[1].sum() == pytest.approx(
        cut.energy(np.concatenate([matrix, matrix]).astype(np.float32)), rel=1e-4
    )
    np.testing.assert_allclose(cut.mean_squares, whole.mean_squares)
