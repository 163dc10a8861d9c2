"""Second moments: batches add up, energy is the mean squared output, the pooled metric is that of Stock et al.."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import vqonnx.moments
from vqonnx.moments import Moments, MomentsAccumulator, snr_db


def draw_rows(groups: int, count: int, cols: int, seed: int) -> NDArray[np.float32]:
    """Correlated rows with a mean, which is not taken away."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(groups, cols, cols))
    return (rng.normal(size=(groups, count, cols)) @ mix + rng.normal(size=(groups, 1, cols))).astype(np.float32)


def moments_of(rows: NDArray[np.floating], *cuts: int) -> Moments:
    accumulator = MomentsAccumulator(rows.shape[0], rows.shape[2])
    for part in np.split(rows, cuts, axis=1):
        accumulator.add(part)
    return accumulator.result()


SIZES = {
    "groups": st.integers(1, 3),
    "count": st.integers(1, 20),
    "cols": st.integers(1, 12),
    "seed": st.integers(0, 99),
}


@given(**SIZES, cuts=st.lists(st.integers(0, 20), max_size=3))
def test_batches_add_up(groups: int, count: int, cols: int, seed: int, cuts: list[int]) -> None:
    rows = draw_rows(groups, count, cols, seed)
    whole, parts = moments_of(rows), moments_of(rows, *sorted(cuts))
    where = f"groups {groups}, rows {count}, cols {cols}, seed {seed}, cuts {cuts}"
    assert whole.rows == parts.rows == count, where
    assert whole.groups == parts.groups == groups, where
    np.testing.assert_allclose(parts.sums, whole.sums, rtol=1e-10, atol=1e-10, err_msg=where)
    for ours, theirs in zip(parts.blocks, whole.blocks, strict=True):
        for mine, yours in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, yours, rtol=1e-10, atol=1e-10, err_msg=where)


@given(**SIZES)
def test_moments_are_sums_over_rows(groups: int, count: int, cols: int, seed: int) -> None:
    rows = draw_rows(groups, count, cols, seed).astype(np.float64)
    found = moments_of(rows)
    np.testing.assert_allclose(found.sums, rows.sum(axis=1), atol=1e-9)
    for group in range(groups):
        assert len(found.blocks[group]) == 1
        expected = sum(np.outer(row, row) for row in rows[group])
        np.testing.assert_allclose(found.blocks[group][0], expected, atol=1e-9, err_msg=f"group {group} seed {seed}")


@given(**SIZES, outputs=st.integers(1, 4))
def test_energy_is_the_mean_squared_output(groups: int, count: int, cols: int, seed: int, outputs: int) -> None:
    rows = draw_rows(groups, count, cols, seed)
    matrix = np.random.default_rng(seed + 1).normal(size=(groups * outputs, cols)).astype(np.float32)
    output = rows.astype(np.float64) @ matrix.astype(np.float64).reshape(groups, outputs, cols).transpose(0, 2, 1)
    expected = (output**2).sum(axis=(0, 2)).mean()  # of one row: over all outputs of all groups
    where = f"groups {groups}, rows {count}, cols {cols}, seed {seed}, outputs {outputs}"
    assert moments_of(rows).energy(matrix) == pytest.approx(expected, rel=1e-9), where


@given(**SIZES)
def test_energy_of_no_error_is_zero(groups: int, count: int, cols: int, seed: int) -> None:
    assert moments_of(draw_rows(groups, count, cols, seed)).energy(np.zeros((groups * 2, cols), np.float32)) == 0


def pooled(rows: NDArray[np.floating], width: int) -> NDArray[np.float64]:
    """The mean over groups, column blocks and rows of ``x_j x_j^T``; columns beyond the last are zero."""
    cols = rows.shape[2]
    blocks = -(-cols // width)
    padded = np.pad(rows.astype(np.float64), ((0, 0), (0, 0), (0, blocks * width - cols)))
    stacked = padded.reshape(-1, width)  # the matrix that the paper calls unrolled: one block of one row each
    return stacked.T @ stacked / len(stacked)


@given(**SIZES, width=st.integers(1, 14))
def test_pooled_gram_is_the_mean_over_all_blocks(groups: int, count: int, cols: int, seed: int, width: int) -> None:
    rows = draw_rows(groups, count, cols, seed)
    where = f"groups {groups}, rows {count}, cols {cols}, width {width}, seed {seed}"
    np.testing.assert_allclose(moments_of(rows).pooled_gram(width), pooled(rows, width), atol=1e-8, err_msg=where)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize(("groups", "cols"), [(1, 40), (2, 25), (1, 24), (1, 13)])
def test_above_the_limit_only_diagonal_blocks_are_kept(
    monkeypatch: pytest.MonkeyPatch, groups: int, cols: int, width: int
) -> None:
    rows = draw_rows(groups, 9, cols, seed=cols)
    full = moments_of(rows)
    monkeypatch.setattr(vqonnx.moments, "FULL_COLS", 12)
    monkeypatch.setattr(vqonnx.moments, "BLOCK_COLS", 12)
    found = moments_of(rows, 4)
    sizes = [12] * (cols // 12) + ([cols % 12] if cols % 12 else [])
    assert [[block.shape for block in blocks] for blocks in found.blocks] == [[(s, s) for s in sizes]] * groups
    np.testing.assert_allclose(found.sums, full.sums, atol=1e-9)
    for group in range(groups):
        start = 0
        for block in found.blocks[group]:
            inside = slice(start, start + len(block))
            np.testing.assert_allclose(block, full.blocks[group][0][inside, inside], atol=1e-9)
            start += len(block)
    # No block of weights straddles two of them, so the pooled metric is still exact.
    np.testing.assert_allclose(found.pooled_gram(width), pooled(rows, width), atol=1e-8, err_msg=f"width {width}")


def test_energy_of_diagonal_blocks_leaves_out_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw_rows(2, 30, 10, seed=1)
    matrix = np.random.default_rng(2).normal(size=(6, 10)).astype(np.float32)
    monkeypatch.setattr(vqonnx.moments, "FULL_COLS", 4)
    monkeypatch.setattr(vqonnx.moments, "BLOCK_COLS", 4)
    by_group = matrix.astype(np.float64).reshape(2, 3, 10).transpose(0, 2, 1)
    parts = [rows[:, :, cut].astype(np.float64) @ by_group[:, cut] for cut in (slice(0, 4), slice(4, 8), slice(8, 10))]
    expected = sum((part**2).sum(axis=(0, 2)).mean() for part in parts)
    assert moments_of(rows).energy(matrix) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 16, 18])
def test_usual_widths_divide_the_diagonal_blocks(width: int) -> None:
    assert vqonnx.moments.BLOCK_COLS % width == 0
    assert vqonnx.moments.BLOCK_COLS <= vqonnx.moments.FULL_COLS


def test_float16_rows_are_summed_in_float64() -> None:
    rows = np.full((1, 4000, 1), 30, np.float16)  # 900 * 4000 is beyond float16
    found = moments_of(rows)
    assert found.sums.tolist() == [[120_000.0]]
    assert found.blocks[0][0].tolist() == [[3_600_000.0]]


@pytest.mark.parametrize(
    ("signal", "noise", "db"), [(1, 1, 0), (100, 1, 20), (1, 10, -10), (1, 0, None), (0, 1, None), (0, 0, None)]
)
def test_snr_in_db(signal: float, noise: float, db: float | None) -> None:
    assert snr_db(signal, noise) == (None if db is None else pytest.approx(db))
