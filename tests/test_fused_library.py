"""The fused ops of the library against the same layer in onnxruntime's own operators, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fused import CONV, F32, Layer, conv, matrix, open_session
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_library import random_form

EXACT = 1e-5  # relative error of float32 sums in another order; a Clip takes away much of what it is relative to

FAST = 3e-4  # where tables of 16 bits are taken by themselves


def run(layer: Layer, x: NDArray[Any], threads: int = 1, **extra: Any) -> NDArray[np.float32]:
    return open_session(layer.fused(**extra), threads).run(None, feeds(layer, x))[0]


def feeds(layer: Layer, x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    if "Add" not in layer.op:
        return {"X": x}
    shape = open_session(replace(layer, op="Conv").plain()).run(None, {"X": x})[0].shape
    return {"X": x, "Z": np.random.default_rng(9).standard_normal(shape).astype(F32)}


def check(layer: Layer, shape: tuple[int, ...], bound: float = EXACT, threads: int = 1, **extra: Any) -> None:
    x = np.random.default_rng(8).standard_normal(shape).astype(F32)
    want = open_session(layer.plain()).run(None, feeds(layer, x))[0]
    got = run(layer, x, threads, **extra)
    what = f"{layer.op} {layer.sizes} {layer.attributes} of {shape}"
    assert got.shape == want.shape, what
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want), what


def bias(size: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal(size).astype(F32)


CASES = [
    pytest.param((64, 32, 3, 3), {"pads": (1, 1, 1, 1)}, (1, 32, 28, 28), id="3x3"),
    pytest.param((40, 24, 1, 1), {}, (2, 24, 17, 13), id="1x1"),
    pytest.param((40, 24, 1, 1), {}, (3, 24, 2, 3), id="few-positions"),
    pytest.param((70, 48, 1, 1), {"strides": (2, 2)}, (1, 48, 15, 14), id="1x1-strided"),
    pytest.param((33, 5, 7, 7), {"strides": (2, 2), "pads": (3, 3, 3, 3)}, (1, 5, 33, 41), id="7x7-strided"),
    pytest.param((30, 4, 3, 2), {"group": 5, "pads": (2, 0, 1, 3), "strides": (2, 3)}, (2, 20, 29, 31), id="grouped"),
    pytest.param((30, 6, 3, 3), {"dilations": (2, 3), "pads": (2, 3, 2, 3)}, (1, 6, 9, 20), id="dilated"),
    pytest.param((30, 6, 3, 3), {"dilations": (2, 3), "strides": (3, 2)}, (1, 6, 19, 20), id="dilated-strided"),
    pytest.param((24, 1, 3, 3), {"group": 24, "pads": (1, 1, 1, 1)}, (2, 24, 14, 15), id="depthwise"),
    pytest.param(
        (24, 1, 5, 5), {"group": 12, "pads": (2, 2, 2, 2), "strides": (2, 2)}, (1, 12, 14, 15), id="multiplier"
    ),
    pytest.param((20, 9, 5), {"pads": (2, 2)}, (2, 9, 50), id="1-d"),
    pytest.param(
        (20, 3, 4), {"pads": (0, 3), "strides": (3,), "dilations": (2,), "group": 4}, (1, 12, 50), id="1-d-grouped"
    ),
    pytest.param((1, 1, 1, 1), {}, (1, 1, 1, 1), id="one"),
    pytest.param((5, 3, 2, 2), {"pads": (4, 4, 4, 4)}, (1, 3, 2, 2), id="mostly-pads"),
    pytest.param((9, 300, 3, 3), {"pads": (1, 1, 1, 1)}, (1, 300, 6, 40), id="deep"),
    pytest.param((50, 700, 1, 1), {}, (1, 700, 40, 40), id="deep-1x1"),
]


@pytest.mark.parametrize("op", CONV)
@pytest.mark.parametrize("order", ["ihw", "hwi", "ohw"])
@pytest.mark.parametrize(("weight", "options", "shape"), CASES)
def test_convolutions(
    weight: tuple[int, ...], options: dict[str, Any], shape: tuple[int, ...], order: str, op: str
) -> None:
    outputs, inputs = weight[:2]
    taps = int(np.prod(weight[2:]))
    rows, cols = (inputs, outputs * taps) if order == "ohw" else (outputs, inputs * taps)
    form = random_form(len(op), rows=rows, cols=cols, width=9, words=37, books=2, stages=1 + len(op) % 2)
    layer = conv(form, weight, op=op, order=order, bias=bias(outputs), **options)
    check(layer, shape, precision="exact")
    check(layer, shape, FAST)


@pytest.mark.parametrize("op", ["Gemm", "GemmRelu", "MatMul"])
@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("order", ["oi", "io"])
@pytest.mark.parametrize("shape", [(1, 70), (2, 70), (5, 70), (70, 70), (3, 1), (33, 600)])
def test_matrices(shape: tuple[int, int], order: str, trans: int, op: str) -> None:
    for outputs in (1, 31, 300):
        rows, cols = (outputs, shape[1]) if order == "oi" else (shape[1], outputs)
        form = random_form(outputs, rows=rows, cols=cols, words=100)
        layer = matrix(form, op=op, trans=0 if op == "MatMul" else trans, order=order, bias=bias(outputs))
        check(layer, shape, precision="exact")
        check(layer, shape, FAST)


@pytest.mark.parametrize("shape", [(70,), (2, 3, 70), (1, 1, 1, 70), (0, 70), (2, 0, 70)])
def test_matmul_of_any_rank(shape: tuple[int, ...]) -> None:
    check(matrix(random_form(1, rows=20, cols=70)), shape)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, tuple[int, ...]]:
    """Any form, any window."""
    axes = draw(st.integers(1, 2))
    sizes = st.lists(st.integers(1, 4), min_size=axes, max_size=axes)
    kernel, strides, dilations = draw(sizes), draw(sizes), draw(sizes)
    pads = draw(st.lists(st.integers(0, 3), min_size=2 * axes, max_size=2 * axes))
    group = draw(st.integers(1, 4))
    outputs = group * draw(st.integers(1, 20))
    inputs = draw(st.integers(1, 12))
    image = [draw(st.integers((k - 1) * d + 1, 30)) for k, d in zip(kernel, dilations, strict=True)]
    order = draw(st.sampled_from(["ihw", "hwi", "ohw"]))
    taps = int(np.prod(kernel))
    rows, cols = (inputs, outputs * taps) if order == "ohw" else (outputs, inputs * taps)
    form = random_form(
        draw(st.integers(0, 99)),
        rows=rows,
        cols=cols,
        width=draw(st.integers(1, 20)),
        words=draw(st.integers(1, 300)),
        stages=draw(st.integers(1, 3)),
        books=draw(st.sampled_from([1, 2, 10**6])),
        dtype=draw(st.sampled_from([np.float16, np.float32])),
        scales=draw(st.sampled_from([None, np.float16, np.float32])),
    )
    layer = conv(
        form,
        (outputs, inputs, *kernel),
        op=draw(st.sampled_from(CONV)),
        order=order,
        group=group,
        strides=tuple(strides),
        dilations=tuple(dilations),
        pads=tuple(pads),
        bias=bias(outputs),
    )
    return layer, (draw(st.integers(1, 2)), group * inputs, *image)


@settings(max_examples=150, deadline=None)
@given(layers())
def test_any_form_and_window(case: tuple[Layer, tuple[int, ...]]) -> None:
    layer, shape = case
    check(layer, shape, precision="exact")


@pytest.mark.parametrize("op", ["Conv", "ConvRelu", "ConvAddRelu"])
def test_nan_and_infinity_pass_through(op: str) -> None:
    layer = conv(random_form(1, rows=40, cols=24 * 9), (40, 24, 3, 3), op=op, order="hwi", pads=(1, 1, 1, 1))
    x = np.random.default_rng(1).standard_normal((1, 24, 14, 14)).astype(F32)
    for value in (np.nan, np.inf, -np.inf):
        x[0, 3, 7, 7] = value
        want = open_session(layer.plain()).run(None, feeds(layer, x))[0]
        got = run(layer, x)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want))


def test_threads_do_not_change_the_result() -> None:
    x = np.random.default_rng(1).standard_normal((2, 64, 28, 28)).astype(F32)
    for order, width in (("ihw", 9), ("hwi", 8)):
        layer = conv(random_form(1, rows=96, cols=576, width=width), (96, 64, 3, 3), order=order, pads=(1, 1, 1, 1))
        first, *others = (run(layer, x, threads) for threads in (1, 2, 3))
        for other in others:
            np.testing.assert_array_equal(first, other)
    for rows in (1, 2, 20):
        layer = matrix(random_form(1, rows=1000, cols=2048, width=8, words=256), op="Gemm")
        x = np.random.default_rng(1).standard_normal((rows, 2048)).astype(F32)
        first, *others = (run(layer, x, threads) for threads in (1, 2, 3))
        for other in others:
            np.testing.assert_array_equal(first, other)
