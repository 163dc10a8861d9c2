"""Rows of `unfold` times the matrix are the layer's output, exactly: values are whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ORDERS, Single, convs, gemms, matmuls, positions
from numpy.typing import NDArray

from vqonnx.unfold import unfold
from vqonnx.view import Order


def product(case: Single, rows: NDArray[np.floating], order: Order) -> NDArray[np.floating]:
    """``[groups, n, outputs]``."""
    matrix = case.view(order).matrix(case.arrays[1])
    return rows @ matrix.reshape(len(rows), -1, matrix.shape[1]).transpose(0, 2, 1)


def check(case: Single, order: Order) -> None:
    x, w = case.arrays
    expected = case.by_row(case.run(x, w))
    rows = unfold(case.op_type, case.read_attributes, case.weight, x, order=order)
    assert rows.shape == (*expected.shape[:2], case.view(order).cols), f"{case} {order}"
    np.testing.assert_array_equal(product(case, rows, order), expected, err_msg=f"{case} {order}")


@given(convs(), st.sampled_from(ORDERS))
@settings(max_examples=250)
def test_conv_is_rows_times_matrix(case: Single, order: Order) -> None:
    check(case, order)


@given(convs("ConvTranspose"), st.sampled_from(ORDERS))
@settings(max_examples=250)
def test_conv_transpose_is_rows_times_matrix(case: Single, order: Order) -> None:
    check(case, order)


@given(gemms())
def test_gemm_is_rows_times_matrix(case: Single) -> None:
    check(case, "ihw")


@given(matmuls())
@settings(max_examples=250)
def test_matmul_is_rows_times_matrix(case: Single) -> None:
    check(case, "ihw")


@pytest.mark.parametrize(
    ("stack", "outer"),
    [
        ((2,), (2,)),
        ((2,), (1,)),
        ((1,), (2,)),
        ((2,), ()),
        ((2, 3), (3,)),
        ((3,), (2, 3)),
        ((1, 3), (2, 3)),
        ((2, 1), (2, 3)),
    ],
)
def test_stacked_matmul_broadcasts_like_numpy(stack: tuple[int, ...], outer: tuple[int, ...]) -> None:
    check(Single("MatMul", (*stack, 4, 5), (*outer, 3, 4), seed=1), "ihw")


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_odd_padding_goes_to_the_named_side(op_type: str, auto_pad: str) -> None:
    weight = (3, 2, 2, 4) if op_type == "Conv" else (2, 3, 2, 4)
    check(Single(op_type, weight, (2, 2, 5, 6), {"auto_pad": auto_pad, "strides": [1, 2]}, seed=2), "hwi")


@pytest.mark.parametrize("shape", [[9, 9], [10, 9], [9, 8]])
def test_output_shape_overrides_pads(shape: list[int]) -> None:
    attributes = {"output_shape": shape, "strides": [2, 2], "pads": [1, 0, 0, 2], "output_padding": [1, 1]}
    check(Single("ConvTranspose", (2, 3, 3, 3), (2, 2, 4, 4), attributes, seed=3), "ihw")


def as_set(rows: NDArray[np.floating]) -> list[tuple[float, ...]]:
    return sorted(map(tuple, rows.tolist()))


@given(st.one_of(convs(), convs("ConvTranspose")), st.sampled_from(ORDERS), st.integers(1, 6), st.integers(0, 9))
@settings(max_examples=120)
def test_a_choice_of_positions_is_k_different_ones_of_each_image(case: Single, order: Order, k: int, seed: int) -> None:
    x, w = case.arrays
    total = positions(case, case.run(x, w))
    # Every value of the input differs, and 0 is padding: rows that are not all padding tell their position.
    x = np.arange(1, x.size + 1, dtype=np.float32).reshape(x.shape)
    everything = unfold(case.op_type, case.read_attributes, case.weight, x, order=order)
    chosen = unfold(
        case.op_type, case.read_attributes, case.weight, x, order=order, positions=k, rng=np.random.default_rng(seed)
    )
    images, taken = case.input[0], min(k, total)
    assert chosen.shape == (case.group, images * taken, everything.shape[2]), f"{case} k={k} seed={seed}"
    # Rows of all groups side by side: the same positions are taken of every group.
    wide = everything.transpose(1, 0, 2).reshape(images, total, -1)
    few = chosen.transpose(1, 0, 2).reshape(images, taken, -1)
    for image in range(images):
        left = as_set(wide[image])
        for row in as_set(few[image]):
            assert row in left, f"{case} k={k} seed={seed}: image {image} has no such row"
            left.remove(row)  # each position at most once


@pytest.mark.parametrize(("input_shape", "k", "rows"), [((50, 4), 1, 50), ((5, 30, 4), 7, 35), ((5, 6, 4), 7, 30)])
def test_rows_of_a_matmul_are_chosen_as_well(input_shape: tuple[int, ...], k: int, rows: int) -> None:
    case = Single("MatMul", (4, 3), input_shape, seed=4)
    x = np.arange(np.prod(input_shape), dtype=np.float32).reshape(input_shape)
    chosen = unfold("MatMul", {}, case.weight, x, positions=k, rng=np.random.default_rng(0))
    assert chosen.shape == (1, rows, 4)
    assert len(np.unique(chosen[0], axis=0)) == rows
    assert set(as_set(chosen[0])) <= set(as_set(x.reshape(-1, 4)))


def test_each_matrix_of_a_stack_gets_its_own_rows() -> None:
    x = np.arange(3 * 20 * 4, dtype=np.float32).reshape(3, 20, 4)
    chosen = unfold("MatMul", {}, (3, 4, 2), x, positions=5, rng=np.random.default_rng(0))
    assert chosen.shape == (3, 5, 4)
    for matrix in range(3):
        assert set(as_set(chosen[matrix])) <= set(as_set(x[matrix])), f"matrix {matrix}"


def test_the_same_generator_makes_the_same_choice() -> None:
    case = Single("Conv", (2, 3, 3, 3), (2, 3, 9, 9), seed=5)
    first, second, other = (
        unfold("Conv", {}, case.weight, case.arrays[0], positions=4, rng=np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
