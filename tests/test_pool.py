"""The MaxPool of the library against onnxruntime's own, and every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fused import F32, open_session
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper


def model(domain: str, kernel: tuple[int, ...], **attributes: Any) -> bytes:
    axes = len(kernel)
    given = {"kernel_shape": kernel, "strides": [1] * axes, "pads": [0] * 2 * axes, **attributes}
    given = {name: value for name, value in given.items() if value is not None}
    graph = helper.make_graph(
        [helper.make_node("MaxPool", ["X"], ["Y"], name="pool", domain=domain, **given)],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("vqonnx", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def check(kernel: tuple[int, ...], image: tuple[int, ...], threads: int = 1, **attributes: Any) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal(image).astype(F32)
    want = open_session(model("", kernel, **attributes)).run(None, {"X": x})[0]
    got = open_session(model("vqonnx", kernel, **attributes), threads).run(None, {"X": x})[0]
    np.testing.assert_array_equal(got, want, err_msg=f"{kernel} {image} {attributes}")
    return got


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9, 13, 16, 17])
def test_square_windows(size: int, stride: int) -> None:
    for image in (7, 15, 16, 17, 33, 56):
        if image + size // 2 * 2 >= size:
            check((size, size), (2, 5, image, image + 1), strides=[stride] * 2, pads=[size // 2 if size > 1 else 0] * 4)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    axes = draw(st.integers(1, 2))
    kernel, strides = (draw(st.lists(st.integers(1, 6), min_size=axes, max_size=axes)) for _ in range(2))
    pads = [draw(st.integers(0, size - 1)) for size in kernel * 2]
    image = [draw(st.integers(size, 40)) for size in kernel]
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), *image)
    return tuple(kernel), shape, {"strides": strides, "pads": pads}


@settings(max_examples=100, deadline=None)
@given(windows())
def test_any_window(case: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]) -> None:
    kernel, image, attributes = case
    check(kernel, image, **attributes)


def test_threads_do_not_change_the_result() -> None:
    for threads in (2, 3):
        check((3, 3), (2, 96, 30, 31), threads, pads=[1] * 4)


def test_infinities_stay() -> None:
    x = np.full((1, 2, 6, 20), -np.inf, F32)
    x[0, 0, 3, 9] = np.inf
    got = open_session(model("vqonnx", (2, 2), strides=[2, 2])).run(None, {"X": x})[0]
    want = np.full((1, 2, 3, 10), -np.inf, F32)
    want[0, 0, 1, 4] = np.inf
    np.testing.assert_array_equal(got, want)


def test_no_images() -> None:
    session = open_session(model("vqonnx", (3, 3)))
    assert session.run(None, {"X": np.zeros((0, 3, 5, 5), F32)})[0].shape == (0, 3, 3, 3)
    assert session.run(None, {"X": np.zeros((2, 0, 5, 5), F32)})[0].shape == (2, 0, 3, 3)


@pytest.mark.parametrize(
    ("kernel", "attributes", "message"),
    [
        pytest.param((3, 3), {"kernel_shape": None}, "attribute kernel_shape is missing", id="no-kernel"),
        pytest.param((3, 3), {"strides": None}, "attribute strides is missing", id="no-strides"),
        pytest.param((3, 3), {"pads": None}, "attribute pads is missing", id="no-pads"),
        pytest.param((3, 3), {"strides": [0, 1]}, "each must be 1 to", id="stride-0"),
        pytest.param((3, 3), {"strides": [1]}, r"strides are \[1\]; there must be 2", id="strides-short"),
        pytest.param((3, 3), {"pads": [0, 0, 0, -1]}, "each must be 0 to", id="pads-negative"),
        pytest.param((3, 3), {"pads": [0, 0, 3, 0]}, "each must be less than the window", id="pads-large"),
        pytest.param((0, 3), {}, "each must be 1 to", id="empty"),
        pytest.param((2, 2, 2), {}, "must have 1 or 2 axes", id="three-axes"),
        pytest.param((1 << 30, 1 << 30), {}, "is too large", id="huge"),
        pytest.param((-1, 3), {}, "is too large", id="negative"),
    ],
)
def test_bad_nodes_are_refused_when_the_session_is_made(
    kernel: tuple[int, ...], attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as error:
        open_session(model("vqonnx", kernel, **attributes))
    assert "vqonnx.MaxPool 'pool': " in str(error.value)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 5), "it must have 4 axes"), ((1, 3, 2, 5), "shorter than the window's 3"), ((1, 3, 0, 5), "axis of 0")],
)
def test_bad_images_are_refused_when_they_come(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_session(model("vqonnx", (3, 3))).run(None, {"X": np.zeros(shape, F32)})
