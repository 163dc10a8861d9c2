"""Fused ops: for every op and opset the body means the layers that it stands for, in every reader of ONNX files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
from cases import Case, numbers, parse
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from test_ops import OPSETS
from test_place import FORMS, rewrite, runnable

from vqonnx.fused import FUSED
from vqonnx.fusion import fuse_layers
from vqonnx.runtime import open_session, run

# A graph of each op. The numbers are small multiples of 1/2, so sums are exact in any order.
CONV = "Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]>"
ONE, TWO = "(float[N, 4, 5, 5] x)", "(float[N, 4, 5, 5] x, float[N, 6, 5, 5] z)"
IMAGE = "(float[N, 6, H, W] y)"
F32 = np.float32
GRAPHS = {
    "Conv": f"{ONE} => {IMAGE} {{ [c] y = {CONV} (x, w) }}",
    "ConvRelu": f"{ONE} => {IMAGE} {{ [c] a = {CONV} (x, w, b)  y = Relu (a) }}",
    "ConvClip": f"{ONE} => {IMAGE} {{ [c] a = {CONV} (x, w, b)  y = Clip (a, low, top) }}",
    "ConvAdd": f"{TWO} => {IMAGE} {{ [c] a = {CONV} (x, w)  y = Add (a, z) }}",
    "ConvAddRelu": f"{TWO} => {IMAGE} {{ [c] a = {CONV} (x, w, b)  s = Add (z, a)  y = Relu (s) }}",
    "ConvSilu": f"{ONE} => {IMAGE} {{ [c] a = {CONV} (x, w, b)  s = Sigmoid (a)  y = Mul (a, s) }}",
    "Gemm": "(float[N, 36] x) => (float[N, 6] y) { [c] y = Gemm <transB = 1> (x, w, b) }",
    "GemmRelu": "(float[N, 36] x) => (float[N, 6] y) { [c] a = Gemm <transB = 1> (x, w, b)  y = Relu (a) }",
    "MatMul": "(float[N, 6] x) => (float[N, 36] y) { [c] y = MatMul (x, w) }",
}


def case_of(op: str, opset: int) -> Case:
    weight = numbers((6, 4, 3, 3) if op.startswith("Conv") else (6, 36), 1)
    arrays = {"w": weight}
    if "b)" in GRAPHS[op]:
        arrays["b"] = numbers((6,), 2)
    if op == "ConvClip":
        arrays |= {"low": np.array(-1, np.float32), "top": np.array(2, np.float32)}
    sizes = (2, 4, 5, 5) if op.startswith("Conv") else (2, 6 if op == "MatMul" else 36)
    feed = {"x": numbers(sizes, 3)}
    if "Add" in op:
        feed["z"] = numbers((2, 6, 5, 5), 4)
    return Case(f"{op} at opset {opset}", parse(GRAPHS[op], opset=opset, **arrays), (), frozenset(), feed)


def assert_means(op: str, found: np.ndarray, wanted: np.ndarray, form: str = "") -> None:
    """The same values; a sigmoid may be rounded otherwise."""
    if op.endswith("Silu"):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=form)
    else:
        np.testing.assert_array_equal(found, wanted, err_msg=form)


def optimised(model: bytes, folder: Path, *, library: bool = False) -> Counter[tuple[str, str]]:
    """How often each operator is in the graph that onnxruntime runs."""
    open_session(model, library=library, optimised_path=folder / "optimised.onnx")
    graph = onnx.load(folder / "optimised.onnx", load_external_data=False).graph
    return Counter((node.domain, node.op_type) for node in graph.node)


# What follows a layer ``w`` that is fused.
BEHIND = {
    "DepthwiseConv": "y = Conv <group = 6, strides = [2, 2]> (a, v)",
    "DepthwiseConvRelu": "d = Conv <group = 6, pads = [1, 1, 1, 1]> (a, v, b)  y = Relu (d)",
    "DepthwiseConvClip": "d = Conv <group = 6, kernel_shape = [3, 3]> (a, v, b)  y = Clip (d, low, top)",
    "MaxPool": "y = MaxPool <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 0, 1]> (a)",
    "DepthwiseConvSilu": "d = Conv <group = 6> (a, v, b)  s = Sigmoid (d)  y = Mul (s, d)",
}


def test_every_op_has_a_graph_here() -> None:
    assert set(GRAPHS) | set(BEHIND) == set(FUSED)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("op", BEHIND)
def test_bodies_of_what_is_behind_a_layer(op: str, opset: int, tmp_path: Path) -> None:
    opset = max(opset, 11) if op == "DepthwiseConvClip" else opset
    arrays = {"v": numbers((6, 1, 3, 3), 5), "b": numbers((6,), 2), "low": F32(-1), "top": F32(2)}
    text = f"{ONE} => {IMAGE} {{ a = {CONV} (x, w)  {BEHIND[op]} }}"
    arrays = {name: np.asarray(value) for name, value in arrays.items() if f", {name}" in BEHIND[op]}
    model = parse(text, opset=opset, w=numbers((6, 4, 3, 3), 1), **arrays)
    original, feed = model.SerializeToString(), {"x": numbers((2, 4, 5, 5), 3)}
    wanted = run(open_session(original), feed)["y"]
    assert fuse_layers(rewrite(model, "hybrid"), Path()) == {"w": "Conv", "y" if op == "MaxPool" else "v": op}
    onnx.checker.check_model(model, full_check=True)
    fused = model.SerializeToString()
    for library in (False, True):
        assert_means(op, run(open_session(fused, library=library), feed)["y"], wanted)
    assert optimised(fused, tmp_path) == optimised(original, tmp_path)
    assert optimised(fused, tmp_path, library=True) == {("vqonnx", "Conv"): 1, ("vqonnx", op): 1}
    assert_means(op, ReferenceEvaluator(model).run(None, feed)[0], wanted)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("op", GRAPHS)
def test_the_body_means_the_layers(op: str, opset: int, tmp_path: Path) -> None:
    case = case_of(op, opset if op != "ConvClip" or opset >= 11 else 11)
    original = case.copy().SerializeToString()
    wanted = run(open_session(original), case.feed)["y"]
    assert np.any(wanted)
    for form in ("scalar", "two stages and books", "scaled rows", "wide blocks with a tail", "long codes"):
        model = rewrite(case.copy(), "hybrid", exact=FORMS[form])
        assert fuse_layers(model, Path()) == {"w": op}
        onnx.checker.check_model(model, full_check=True)
        assert [(node.domain, node.op_type, node.name) for node in model.graph.node] == [("vqonnx", op, "c")]
        assert all(f.opset_import[0].version == case.model.opset_import[0].version for f in model.functions)
        fused = model.SerializeToString()
        np.testing.assert_array_equal(run(open_session(fused), case.feed)["y"], wanted, err_msg=form)
        assert_means(op, run(open_session(fused, library=True), case.feed)["y"], wanted, form)
    assert optimised(fused, tmp_path) == optimised(original, tmp_path)


@pytest.mark.parametrize("op", GRAPHS)
def test_other_tools_agree(op: str) -> None:
    case = case_of(op, 17)
    wanted = run(open_session(case.model.SerializeToString()), case.feed)["y"]
    model = rewrite(case.copy(), "hybrid", exact=FORMS["two stages and books"])
    fuse_layers(model, Path())
    assert_means(op, ReferenceEvaluator(model).run(None, case.feed)[0], wanted)
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions
    assert_means(op, ReferenceEvaluator(inlined).run(None, case.feed)[0], wanted)


@pytest.mark.parametrize("op", GRAPHS)
def test_without_bodies(op: str) -> None:
    """A file of target custom has the same node; onnxruntime runs it once the bodies are added."""
    case = case_of(op, 17)
    wanted = run(open_session(case.model.SerializeToString()), case.feed)["y"]
    model = rewrite(case.copy(), "custom")
    assert fuse_layers(model, Path()) == {"w": op}
    assert not model.functions
    whole = ModelProto.FromString(runnable(model))
    whole.functions.append(FUSED[op].function(17))
    np.testing.assert_array_equal(run(open_session(whole.SerializeToString()), case.feed)["y"], wanted)
