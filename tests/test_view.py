"""A view brings the matrix back into the tensor, and a row holds the weights of one output in the order of `unfold`."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ORDERS, VIEW_ORDERS, Single, singles

from vqonnx.errors import OptionError
from vqonnx.unfold import unfold
from vqonnx.view import Order, ViewOrder, conv_transpose_view, conv_view, matmul_view


@given(singles(), st.sampled_from(VIEW_ORDERS))
@settings(max_examples=200)
def test_tensor_undoes_matrix(case: Single, order: ViewOrder) -> None:
    view = case.view(order)
    tensor = np.arange(prod(case.weight), dtype=np.float32).reshape(case.weight)
    matrix = view.matrix(tensor)
    assert matrix.shape == (view.rows, view.cols), f"{case} {order}"
    assert matrix.dtype == np.float32
    assert matrix.flags.c_contiguous
    np.testing.assert_array_equal(view.tensor(matrix), tensor, err_msg=f"{case} {order}")
    # The formula of docs/format.md, whose reader in the model is Reshape and Transpose.
    written = matrix.reshape(view.split).transpose(view.perm)
    assert written.shape == view.transposed
    np.testing.assert_array_equal(written.reshape(view.shape), tensor, err_msg=f"{case} {order}")


@given(singles(), st.sampled_from(ORDERS), st.data())
@settings(max_examples=200)
def test_an_entry_multiplies_its_column_for_its_output_only(case: Single, order: Order, data: st.DataObject) -> None:
    """With a single 1 in the matrix at (r, c), output r is column c of the unfolded input and the others are 0."""
    view = case.view(order)
    row, col = data.draw(st.integers(0, view.rows - 1)), data.draw(st.integers(0, view.cols - 1))
    matrix = np.zeros((view.rows, view.cols), np.float32)
    matrix[row, col] = 1
    x = case.arrays[0]
    y = case.by_row(case.run(x, view.tensor(matrix)))
    rows = unfold(case.op_type, case.read_attributes, case.weight, x, order=order)
    group, output = divmod(row, view.rows // len(rows))
    expected = np.zeros_like(y)
    expected[group, :, output] = rows[group, :, col]
    np.testing.assert_array_equal(y, expected, err_msg=f"{case} {order} row {row} col {col}")


@given(singles())
@settings(max_examples=200)
def test_by_input_the_matrix_is_cut_between_inputs_instead_of_outputs(case: Single) -> None:
    tensor = np.arange(prod(case.weight), dtype=np.float32).reshape(case.weight)
    outer, inner = case.view("ihw"), case.view("ohw")
    assert (outer.by_input, inner.by_input) == (False, True)
    taps = outer.cols // inner.rows
    assert (inner.rows * taps, inner.cols) == (outer.cols, outer.rows * taps), f"{case}"
    by_output = outer.matrix(tensor).reshape(outer.rows, inner.rows, taps)
    by_input = inner.matrix(tensor).reshape(inner.rows, outer.rows, taps)
    np.testing.assert_array_equal(by_input.swapaxes(0, 1), by_output, err_msg=f"{case}")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_matrix_is_float32_whatever_the_tensor(dtype: type) -> None:
    tensor = np.arange(24).reshape(2, 3, 2, 2).astype(dtype)
    matrix = conv_view(tensor.shape, "ihw").matrix(tensor)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, np.arange(24, dtype=np.float32).reshape(2, 12))


def test_hwi_puts_the_channels_of_one_tap_side_by_side() -> None:
    tensor = np.arange(2 * 3 * 4, dtype=np.float32).reshape(1, 2, 3, 4)
    np.testing.assert_array_equal(conv_view((1, 2, 3, 4), "hwi").matrix(tensor)[0, :4], [0, 12, 1, 13])
    np.testing.assert_array_equal(conv_view((1, 2, 3, 4), "ihw").matrix(tensor)[0, :4], [0, 1, 2, 3])


def test_splits_are_those_of_the_format_page() -> None:
    cases = [
        (conv_view((8, 3, 5, 7), "ihw"), (8, 3, 5, 7), (0, 1, 2, 3)),
        (conv_view((8, 3, 5, 7), "hwi"), (8, 5, 7, 3), (0, 3, 1, 2)),
        (conv_view((8, 3, 5, 7), "ohw"), (3, 8, 5, 7), (1, 0, 2, 3)),
        (conv_transpose_view((6, 4, 5, 7), 2, "ihw"), (2, 4, 3, 5, 7), (0, 2, 1, 3, 4)),
        (conv_transpose_view((6, 4, 5, 7), 2, "hwi"), (2, 4, 5, 7, 3), (0, 4, 1, 2, 3)),
        (conv_transpose_view((6, 4, 5, 7), 1, "ihw"), (4, 6, 5, 7), (1, 0, 2, 3)),
        (conv_transpose_view((6, 4, 5, 7), 2, "ohw"), (3, 2, 4, 5, 7), (1, 0, 2, 3, 4)),
        (conv_transpose_view((6, 4, 5, 7), 1, "ohw"), (6, 4, 5, 7), (0, 1, 2, 3)),
        (matmul_view((8, 3), outputs_first=True), (8, 3), (0, 1)),
        (matmul_view((3, 8), outputs_first=False), (8, 3), (1, 0)),
        (matmul_view((2, 5, 3, 8), outputs_first=False), (2, 5, 8, 3), (0, 1, 3, 2)),
        (matmul_view((8, 3), outputs_first=True, order="ohw"), (3, 8), (1, 0)),
        (matmul_view((3, 8), outputs_first=False, order="ohw"), (3, 8), (0, 1)),
        (matmul_view((2, 5, 3, 8), outputs_first=False, order="ohw"), (3, 2, 5, 8), (1, 2, 0, 3)),
    ]
    for view, split, perm in cases:
        assert (view.split, view.perm) == (split, perm), f"{view}"


@pytest.mark.parametrize(
    "make", [lambda order: conv_view((2, 2, 3), order), lambda o: conv_transpose_view((2, 2, 3), 1, o)]
)
def test_unknown_order_is_named(make) -> None:
    with pytest.raises(OptionError, match=r"'whi'.*ihw, hwi, ohw"):
        make("whi")
