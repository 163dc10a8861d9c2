"""Finding weights: every kind of layer, every place a weight can come from, and every reason to leave one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from cases import CASES, LAYERS, SOURCE_CASES, Case, constant, numbers, parse, store, subgraphs
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from vqonnx.errors import ModelError
from vqonnx.graph import find
from vqonnx.modelfile import make_tensor
from vqonnx.scope import constant_value, scopes
from vqonnx.view import Order

ORDERS: tuple[Order, ...] = get_args(Order)
W = numbers((6, 4), 1)


def found(model: ModelProto) -> dict[str, tuple[str, tuple[int, ...]]]:
    result = find(model, ".")
    assert not result.skipped, [(entry.name, entry.reason) for entry in result.skipped]
    return {site.name: (site.op_type, site.shape) for site in result.sites}


def skipped(model: ModelProto, sites: tuple[str, ...] = ()) -> dict[str, str]:
    """Reasons by name; the sites beside them must be those that are named."""
    result = find(model, ".")
    assert tuple(site.name for site in result.sites) == sites
    return {entry.name: entry.reason for entry in result.skipped}


# What is found


@pytest.mark.parametrize("name", CASES)
def test_weights_are_found(name: str) -> None:
    case = CASES[name]
    assert found(case.model) == {weight: (op_type, shape) for weight, op_type, shape in case.sites}
    assert tuple(site.name for site in find(case.model, ".").sites) == tuple(weight for weight, *_ in case.sites)


def weights_as_run(case: Case) -> dict[str, Any]:
    """The weights of the main graph as a reference implementation computes them."""
    model = case.copy()
    names = [name for name, *_ in case.sites]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return dict(zip(names, ReferenceEvaluator(model).run(None, case.feed), strict=True))


OTHERS = {"cast_from_bfloat16"}  # the reference implementation of onnx 1.17 does not read it
MAIN = [name for name, case in SOURCE_CASES.items() if not (subgraphs(case.model) or case.model.functions)]


@pytest.mark.parametrize("name", [name for name in MAIN if name not in OTHERS])
def test_weights_are_read_as_the_layer_sees_them(name: str) -> None:
    want = weights_as_run(SOURCE_CASES[name])
    for site in find(SOURCE_CASES[name].model, ".").sites:
        assert site.read().dtype == np.float32
        np.testing.assert_array_equal(site.read(), want[site.name].astype(np.float32), err_msg=site.name)


def test_bfloat16_weights_are_read() -> None:
    (site,) = find(SOURCE_CASES["cast_from_bfloat16"].model, ".").sites
    assert site.read().dtype == np.float32
    np.testing.assert_array_equal(site.read(), W)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LAYERS)
def test_sites_see_their_weight_as_a_matrix(name: str, order: Order) -> None:
    (site,) = find(CASES[name].model, ".").sites
    view = site.view(order)
    assert (view.rows, view.cols) == LAYERS[name].matrix
    assert (view.shape, site.shape) == (LAYERS[name].w, LAYERS[name].w)
    np.testing.assert_array_equal(view.tensor(view.matrix(site.read())), site.read())
    assert site.kernel == (LAYERS[name].w[2:] if site.op_type.startswith("Conv") else ())


def test_shared_weights_are_one_site() -> None:
    model = parse("(float[2, 6] x) => (float[R, C] y) { a = MatMul (x, w)  b = Gemm (x, w)  y = Add (a, b) }", w=W)
    (site,) = find(model, ".").sites
    assert [use.node.op_type for use in site.uses] == ["MatMul", "Gemm"]
    assert site.node is site.uses[0].node


def test_the_first_layer_that_reads_a_weight_names_the_site() -> None:
    case = SOURCE_CASES["outside_read_in_both_branches"]
    (site,) = find(case.model, ".").sites
    assert [tuple(use.node.output) for use in site.uses] == [("a",), ("b",)]
    assert site.scope.parent is None


def test_models_of_graph_surgeon() -> None:
    x = gs.Variable("x", np.float32, (1, 3, 8, 8))
    weight, half = gs.Constant("weight", numbers((4, 3, 3, 3))), gs.Constant("half", numbers((4, 9), 1, np.float16))
    a, b, c, d, y = (gs.Variable(name, np.float32) for name in "abcdy")
    flat = gs.Constant("flat", np.array([0, -1]))
    dense = gs.Variable("dense", np.float32)
    nodes = [
        gs.Node("Conv", "first", {"strides": [2, 2]}, [x, weight], [a]),
        gs.Node("Conv", "second", {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, [x, weight], [b]),
        gs.Node("Reshape", "flatten", {}, [a, flat], [c]),
        gs.Node("Cast", "widen", {"to": TensorProto.FLOAT}, [half], [dense]),
        gs.Node("Gemm", "last", {"transA": 1}, [c, c], [d]),
        gs.Node("MatMul", "end", {}, [d, dense], [y]),
    ]
    model = gs.export_onnx(gs.Graph(nodes, [x], [b, y], opset=17))
    result = find(model, ".")
    assert [(site.name, site.node.name, site.source) for site in result.sites] == [
        ("weight", "first", "weight"),
        ("dense", "end", "half"),
    ]
    assert {entry.name: entry.reason for entry in result.skipped} == {
        "c": "weight is computed at run time (by Conv 'first')"
    }


def test_external_data_are_read(tmp_path: Path) -> None:
    model = parse("(float[2, 6] x) => (float[R, C] y) { y = MatMul (x, w) }", w=W)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.bin")
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    (site,) = find(model, tmp_path).sites
    np.testing.assert_array_equal(site.read(), W)

    (tmp_path / "m.bin").unlink()
    (site,) = find(model, tmp_path).sites  # shapes need no data
    with pytest.raises(ModelError, match="tensor 'w'"):
        site.read()


@pytest.mark.parametrize("elem_type", ["FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16"])
def test_element_types_are_kept(elem_type: str) -> None:
    stored = make_tensor(W, getattr(TensorProto, elem_type), "w")
    (site,) = find(parse("(float[2, 6] x) => (float[R, C] y) { y = MatMul (x, w) }", w=stored), ".").sites
    assert site.elem_type == getattr(TensorProto, elem_type)
    np.testing.assert_array_equal(site.read(), W)


def test_scopes_see_outer_names() -> None:
    model = SOURCE_CASES["outside_and_in_nested_branches"].model
    outer, branch, inner, *_ = scopes(model)
    assert (inner.parent, branch.parent, outer.parent) == (branch, outer, None)
    homes = [inner.home(name) for name in ("w", "v", "u", "h", "x")]
    assert homes == [outer, branch, inner, outer, None]
    np.testing.assert_array_equal(constant_value(inner, "w", Path()), W)
    assert constant_value(inner, "h", Path()) is None


@pytest.mark.parametrize(
    ("attribute", "want"),
    [("value_float", np.float32(2)), ("value_ints", [1, 2]), ("value_floats", [0.5, 1.5]), ("value_int", 3)],
)
def test_constant_nodes_of_every_kind_are_read(attribute: str, want: Any) -> None:
    model = parse("(float[2, 6] x) => (float[R, C] y) { y = Neg (x) }")
    model.graph.node.append(helper.make_node("Constant", [], ["k"], **{attribute: want}))
    np.testing.assert_array_equal(constant_value(scopes(model)[0], "k", Path()), want)


# What is left alone

X = "(float[2, 6] x) => (float[R, C] y)"
IMAGE = "(float[1, 4, 5, 5] x) => (float[A, B, C, D] y)"


@pytest.mark.parametrize(
    ("op_type", "shape"), [("Conv", (8, 1, 3, 3)), ("ConvTranspose", (4, 2, 3, 3))], ids=["Conv", "ConvTranspose"]
)
def test_depthwise_convolutions_are_known_as_such(op_type: str, shape: tuple[int, ...]) -> None:
    model = parse(f"{IMAGE} {{ y = {op_type} <group = 4> (x, w) }}", w=numbers(shape))
    assert [site.depthwise for site in find(model, ".").sites] == [True]


def test_one_input_channel_is_not_depthwise() -> None:
    model = parse(
        "(float[1, 1, 5, 5] x) => (float[A, B, C, D] y) { h = Conv (x, w)  y = ConvTranspose (h, v) }",
        w=numbers((4, 1, 3, 3)),
        v=numbers((4, 1, 3, 3)),
    )
    assert {site.name: site.depthwise for site in find(model, ".").sites} == {"w": False, "v": False}


@pytest.mark.parametrize("steps", ["", "Transpose", "Identity"])
def test_weights_behind_dequantize_are_left_alone(steps: str) -> None:
    chain = f"w = {steps} (d)" if steps else ""
    model = parse(
        f"{X} {{ {'d' if steps else 'w'} = DequantizeLinear (q, s, z) {chain} y = MatMul (x, w) }}",
        q=np.ones((6, 6), np.int8),
        s=np.array(0.5, np.float32),
        z=np.array(0, np.int8),
    )
    assert skipped(model) == {"w": "already quantised (weight behind DequantizeLinear)"}


@pytest.mark.parametrize(
    "op_type",
    [
        "ConvInteger",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "com.microsoft.MatMulNBits",
        "com.microsoft.QGemm",
    ],
)
def test_quantised_layers_are_left_alone(op_type: str) -> None:
    model = parse(f"(uint8[2, 6] x) => (int32[R, C] y) {{ [layer] y = {op_type} (x, w) }}", w=np.ones((6, 4), np.uint8))
    assert skipped(model) == {"layer": f"already quantised ({op_type.rpartition('.')[2]})"}


@pytest.mark.parametrize("op_type", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_are_left_alone(op_type: str) -> None:
    model = parse(f"(float[2, 1, 6] x) => (float[A, B, C, D] y) {{ y = {op_type} <hidden_size = 3> (x, w, r) }}")
    store(model.graph, w=numbers((1, 12, 6)), r=numbers((1, 12, 3)))
    assert skipped(model) == {"y": f"{op_type} weights are not compressed; only Conv, ConvTranspose, Gemm, MatMul are"}


ATTENTION = "(float[2, 6] x) => (float[2, 2] y) { [turn] t = Transpose (x)  y = MatMul (x, t) }"
COMPUTED = "(float[2, 6] x) => (float[R, C] y) { [scale] w = Mul (v, k)  y = MatMul (x, w) }"
SIZED = "(float[2, 6] x, int64[2] s) => (float[R, C] y) { [turn] w = Reshape (v, s)  y = MatMul (x, w) }"


def test_run_time_weights_are_left_alone() -> None:
    assert skipped(parse(ATTENTION)) == {"t": "weight is an input of the graph, not a constant"}
    deep = ATTENTION.replace("(x)  y", "(h)  y").replace("{", "{ [act] h = Relu (x)", 1)
    assert skipped(parse(deep)) == {"t": "weight is computed at run time (by Relu 'act')"}
    model = parse(COMPUTED, v=W, k=np.array(2, np.float32))
    assert skipped(model) == {"w": "weight is computed at run time (by Mul 'scale')"}
    assert skipped(parse(SIZED, v=W)) == {"w": "weight is reshaped to a size that is not constant (by 'turn')"}


def test_weights_on_the_left_are_left_alone() -> None:
    model = parse("(float[4, 3] x) => (float[R, C] y) { y = MatMul (w, x) }", w=W)
    assert skipped(model) == {"x": "weight is an input of the graph, not a constant"}


def test_graph_inputs_without_a_value_are_left_alone() -> None:
    model = parse("(float[2, 6] x, float[6, 4] w) => (float[R, C] y) { y = MatMul (x, w) }")
    assert skipped(model) == {"w": "weight is an input of the graph, not a constant"}
    model = parse(f"{X} {{ y = local.layer (x, k) }}", functions="layer (a, w) => (b) { b = MatMul (a, w) }", k=W)
    assert skipped(model) == {"w": "weight is an input of the graph, not a constant"}


def test_weights_that_are_outputs_are_left_alone() -> None:
    reason = "weight is also an output of the graph"
    model = parse("(float[2, 6] x) => (float[R, C] y, float[6, 4] w) { y = MatMul (x, w) }", w=W)
    assert skipped(model) == {"w": reason}
    behind = "(float[2, 6] x) => (float[R, C] y, float[6, 4] w) { w = Identity (v)  y = MatMul (x, w) }"
    assert skipped(parse(behind, v=W)) == {"w": reason}
    before = "(float[2, 6] x) => (float[R, C] y, float[4, 6] v) { w = Transpose (v)  y = MatMul (x, w) }"
    assert skipped(parse(before, v=W.T.copy())) == {"v": reason}
    model = parse(
        """(float[2, 6] x, bool c) => (float[R, C] y) {
             h = MatMul (x, w)
             z = If (c) <then_branch = t () => (float[R, C] w) { n = Neg (x) },
                         else_branch = e () => (float[R, C] b) { b = Relu (x) }>
             y = Add (h, z) }""",
        w=W,
    )
    assert skipped(model) == {"w": reason}


def test_embeddings_that_are_also_weights_are_left_alone() -> None:
    text = """(float[2, 6] x, int64[3] i) => (float[A, B] y, float[C, D] z) {
                y = MatMul (x, w)
                [words] z = Gather (w, i) }"""
    assert skipped(parse(text, w=W)) == {"w": "weight is also read by Gather 'words', so it would stay in the file"}
    tied = text.replace("y = MatMul (x, w)", "t = Transpose (w)  y = MatMul (x, t)")
    assert skipped(parse(tied, w=W.T.copy())) == {
        "w": "weight is also read by Gather 'words', so it would stay in the file"
    }


def test_weights_read_in_a_branch_are_left_alone() -> None:
    model = parse(
        """(float[2, 6] x, bool c) => (float[R, C] y) {
             h = MatMul (x, w)
             z = If (c) <then_branch = t () => (float[R, C] a) { [twice] a = Add (w, w) },
                         else_branch = e () => (float[R, C] b) { b = Relu (x) }>
             y = Add (h, z) }""",
        w=W,
    )
    assert skipped(model) == {"w": "weight is also read by Add 'twice', so it would stay in the file"}


def test_weights_that_are_biases_too_are_left_alone() -> None:
    text = "(float[4, 6] x) => (float[R, C] y) { h = MatMul (x, w)  [add] y = Gemm (x, v, w) }"
    model = parse(text, w=numbers((6, 6)), v=numbers((6, 6)))
    assert skipped(model, sites=("v",)) == {"w": "weight is also read by Gemm 'add', so it would stay in the file"}


def test_weights_seen_in_different_ways_are_left_alone() -> None:
    text = f"{X} {{ a = Gemm (x, w)  y = Gemm <transB = 1> (a, w) }}"
    assert skipped(parse(text, w=numbers((6, 6)))) == {"w": "weight is read by layers that see it in different ways"}
    text = f"{X} {{ t = Transpose (w)  u = Transpose (w)  a = MatMul (x, t)  y = MatMul (a, u) }}"
    assert skipped(parse(text, w=numbers((6, 6)))) == {
        "w": "weight reaches its layers through different Transpose or Reshape nodes"
    }


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_integer_weights_are_left_alone(dtype: Any) -> None:
    text = "(int32[2, 6] x) => (int32[R, C] y) { y = MatMul (x, w) }"
    name = np.dtype(dtype).name
    assert skipped(parse(text, w=np.ones((6, 4), dtype))) == {"w": f"weights are {name}, not floating point"}


def test_weights_cast_to_integers_are_left_alone() -> None:
    text = "(int32[2, 6] x) => (int32[R, C] y) { w = Cast <to = 6> (v)  y = MatMul (x, w) }"
    assert skipped(parse(text, v=W)) == {"w": "weights are cast to int32"}


def test_weights_that_are_no_matrix_are_left_alone() -> None:
    vector = parse("(float[2, 6] x) => (float[R] y) { y = MatMul (x, w) }", w=W[:, 0].copy())
    assert skipped(vector) == {"w": "weight has 1 axes [6]"}
    empty = parse(f"{X} {{ y = MatMul (x, w) }}", w=W[:, :0].copy())
    assert skipped(empty) == {"w": "weight is empty [6, 0]"}


def test_constants_without_a_tensor_are_left_alone() -> None:
    model = parse(f"{X} {{ w = Constant <value_floats = [1.0, 2.0]> ()  y = MatMul (x, w) }}")
    assert skipped(model) == {"w": "weight is a Constant without a plain tensor value"}
    reference = "layer <kernel> (a) => (b) { w = Constant <value: tensor = @kernel> ()  b = MatMul (a, w) }"
    model = parse(f"{X} {{ y = local.layer <kernel = float[6, 1] {{1, 1, 1, 1, 1, 1}}> (x) }}", functions=reference)
    assert skipped(model) == {"w": "weight is a Constant without a plain tensor value"}


def test_attributes_set_by_the_caller_leave_a_layer_alone() -> None:
    functions = "layer <turned> (a) => (b) { b = Gemm <transB: int = @turned> (a, w) }"
    model = parse(f"{X} {{ y = local.layer <turned = 1> (x) }}", functions=functions)
    model.functions[0].node.insert(0, constant("w", W))
    assert skipped(model) == {"w": "an attribute of the layer is set by the caller of its function"}


def test_operators_of_other_domains_are_not_layers() -> None:
    model = parse(f"{X} {{ y = local.MatMul (x, w) }}", functions="MatMul (a, b) => (c) { c = Add (a, b) }", w=W)
    assert skipped(model) == {}


def test_layers_beside_those_left_alone_are_found() -> None:
    text = f"{X} {{ h = MatMul (x, w)  t = Transpose (h)  g = MatMul (t, h)  y = MatMul (g, v) }}"
    model = parse(text, w=W, v=numbers((4, 4)))
    assert skipped(model, sites=("w", "v")) == {"h": "weight is computed at run time (by MatMul 'h')"}
