"""Which layers are fused and which are left; that names and order come back; that outputs never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import onnx.parser
import pytest
from cases import CASES, Case, numbers, parse
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from test_fused import assert_means, optimised
from test_place import FORMS, assert_same_outputs, rewrite

import vqonnx
from vqonnx.errors import ModelError
from vqonnx.fused import FUSED
from vqonnx.fusion import fuse_layers
from vqonnx.runtime import open_session, run
from vqonnx.scope import attributes
from vqonnx.unfusion import split_layers

Array = np.ndarray


def placed(graph: str, *, opset: int = 17, target: Any = "hybrid", form: str = "scalar", **arrays: Any) -> ModelProto:
    """A model with every weight as a Decode node."""
    return rewrite(parse(graph, opset=opset, **arrays), target, exact=FORMS[form])


def fused(model: ModelProto) -> dict[str, str]:
    """Fuse, check the file, and that splitting brings back what was; leaves the fused model."""
    before = [without_empty_fields(node) for node in model.graph.node]
    constants = sorted(tensor.name for tensor in model.graph.initializer)
    found = fuse_layers(model, Path())
    if any(function.domain == "vqonnx" for function in model.functions):
        onnx.checker.check_model(model, full_check=True)
    copy = ModelProto.FromString(model.SerializeToString())
    assert split_layers(copy) == found
    assert [without_empty_fields(node) for node in copy.graph.node] == before
    assert sorted(tensor.name for tensor in copy.graph.initializer) == constants
    assert not any(function.name in FUSED for function in copy.functions if function.domain == "vqonnx")
    return found


def without_empty_fields(node: NodeProto) -> NodeProto:
    copy = NodeProto.FromString(node.SerializeToString())
    for name in ("name", "doc_string", "domain"):
        if not getattr(copy, name):
            copy.ClearField(name)
    return copy


def node_of(model: ModelProto, op: str) -> NodeProto:
    return next(node for node in model.graph.node if (node.domain, node.op_type) == ("vqonnx", op))


def same_outputs(model: ModelProto, **feed: Array) -> None:
    """Fusing changes no output, without the library and with it."""
    before = ModelProto.FromString(model.SerializeToString())
    assert fused(model)
    wanted = run(open_session(before.SerializeToString()), feed)
    for library in (False, True):
        found = run(open_session(model.SerializeToString(), library=library), feed)
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name}, library {library}")


IMAGE = "(float[N, 4, 6, 6] x) => (float[N, C, H, W] y)"
W, B = numbers((4, 4, 3, 3), 1), numbers((4,), 2)
SAME, DEEP = "<pads = [1, 1, 1, 1]>", "<group = 4, pads = [1, 1, 1, 1]>"

# What is fused: the graph, the ops by weight.
FUSES: dict[str, tuple[str, dict[str, str]]] = {
    "relu": (f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Relu (a) }}", {"w": "ConvRelu"}),
    "relu of two readers": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  r = Relu (a)  y = Add (a, r) }}",
        {"w": "Conv"},
    ),
    "residual": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  r = Relu (a)  c = Conv {SAME} (r, v)  s = Add (c, x)  y = Relu (s) }}",
        {"w": "ConvRelu", "v": "ConvAddRelu"},
    ),
    "two branches": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  c = Conv {SAME} (x, v)  s = Add (c, a)  y = Relu (s) }}",
        {"w": "Conv", "v": "ConvAddRelu"},
    ),
    "two branches, the other way": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  c = Conv {SAME} (x, v)  y = Add (a, c) }}",
        {"w": "ConvAdd", "v": "Conv"},
    ),
    "two branches, one of which is read twice": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  c = Conv {SAME} (x, v)  s = Add (a, c)  y = Add (s, a) }}",
        {"w": "Conv", "v": "ConvAdd"},
    ),
    "residual that comes later": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  z = Abs (x)  y = Add (a, z) }}",
        {"w": "ConvAdd"},
    ),
    "its own input": (f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Add (x, a) }}", {"w": "ConvAdd"}),
    "twice itself": (f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Add (a, a) }}", {"w": "Conv"}),
    "a sum that repeats": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  p = GlobalAveragePool (x)  y = Add (a, p) }}",
        {"w": "Conv"},
    ),
    "a constant summand": (f"{IMAGE} {{ a = Conv {SAME} (x, w)  y = Add (a, channel) }}", {"w": "Conv"}),
    "sigmoid": (f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Sigmoid (a) }}", {"w": "Conv"}),
    "silu": (f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  s = Sigmoid (a)  y = Mul (a, s) }}", {"w": "ConvSilu"}),
    "silu, the other way": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  s = Sigmoid (a)  n = Neg (x)  y = Mul (s, a) }}",
        {"w": "ConvSilu"},
    ),
    "silu, a product that others read": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  s = Sigmoid (a)  p = Mul (a, s)  n = Abs (p)  y = Add (p, n) }}",
        {"w": "ConvSilu"},
    ),
    "silu of what others read": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  s = Sigmoid (a)  p = Mul (a, s)  y = Add (p, a) }}",
        {"w": "Conv"},
    ),
    "silu, a sigmoid that others read": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  s = Sigmoid (a)  p = Mul (a, s)  y = Add (p, s) }}",
        {"w": "Conv"},
    ),
    "a sigmoid of something else": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  s = Sigmoid (x)  y = Mul (a, s) }}",
        {"w": "Conv"},
    ),
    "a sigmoid times something else": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  n = Neg (a)  s = Sigmoid (a)  y = Mul (n, s) }}",
        {"w": "Conv"},
    ),
    "a square": (f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Mul (a, a) }}", {"w": "Conv"}),
    "depthwise then silu": (
        f"""{IMAGE} {{ a = Conv {SAME} (x, w)  s = Sigmoid (a)  p = Mul (a, s)
            d = Conv {DEEP} (p, dw, b)  t = Sigmoid (d)  y = Mul (t, d) }}""",
        {"w": "ConvSilu", "dw": "DepthwiseConvSilu"},
    ),
    "gemm then silu": (
        "(float[M, 6] x) => (float[M, 8] y) { a = Gemm (x, m)  s = Sigmoid (a)  y = Mul (a, s) }",
        {"m": "Gemm"},
    ),
    "clip": (f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Clip (a, low, top) }}", {"w": "ConvClip"}),
    "clip at numbers in lists": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Clip (a, lows, top) }}",
        {"w": "ConvClip"},
    ),
    "clip from below": (f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Clip (a, low) }}", {"w": "ConvClip"}),
    "clip from above": (f'{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Clip (a, "", top) }}', {"w": "ConvClip"}),
    "clip of nothing": (f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Clip (a) }}", {"w": "ConvClip"}),
    "clip at what is computed": (
        f"{IMAGE} {{ l = Neg (top)  a = Conv {SAME} (x, w, b)  y = Clip (a, l, top) }}",
        {"w": "Conv"},
    ),
    "a bias that is computed": (f"{IMAGE} {{ n = Neg (b)  y = Conv {SAME} (x, w, n) }}", {"w": "Conv"}),
    "a bias that is not given": (f'{IMAGE} {{ y = Conv {SAME} (x, w, "") }}', {"w": "Conv"}),
    "groups": (f"{IMAGE} {{ y = Conv <group = 2, dilations = [2, 1]> (x, grouped) }}", {"grouped": "Conv"}),
    "depthwise": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  d = Conv {DEEP} (a, dw, b)  y = Relu (d) }}",
        {"w": "Conv", "dw": "DepthwiseConvRelu"},
    ),
    "depthwise between clips": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  r = Clip (a, low, top)  d = Conv {DEEP} (r, dw)  y = Clip (d, low) }}",
        {"w": "ConvClip", "dw": "DepthwiseConvClip"},
    ),
    "depthwise behind what is computed from a layer": (
        f"""{IMAGE} {{ a = Conv {SAME} (x, w)  r = Abs (a)  s = Mul (r, channel)
            p = MaxPool <kernel_shape = [2, 2]> (s)  d = Conv <group = 4, strides = [2, 2]> (p, dw)
            f = Conv {DEEP} (d, dv)  y = Neg (f) }}""",
        {"w": "Conv", "dw": "DepthwiseConv", "dv": "DepthwiseConv", "p": "MaxPool"},
    ),
    "depthwise with a sum": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  d = Conv {DEEP} (a, dw)  y = Add (d, x) }}",
        {"w": "Conv", "dw": "DepthwiseConv"},
    ),
    "depthwise with a weight that two read": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  d = Conv {DEEP} (a, dw)  f = Conv {DEEP} (d, dw)  y = Relu (f) }}",
        {"w": "Conv", "dw": "DepthwiseConvRelu"},
    ),
    "depthwise in front": (f"{IMAGE} {{ d = Conv {DEEP} (x, dw)  y = Conv {SAME} (d, w) }}", {"w": "Conv"}),
    "depthwise beside": (
        f"{IMAGE} {{ d = Conv {DEEP} (x, dw)  a = Conv {SAME} (x, w)  y = Add (a, d) }}",
        {"w": "ConvAdd"},
    ),
    "depthwise with a weight that is computed": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  n = Neg (dw)  y = Conv {DEEP} (a, n) }}",
        {"w": "Conv"},
    ),
    "depthwise with normalisation": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  d = Conv {DEEP} (a, dw)  y = BatchNormalization (d, b, b, b, one_each) }}",
        {"w": "Conv"},
    ),
    "depthwise, two outputs a channel": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  d = Conv {DEEP} (a, wide)  y = Conv (d, from_wide) }}",
        {"w": "Conv", "from_wide": "Conv"},
    ),
    "pool": (
        f"""{IMAGE} {{ a = Conv {SAME} (x, w, b)  r = Relu (a)
            y = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (r) }}""",
        {"w": "ConvRelu", "y": "MaxPool"},
    ),
    "pools of a sum, and of a pool": (
        f"""{IMAGE} {{ a = Conv {SAME} (x, w)  s = Sigmoid (a)  r = Mul (a, s)
            p = MaxPool <kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (r)
            q = MaxPool <kernel_shape = [5, 5], pads = [2, 2, 2, 2], dilations = [1, 1], ceil_mode = 0> (p)
            c = Concat <axis = 1> (r, p, q)  n = Abs (c)  y = MaxPool <kernel_shape = [1, 2]> (c) }}""",
        {"w": "ConvSilu", "p": "MaxPool", "q": "MaxPool", "y": "MaxPool"},
    ),
    "pool then relu": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  p = MaxPool <kernel_shape = [2, 2]> (a)  y = Relu (p) }}",
        {"w": "Conv", "p": "MaxPool"},
    ),
    "pool in front": (f"{IMAGE} {{ p = MaxPool <kernel_shape = [2, 2]> (x)  y = Conv {SAME} (p, w) }}", {"w": "Conv"}),
    "pool of what may have another type": (
        f"""{IMAGE} {{ a = Conv {SAME} (x, w)  d = Cast <to = 11> (a)  p = MaxPool <kernel_shape = [2, 2]> (d)
            y = Cast <to = 1> (p) }}""",
        {"w": "Conv"},
    ),
    "pool with rounding up": (
        f"""{IMAGE} {{ a = Conv {SAME} (x, w)
            y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (a) }}""",
        {"w": "Conv"},
    ),
    "pool with dilations": (
        f"{IMAGE} {{ a = Conv {SAME} (x, w)  y = MaxPool <kernel_shape = [2, 2], dilations = [2, 1]> (a) }}",
        {"w": "Conv"},
    ),
    "pool with places": (
        f"""{IMAGE} {{ a = Conv {SAME} (x, w)  p, i = MaxPool <kernel_shape = [2, 2]> (a)
            f = Cast <to = 1> (i)  y = Add (p, f) }}""",
        {"w": "Conv"},
    ),
    "pool of one axis": (
        """(float[N, 4, 9] x) => (float[N, C, L] y) {
            a = Conv (x, one)  y = MaxPool <kernel_shape = [3], strides = [3]> (a) }""",
        {"one": "Conv", "y": "MaxPool"},
    ),
    "a weight that two read": (f"{IMAGE} {{ a = Conv {SAME} (x, w)  y = Conv {SAME} (a, w) }}", {}),
    "transposed": (f"{IMAGE} {{ y = ConvTranspose (x, w) }}", {}),
    "one axis": (
        "(float[N, 4, 9] x) => (float[N, C, L] y) { a = Conv <strides = [2]> (x, one)  y = Relu (a) }",
        {"one": "ConvRelu"},
    ),
    "three axes": ("(float[N, 2, 4, 4, 4] x) => (float[N, C, D, H, W] y) { y = Conv (x, three) }", {}),
    "gemm": ("(float[M, 8] x) => (float[M, 6] y) { y = Gemm <transB = 1> (x, m) }", {"m": "Gemm"}),
    "gemm by columns": (
        "(float[M, 6] x) => (float[M, 8] y) { a = Gemm (x, m, e)  y = Relu (a) }",
        {"m": "GemmRelu"},
    ),
    "gemm with a number": ("(float[M, 6] x) => (float[M, 8] y) { y = Gemm (x, m, number) }", {"m": "Gemm"}),
    "gemm with a row": ("(float[M, 6] x) => (float[M, 8] y) { y = Gemm (x, m, row) }", {"m": "Gemm"}),
    "gemm with a matrix": ("(float[2, 6] x) => (float[2, 8] y) { y = Gemm (x, m, matrix) }", {}),
    "gemm with a bias that is computed": (
        "(float[2, 6] x) => (float[2, 8] y) { f = Neg (e)  y = Gemm (x, m, f) }",
        {"m": "Gemm"},
    ),
    "gemm with a matrix that is computed": (
        "(float[2, 6] x) => (float[2, 8] y) { f = Neg (matrix)  y = Gemm (x, m, f) }",
        {},
    ),
    "gemm of half": ("(float[M, 6] x) => (float[M, 8] y) { y = Gemm <alpha = 0.5> (x, m) }", {}),
    "gemm of a transposed input": ("(float[6, M] x) => (float[M, 8] y) { y = Gemm <transA = 1> (x, m) }", {}),
    "gemm that says what is usual": (
        "(float[M, 6] x) => (float[M, 8] y) { y = Gemm <alpha = 1.0, beta = 1.0, transA = 0, transB = 0> (x, m, e) }",
        {"m": "Gemm"},
    ),
    "gemm then clip": ("(float[M, 6] x) => (float[M, 8] y) { a = Gemm (x, m)  y = Clip (a, low) }", {"m": "Gemm"}),
    "matmul": ("(float[M, 3, 6] x) => (float[M, 3, 8] y) { a = MatMul (x, m)  y = Relu (a) }", {"m": "MatMul"}),
    "matmul of a vector": ("(float[6] x) => (float[8] y) { y = MatMul (x, m) }", {"m": "MatMul"}),
    "a stack of matrices": ("(float[2, 3, 6] x) => (float[2, 3, 4] y) { y = MatMul (x, stack) }", {}),
}
ARRAYS: dict[str, Array] = {
    "w": W,
    "v": numbers((4, 4, 3, 3), 3),
    "b": B,
    "grouped": numbers((4, 2, 3, 3), 4),
    "one": numbers((6, 4, 3), 5),
    "three": numbers((6, 2, 2, 2, 2), 6),
    "m": numbers((6, 8), 7),
    "e": numbers((8,), 8),
    "row": numbers((1, 8), 9),
    "number": np.array(0.5, np.float32),
    "matrix": numbers((2, 8), 10),
    "stack": numbers((2, 6, 4), 11),
    "channel": numbers((4, 1, 1), 12),
    "dw": numbers((4, 1, 3, 3), 13),
    "dv": numbers((4, 1, 3, 3), 14),
    "wide": numbers((8, 1, 3, 3), 15),
    "from_wide": numbers((2, 8, 1, 1), 16),
    "one_each": np.ones(4, np.float32),
    "low": np.array(-1, np.float32),
    "lows": np.array([-1], np.float32),
    "top": np.array(2, np.float32),
}
SIZES = {"N": 2, "M": 3}


def feed_of(model: ModelProto) -> dict[str, Array]:
    names = {tensor.name for tensor in model.graph.initializer}
    shapes = {
        value.name: tuple(d.dim_value or SIZES[d.dim_param] for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
        if value.name not in names
    }
    return {name: numbers(shape, 20) for name, shape in shapes.items()}


def model_of(graph: str, opset: int = 17) -> ModelProto:
    """The model, with those of `ARRAYS` that it reads."""
    reads = {name for node in parse(graph, opset=opset).graph.node for name in node.input}
    return parse(graph, opset=opset, **{name: ARRAYS[name] for name in ARRAYS if name in reads})


@pytest.mark.parametrize("name", FUSES)
def test_what_is_fused(name: str, tmp_path: Path) -> None:
    graph, ops = FUSES[name]
    original = model_of(graph)
    case = Case(name, original, (), frozenset(), feed_of(original))
    model = rewrite(case.copy(), "hybrid")
    before = ModelProto.FromString(model.SerializeToString())
    assert fused(model) == ops
    assert_same_outputs(case, model)
    found = run(open_session(model.SerializeToString(), library=True), case.feed)["y"]
    wanted = run(open_session(original.SerializeToString()), case.feed)["y"]
    assert_means("Silu" if "Sigmoid" in graph else "", found, wanted)
    if '""' not in graph:  # onnxruntime makes no NCHWc Conv where a bias is given as empty; the fused op has zeros
        assert optimised(model.SerializeToString(), tmp_path) == optimised(before.SerializeToString(), tmp_path)
    custom = rewrite(case.copy(), "custom")
    assert fused(custom) == ops
    assert not custom.functions


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 18, 21])
def test_limits_are_attributes_before_opset_11(opset: int) -> None:
    inputs = "<min = -1.0, max = 2.0> (a)" if opset < 11 else "(a, low, top)"
    model = rewrite(model_of(f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Clip {inputs} }}", opset), "hybrid")
    assert fused(model) == {"w": "Conv" if opset < 11 else "ConvClip"}


PADS = {
    # mode, kernel, strides, dilations, input: pads, or None where they are not known
    "valid": ("VALID", (3, 2), (2, 1), (1, 1), "6, 6", [0, 0, 0, 0]),
    "upper": ("SAME_UPPER", (3, 2), (1, 1), (1, 1), "H, W", [1, 0, 1, 1]),
    "lower": ("SAME_LOWER", (3, 2), (1, 1), (1, 1), "H, W", [1, 1, 1, 0]),
    "upper, strides": ("SAME_UPPER", (3, 3), (2, 2), (1, 1), "6, 7", [0, 1, 1, 1]),
    "lower, strides": ("SAME_LOWER", (3, 3), (2, 2), (1, 1), "6, 7", [1, 1, 0, 1]),
    "strides beyond the kernel": ("SAME_UPPER", (1, 1), (2, 3), (1, 1), "6, 7", [0, 0, 0, 0]),
    "strides and unknown sizes": ("SAME_UPPER", (3, 3), (2, 2), (1, 1), "H, 7", None),
}


@pytest.mark.parametrize("name", PADS)
def test_automatic_pads(name: str) -> None:
    mode, kernel, strides, dilations, sizes, pads = PADS[name]
    text = f'<auto_pad = "{mode}", strides = {list(strides)}, dilations = {list(dilations)}>'
    graph = f"(float[N, 4, {sizes}] x) => (float[N, C, I, J] y) {{ y = Conv {text} (x, w) }}"
    model = placed(graph, w=numbers((5, 4, *kernel), 1))
    if pads is None:
        assert fused(model) == {}
        return
    same_outputs(model, x=numbers((2, 4, 6, 6 if "6, 6" in sizes else 7), 2))
    node = node_of(model, "Conv")
    assert attributes(node)["pads"] == pads
    assert attributes(node)["auto_pad"].decode() == mode


def test_attributes_are_always_given() -> None:
    model = model_of(f"{IMAGE} {{ y = Conv (x, w) }}")
    model = rewrite(model, "hybrid")
    fused(model)
    given = attributes(node_of(model, "Conv"))
    assert given == {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1, "perm": [0, 1, 2, 3]}
    model = rewrite(model_of("(float[M, 6] x) => (float[M, 8] y) { y = Gemm (x, m) }"), "hybrid")
    fused(model)
    node = node_of(model, "Gemm")
    assert attributes(node) == {"transB": 0, "perm": [1, 0]}
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[5])
    np.testing.assert_array_equal(numpy_helper.to_array(bias), np.zeros(8, np.float32))


def test_names_and_texts_survive() -> None:
    graph = f"{IMAGE} {{ [first] a = Conv {SAME} (x, w, b)  [second] s = Add (x, a)  [third] y = Relu (s) }}"
    model = rewrite(model_of(graph), "hybrid")
    for number, node in enumerate(model.graph.node):
        node.doc_string = f"text {number}"
        node.metadata_props.add(key="place", value=str(number))
    model.metadata_props.add(key="author", value="somebody")
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 4, 6, 6]))
    assert fused(model) == {"w": "ConvAddRelu"}
    node = node_of(model, "ConvAddRelu")
    assert (node.name, node.doc_string, list(node.output)) == ("first", "text 1", ["y"])
    assert [(entry.key, entry.value) for entry in node.metadata_props][:1] == [("place", "1")]
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("author", "somebody")]
    assert [value.name for value in model.graph.value_info] == ["a"]
    same_outputs(placed(graph, w=W, b=B), x=numbers((2, 4, 6, 6), 3))


@pytest.mark.parametrize("name", ["a", "s"])
def test_no_value_of_a_silu_that_leaves_the_graph_is_hidden(name: str) -> None:
    outputs = f"float[N, 4, H, W] y, float[N, 4, H, W] {name}"
    body = f"a = Conv {SAME} (x, w)  s = Sigmoid (a)  y = Mul (a, s)"
    model = placed(f"(float[N, 4, 6, 6] x) => ({outputs}) {{ {body} }}", w=W)
    same_outputs(model, x=numbers((2, 4, 6, 6), 3))
    assert [node.op_type for node in model.graph.node] == ["Conv", "Sigmoid", "Mul"]


def test_a_value_that_leaves_the_graph_or_is_read_inside_is_not_hidden() -> None:
    outputs = "float[N, 4, H, W] y, float[N, 4, H, W] a"
    graph = f"(float[N, 4, 6, 6] x) => ({outputs}) {{ a = Conv {SAME} (x, w)  y = Relu (a) }}"
    model = placed(graph, w=W)
    assert fused(model) == {"w": "Conv"}
    graph = f"""(float[N, 4, 6, 6] x, bool c) => (float[N, 4, H, W] y) {{
        a = Conv {SAME} (x, w)
        r = Relu (a)
        y = If (c) <then_branch = t () => (float[N, 4, H, W] p) {{ p = Add (a, r) }},
                    else_branch = e () => (float[N, 4, H, W] q) {{ q = Identity (r) }}> }}"""
    model = placed(graph, w=W)
    same_outputs(model, x=numbers((2, 4, 6, 6), 3), c=np.array(True))
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "If"]


def test_unknown_sizes_are_not_equal_sizes() -> None:
    for dims in ("N, 4, H, W", "N, 4, ?, ?"):
        text = (
            f"(float[{dims.replace('?', 'k')}] x) => (float[A, B, C, D] y) {{ a = Conv {SAME} (x, w)  y = Add (a, x) }}"
        )
        model = parse(text, w=W)
        for dim in model.graph.input[0].type.tensor_type.shape.dim:
            if dim.dim_param == "k":
                dim.dim_param = "?"
        assert fused(rewrite(model, "hybrid")) == {"w": "Conv"}
    # What the file says of values between is not believed.
    text = "(float[N, 4, H, W] x) => (float[A, B, C, D] y) { r = Relu (x)  a = Conv (r, w)  y = Add (a, r) }"
    model = parse(text, w=numbers((4, 4, 1, 1), 1))
    for name in ("r", "a"):
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4, 6, 6]))
    assert fused(rewrite(model, "hybrid")) == {"w": "Conv"}


def test_constants_that_can_be_fed_are_no_limits() -> None:
    model = rewrite(model_of(f"{IMAGE} {{ a = Conv {SAME} (x, w, b)  y = Clip (a, low, top) }}"), "hybrid")
    model.graph.input.append(helper.make_tensor_value_info("low", TensorProto.FLOAT, []))
    assert fused(model) == {"w": "Conv"}


def test_a_bias_that_others_read_stays() -> None:
    graph = "(float[M, 6] x) => (float[M, 8] y) { a = Gemm (x, m, number)  y = Add (a, number) }"
    model = rewrite(model_of(graph), "hybrid")
    assert fused(model) == {"m": "Gemm"}
    assert "number" in {tensor.name for tensor in model.graph.initializer}
    graph = "(float[M, 6] x) => (float[M, 8] y) { y = Gemm (x, m, number) }"
    model = rewrite(model_of(graph), "hybrid")
    fused(model)
    assert "number" not in {tensor.name for tensor in model.graph.initializer}
    split_layers(model)
    back = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}["number"]
    np.testing.assert_array_equal(back, ARRAYS["number"])


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer(name: str) -> None:
    """Whatever the model: what is fused is float32 in the main graph, and outputs stay."""
    case = CASES[name]
    model = rewrite(case.copy(), "hybrid")
    fused(model)
    assert_same_outputs(case, model)
    for graph in [model.graph]:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    assert all(inner.op_type not in FUSED or inner.domain != "vqonnx" for inner in attribute.g.node)


def test_fusing_twice_changes_nothing() -> None:
    model = rewrite(model_of(FUSES["residual"][0]), "hybrid")
    first = fuse_layers(model, Path())
    before = model.SerializeToString()
    assert fuse_layers(model, Path()) == first
    assert model.SerializeToString() == before


# Damage


def residual() -> ModelProto:
    model = rewrite(model_of(FUSES["residual"][0]), "hybrid")
    fuse_layers(model, Path())
    return model


NOTES = [
    None,
    "",
    "no json",
    "[]",
    "null",
    "{}",
    '{"weight":1,"places":[0,1,2,3],"values":["a","b"]}',
    '{"weight":"w","places":[0,1,2],"values":["a","b"]}',
    '{"weight":"w","places":[0,1,2,3],"values":["x","b"]}',
    '{"weight":"w","places":[0,1,2,3],"values":["b","b"]}',
    '{"weight":"w","places":[0,1,2,3],"values":["","b"]}',
    '{"weight":"w","places":[0,1,2,9999],"values":["a","b"]}',
    '{"weight":"w","places":[3,2,1,0],"values":["a","b"]}',
    '{"weight":"w","places":[-1,1,2,3],"values":["a","b"]}',
    '{"weight":"w","places":[0,1,2,3],"values":["a","b"],"names":[1]}',
    '{"weight":"w","places":[0,1,2,3],"values":["a","b"],"texts":[["a",[]],["b",[1]],3]}',
    '{"weight":"w","places":[0,1,2,3],"values":["a","b"],"other":1}',
]


@pytest.mark.parametrize("note", NOTES)
def test_a_note_that_is_lost_or_damaged(note: str | None) -> None:
    """The nodes come back under new names, or in another place; outputs stay."""
    model = residual()
    feed = {"x": numbers((2, 4, 6, 6), 3)}
    wanted = run(open_session(model.SerializeToString()), feed)["y"]
    for node in model.graph.node:
        del node.metadata_props[:]
        if note is not None:
            node.metadata_props.add(key="vqonnx", value=note)
    found = split_layers(model)
    assert sorted(found.values()) == ["ConvAddRelu", "ConvRelu"]
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node] == ["Decode", "Conv", "Relu", "Decode", "Conv", "Add", "Relu"]
    np.testing.assert_array_equal(run(open_session(model.SerializeToString()), feed)["y"], wanted)


def test_a_file_that_was_changed_meanwhile() -> None:
    model = residual()
    model.graph.node.insert(0, helper.make_node("Identity", ["x"], ["same"]))
    model.graph.node[1].input[0] = "same"
    split_layers(model)
    onnx.checker.check_model(model, full_check=True)


def test_nodes_that_lack_inputs_are_refused() -> None:
    model = residual()
    del model.graph.node[0].input[-1]
    with pytest.raises(
        ModelError, match=r"node 'r' \(vqonnx\.ConvRelu\) has 5 inputs instead of 6; the file is damaged"
    ):
        split_layers(model)


def test_nodes_where_none_is_written_are_refused() -> None:
    graph = "(float[N, 32] x) => (float[N, 32] y) { y = local.Mix (x) }"
    body = "Mix (x) => (y) { a = vqonnx.MatMul (x, x, x, x, x)  y = Relu (a) }"
    model = parse(graph, functions=body)
    with pytest.raises(ModelError, match=r"node 'a' \(vqonnx\.MatMul\) is in function Mix; only layers of the main"):
        split_layers(model)


def test_decode_nodes_that_are_damaged_are_left_alone() -> None:
    for damage in ([1, 8, 6, 7, 1], [1], [1, 8, 0, 48], [1, 8, 48]):
        model = rewrite(model_of(FUSES["gemm"][0]), "hybrid")
        layout = next(t for t in model.graph.initializer if t.data_type == TensorProto.INT64)
        layout.CopyFrom(helper.make_tensor(layout.name, TensorProto.INT64, [len(damage)], damage))
        assert fuse_layers(model, Path()) == {}


def test_codes_that_can_be_fed_are_left_alone() -> None:
    model = rewrite(model_of(FUSES["gemm"][0]), "hybrid")
    decode = next(node for node in model.graph.node if node.op_type == "Decode")
    codes = next(tensor for tensor in model.graph.initializer if tensor.name == decode.input[0])
    model.graph.input.append(helper.make_tensor_value_info(codes.name, codes.data_type, codes.dims))
    assert fuse_layers(model, Path()) == {}


# Random graphs


@st.composite
def graphs(draw: st.DrawFn) -> tuple[ModelProto, dict[str, Array]]:
    """Convolutions, what may follow them, pools, and sums of what there is; then perhaps a Gemm."""
    opset = draw(st.sampled_from([7, 9, 11, 13, 17, 21]))
    channels, size = draw(st.integers(2, 5)), draw(st.integers(3, 6))
    batch = draw(st.sampled_from(["N", "2"]))
    arrays: dict[str, Array] = {}
    lines: list[str] = []
    values = ["x"]

    def constant(shape: tuple[int, ...]) -> str:
        name = f"k{len(arrays)}"
        arrays[name] = numbers(shape, draw(st.integers(0, 999)))
        return name

    for number in range(draw(st.integers(2, 9))):
        source, output = draw(st.sampled_from(values)), f"v{number}"
        kind = draw(st.sampled_from(["Conv", "Conv", "Conv", "Relu", "Add", "Clip", "Sum1", "Silu", "MaxPool"]))
        if kind == "Conv":
            kernel = draw(st.sampled_from([1, 3]))
            pad = draw(
                st.sampled_from(
                    [f"pads = [{kernel // 2}, {kernel // 2}, {kernel // 2}, {kernel // 2}]", 'auto_pad = "SAME_UPPER"']
                )
            )
            weight = constant((channels, channels, kernel, kernel))
            bias = f", {constant((channels,))}" if draw(st.booleans()) else ""
            lines.append(f"{output} = Conv <{pad}> ({source}, {weight}{bias})")
        elif kind == "Clip" and opset >= 11:
            low = constant(())
            lines.append(f"{output} = Clip ({source}, {low})")
        elif kind == "Add":
            other = draw(st.sampled_from(values))
            lines.append(f"{output} = Add ({source}, {other})")
        elif kind == "Silu":
            operands = draw(st.permutations([source, f"s{number}"]))
            lines.append(f"s{number} = Sigmoid ({source})  {output} = Mul ({', '.join(operands)})")
        elif kind == "MaxPool":
            lines.append(f"{output} = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({source})")
        elif kind == "Sum1":
            lines.append(f"{output} = Add ({source}, {constant((channels, 1, 1))})")
        else:
            lines.append(f"{output} = Relu ({source})")
        values.append(output)
    lines.append(f"flat = Flatten ({values[-1]})")
    weight, kind = constant((5, channels * size * size)), draw(st.sampled_from(["Gemm", "MatMul"]))
    if kind == "Gemm":
        bias = constant(draw(st.sampled_from([(5,), (1, 5), (1,), ()])))
        lines.append(f"fc = Gemm <transB = 1> (flat, {weight}, {bias})")
    else:
        arrays[weight] = arrays[weight].T.copy()
        lines.append(f"fc = MatMul (flat, {weight})")
    lines.append("y = Relu (fc)")
    extra = draw(st.sampled_from(values[1:]))
    signature = f"(float[{batch}, {channels}, {size}, {size}] x) => (float[A, B] y, float[C, D, E, F] {extra})"
    model = parse(f"{signature} {{ {'  '.join(lines)} }}", opset=opset, **arrays)
    return model, {"x": numbers((2, channels, size, size), 1)}


@settings(max_examples=60)
@given(graphs(), st.sampled_from(["scalar", "two stages and books", "wide blocks with a tail"]))
def test_random_graphs(drawn: tuple[ModelProto, dict[str, Array]], form: str) -> None:
    model, feed = drawn
    rewritten = rewrite(ModelProto.FromString(model.SerializeToString()), "hybrid", exact=FORMS[form])
    wanted = run(open_session(model.SerializeToString()), feed)
    fused(rewritten)
    for library in (False, True):
        found = run(open_session(rewritten.SerializeToString(), library=library), feed)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4 * (np.abs(value).max(initial=0) + 1))
    split_layers(rewritten)
    found = run(open_session(rewritten.SerializeToString()), feed)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4 * (np.abs(value).max(initial=0) + 1))


def test_prefix_codes_are_fused_and_run(tmp_path: Path) -> None:
    """onnxruntime folds Inflate before the library looks for constants."""
    method = vqonnx.Entropy(bits=2)
    small, apart = tmp_path / "small.onnx", tmp_path / "apart.onnx"
    result = vqonnx.compress(nets.MLP, method, calibration=nets.CALIBRATION)
    assert [layer.fused for layer in result.layers] == [("GemmRelu",), ("GemmRelu",), ("Gemm",)]
    result.save(small)  # run with and without the library
    vqonnx.compress(nets.MLP, method, calibration=nets.CALIBRATION, fuse=False).save(apart)
    for library in (False, True):
        found = vqonnx.compare(apart, small, nets.TEST, library=library)
        assert found.snr_db is None or found.snr_db > 100
    split = onnx.load(small)
    split_layers(split)
    other = onnx.load(apart)
    assert [without_empty_fields(node) for node in split.graph.node] == [
        without_empty_fields(n) for n in other.graph.node
    ]
