"""Laws of settling: no sweep makes the error larger, no level alone could be better, what was lost is made good."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_methods import gaussian

from vqonnx.method import Layer
from vqonnx.methods import RTN, Settled
from vqonnx.methods.settled import settle
from vqonnx.moments import Cross, MomentsAccumulator
from vqonnx.refine import Target, target_of


def problem(groups: int, rows: int, cols: int, bits: int, seed: int) -> tuple[Target, NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((groups, cols, cols))
    metrics = tuple(mixed @ mixed.T + 0.1 * np.eye(cols) for mixed in mixing)
    weight = rng.standard_normal((groups * rows, cols))
    levels = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), weight.shape).astype(np.float64)
    return Target.of(weight, metrics, 1, rng.uniform(0.1, 1, len(weight))), levels


def error(target: Target, levels: NDArray[np.float64]) -> float:
    return target.distance(levels * target.scales[:, None])


PROBLEMS = {
    "groups": st.integers(1, 4),
    "rows": st.integers(1, 3),
    "cols": st.integers(1, 6),
    "bits": st.integers(1, 4),
    "seed": st.integers(0, 999),
}


@given(**PROBLEMS)
def test_no_sweep_makes_the_error_larger(groups: int, rows: int, cols: int, bits: int, seed: int) -> None:
    target, levels = problem(groups, rows, cols, bits, seed)
    found = settle(target, levels, target.scales, bits)
    assert error(target, found) <= error(target, levels) * (1 + 1e-9)
    assert found.min() >= -(2 ** (bits - 1))
    assert found.max() < 2 ** (bits - 1)
    assert (found == np.rint(found)).all()


@given(**PROBLEMS)
def test_it_ends_where_no_single_level_could_be_better(groups: int, rows: int, cols: int, bits: int, seed: int) -> None:
    target, levels = problem(groups, rows, cols, bits, seed)
    for _ in range(100):
        before, levels = levels, settle(target, levels, target.scales, bits)
        if (before == levels).all():
            break
    least = error(target, levels)
    for place in np.ndindex(levels.shape):
        for level in range(-(2 ** (bits - 1)), 2 ** (bits - 1)):
            other = levels.copy()
            other[place] = level
            assert error(target, other) >= least * (1 - 1e-9)


def test_many_columns_are_settled_like_one_after_the_other() -> None:
    target, levels = problem(2, 3, 150, 3, 7)
    found = settle(target, levels, target.scales, 3)
    wanted = levels.copy()
    for column in range(150):
        for row in range(6):
            metric = target.metrics[row // 3]
            missed = target.weight[row] - wanted[row] * target.scales[row]
            best = wanted[row, column] + missed @ metric[column] / metric[column, column] / target.scales[row]
            wanted[row, column] = np.clip(np.rint(best), -4, 3)
    assert (found == wanted).all()


def test_where_inputs_have_nothing_in_common_it_is_rounding_to_nearest() -> None:
    target, levels = problem(3, 4, 5, 4, 0)
    plain = replace(target, metrics=tuple(np.diag(np.arange(1.0, 6)) for _ in range(3)))
    nearest = np.clip(np.rint(target.weight / target.scales[:, None]), -8, 7)
    assert (settle(plain, levels, target.scales, 4) == nearest).all()


def layer_behind(mixing: NDArray[np.float64], groups: int = 1) -> Layer:
    """A layer whose input in the compressed model is a mixture of what it was in the original."""
    cols = len(mixing)
    layer = gaussian(8 * groups, cols, 5, (3, 3) if groups > 1 else ())
    before = np.random.default_rng(1).normal(size=(groups, 5000, cols)) + 0.5
    after = before @ mixing
    accumulator = MomentsAccumulator(groups, cols)
    accumulator.add(after)
    cross = Cross(before.sum(axis=1), tuple(a.T @ b for a, b in zip(after, before, strict=True)))
    return replace(layer, moments=accumulator.result(), cross=cross, groups=groups)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_it_makes_good_what_layers_before_have_lost(bits: int, groups: int) -> None:
    mixing = np.eye(9) + 0.1 * np.random.default_rng(2).normal(size=(9, 9))
    layer = layer_behind(mixing, groups)
    wanted = target_of(layer, 1, asymmetric=True)
    nearest, settled = RTN(bits=bits).encode(layer), Settled(bits=bits).encode(layer)
    assert settled.nbytes == nearest.nbytes
    # Rounding to nearest aims at the weights as they were, which miss by what the mixture does.
    assert wanted.distance(settled.decode()) < (0.5 if bits == 4 else 0.1) * wanted.distance(nearest.decode())
    plain = target_of(layer, 1, asymmetric=False)
    same = Settled(bits=bits, asymmetric=False).encode(layer)
    assert plain.distance(same.decode()) <= plain.distance(nearest.decode())


def test_rows_that_float16_can_hardly_hold_keep_a_step() -> None:
    layer = layer_behind(np.eye(9))
    weight = layer.weight.copy()
    weight[1] *= 3e-7
    weight[2] = 0
    form = Settled(bits=3).encode(replace(layer, weight=weight))
    assert form.scales is not None
    assert form.scales.dtype == np.float16
    assert (form.scales > 0).all()
    assert np.isfinite(form.decode()).all()
    assert (form.decode()[2] == 0).all()
