"""A product as two layers: the same outputs as the whole weight for every layer and target, and the way back.

The numbers are small and whole, so that every sum is exact in any order: outputs must be the very same.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from math import prod
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from cases import CASES, SOURCE_CASES, Case, feeds, numbers, parse, parse_named
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import VIEW_ORDERS, Single, singles
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from test_place import runnable, scalar

from vqonnx.errors import FormError
from vqonnx.form import Blocks, Dense, Form, Matrix, Product
from vqonnx.graph import LINEAR, Site, find
from vqonnx.modelfile import make_tensor
from vqonnx.pair import count, join, joined_shape, joined_weight, multiplications, obstacle, pair_of, split
from vqonnx.place import Placement, Target, place
from vqonnx.runtime import open_session, run
from vqonnx.scope import scopes
from vqonnx.view import View, ViewOrder

TARGETS: tuple[Target, ...] = get_args(Target)


# Layers of every kind, with a bias where the operator has one


@dataclass(frozen=True)
class Biased:
    """A layer in a model of its own, its weight of a low rank."""

    layer: Single
    opset: int
    bias: tuple[int, ...] | None
    inner: int
    order: ViewOrder

    @property
    def view(self) -> View:
        return self.layer.view(self.order)

    @property
    def factors(self) -> tuple[Matrix, Matrix]:
        rng = np.random.default_rng(self.layer.seed)
        shapes = (self.view.rows, self.inner), (self.inner, self.view.cols)
        left, right = (rng.integers(-2, 3, shape).astype(np.float32) for shape in shapes)
        return left, right

    def model(self) -> ModelProto:
        left, right = self.factors
        node = self.layer.node
        node.name = "layer"
        tensors = [numpy_helper.from_array(self.view.tensor(left @ right), "w")]
        if self.bias is not None:
            node.input.append("b")
            bias = np.random.default_rng(7).integers(-9, 10, self.bias).astype(np.float32)
            tensors.append(numpy_helper.from_array(bias, "b"))
        x = helper.make_tensor_value_info("x", 1, self.layer.input)
        rank = len(self.layer.input)
        if self.layer.op_type == "MatMul":
            rank = np.matmul(*self.layer.arrays).ndim
        y = helper.make_tensor_value_info("y", 1, [None] * rank)
        graph = helper.make_graph([node], "biased", [x], [y], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    @property
    def feed(self) -> dict[str, NDArray[Any]]:
        return {"x": self.layer.arrays[0]}


@st.composite
def biased(draw: st.DrawFn) -> Biased:
    layer = draw(singles())
    opset = draw(st.sampled_from((11, 13, 17)))
    bias: tuple[int, ...] | None = None
    if layer.op_type == "Conv":
        bias = draw(st.sampled_from((None, (layer.weight[0],))))
    elif layer.op_type == "ConvTranspose":
        bias = draw(st.sampled_from((None, (layer.group * layer.weight[1],))))
    elif layer.op_type == "Gemm":
        outputs = layer.weight[0 if layer.attributes.get("transB") else 1]
        rows = layer.input[1 if layer.attributes.get("transA") else 0]
        bias = draw(st.sampled_from((None, (1,), (outputs,), (1, outputs), (rows, 1), (rows, outputs))))
        for name in ("alpha", "beta"):
            value = draw(st.sampled_from((None, 1.0, 0.5, -2.0)))
            if value is not None:
                layer.attributes[name] = value
        opset = draw(st.sampled_from((7, 9, 10, 13) if bias else (11, 13)))
    return Biased(layer, opset, bias, draw(st.integers(1, 3)), draw(st.sampled_from(VIEW_ORDERS)))


def coded_in_parts(matrix: Matrix) -> Form:
    rows = len(matrix) // 2
    return Blocks((scalar(matrix[:rows]), scalar(matrix[rows:])), axis=0) if rows else scalar(matrix)


def part_of_the_columns(matrix: Matrix) -> Form:
    cols = matrix.shape[1] // 2
    return Blocks((scalar(matrix[:, :cols]), Dense(matrix[:, cols:])), axis=1) if cols else scalar(matrix)


FACTORS = {
    "dense": Dense,
    "half": lambda matrix: Dense(matrix.astype(np.float16)),
    "coded": scalar,
    "rows": coded_in_parts,
    "columns": part_of_the_columns,
}


def only_site(model: ModelProto) -> Site:
    (site,) = find(model, ".").sites
    return site


@given(case=biased(), target=st.sampled_from(TARGETS), kinds=st.tuples(*[st.sampled_from(sorted(FACTORS))] * 2))
@settings(max_examples=150)
def test_two_layers_do_what_one_does(case: Biased, target: Target, kinds: tuple[str, str]) -> None:
    original = case.model()
    (want,) = run(open_session(original.SerializeToString(), threads=1), case.feed).values()
    left, right = (FACTORS[kind](factor) for kind, factor in zip(kinds, case.factors, strict=True))
    for apply in ("weights", "activations"):
        model = case.model()
        if not find(model, ".").sites:  # a depthwise convolution
            return
        site = only_site(model)
        (names,) = place(model, [Placement(site, Product(left, right, apply), case.view)], target)
        # onnx (1.23) infers too few axes where an output_shape is smaller than the input, in any model.
        onnx.checker.check_model(model, full_check="output_shape" not in case.layer.attributes)
        weights = [node.input[1] for node in model.graph.node if node.op_type in LINEAR and node.domain == ""]
        refused = "output_shape" in case.layer.attributes and case.order != "ohw"
        split_up = apply == "activations" and not refused
        assert weights[-2:] == list(names) if split_up else (weights[-1], names) == ("w", ())
        ways = [(runnable(model), False)] + ([(model.SerializeToString(), True)] if target != "portable" else [])
        for written, library in ways:
            for optimise in (True, False):
                session = open_session(written, library=library, threads=1, optimise=optimise)
                (got,) = run(session, case.feed).values()
                np.testing.assert_array_equal(got, want, err_msg=f"{case} {target} {apply} {library} {optimise}")


@given(case=biased())
@settings(max_examples=200)
def test_joining_undoes_splitting(case: Biased) -> None:
    model = case.model()
    if not find(model, ".").sites:
        return
    site = only_site(model)
    left, right = case.factors
    product = Product(Dense(left), Dense(right), "activations")
    pair = pair_of(site, case.view, product)
    if pair is None:
        assert "output_shape" in str(obstacle(site, case.view, product))
        return
    first, second = split(site.node, pair, ("a", "b"), "between", "zero" if case.opset < 11 else None)
    back = join(first, second, "w")
    for node in (back, site.node):
        ordered = sorted(node.attribute, key=lambda attribute: attribute.name)
        ordered = [type(attribute).FromString(attribute.SerializeToString()) for attribute in ordered]
        del node.attribute[:]
        node.attribute.extend(ordered)
    assert back == site.node, f"{case}"
    assert joined_shape(first, second, *pair.shapes) == site.shape
    weights = [
        np.concatenate([view.tensor(form.decode())] * copies)
        for form, view, copies in (
            (pair.first, pair.first_view, pair.copies),
            (pair.second, pair.second_view, 1),
        )
    ]
    assert tuple(weight.shape for weight in weights) == pair.shapes
    np.testing.assert_array_equal(joined_weight(first, second, *weights), site.read(), err_msg=f"{case}")


# Every place that a weight can come from


def exact(matrix: Matrix) -> Product:
    """A product that loses nothing."""
    order = np.random.default_rng(0).permutation(matrix.shape[1])
    unit = np.eye(matrix.shape[1], dtype=np.float32)
    return Product(scalar(matrix[:, order]), scalar(unit[order]), "activations")


def split_all(model: ModelProto, target: Target, order: ViewOrder = "ihw") -> list[tuple[str, ...]]:
    sites = find(model, ".").sites
    placements = [Placement(s, exact(s.view(order).matrix(s.read())), s.view(order)) for s in sites]
    names = place(model, placements, target)
    onnx.checker.check_model(model, full_check=True)
    return list(names)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_wherever_the_weight_is(name: str, target: Target) -> None:
    case = CASES[name]
    original = open_session(case.model.SerializeToString())
    for order in VIEW_ORDERS:
        model = case.copy()
        before = {tensor.name for scope in scopes(model) for tensor in scope.initializers.values()}
        names = split_all(model, target, order)
        tied = name in ("tied_through_a_transpose", "turned_before_it_is_read_directly")
        assert all(len(pair) == (0 if tied else 2) for pair in names)
        session = open_session(runnable(model))
        for feed in feeds(case):
            want, got = run(original, feed), run(session, feed)
            for output in want:
                np.testing.assert_array_equal(got[output], want[output], err_msg=f"{name}: {output}, {order}")
        left = {tensor.name for scope in scopes(model) for tensor in scope.initializers.values()}
        read = {name for scope in scopes(model) for node in scope.proto.node for name in node.input}
        assert left <= read, "nothing is stored that nobody reads"
        if not tied:
            assert not (left & before) & {weight for weight, *_ in case.sites}


def test_every_use_of_a_shared_weight_becomes_two_layers() -> None:
    for name in ("shared_by_two", "shared_behind_one_transpose", "outside_read_in_both_branches"):
        model = SOURCE_CASES[name].copy()
        ((first, second),) = split_all(model, "hybrid")
        uses = scopes(model)[0].uses
        assert len(uses[first]) == len(uses[second]) == 2, name


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 18, 21])
@pytest.mark.parametrize("target", TARGETS)
def test_every_opset(opset: int, target: Target) -> None:
    text = """(float[2, 6] x) => (float[R, C] y) {
      h = Gemm <alpha = 0.5> (x, w, b)
      i = Gemm <transB = 1> (h, u, b)
      y = MatMul (i, v)
    }"""
    model = parse(
        text, opset=opset, w=numbers((6, 4), 1), u=numbers((4, 4), 2), v=numbers((4, 3), 3), b=numbers((4,), 4)
    )
    case = Case(f"opset {opset}", model, (), frozenset(), {"x": numbers((2, 6), 5)})
    want = run(open_session(model.SerializeToString()), case.feed)["y"]
    for order in ("ihw", "ohw"):
        copy = case.copy()
        assert all(split_all(copy, target, order))
        np.testing.assert_array_equal(run(open_session(runnable(copy)), case.feed)["y"], want)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("call", ["Gemm (x, w)", "Gemm <transB = 1> (x, w)", "MatMul (x, w)", "Conv (x, w)"])
def test_square_factors_are_not_transposed(call: str, target: Target) -> None:
    """onnxruntime fuses Transpose and Gemm, and 1.19 to 1.23 whatever the perm; square, nobody would notice."""
    square = (6, 6, 1) if "Conv" in call else (6, 6)
    x = (2, 6, 3) if "Conv" in call else (2, 6)
    sizes, outputs = ", ".join(map(str, x)), ", ".join("ABC"[: len(x)])
    model = parse(f"(float[{sizes}] x) => (float[{outputs}] y) {{ y = {call} }}", w=numbers(square, 1))
    feed = {"x": numbers(x, 2)}
    want = run(open_session(model.SerializeToString()), feed)["y"]
    for order in VIEW_ORDERS:
        copy = ModelProto.FromString(model.SerializeToString())
        assert all(split_all(copy, target, order))
        np.testing.assert_array_equal(run(open_session(runnable(copy)), feed)["y"], want, err_msg=order)


def test_onnxruntime_runs_two_fast_layers(tmp_path: Any) -> None:
    """After folding there are two convolutions in the fast layout, and nothing that decodes."""
    model = parse(
        "(float[1, 32, 8, 8] x) => (float[A, B, C, D] y) { h = Conv <pads = [1, 1, 1, 1]> (x, w, b) y = Relu (h) }",
        w=numbers((32, 32, 3, 3), 1),
        b=numbers((32,), 2),
    )
    site = only_site(model)
    for order in VIEW_ORDERS:
        for target in ("hybrid", "portable"):
            copy = ModelProto.FromString(model.SerializeToString())
            site = only_site(copy)
            view = site.view(order)
            left, right = numbers((view.rows, 16), 3), numbers((16, view.cols), 4)
            place(copy, [Placement(site, Product(scalar(left), scalar(right), "activations"), view)], target)
            open_session(copy.SerializeToString(), optimised_path=tmp_path / "optimised.onnx")
            nodes = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
            assert sorted(nodes) == ["Conv", "Conv", "ReorderInput", "ReorderOutput"], (order, target)


@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16_layers_keep_their_type(target: Target) -> None:
    """onnxruntime has no such MatMul on a CPU: look at the types, which the checker compares, and at the factors."""
    weight = make_tensor(numbers((6, 4), 1), TensorProto.BFLOAT16, "w")
    model = parse("(bfloat16[2, 6] x) => (bfloat16[R, C] y) { y = MatMul (x, w) }", w=weight)
    ((first, second),) = split_all(model, target)
    del model.graph.node[-2:], model.graph.input[:], model.graph.output[:]
    for name in (first, second):
        model.graph.node.append(helper.make_node("Cast", [name], [f"wide {name}"], to=TensorProto.FLOAT))
        model.graph.output.append(helper.make_tensor_value_info(f"wide {name}", TensorProto.FLOAT, [None, None]))
    inner, outer = run(open_session(runnable(model)), {}).values()
    np.testing.assert_array_equal(inner @ outer, numbers((6, 4), 1))


# When a product stays whole


def low_rank(site: Site, inner: int, order: ViewOrder = "ihw") -> tuple[View, Any]:
    view = site.view(order)
    return view, Product(Dense(numbers((view.rows, inner), 1)), Dense(numbers((inner, view.cols), 2)), "activations")


def test_what_cannot_be_two_layers_is_multiplied_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    conv = "(float[1, 8, 5, 5] x) => (float[A, B, C, D] y)"
    groups = parse(
        f"{conv} {{ h = Conv <group = 2> (x, w)  i = Concat <axis = 1> (h, h)  y = Conv <group = 4> (i, w) }}",
        w=numbers((8, 4, 1, 1), 1),
    )
    by_caller = parse_named(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2, 4] x) => (float[2, 4] y) { y = local.twice <turned = 1> (x) }
        <domain: "local", opset_import: ["" : 17]>
        twice <turned> (a) => (c) { b = Gemm (a, w)  c = Gemm <transB: int = @turned> (b, w) }"""
    )
    weight = numpy_helper.from_array(numbers((4, 4), 1), "")
    by_caller.functions[0].node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    tied = SOURCE_CASES["tied_through_a_transpose"].copy()
    parted = CASES["gemm"].copy()
    reasons = {
        "layers of different groups share the weight": groups,
        "an attribute of a layer is set by the caller of its function": by_caller,
        "another layer reads the weight through a Transpose or Reshape": tied,
        "it is only a part of the weight": parted,
    }
    for reason, model in reasons.items():
        site = only_site(model)
        view, form = low_rank(site, 2)
        if model is parted:
            above = Product(Dense(numbers((3, 2), 1)), form.right, "activations")
            form = Blocks((above, Dense(numbers((1, 6), 3))), axis=0)
        assert obstacle(site, view, form) == reason
        assert multiplications(site, view, form).share == 1
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vqonnx"):
            assert place(model, [Placement(site, form, view)], "hybrid") == ((),)
        (record,) = caplog.records
        assert record.getMessage() == f"{site.name}: the product is multiplied out into the weight, as {reason}"
        onnx.checker.check_model(model)
        assert open_session(model.SerializeToString())


def test_cheaper_says_nothing_where_it_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody asked for it by name; the report shows what became of it."""
    model = SOURCE_CASES["tied_through_a_transpose"].copy()
    site = only_site(model)
    view, product = low_rank(site, 1)
    assert place(model, [Placement(site, replace(product, apply="cheaper"), view)], "hybrid") == ((),)
    assert not caplog.records


def test_cheaper_asks_for_a_quarter_less() -> None:
    site = only_site(parse("(float[2, 40] x) => (float[R, C] y) { y = MatMul (x, w) }", w=numbers((40, 40))))
    for inner, applied in ((15, True), (16, False), (20, False)):  # 2 * 15 * 40 is 0.75 of 40 * 40
        view, product = low_rank(site, inner)
        assert (pair_of(site, view, replace(product, apply="cheaper")) is not None) == applied
        assert pair_of(site, view, replace(product, apply="weights")) is None
        assert pair_of(site, view, product) is not None
        share = multiplications(site, view, replace(product, apply="cheaper")).share
        assert share == (inner / 20 if applied else 1)


def test_other_ways_to_run_are_refused() -> None:
    part = Dense(np.ones((2, 2), np.float32))
    with pytest.raises(FormError, match="apply is 'outputs'; choose one of weights, activations, cheaper"):
        Product(part, part, "outputs")  # type: ignore[arg-type]


# Multiplications


@given(case=biased())
@settings(max_examples=200)
def test_multiplications_are_those_of_the_nodes(case: Biased) -> None:
    """Counted over all positions of an input that the kernel tiles without overlap or rest: there are no edges."""
    layer = case.layer
    if layer.op_type in ("Conv", "ConvTranspose"):
        kernel = layer.weight[2:]
        places = tuple(size % 3 + 1 for size in layer.input[2:])
        size = tuple(a * b for a, b in zip(places, kernel, strict=True)) if layer.op_type == "Conv" else places
        layer = replace(
            layer, input=(*layer.input[:2], *size), attributes={"group": layer.group, "strides": list(kernel)}
        )
        case = replace(case, layer=layer)
    model = case.model()
    if not find(model, ".").sites:
        return
    site = only_site(model)
    left, right = case.factors
    pair = pair_of(site, case.view, Product(Dense(left), Dense(right), "activations"))
    assert pair is not None
    cost = multiplications(site, case.view, Product(Dense(left), Dense(right), "activations"))
    outer = layer.weight[:-2] if layer.op_type == "MatMul" else ()
    if outer or layer.op_type in ("Gemm", "MatMul"):
        inputs, outputs = layer.weight[-2:]
        assert cost.before == inputs * outputs
        assert cost.after == case.inner * (inputs + outputs)
        return
    taps, places = prod(layer.weight[2:]), prod(layer.input[2:])
    if layer.op_type == "Conv":
        inner_places = places if pair.by_input else places // taps  # the stride is the kernel
        total = {"before": prod(layer.weight) * places // taps}
        last = places // taps
        after = [prod(pair.shapes[0]) * inner_places, prod(pair.shapes[1]) * last]
    else:
        total = {"before": prod(layer.weight) * places}
        last = places * taps
        after = [prod(pair.shapes[0]) * places, prod(pair.shapes[1]) * (places if pair.by_input else last)]
    assert cost.before * last == pytest.approx(total["before"], rel=1e-9), f"{case}"
    assert cost.after * last == pytest.approx(sum(after), rel=1e-9), f"{case}"


@pytest.mark.parametrize(("order", "rows"), [("ihw", "outputs"), ("ohw", "inputs")])
def test_the_share_is_that_of_the_paper(order: ViewOrder, rows: str) -> None:
    """Young et al. 2021, section 4.4: (n k + a b m k) / (a b m n), with m and n exchanged where rows are inputs."""
    n, m, a, b, k = 24, 10, 3, 5, 4
    site = only_site(
        parse("(float[1, 10, 9, 9] x) => (float[A, B, C, D] y) { y = Conv (x, w) }", w=numbers((n, m, a, b)))
    )
    view, product = low_rank(site, k, order)
    cost = multiplications(site, view, product)
    assert (cost.before, cost.after) == (
        a * b * m * n,
        n * k + a * b * m * k if rows == "outputs" else m * k + a * b * n * k,
    )
    pair = pair_of(site, view, product)
    assert pair is not None
    nodes = split(site.node, pair, ("a", "b"), "h")
    assert count(*nodes, *pair.shapes) == cost
