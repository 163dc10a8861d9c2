"""Small models with every kind of layer and every place a weight can come from, for test_graph.py and test_place.py.

All numbers are small multiples of 1/2, so that every sum is exact in each element type and in any order: a lossless
rewrite must give the very same outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.parser
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vqonnx.modelfile import make_tensor

Array = NDArray[Any]


def numbers(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> Array:
    """Random multiples of 1/2 from -1 to 1."""
    return (np.random.default_rng(seed).integers(-2, 3, shape) / 2).astype(dtype)


def parse(
    graph: str, *, opset: int = 17, ir: int = 8, functions: str = "", **arrays: Array | TensorProto
) -> ModelProto:
    """A model from the text of its graph, where ``[name]`` may stand before a node, with initializers from arrays."""
    imports = f'"" : {opset}' + (', "local" : 1' if functions else "")
    header = f"<ir_version: {ir}, opset_import: [{imports}]>"
    body = f'<domain: "local", opset_import: ["" : {opset}]> {functions}' if functions else ""
    model = parse_named(f"{header} g {graph} {body}")
    store(model.graph, **arrays)
    return model


_NAMED = re.compile(r"(?<!\w)\[(\w+)\] (?=(\w+) = )")


def parse_named(text: str) -> ModelProto:
    """What `onnx.parser.parse_model` does, and names of nodes, which it reads only since onnx 1.18."""
    model = onnx.parser.parse_model(_NAMED.sub("", text))
    names = {output: name for name, output in _NAMED.findall(text)}
    for graph in (model.graph, *subgraphs(model)):
        for node in graph.node:
            node.name = names.get(node.output[0], "")
    return model


def store(graph: GraphProto, **arrays: Array | TensorProto) -> None:
    for name, values in arrays.items():
        tensor = values if isinstance(values, TensorProto) else numpy_helper.from_array(values, name)
        graph.initializer.append(tensor)


def constant(name: str, values: Array) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values, ""))


def subgraphs(model: ModelProto) -> list[GraphProto]:
    """Graphs in attributes, outer ones first, in the order of the file."""
    found: list[GraphProto] = []

    def walk(nodes: Any) -> None:
        for node in nodes:
            for attribute in node.attribute:
                for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    found.append(graph)
                    walk(graph.node)

    walk(model.graph.node)
    for function in model.functions:
        walk(function.node)
    return found


@dataclass(frozen=True, eq=False)
class Case:
    """A model whose weights can all be replaced.

    Attributes:
        name: For messages.
        model: The model; copy it before it is changed.
        sites: Name, operator and shape of each weight that is found.
        gone: Names that a rewrite takes away, the weights aside.
        feed: Inputs.
    """

    name: str
    model: ModelProto
    sites: tuple[tuple[str, str, tuple[int, ...]], ...]
    gone: frozenset[str]
    feed: dict[str, Array]

    def copy(self) -> ModelProto:
        copy = ModelProto()
        copy.CopyFrom(self.model)
        return copy


# Layers


@dataclass(frozen=True)
class LayerKind:
    """One operator with its attributes.

    Attributes:
        call: The node, as ONNX text; it reads x, w and perhaps b.
        x: Shape of the input.
        w: Shape of the weight.
        bias: Shape of b.
        matrix: Rows and columns that the weight is seen as.
        dtype: Element type of the model.
    """

    call: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    matrix: tuple[int, int]
    bias: tuple[int, ...] | None = None
    dtype: Any = np.float32
    opset: int = 17
    ir: int = 8

    @property
    def op_type(self) -> str:
        return self.call.split()[0]

    @property
    def _outputs(self) -> str:
        rank = len(self.x) if len(self.x) != 2 else len(self.w)
        return ", ".join("ABCDE"[:rank])

    def case(self, name: str) -> Case:
        kind = {np.float32: "float", np.float16: "float16", np.float64: "double"}[self.dtype]
        arrays = {"w": numbers(self.w, 1, self.dtype)}
        if self.bias is not None:
            arrays["b"] = numbers(self.bias, 2, self.dtype)
        sizes = ", ".join(map(str, self.x))
        listed = "".join(f", {kind}{list(values.shape)} {key}" for key, values in arrays.items() if self.ir < 4)
        graph = f"({kind}[{sizes}] x{listed}) => ({kind}[{self._outputs}] y) {{ y = {self.call} }}"
        model = parse(graph, opset=self.opset, ir=self.ir, **arrays)
        return Case(name, model, (("w", self.op_type, self.w),), frozenset(), {"x": 2 * numbers(self.x, 3, self.dtype)})


LAYERS = {
    "conv1d": LayerKind("Conv <strides = [2]> (x, w, b)", (2, 3, 9), (4, 3, 3), (4, 9), bias=(4,)),
    "conv2d": LayerKind(
        "Conv <strides = [2, 1], dilations = [1, 2], pads = [1, 0, 2, 1]> (x, w)", (1, 3, 8, 9), (5, 3, 3, 2), (5, 18)
    ),
    "conv2d_auto_pad": LayerKind(
        'Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)', (1, 3, 6, 7), (4, 3, 3, 3), (4, 27)
    ),
    "conv2d_1x1": LayerKind("Conv (x, w)", (1, 6, 4, 4), (4, 6, 1, 1), (4, 6)),
    "conv2d_grouped": LayerKind("Conv <group = 2> (x, w)", (1, 6, 5, 5), (4, 3, 3, 3), (4, 27)),
    "conv3d": LayerKind("Conv (x, w)", (1, 2, 4, 5, 4), (3, 2, 2, 3, 2), (3, 24)),
    "conv_half": LayerKind("Conv (x, w, b)", (1, 3, 5, 5), (4, 3, 3, 3), (4, 27), bias=(4,), dtype=np.float16),
    "transposed1d": LayerKind("ConvTranspose <strides = [2]> (x, w, b)", (1, 4, 5), (4, 3, 3), (3, 12), bias=(3,)),
    "transposed2d": LayerKind(
        "ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 0]> (x, w)",
        (1, 4, 5, 4),
        (4, 3, 3, 2),
        (3, 24),
    ),
    "transposed2d_grouped": LayerKind("ConvTranspose <group = 2> (x, w)", (1, 4, 4, 4), (4, 3, 3, 2), (6, 12)),
    "transposed3d_grouped": LayerKind("ConvTranspose <group = 3> (x, w)", (1, 6, 3, 2, 3), (6, 2, 2, 1, 3), (6, 12)),
    "gemm": LayerKind("Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", (2, 6), (6, 4), (4, 6), bias=(4,)),
    "gemm_trans_a": LayerKind("Gemm <transA = 1> (x, w)", (6, 2), (6, 4), (4, 6)),
    "gemm_trans_b": LayerKind("Gemm <transB = 1> (x, w, b)", (2, 6), (4, 6), (4, 6), bias=(1, 4)),
    "gemm_trans_both": LayerKind("Gemm <transA = 1, transB = 1, alpha = 2.0> (x, w)", (6, 2), (4, 6), (4, 6)),
    "gemm_opset_7": LayerKind("Gemm (x, w, b)", (2, 6), (6, 4), (4, 6), bias=(4,), opset=7, ir=3),
    "matmul": LayerKind("MatMul (x, w)", (2, 3, 6), (6, 4), (4, 6)),
    "matmul_vector": LayerKind("MatMul (x, w)", (6,), (6, 4), (4, 6)),
    "matmul_stacked": LayerKind("MatMul (x, w)", (3, 2, 6), (3, 6, 4), (12, 6)),
    "matmul_stacked_twice": LayerKind("MatMul (x, w)", (2, 6), (2, 3, 6, 4), (24, 6)),
    "matmul_half": LayerKind("MatMul (x, w)", (2, 6), (6, 4), (4, 6), dtype=np.float16),
    "matmul_double": LayerKind("MatMul (x, w)", (2, 6), (6, 4), (4, 6), dtype=np.float64),
}


# Sources. All weights are read as [6, 4] by MatMul nodes.

_W = numbers((6, 4), 1)
_V = numbers((4, 4), 4)
_X = {"x": 2 * numbers((2, 6), 3)}
_HEAD = "(float[2, 6] x) => (float[R, C] y)"
_LIST = "(float[2, 6] x, bool c) => (float[R, C] y)"

Builder = Callable[[], "tuple[ModelProto, tuple[str, ...], set[str]]"]
_SOURCES: dict[str, Builder] = {}


def _source(builder: Builder) -> Builder:
    _SOURCES[builder.__name__] = builder
    return builder


def _chain(steps: str, *, head: str = _HEAD, **arrays: Array | TensorProto) -> ModelProto:
    return parse(f"{head} {{ {steps} y = MatMul (x, w) }}", **arrays)


def _before(model: ModelProto, *nodes: NodeProto) -> ModelProto:
    rest = [NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    return model


@_source
def initializer():
    return _chain("", w=_W), ("w",), set()


@_source
def typed_initializer():
    model = _chain("")
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, _W.shape, _W.ravel().tolist()))
    return model, ("w",), set()


@_source
def constant_node():
    return _before(_chain(""), constant("w", _W)), ("w",), set()


@_source
def constant_node_between_others():
    model = parse(f"{_HEAD} {{ h = Relu (x)  k = Neg (h)  y = MatMul (k, w) }}")
    model.graph.node.insert(1, constant("w", _W))
    return model, ("w",), set()


@_source
def identity():
    return _chain("w = Identity (v)", v=_W), ("w",), {"v"}


@_source
def transpose():
    return _chain("w = Transpose <perm = [1, 0]> (v)", v=_W.T.copy()), ("w",), {"v"}


@_source
def transpose_without_perm():
    return _chain("w = Transpose (v)", v=_W.T.copy()), ("w",), {"v"}


@_source
def reshape():
    return _chain("w = Reshape (v, s)", v=_W.reshape(3, 8), s=np.array([6, -1])), ("w",), {"v", "s"}


@_source
def reshape_keeping_an_axis():
    return _chain("w = Reshape (v, s)", v=_W.reshape(6, 2, 2), s=np.array([0, 4])), ("w",), {"v", "s"}


@_source
def reshape_by_a_constant_node():
    model = _before(_chain("w = Reshape (v, s)", v=_W.reshape(24)), constant("s", np.array([6, 4])))
    return model, ("w",), {"v", "s"}


@_source
def reshape_by_a_shape_that_others_use():
    text = f"{_HEAD} {{ w = Reshape (v, s)  h = MatMul (x, w)  y = Reshape (h, s) }}"
    return parse(text, v=_W.reshape(3, 8), s=np.array([-1, 4])), ("w",), {"v"}


@_source
def cast_from_half():
    return _chain("w = Cast <to = 1> (v)", v=_W.astype(np.float16)), ("w",), {"v"}


@_source
def cast_from_bfloat16():
    return _chain("w = Cast <to = 1> (v)", v=make_tensor(_W, TensorProto.BFLOAT16, "v")), ("w",), {"v"}


@_source
def cast_from_double():
    return _chain("w = Cast <to = 1> (v)", v=_W.astype(np.float64)), ("w",), {"v"}


@_source
def cast_to_half():
    text = "(float16[2, 6] x) => (float16[R, C] y) { w = Cast <to = 10> (v)  y = MatMul (x, w) }"
    return parse(text, v=_W), ("w",), {"v"}


@_source
def long_chain():
    steps = "c = Reshape (a, s)  d = Transpose (c)  e = Cast <to = 1> (d)  w = Identity (e)"
    model = _before(_chain(steps, s=np.array([4, 6])), constant("a", _W.T.astype(np.float16).reshape(-1)))
    model.graph.value_info.append(helper.make_tensor_value_info("d", TensorProto.FLOAT16, (6, 4)))
    return model, ("w",), {"s", "a", "c", "d", "e"}


@_source
def listed_as_input():
    head = "(float[2, 6] x, float[6, 4] w, float[4] b) => (float[R, C] y)"
    return parse(f"{head} {{ h = MatMul (x, w)  y = Add (h, b) }}", ir=3, opset=9, w=_W, b=_V[0]), ("w",), set()


@_source
def listed_as_input_of_a_newer_file():
    return _chain("", head="(float[2, 6] x, float[6, 4] w) => (float[R, C] y)", w=_W), ("w",), set()


@_source
def listed_as_input_behind_transpose():
    model = parse(
        "(float[2, 6] x, float[4, 6] v) => (float[R, C] y) { w = Transpose (v)  y = MatMul (x, w) }",
        **{"ir": 3, "opset": 8, "v": _W.T.copy()},
    )
    return model, ("w",), {"v"}


@_source
def shared_by_two():
    return parse(f"{_HEAD} {{ h = MatMul (x, w)  k = Gemm (x, w)  y = Add (h, k) }}", w=_W), ("w",), set()


@_source
def shared_behind_one_transpose():
    steps = "w = Transpose (v)  h = MatMul (x, w)  n = Neg (x)  k = MatMul (n, w)  y = Concat <axis = 0> (h, k)"
    return parse(f"{_HEAD} {{ {steps} }}", v=_W.T.copy()), ("w",), {"v"}


@_source
def tied_through_a_transpose():
    text = f"{_HEAD} {{ t = Transpose (w)  h = MatMul (x, w)  y = MatMul (h, t) }}"
    return parse(text, w=_W), ("w",), set()


@_source
def turned_before_it_is_read_directly():
    steps = "n = Neg (x)  t = Transpose (w)  h = MatMul (n, w)  y = MatMul (h, t)"
    return parse(f"{_HEAD} {{ {steps} }}", w=_W), ("w",), set()


@_source
def two_sites():
    return parse(f"{_HEAD} {{ h = MatMul (x, w)  y = MatMul (h, v) }}", w=_W, v=_V), ("w", "v:4"), set()


@_source
def in_a_branch():
    text = """
      y = If (c) <then_branch = t () => (float[R, C] a) { a = MatMul (x, w) },
                  else_branch = e () => (float[R, C] b) { n = Neg (x)  b = MatMul (n, v) }>"""
    model = parse(f"{_LIST} {{ {text} }}")
    store(subgraphs(model)[0], w=_W)
    store(subgraphs(model)[1], v=numbers((6, 4), 5))
    return model, ("w", "v"), set()


@_source
def constant_and_chain_in_a_branch():
    text = """
      y = If (c) <then_branch = t () => (float[R, C] a) { w = Transpose (k)  a = MatMul (x, w) },
                  else_branch = e () => (float[R, C] b) { v = Reshape (f, s)  b = MatMul (x, v) }>"""
    model = parse(f"{_LIST} {{ {text} }}")
    subgraphs(model)[0].node.insert(0, constant("k", _W.T.copy()))
    store(subgraphs(model)[1], f=numbers((24,), 5), s=np.array([6, 4]))
    return model, ("w", "v"), {"k", "f", "s"}


@_source
def outside_read_in_both_branches():
    text = """
      y = If (c) <then_branch = t () => (float[R, C] a) { a = MatMul (x, w) },
                  else_branch = e () => (float[R, C] b) { n = Neg (x)  b = MatMul (n, w) }>"""
    return parse(f"{_LIST} {{ {text} }}", w=_W), ("w",), set()


@_source
def outside_and_in_nested_branches():
    text = """
      h = MatMul (x, w)
      y = If (c) <
        then_branch = t () => (float[R, C] a) {
          i = MatMul (h, v)
          a = If (c) <then_branch = tt () => (float[R, C] aa) { aa = MatMul (i, u) },
                      else_branch = te () => (float[R, C] ab) { ab = MatMul (h, v) }>
        },
        else_branch = e () => (float[R, C] b) { b = MatMul (x, w) }>"""
    model = parse(f"{_LIST} {{ {text} }}", w=_W)
    outer, inner, *_ = subgraphs(model)
    store(outer, v=_V)
    store(inner, u=numbers((4, 4), 6))
    return model, ("w", "v:4", "u:4"), set()


@_source
def in_a_loop():
    text = """
      n = Constant <value = int64 {3}> ()
      t = Constant <value = bool {1}> ()
      h = MatMul (x, w)
      y = Loop (n, t, h) <body = l (int64 i, bool d, float[2, 4] s) => (bool e, float[2, 4] r) {
        e = Identity (d)  m = MatMul (s, v)  z = Constant <value = float {2.0}> ()  r = Mod <fmod = 1> (m, z)
      }>"""
    model = parse(f"{_HEAD} {{ {text} }}", w=_W)
    store(subgraphs(model)[0], v=_V)
    return model, ("w", "v:4"), set()


@_source
def in_a_scan():
    text = """
      z = Constant <value = float[4] {0., 0., 0., 0.}> ()
      s, y = Scan (z, x) <num_scan_inputs = 1, body = b (float[4] p, float[6] r) => (float[4] q, float[4] o) {
        h = MatMul (r, w)  q = Add (p, h)  o = Identity (q)
      }>"""
    model = parse(f"{_HEAD} {{ {text} }}")
    store(subgraphs(model)[0], w=_W)
    return model, ("w",), set()


@_source
def in_a_function_called_twice():
    functions = "layer (a) => (b) { t = Transpose (k)  b = MatMul (a, t) }"
    model = parse(
        f"{_HEAD} {{ h = local.layer (x)  n = Neg (x)  m = local.layer (n)  y = Sub (h, m) }}", functions=functions
    )
    model.functions[0].node.insert(0, constant("k", _W.T.copy()))
    return model, ("t",), {"k"}


@_source
def in_a_branch_of_a_function():
    functions = """layer (a, p) => (b) {
      b = If (p) <then_branch = t () => (float[R, C] d) { d = MatMul (a, w) },
                  else_branch = e () => (float[R, C] f) { f = MatMul (a, v) }> }"""
    model = parse(f"{_LIST} {{ y = local.layer (x, c) }}", functions=functions)
    store(subgraphs(model)[0], w=_W)
    subgraphs(model)[1].node.insert(0, constant("v", numbers((6, 4), 7)))
    return model, ("w", "v"), set()


@_source
def of_a_function_read_in_its_branch():
    functions = """layer (a, p) => (b) {
      n = Neg (a)
      b = If (p) <then_branch = t () => (float[R, C] d) { d = MatMul (a, w) },
                  else_branch = e () => (float[R, C] f) { f = MatMul (n, w) }> }"""
    model = parse(f"{_LIST} {{ y = local.layer (x, c) }}", functions=functions)
    model.functions[0].node.insert(0, constant("w", _W))
    return model, ("w",), set()


def _build(name: str) -> Case:
    model, weights, gone = _SOURCES[name]()
    pairs = (entry.partition(":") for entry in weights)
    sites = tuple((weight, "MatMul", (int(inputs or 6), 4)) for weight, _, inputs in pairs)
    feed = {value.name: _feed(value) for value in model.graph.input if value.name in ("x", "c")}
    return Case(name, model, sites, frozenset(gone), feed)


def _feed(value: Any) -> Array:
    if value.name == "c":
        return np.array(True)
    return _X["x"].astype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


LAYER_CASES = {name: kind.case(name) for name, kind in LAYERS.items()}
SOURCE_CASES = {name: _build(name) for name in _SOURCES}
CASES = LAYER_CASES | SOURCE_CASES


def feeds(case: Case) -> Iterator[dict[str, Array]]:
    """The feed, and for models with a condition both of its values."""
    yield case.feed
    if "c" in case.feed:
        yield case.feed | {"c": np.array(False)}
