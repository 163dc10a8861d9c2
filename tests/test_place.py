"""Putting forms in place: the forms here lose nothing, so the rewritten model must give the very same outputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnx.inliner
import pytest
from cases import CASES, LAYERS, Case, feeds, numbers, parse, parse_named
from onnx import FunctionProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from vqonnx import modelfile, ops
from vqonnx.errors import ModelError
from vqonnx.form import Blocks, Coded, Dense, Form, Matrix, Product
from vqonnx.graph import find
from vqonnx.place import Placement, Target, main_opset, place
from vqonnx.runtime import open_session, run
from vqonnx.scope import scopes
from vqonnx.view import Order

TARGETS: tuple[Target, ...] = get_args(Target)
ORDERS: tuple[Order, ...] = get_args(Order)
Exact = Callable[[Matrix], Form]
_NEW = re.compile(r"vq\d+$")


# Forms that lose nothing


def scalar(matrix: Matrix) -> Coded:
    values, codes = np.unique(matrix, return_inverse=True)
    return Coded.one_stage(codes.reshape(matrix.shape), values[:, None])


def blocks_of(matrix: Matrix, width: int) -> Coded:
    """Every block that occurs is a word; the last one is filled with zeros where the width does not divide."""
    rows, cols = matrix.shape
    padded = np.pad(matrix, ((0, 0), (0, -cols % width))).reshape(-1, width)
    words, codes = np.unique(padded, axis=0, return_inverse=True)
    return Coded.one_stage(codes.reshape(rows, -1), words.astype(np.float16), cols=cols)


def two_stages_and_books(matrix: Matrix) -> Coded:
    """Whole numbers first, then what is left; the second book has its words in another order."""
    whole = np.floor(matrix)
    books = np.array([[[-1, 0, 1], [1, 0, -1]], [[0, 0.5, 0], [0, 0, 0.5]]], np.float32)[..., None]
    book = np.arange(matrix.shape[1]) % 2
    first = np.where(book == 0, whole + 1, 1 - whole)
    second = np.where(matrix == whole, 0, 1 + book)
    return Coded(np.stack([first, second]).astype(np.uint8), books, matrix.shape[1])


def scaled(matrix: Matrix) -> Coded:
    scales = np.where(np.arange(len(matrix)) % 2, 4, 0.5)[:, None]
    plain = scalar((matrix / scales).astype(np.float32))
    return Coded(plain.codes, plain.codebooks, plain.cols, scales.astype(np.float16))


def long_codes(matrix: Matrix) -> Coded:
    """Codes of 11 bits: those of the values, after 1,500 words that nothing uses."""
    plain = scalar(matrix)
    words = np.concatenate([np.full((1500, 1), 77, np.float32), plain.codebooks[0, 0]])
    return Coded.one_stage(plain.codes[0].astype(np.int64) + 1500, words)


def product(matrix: Matrix) -> Product:
    order = np.random.default_rng(0).permutation(matrix.shape[1])
    return Product(scalar(matrix[:, order]), scalar(np.eye(matrix.shape[1], dtype=np.float32)[order]))


def half_product(matrix: Matrix) -> Product:
    return Product(scalar(np.eye(len(matrix), dtype=np.float32) / 2), Dense((2 * matrix).astype(np.float16)))


def nested(matrix: Matrix) -> Blocks:
    above, left, right = matrix[:1], matrix[1:, :2], matrix[1:, 2:]
    return Blocks((blocks_of(above, 2), Blocks((Dense(left), product(right)), axis=1)), axis=0)


FORMS: dict[str, Exact] = {
    "scalar": scalar,
    "pairs": lambda matrix: blocks_of(matrix, 2),
    "wide blocks with a tail": lambda matrix: blocks_of(matrix, 5),
    "whole rows": lambda matrix: blocks_of(matrix, matrix.shape[1]),
    "two stages and books": two_stages_and_books,
    "scaled rows": scaled,
    "long codes": long_codes,
    "long beside short codes": lambda matrix: Blocks((long_codes(matrix[:1]), blocks_of(matrix[1:], 2)), axis=0),
    "one scale": lambda matrix: Coded(
        scalar(matrix * 2).codes, scalar(matrix * 2).codebooks, matrix.shape[1], np.full((1, 1), 0.5, np.float32)
    ),
    "dense": Dense,
    "dense half": lambda matrix: Dense(matrix.astype(np.float16)),
    "product": product,
    "half product": half_product,
    "rows": lambda matrix: Blocks((scalar(matrix[:1]), blocks_of(matrix[1:], 2)), axis=0),
    "columns": lambda matrix: Blocks((scalar(matrix[:, :2]), Dense(matrix[:, 2:])), axis=1),
    "nested": nested,
}


def rewrite(
    model: ModelProto, target: Target, *, exact: Exact = scalar, order: Order = "ihw", folder: Path = Path()
) -> ModelProto:
    """Replace every weight and check the result; the model itself is changed and given back."""
    placements = []
    for site in find(model, folder).sites:
        if site.depthwise:  # most methods leave these alone
            continue
        view = site.view(order)
        form = exact(view.matrix(site.read()))
        np.testing.assert_array_equal(view.tensor(form.decode()), site.read(), err_msg=f"{site.name}: not exact")
        placements.append(Placement(site, form, view))
    assert placements
    place(model, placements, target)
    onnx.checker.check_model(model, full_check=True)
    return model


def runnable(model: ModelProto) -> bytes:
    """With the body added by hand where the file has Decode nodes only, so that onnxruntime runs it by itself."""
    copy = ModelProto.FromString(model.SerializeToString())
    domains = {entry.domain for entry in copy.opset_import}
    if ops.DOMAIN in domains and not any(function.domain == ops.DOMAIN for function in copy.functions):
        copy.functions.append(ops.decode_function(main_opset(copy)))
        copy.ir_version = max(copy.ir_version, ops.FUNCTION_IR_VERSION)
    return copy.SerializeToString()


def assert_same_outputs(case: Case, rewritten: ModelProto) -> None:
    original, compressed = open_session(case.model.SerializeToString()), open_session(runnable(rewritten))
    for feed in feeds(case):
        want, got = run(original, feed), run(compressed, feed)
        assert list(want) == list(got)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=f"{case.name}: {name}")
            assert np.any(want[name])


# The same outputs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_stay_the_same(name: str, target: Target) -> None:
    assert_same_outputs(CASES[name], rewrite(CASES[name].copy(), target))


CONVOLUTIONS = [name for name in LAYERS if LAYERS[name].op_type.startswith("Conv")]
SOME = ("conv2d", "transposed2d_grouped", "gemm", "matmul_stacked", "matmul_half", "in_a_function_called_twice")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_channels_may_come_last(name: str) -> None:
    for target in ("hybrid", "portable"):
        rewritten = rewrite(CASES[name].copy(), target, order="hwi", exact=FORMS["pairs"])
        assert_same_outputs(CASES[name], rewritten)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_written(form: str, target: Target) -> None:
    for name in SOME:
        assert_same_outputs(CASES[name], rewrite(CASES[name].copy(), target, exact=FORMS[form]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_square_gemm_weights_are_not_transposed(form: str, target: Target) -> None:
    """onnxruntime 1.19 to 1.23 takes a Transpose that does nothing for one of a matrix; square, it would not notice."""
    text = "(float[2, 6] x) => (float[R, C] y) { y = Gemm <transB = 1> (x, w) }"
    case = Case("square", parse(text, w=numbers((6, 6), 1)), (), frozenset(), {"x": numbers((2, 6), 2)})
    model = rewrite(case.copy(), target, exact=FORMS[form])
    assert_same_outputs(case, model)
    assert not any(node.op_type == "Transpose" for node in model.graph.node)


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 18, 21])
@pytest.mark.parametrize("target", TARGETS)
def test_the_body_is_of_the_models_opset(opset: int, target: Target) -> None:
    text = "(float[2, 6] x) => (float[R, C] y) { h = Gemm (x, w, b)  y = MatMul (h, v) }"
    model = parse(text, opset=opset, w=numbers((6, 4), 1), v=numbers((4, 3), 2), b=numbers((4,), 3))
    case = Case(f"opset {opset}", model, (), frozenset(), {"x": numbers((2, 6), 4)})
    for form in ("nested", "two stages and books", "scaled rows", "wide blocks with a tail", "long codes"):
        rewritten = rewrite(case.copy(), target, exact=FORMS[form])
        assert_same_outputs(case, rewritten)
        assert {entry.domain: entry.version for entry in rewritten.opset_import}.get("") == opset
        for function in rewritten.functions:
            assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", opset)]


def test_other_tools_agree() -> None:
    for name in ("conv2d", "transposed2d", "gemm", "matmul_stacked"):
        case = CASES[name]
        want = run(open_session(case.model.SerializeToString()), case.feed)["y"]
        hybrid = rewrite(case.copy(), "hybrid", exact=FORMS["two stages and books"])
        for other in (hybrid, onnx.inliner.inline_local_functions(hybrid)):
            np.testing.assert_array_equal(ReferenceEvaluator(other).run(None, case.feed)[0], want, err_msg=name)


@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16_weights_keep_their_type(target: Target) -> None:
    weight = modelfile.make_tensor(numbers((6, 4), 1), TensorProto.BFLOAT16, "w")
    text = "(bfloat16[2, 6] x) => (bfloat16[R, C] y) { y = MatMul (x, w) }"
    model = rewrite(parse(text, w=weight), target)  # the checker finds x and w of the same type
    # onnxruntime has no such MatMul on a CPU: look at the weight itself.
    model.graph.node[-1].CopyFrom(helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT))
    del model.graph.input[:], model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("wide", TensorProto.FLOAT, (6, 4)))
    np.testing.assert_array_equal(run(open_session(runnable(model)), {})["wide"], numbers((6, 4), 1))


@pytest.mark.parametrize("target", TARGETS)
def test_weights_in_external_files(target: Target, tmp_path: Path) -> None:
    case = CASES["long_chain"]
    model = case.copy()
    model.graph.initializer.append(numpy_helper.from_array(numbers((4,), 9), "b"))
    model.graph.node[-1].output[0] = "h"
    model.graph.node.append(helper.make_node("Add", ["h", "b"], ["y"]))
    whole = Case("external", ModelProto.FromString(model.SerializeToString()), case.sites, case.gone, case.feed)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, convert_attribute=True)

    model = rewrite_file(tmp_path / "m.onnx", target)
    modelfile.save(model, tmp_path / "out.onnx", tmp_path)
    assert_same_outputs(whole, onnx.load(tmp_path / "out.onnx"))


def rewrite_file(path: Path, target: Target) -> ModelProto:
    model = modelfile.load(path)
    placements = []
    for site in find(model, path.parent).sites:
        view = site.view("ihw")
        placements.append(Placement(site, scalar(view.matrix(site.read())), view))
    assert [placement.site.name for placement in placements] == ["w"]
    place(model, placements, target)
    return model


# What is stored


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "form", ["scalar", "scaled rows", "long codes", "two stages and books", "wide blocks with a tail"]
)
def test_the_stored_bytes_do_not_depend_on_the_target(form: str, target: Target) -> None:
    model = CASES["gemm"].copy()
    (site,) = find(model, ".").sites
    coded = FORMS[form](site.view("ihw").matrix(site.read()))
    assert isinstance(coded, Coded)
    stored = [tensor.raw_data for tensor in rewrite(model, target, exact=FORMS[form]).graph.initializer]
    assert coded.packed.tobytes() in stored
    assert coded.codebooks.tobytes() in stored
    assert coded.scales is None or coded.scales.tobytes() in stored


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_the_old_weights_are_gone(name: str, target: Target) -> None:
    case = CASES[name]
    old = [numpy_helper.to_array(tensor).tobytes() for tensor in source_tensors(case)]
    rewritten = rewrite(case.copy(), target)
    names = all_names(rewritten)
    assert not case.gone & names, "chains, their constants and their value_info"
    assert {weight for weight, *_ in case.sites} <= names
    for tensor in modelfile._tensors(rewritten):
        assert numpy_helper.to_array(tensor).tobytes() not in old, tensor.name
    unread = {tensor.name for scope in scopes(rewritten) for tensor in scope.initializers.values()} - reads(rewritten)
    assert not unread


def source_tensors(case: Case) -> list[TensorProto]:
    found = []
    for site in find(case.model, ".").sites:
        found += [site.scope.initializers[site.source]] if site.source in site.scope.initializers else []
        found += [a.t for a in getattr(site.scope.producers.get(site.source), "attribute", ())]
    assert found
    return found


def reads(model: ModelProto) -> set[str]:
    return {name for scope in scopes(model) for node in scope.proto.node for name in node.input}


def all_names(model: ModelProto) -> set[str]:
    names = reads(model)
    for scope in scopes(model):
        names |= set(scope.initializers) | set(scope.producers)
        if isinstance(scope.proto, GraphProto):
            names |= {entry.name for entry in (*scope.proto.value_info, *scope.proto.input, *scope.proto.output)}
    return names


@pytest.mark.parametrize("target", TARGETS)
def test_shared_weights_are_stored_once(target: Target) -> None:
    for name in ("shared_by_two", "shared_behind_one_transpose", "outside_read_in_both_branches"):
        model = rewrite(CASES[name].copy(), target)
        (codes,) = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.UINT8]
        assert len([node for node in model.graph.node if codes.name in node.input]) in (1, 2)  # Gather reads it twice


@pytest.mark.parametrize("target", TARGETS)
def test_equal_arrays_are_stored_once(target: Target) -> None:
    weight = numbers((6, 6), 1)
    text = "(float[2, 6] x) => (float[R, C] y) { h = MatMul (x, w)  y = MatMul (h, v) }"
    model = rewrite(parse(text, w=weight, v=weight[::-1].copy()), target)  # the same values, so the same codebook
    arrays = [(tensor.data_type, tuple(tensor.dims), tensor.raw_data) for tensor in model.graph.initializer]
    assert len([entry for entry in arrays if entry[0] == TensorProto.FLOAT and entry[1][-1] == 1]) == (
        1 if target == "portable" else 2
    )  # one codebook, and where there are Decode nodes one factor of 1.0
    assert len([entry for entry in arrays if entry[0] == TensorProto.UINT8]) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_new_names_are_new(target: Target) -> None:
    text = "(float[2, 6] x) => (float[R, C] vq3) { vq0 = Neg (x)  vq1 = MatMul (vq0, w)  vq3 = MatMul (vq1, vq2) }"
    model = parse(text, w=numbers((6, 4), 1), vq2=numbers((4, 4), 2))
    case = Case("names", model, (), frozenset(), {"x": numbers((2, 6), 3)})
    assert_same_outputs(case, rewrite(case.copy(), target))


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_says_what_is_in_the_file(target: Target) -> None:
    for name in ("conv2d", "in_a_branch", "in_a_function_called_twice", "in_a_branch_of_a_function"):
        model = rewrite(CASES[name].copy(), target)
        used = {node.domain for scope in scopes(model) for node in scope.proto.node}
        bodies = [function.name for function in model.functions if function.domain == ops.DOMAIN]
        assert (ops.DOMAIN in used) == (target != "portable")
        assert bodies == (["Decode"] if target == "hybrid" else [])
        assert any(entry.domain == ops.DOMAIN for entry in model.opset_import) == (target != "portable")
        for scope in scopes(model):
            inside = {node.domain for node in scope.proto.node if node.domain}
            while scope.parent:
                scope = scope.parent
            owner = scope.proto if isinstance(scope.proto, FunctionProto) else model
            assert inside <= {entry.domain for entry in owner.opset_import}, (name, scope.path)


# Everything else stays


def rest(model: ModelProto, gone: set[str]) -> ModelProto:
    """What has nothing to do with the names in ``gone`` or with the names that a rewrite makes."""
    copy = ModelProto.FromString(model.SerializeToString())
    copy.ir_version = 0
    for function in [function for function in copy.functions if function.domain == ops.DOMAIN]:
        copy.functions.remove(function)
    for part in (copy, *copy.functions):
        for entry in [entry for entry in part.opset_import if entry.domain == ops.DOMAIN]:
            part.opset_import.remove(entry)
    for part in (copy.graph, *copy.functions):
        strip(part, gone)
    return copy


def strip(part: GraphProto | FunctionProto, gone: set[str]) -> None:
    def stays(name: str) -> bool:
        return name not in gone and not _NEW.match(name)

    fields = [part.node]
    if isinstance(part, GraphProto):
        fields += [part.initializer, part.value_info, part.input]
    for field in fields:
        kept = [
            type(e).FromString(e.SerializeToString())
            for e in field
            if stays(e.output[0] if field is part.node else e.name)
        ]
        del field[:]
        field.extend(kept)
    for node in part.node:
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                strip(graph, gone)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_everything_else_is_byte_for_byte_the_same(name: str, target: Target) -> None:
    case = CASES[name]
    gone = set(case.gone) | {weight for weight, *_ in case.sites}
    if case.model.ir_version < 4:  # the listing of initializers as inputs goes with the old version
        gone |= {tensor.name for tensor in case.model.graph.initializer}
    want, got = rest(case.model, gone), rest(rewrite(case.copy(), target), gone)
    assert want.graph.node or want.functions
    assert got.SerializeToString(deterministic=True) == want.SerializeToString(deterministic=True)


RICH = """
<ir_version: 10, opset_import: ["" : 17, "local" : 1, "com.example" : 3], producer_name: "somebody",
 producer_version: "1.2", domain: "example.com", model_version: 7, doc_string: "about the model",
 metadata_props: ["author" : "me", "license" : "free"]>
g (float[N, 6] x, float[4] b) => (float[N, 4] y) <float[4] b = {1., 2., 3., 4.}> {
  [before] n = Neg (x)
  [turn] w = Transpose <perm = [1, 0]> (v)
  [layer] h = MatMul (n, w)
  [call] k = local.twice (h)
  [after] y = Add (k, b)
}
<domain: "local", opset_import: ["" : 17]>
twice (a) => (c) { c = Add (a, a) }
"""


def rich() -> ModelProto:
    """Everything that a file can say beside its nodes."""
    model = parse_named(RICH)
    graph = model.graph
    for name, sizes in {"v": (4, 6), "w": (6, 4), "n": ("N", 6), "h": ("N", 4)}.items():
        graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
    graph.initializer.insert(0, numpy_helper.from_array(numbers((4, 6), 1), "v"))
    graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "scale"))
    graph.doc_string = "about the graph"
    for owner in (graph, *graph.node, *graph.initializer, model.functions[0]):
        owner.metadata_props.add(key="of", value=str(owner.name))
    for node in graph.node:
        node.doc_string = f"about {node.name}"
    for name in ("x", "h", "w"):
        annotation = graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_notes_stay(target: Target) -> None:
    original = rich()
    model = rewrite(rich(), target)
    gone = {"v", "w"}
    want, got = rest(original, gone), rest(model, gone)
    assert got.SerializeToString(deterministic=True) == want.SerializeToString(deterministic=True)
    assert [node.name for node in got.graph.node] == ["before", "layer", "call", "after"]
    assert got.graph.node[1].doc_string == "about layer"
    assert got.graph.node[1].metadata_props[0].value == "layer"
    assert [entry.name for entry in model.graph.value_info] == ["w", "n", "h"]
    assert model.graph.quantization_annotation == original.graph.quantization_annotation
    assert model.metadata_props == original.metadata_props
    assert model.ir_version == 10
    case = Case("rich", original, (), frozenset(), {"x": numbers((3, 6), 4), "b": numbers((4,), 5)})
    assert_same_outputs(case, model)


@pytest.mark.parametrize(
    ("target", "before", "after"),
    [
        ("hybrid", 3, 8),
        ("hybrid", 8, 8),
        ("hybrid", 10, 10),
        ("portable", 3, 4),
        ("portable", 7, 7),
        ("custom", 3, 4),
    ],
)
def test_the_ir_version_is_raised_only_where_needed(target: Target, before: int, after: int) -> None:
    head = "(float[2, 6] x, float[6, 4] w, float[4] b)" if before < 4 else "(float[2, 6] x)"
    text = f"{head} => (float[R, C] y) {{ h = MatMul (x, w)  y = Add (h, b) }}"
    model = parse(text, opset=9, ir=before, w=numbers((6, 4), 1), b=numbers((4,), 2))
    rewrite(model, target)
    assert model.ir_version == after
    assert [entry.name for entry in model.graph.input] == ["x"]


def test_inputs_that_can_be_overridden_stay_so() -> None:
    text = "(float[2, 6] x, float[6, 4] w, float[4] b) => (float[R, C] y) { h = MatMul (x, w)  y = Add (h, b) }"
    model = rewrite(parse(text, w=numbers((6, 4), 1), b=numbers((4,), 2)), "hybrid")
    assert [entry.name for entry in model.graph.input] == ["x", "b"]


def test_sites_that_get_no_form_stay() -> None:
    case = CASES["outside_and_in_nested_branches"]
    for chosen in range(3):
        model = case.copy()
        sites = find(model, ".").sites
        site = sites[chosen]
        view = site.view("ihw")
        place(model, [Placement(site, scalar(view.matrix(site.read())), view)], "hybrid")
        assert_same_outputs(case, model)
        left = {left.name for left in find(model, ".").sites}
        assert left == {other.name for other in sites} - {site.name}


def test_opsets_too_old_are_refused() -> None:
    model = parse("(float[2, 6] x) => (float[R, C] y) { y = MatMul (x, w) }", opset=6, w=numbers((6, 4)))
    with pytest.raises(ModelError, match="the model has opset 6; convert it to 7 or newer"):
        rewrite(model, "hybrid")


# Speed


def test_convolutions_stay_in_the_fast_layout(tmp_path: Path) -> None:
    """With the weight folded at load, onnxruntime makes the same graph of both models."""
    text = """(float[1, 16, 8, 8] x) => (float[A, B, C, D] y) {
      h = Conv <pads = [1, 1, 1, 1]> (x, w, b)
      k = Relu (h)
      y = Conv (k, v, b)
    }"""
    model = parse(text, w=numbers((16, 16, 3, 3), 1), v=numbers((16, 16, 1, 1), 2), b=numbers((16,), 3))

    def optimised(model: ModelProto) -> Counter[tuple[str, str]]:
        path = tmp_path / "optimised.onnx"
        open_session(model.SerializeToString(), optimised_path=path)
        return Counter((node.domain, node.op_type) for node in onnx.load(path).graph.node)

    want = optimised(model)
    assert sum(count for (_, op_type), count in want.items() if op_type in ("Conv", "FusedConv")) == 2
    for target in ("hybrid", "portable"):
        for order in ORDERS:
            copy = ModelProto.FromString(model.SerializeToString())
            assert optimised(rewrite(copy, target, order=order, exact=FORMS["pairs"])) == want, (target, order)
