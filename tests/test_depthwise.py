"""The fused depthwise ops of the library against onnxruntime's own convolution, and every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fused import F32, open_session
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

OPS = ("DepthwiseConv", "DepthwiseConvRelu", "DepthwiseConvClip", "DepthwiseConvSilu")


def model(op: str, weight: np.ndarray, plain: bool = False, **attributes: Any) -> bytes:
    """A layer in one node, or in standard operators."""
    channels, axes = len(weight), weight.ndim - 2
    given = {"strides": [1] * axes, "dilations": [1] * axes, "pads": [0] * 2 * axes, "group": channels, **attributes}
    given = {name: value for name, value in given.items() if value is not None}
    arrays = {"W": weight, "B": np.random.default_rng(1).standard_normal(channels).astype(F32)}
    limits = {"min": np.array(-0.5, F32), "max": np.array(1.5, F32)} if op.endswith("Clip") else {}
    step = op.removeprefix("DepthwiseConv")
    if not plain:
        nodes = [helper.make_node(op, ["X", "W", "B", *limits], ["Y"], name="layer", domain="vqonnx", **given)]
    else:
        nodes = [helper.make_node("Conv", ["X", "W", "B"], ["T" if step else "Y"], **given)]
        if step == "Silu":
            nodes += [helper.make_node("Sigmoid", ["T"], ["S"]), helper.make_node("Mul", ["T", "S"], ["Y"])]
        elif step:
            nodes.append(helper.make_node(step, ["T", *limits], ["Y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in {**arrays, **limits}.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("vqonnx", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def check(op: str, weight: tuple[int, ...], image: tuple[int, ...], threads: int = 1, **attributes: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    values, x = (rng.standard_normal(shape).astype(F32) for shape in (weight, image))
    want = open_session(model(op, values, plain=True, **attributes)).run(None, {"X": x})[0]
    got = open_session(model(op, values, **attributes), threads).run(None, {"X": x})[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=f"{op} {weight} {image} {attributes}")
    return got


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
def test_the_usual_windows(size: int, stride: int, op: str) -> None:
    for image in (7, 14, 15, 16, 17, 56, 112):
        attributes = {"strides": [stride] * 2, "pads": [size // 2] * 4}
        check(op, (24, 1, size, size), (2, 24, image, image + 1), **attributes)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    axes = draw(st.integers(1, 2))
    kernel, strides, dilations = (draw(st.lists(st.integers(1, 4), min_size=axes, max_size=axes)) for _ in range(3))
    pads = draw(st.lists(st.integers(0, 4), min_size=2 * axes, max_size=2 * axes))
    image = [draw(st.integers((k - 1) * d + 1, 40)) for k, d in zip(kernel, dilations, strict=True)]
    channels = draw(st.integers(1, 5))
    attributes = {"strides": strides, "dilations": dilations, "pads": pads}
    return (channels, 1, *kernel), (draw(st.integers(1, 3)), channels, *image), attributes


@settings(max_examples=100, deadline=None)
@given(windows(), st.sampled_from(OPS))
def test_any_window(case: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], op: str) -> None:
    weight, image, attributes = case
    check(op, weight, image, **attributes)


def test_threads_do_not_change_the_result() -> None:
    found = [check("DepthwiseConvRelu", (96, 1, 3, 3), (2, 96, 30, 31), threads, pads=[1] * 4) for threads in (1, 2, 3)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_no_images() -> None:
    session = open_session(model("DepthwiseConv", np.ones((3, 1, 3, 3), F32)))
    assert session.run(None, {"X": np.zeros((0, 3, 5, 5), F32)})[0].shape == (0, 3, 3, 3)


@pytest.mark.parametrize(
    ("shape", "attributes", "message"),
    [
        pytest.param((6, 1, 3, 3), {"strides": None}, "attribute strides is missing", id="no-strides"),
        pytest.param((6, 1, 3, 3), {"strides": [0, 1]}, "each must be 1 to", id="stride-0"),
        pytest.param((6, 1, 3, 3), {"pads": [2**62] * 4}, "each must be 0 to", id="pads-huge"),
        pytest.param((6, 1, 3, 3), {"group": None}, "attribute group is missing", id="no-group"),
        pytest.param((6, 1, 3, 3), {"group": 3}, "with group 3; there must be one channel and one output", id="group"),
        pytest.param((6, 2, 3, 3), {}, "there must be one channel and one output a group", id="channels"),
        pytest.param(
            (6, 1),
            {"strides": [1], "dilations": [1], "pads": [0]},
            "it must have the axes of a 1-D or 2-D convolution",
            id="no-kernel",
        ),
        pytest.param((6, 1, 2, 2, 2), {}, "it must have the axes of a 1-D or 2-D convolution", id="three-axes"),
        pytest.param((0, 1, 3, 3), {"group": 0}, "there must be one channel and one output", id="no-outputs"),
        pytest.param((6, 1, 0, 3), {}, "each must be 1 to", id="empty-kernel"),
    ],
)
def test_bad_nodes_are_refused_when_the_session_is_made(
    shape: tuple[int, ...], attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as error:
        open_session(model("DepthwiseConv", np.zeros(shape, F32), **attributes))
    assert "vqonnx.DepthwiseConv 'layer': " in str(error.value)


@pytest.mark.parametrize("name", ["W", "min", "max"])
def test_what_must_be_constant(name: str) -> None:
    proto = onnx.load_from_string(model("DepthwiseConvClip", np.ones((3, 1, 3, 3), F32)))
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    proto.graph.initializer.remove(tensor)
    proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    with pytest.raises(Exception, match=f"'layer': {name} is no constant initializer"):
        open_session(proto.SerializeToString())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 5, 5), "the weight wants 3 groups of 1 channels"),
        ((1, 3, 5), "it must have 4 axes"),
        ((1, 3, 2, 5), "shorter than the window's 3"),
    ],
)
def test_bad_images_are_refused_when_they_come(shape: tuple[int, ...], message: str) -> None:
    session = open_session(model("DepthwiseConv", np.ones((3, 1, 3, 3), F32)))
    with pytest.raises(Exception, match=message):
        session.run(None, {"X": np.zeros(shape, F32)})
