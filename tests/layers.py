"""Single linear layers: any shape and attribute, run by onnxruntime on whole numbers, so that results are exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import onnxruntime
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from vqonnx.view import Order, View, ViewOrder, conv_transpose_view, conv_view, matmul_view

ORDERS: tuple[Order, ...] = ("ihw", "hwi")
VIEW_ORDERS: tuple[ViewOrder, ...] = (*ORDERS, "ohw")


@dataclass(frozen=True)
class Single:
    """One layer: its attributes, the shapes of its weight and input, and the seed of their values."""

    op_type: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def node(self) -> NodeProto:
        return helper.make_node(self.op_type, ["x", "w"], ["y"], **self.attributes)

    @property
    def read_attributes(self) -> dict[str, Any]:
        """The attributes as they are read from a model: text is bytes."""
        return {a.name: helper.get_attribute_value(a) for a in self.node.attribute}

    @property
    def group(self) -> int:
        return int(self.attributes.get("group", 1))

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Input and weight: small whole numbers, whose sums of products are exact in float32."""
        rng = np.random.default_rng(self.seed)
        return tuple(rng.integers(-8, 9, shape).astype(np.float32) for shape in (self.input, self.weight))

    def view(self, order: ViewOrder) -> View:
        if self.op_type == "Conv":
            return conv_view(self.weight, order)
        if self.op_type == "ConvTranspose":
            return conv_transpose_view(self.weight, self.group, order)
        return matmul_view(self.weight, outputs_first=bool(self.attributes.get("transB", 0)), order=order)

    def run(self, x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float32]:
        """What onnxruntime makes of it."""
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph([self.node], "single", [value], [result], [numpy_helper.from_array(w, "w")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]

    def by_row(self, y: NDArray[np.float32]) -> NDArray[np.float32]:
        """The output as ``[groups, n, outputs of a group]``, positions in the order of the output."""
        if self.op_type in ("Conv", "ConvTranspose"):
            batch, outputs = y.shape[:2]
            return (
                y.reshape(batch, self.group, outputs // self.group, -1)
                .transpose(1, 0, 3, 2)
                .reshape(self.group, -1, outputs // self.group)
            )
        stack = self.weight[:-2]
        if not stack:
            return y.reshape(1, -1, y.shape[-1])
        if len(self.input) == 1:
            y = y[..., None, :]
        parts = []
        for index in np.ndindex(*stack):  # axes of size 1 are broadcast: all of the output's entries belong to index 0
            where = [at if size > 1 else slice(None) for at, size in zip(index, stack, strict=True)]
            parts.append(y[(..., *where, slice(None), slice(None))].reshape(-1, y.shape[-1]))
        return np.stack(parts)


def _sometimes(draw: st.DrawFn, attributes: dict[str, Any], name: str, value: Any, default: Any) -> None:
    """Leave an attribute out now and then where it says what holds anyway."""
    if value != default or draw(st.booleans()):
        attributes[name] = value


@st.composite
def convs(draw: st.DrawFn, op_type: str = "Conv") -> Single:
    axes = draw(st.integers(1, 3))

    def sizes(low: int, high: int, count: int = axes) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    group, inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, strides, dilations = sizes(1, 3), sizes(1, 3), sizes(1, 2)
    mode = draw(st.sampled_from(("NOTSET", "pads", "VALID", "SAME_UPPER", "SAME_LOWER")))
    if op_type == "Conv" and mode.startswith("SAME"):
        dilations = [1] * axes  # onnxruntime refuses others
    attributes: dict[str, Any] = {}
    _sometimes(draw, attributes, "group", group, 1)
    _sometimes(draw, attributes, "kernel_shape", kernel, kernel)
    _sometimes(draw, attributes, "strides", strides, [1] * axes)
    _sometimes(draw, attributes, "dilations", dilations, [1] * axes)
    if mode == "pads":
        attributes["pads"] = sizes(0, 2, 2 * axes)
    elif mode != "NOTSET" or draw(st.booleans()):
        attributes["auto_pad"] = mode
    if op_type == "Conv":
        size = [d * (k - 1) + 1 + more for d, k, more in zip(dilations, kernel, sizes(0, 4), strict=True)]
        weight = (group * outputs, inputs, *kernel)
    else:
        size = [1 + more for more in sizes(0, 3)]
        weight = (group * inputs, outputs, *kernel)
        padding = [draw(st.integers(0, s - 1)) for s in strides]  # onnxruntime refuses more
        _sometimes(draw, attributes, "output_padding", padding, [0] * axes)
        full = [
            s * (n - 1) + p + d * (k - 1) + 1
            for s, n, p, d, k in zip(strides, size, padding, dilations, kernel, strict=True)
        ]
        pads = attributes.get("pads", [0] * 2 * axes)
        if any(full[a] - pads[a] - pads[axes + a] < 1 for a in range(axes)):
            del attributes["pads"]
        if mode in ("NOTSET", "SAME_UPPER", "SAME_LOWER") and draw(st.booleans()):
            attributes["output_shape"] = [
                draw(st.integers(max(1, length - 3), length + s - 1 - p))
                for length, s, p in zip(full, strides, padding, strict=True)
            ]
    x = (draw(st.integers(1, 2)), group * inputs, *size)
    return Single(op_type, weight, x, attributes, draw(st.integers(0, 99)))


@st.composite
def gemms(draw: st.DrawFn) -> Single:
    rows, inputs, outputs = (draw(st.integers(1, 5)) for _ in range(3))
    flags = {name: draw(st.sampled_from((None, 0, 1))) for name in ("transA", "transB")}
    weight = (outputs, inputs) if flags["transB"] else (inputs, outputs)
    x = (inputs, rows) if flags["transA"] else (rows, inputs)
    attributes = {name: flag for name, flag in flags.items() if flag is not None}
    return Single("Gemm", weight, x, attributes, draw(st.integers(0, 99)))


@st.composite
def matmuls(draw: st.DrawFn) -> Single:
    """Plain and stacked ones, with broadcasting on either side, and inputs of one axis."""
    rows, inputs, outputs = (draw(st.integers(1, 4)) for _ in range(3))
    full = draw(st.permutations((2, 3, 4)))[: draw(st.integers(0, 3))]

    def part() -> list[int]:
        kept = full[draw(st.integers(0, len(full))) :]
        return [draw(st.sampled_from((size, 1))) for size in kept]

    stack = part()
    x = (inputs,) if draw(st.integers(0, 5)) == 0 else (*part(), rows, inputs)
    return Single("MatMul", (*stack, inputs, outputs), x, {}, draw(st.integers(0, 99)))


def singles() -> st.SearchStrategy[Single]:
    return st.one_of(convs(), convs("ConvTranspose"), gemms(), matmuls())


def positions(case: Single, y: NDArray[np.float32]) -> int:
    """Output positions of one image of a convolution."""
    return prod(y.shape[2:])
