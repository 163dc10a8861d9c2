"""The fused ops of the library against the same layer in onnxruntime's own operators, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from fused import CONV, F32, Layer, conv, matrix, open_session
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
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
    # Where large products cancel out, float32 cannot do better than a unit in the last place of the largest.
    largest = np.abs(x).max(initial=0) * np.abs(np.asarray(layer.form.codebooks, F32)).max()
    rounding = float(np.spacing(F32(largest))) * np.sqrt(want.size)
    # The error of tables is one of the product; a Clip may take away much of it.
    clips = bound > EXACT and "Clip" in layer.op
    product = open_session(replace(layer, op="Conv").plain()).run(None, {"X": x})[0] if clips else want
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(product) + rounding, what


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
        dtype=draw(st.sampled_from([np.int8, np.float16, np.float32])),
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


@pytest.mark.parametrize("op", ["Conv", "ConvRelu", "ConvAddRelu", "ConvSilu"])
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


def _gemm() -> Layer:
    return matrix(random_form(5, rows=12, cols=70, words=128), op="Gemm", trans=1)


def _conv() -> Layer:
    return conv(
        random_form(5, rows=12, cols=72, words=128), (12, 8, 3, 3), op="ConvClip", order="hwi", pads=(1, 1, 1, 1)
    )


# What is wrong, and what the message must say.
REFUSED = [
    pytest.param(_gemm, {"transB": None}, "attribute transB is missing", id="no-trans"),
    pytest.param(_gemm, {"transB": 2}, "transB is 2; it must be 0 or 1", id="trans-2"),
    pytest.param(_gemm, {"perm": None}, "attribute perm is missing", id="no-perm"),
    pytest.param(_gemm, {"perm": [0, 0]}, r"perm \[0, 0\] is no permutation", id="perm-twice"),
    pytest.param(_gemm, {"coding": "rans"}, "coding is 'rans'", id="coding"),
    pytest.param(_gemm, {"precision": "best"}, "precision is 'best'; known are auto, exact and fast", id="precision"),
    pytest.param(_gemm, {"precision": 1}, "precision is no string", id="precision-number"),
    pytest.param(_gemm, {"transB": 0}, r"B is \[12\]; it must be \[70\]", id="bias"),
    pytest.param(_conv, {"strides": None}, "attribute strides is missing", id="no-strides"),
    pytest.param(_conv, {"strides": [1]}, r"strides are \[1\]; there must be 2", id="strides-short"),
    pytest.param(_conv, {"strides": [1, 0]}, r"strides are \[1, 0\]; each must be 1 to", id="stride-0"),
    pytest.param(_conv, {"strides": [1, 2**62]}, "each must be 1 to", id="stride-huge"),
    pytest.param(_conv, {"dilations": [1, -1]}, r"dilations are \[1, -1\]; each must be 1 to", id="dilation-negative"),
    pytest.param(_conv, {"pads": [1, 1]}, r"pads are \[1, 1\]; there must be 4", id="pads-short"),
    pytest.param(_conv, {"pads": [0, 0, 0, -1]}, "each must be 0 to", id="pad-negative"),
    pytest.param(_conv, {"pads": [2**62] * 4}, "each must be 0 to", id="pads-huge"),
    pytest.param(_conv, {"group": None}, "attribute group is missing", id="no-group"),
    pytest.param(_conv, {"group": 0}, "group is 0, which does not divide 12 outputs", id="group-0"),
    pytest.param(_conv, {"group": 5}, "group is 5, which does not divide 12 outputs", id="group-5"),
    pytest.param(_conv, {"group": -(2**63)}, "does not divide 12 outputs", id="group-negative"),
]


@pytest.mark.parametrize(("make", "attributes", "message"), REFUSED)
def test_bad_nodes_are_refused_when_the_session_is_made(
    make: Callable[[], Layer], attributes: dict[str, Any], message: str
) -> None:
    layer = make()
    with pytest.raises(Exception, match=message) as error:
        open_session(layer.fused(**attributes))
    assert f"vqonnx.{layer.op} 'layer': " in str(error.value)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("name", ["codes", "codebooks", "scales", "layout", "min", "max"])
def test_what_must_be_constant(name: str) -> None:
    model = onnx.load_from_string(_conv().fused())
    tensor = next(t for t in model.graph.initializer if t.name == name)
    model.graph.initializer.remove(tensor)
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    with pytest.raises(Exception, match=rf"vqonnx\.ConvClip 'layer': {name} is no constant initializer"):
        open_session(model.SerializeToString())


def test_a_bias_may_be_computed() -> None:
    layer = matrix(random_form(5, rows=12, cols=70), op="GemmRelu", trans=1)
    model = onnx.load_from_string(layer.fused())
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "B"))
    model.graph.input.append(helper.make_tensor_value_info("B", TensorProto.FLOAT, None))
    session = open_session(model.SerializeToString())
    x = np.ones((2, 70), F32)
    want = np.maximum(x @ layer.weight.T + bias(12), 0)
    np.testing.assert_allclose(session.run(None, {"X": x, "B": bias(12)})[0], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match=r"B is \[11\]; it must be \[12\]"):
        session.run(None, {"X": x, "B": bias(11)})


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        pytest.param(_gemm, (2, 71), r"X is \[2, 71\]; its last axis must be 70", id="gemm"),
        pytest.param(_gemm, (70,), r"X is \[70\]; its last axis must be 70, of 2", id="gemm-rank"),
        pytest.param(
            _conv, (1, 9, 5, 5), r"X is \[1, 9, 5, 5\]; the weight wants 1 groups of 8 channels", id="channels"
        ),
        pytest.param(_conv, (1, 8, 5), r"X is \[1, 8, 5\]; it must have 4 axes", id="conv-rank"),
        pytest.param(_conv, (1, 8, 5, 0), "image axis of 0", id="empty-image"),
    ],
)
def test_bad_inputs_are_refused_when_they_come(make: Callable[[], Layer], shape: tuple[int, ...], message: str) -> None:
    session = open_session(make().fused())
    with pytest.raises(Exception, match=message):
        session.run(None, {"X": np.zeros(shape, F32)})


def test_an_addend_of_another_shape_is_refused() -> None:
    session = open_session(replace(_conv(), op="ConvAdd").fused())
    with pytest.raises(Exception, match=r"Z is \[1, 12, 1, 1\], but the output \[1, 12, 5, 5\]"):
        session.run(None, {"X": np.zeros((1, 8, 5, 5), F32), "Z": np.zeros((1, 12, 1, 1), F32)})
