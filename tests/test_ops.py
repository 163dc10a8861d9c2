"""The agreement test: every reader of the stored format gives the same bits. See docs/format.md."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from vqonnx import ops
from vqonnx.errors import ModelError
from vqonnx.form import Coded, pack, unpack
from vqonnx.ops import ALL_FEATURES, Features, decode_function, write_decode, write_standard
from vqonnx.runtime import open_session, run
from vqonnx.writer import Writer

GOLDEN = sorted(Path(__file__).with_name("golden").glob("*.npz"))
Weight = NDArray[np.float32]


def empty_model(opset: int, nodes: list[NodeProto], constants: dict[str, TensorProto], shape: Any) -> ModelProto:
    """``y_i = x * w_i`` for each weight that a last node of ``nodes`` yields; x is one."""
    made = {name for node in nodes for name in node.output} - {name for node in nodes for name in node.input}
    outputs = sorted(made)
    users = [helper.make_node("Mul", ["x", name], [f"y_{name}"]) for name in outputs]
    graph = helper.make_graph(
        [*nodes, *users],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ())],
        [helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, shape) for name in outputs],
        list(constants.values()),
    )
    domains = sorted({node.domain for node in nodes} - {""})
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def newest_opset() -> int:
    """The newest that both onnx and onnxruntime know."""
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        model = empty_model(opset, [helper.make_node("Identity", ["k"], ["w"])], {"k": scalar_tensor("k")}, ())
        try:
            open_session(model.SerializeToString())
        except ModelError:
            continue
        return opset
    raise AssertionError("onnxruntime loads no opset at all")


def scalar_tensor(name: str) -> TensorProto:
    return numpy_helper.from_array(np.array(1, np.float32), name)


NEWEST = newest_opset()
OPSETS = range(ops.OLDEST_OPSET, NEWEST + 1)


# Forms


@st.composite
def forms(draw: st.DrawFn) -> Coded:
    bits, stages = draw(st.one_of(st.integers(1, 8), st.integers(9, 16))), draw(st.integers(1, 3))
    words = draw(st.integers(2 ** (bits - 1) + 1 if bits > 1 else 1, 2**bits))
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    groups = draw(st.one_of(st.integers(1, 9), st.sampled_from([255, 256, 257, 515])))
    books = draw(st.integers(1, min(groups, 5)))
    cols = groups * width - draw(st.integers(0, width - 1))
    scales = draw(st.sampled_from([None, (rows, 1), (1, 1)]))
    float_types = st.sampled_from([np.float16, np.float32])
    return random_form(
        draw(st.integers(0, 2**32 - 1)),
        codes=(stages, rows, groups),
        codebooks=(stages, books, words, width),
        cols=cols,
        scales=scales,
        dtype=draw(st.sampled_from([np.int8, np.float16, np.float32])),
        scale_dtype=draw(float_types),
    )


def random_form(
    seed: int,
    *,
    codes: tuple[int, int, int],
    codebooks: tuple[int, int, int, int],
    cols: int,
    scales: tuple[int, int] | None = None,
    dtype: Any = np.float32,
    scale_dtype: Any = np.float32,
) -> Coded:
    """Values of very different size, so that another order of the sum shows; zeros of both signs and tiny numbers."""
    rng = np.random.default_rng(seed)

    def values(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        if dtype == np.int8:
            return rng.integers(-128, 128, shape, np.int8)
        spread = (rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3, shape)).astype(dtype)
        special = rng.choice(np.array([0, -0.0, 6e-8, -6e-8, 1, -1, 65504], dtype), shape)
        return np.where(rng.random(shape) < 0.1, special, spread)

    form = Coded(
        rng.integers(0, codebooks[2], codes).astype(np.uint16),
        values(codebooks, dtype),
        cols,
        None if scales is None else values(scales, scale_dtype),
    )
    # One code at least is the greatest there is.
    form.codes.flat[rng.integers(form.codes.size)] = form.words - 1
    return form


@st.composite
def layouts(draw: st.DrawFn, form: Coded) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A reshape of the matrix to one to five axes, and a transpose."""
    split, left = [], form.shape[0] * form.shape[1]
    for _ in range(draw(st.integers(0, 4))):
        split.append(draw(st.sampled_from([size for size in range(1, 7) if left % size == 0])))
        left //= split[-1]
    split.insert(draw(st.integers(0, len(split))), left)
    return tuple(split), tuple(draw(st.permutations(range(len(split)))))


def expected(form: Coded, split: tuple[int, ...], perm: tuple[int, ...]) -> Weight:
    return np.ascontiguousarray(form.decode().reshape(split).transpose(perm))


def readers(form: Coded, split: tuple[int, ...], perm: tuple[int, ...], opset: int) -> ModelProto:
    """A model with three outputs: by the body that this form needs, by the whole body, and by standard nodes."""
    writer = Writer(set())
    write_decode(writer, form, split, perm, "minimal")
    whole = NodeProto.FromString(writer.nodes[0].SerializeToString())
    whole.domain, whole.output[0] = "whole", "whole"
    write_standard(writer, form, split, perm, "portable", opset)
    shape = [split[axis] for axis in perm]
    model = empty_model(opset, [*writer.take(), whole], writer.constants, shape)
    model.functions.append(decode_function(opset, Features.of(form)))
    model.functions.append(decode_function(opset, ALL_FEATURES))
    model.functions[1].domain = "whole"
    return model


def assert_same_bits(outputs: dict[str, Any], want: Weight, what: object) -> None:
    for name, got in outputs.items():
        assert (got.dtype, got.shape) == (np.float32, want.shape), f"{name} {what}"
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32), err_msg=f"{name} {what}")


ONE = {"x": np.array(1, np.float32)}


# Laws


@pytest.mark.parametrize("opset", OPSETS)
@settings(max_examples=15)
@given(data=st.data())
def test_all_readers_give_the_same_bits(opset: int, data: st.DataObject) -> None:
    form = data.draw(forms())
    split, perm = data.draw(layouts(form))
    model = readers(form, split, perm, opset)
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString(), optimise=data.draw(st.booleans(), label="optimise"))
    outputs = run(session, ONE)
    assert len(outputs) == 3
    assert_same_bits(outputs, expected(form, split, perm), (opset, split, perm))


@settings(max_examples=40)
@given(data=st.data())
def test_the_reference_implementation_and_the_inliner_agree(data: st.DataObject) -> None:
    form = data.draw(forms())
    split, perm = data.draw(layouts(form))
    model = readers(form, split, perm, NEWEST)
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions
    onnx.checker.check_model(inlined, full_check=True)
    names = [output.name for output in model.graph.output]
    for reader in (ReferenceEvaluator(model), ReferenceEvaluator(inlined)):
        outputs = dict(zip(names, reader.run(None, ONE), strict=True))
        assert_same_bits(outputs, expected(form, split, perm), (split, perm))
    assert_same_bits(run(open_session(inlined.SerializeToString()), ONE), expected(form, split, perm), "inlined")


@settings(max_examples=30)
@given(forms(), st.sampled_from([7, 9, 11, 13, NEWEST]))
def test_a_body_for_several_forms_reads_each(form: Coded, opset: int) -> None:
    """A model has one body; what another layer needs must not change this one."""
    writer = Writer(set())
    nodes, functions = [], []
    everything = itertools.product((False, True), repeat=len(fields(Features)))
    for other in (Features(*flags) for flags in everything):
        write_decode(writer, form, form.shape, (0, 1), f"w{len(functions)}")
        (node,) = writer.take()
        node.domain = f"d{len(functions)}"
        nodes.append(node)
        functions.append(decode_function(opset, Features.of(form) | other))
        functions[-1].domain = node.domain
    model = empty_model(opset, nodes, writer.constants, form.shape)
    model.functions.extend(functions)
    outputs = run(open_session(model.SerializeToString()), ONE)
    assert len(outputs) == 2 ** len(fields(Features)) == 64
    assert_same_bits(outputs, form.decode(), Features.of(form))


@pytest.mark.parametrize("opset", [7, 12, 13, NEWEST])
@pytest.mark.parametrize("stages", [4, 9, 17])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (2, 8), (40, 65)])
def test_stages_are_summed_first_to_last(stages: int, sizes: tuple[int, int], opset: int) -> None:
    rows, cols = sizes
    form = random_form(stages, codes=(stages, rows, cols), codebooks=(stages, 1, 16, 1), cols=cols)
    backwards = form.codebooks[::-1].astype(np.float32), form.codes[::-1]
    assert (Coded(backwards[1], backwards[0], cols).decode() != form.decode()).any(), "the order does not show"
    for optimise in (False, True):
        outputs = run(open_session(readers(form, sizes, (0, 1), opset).SerializeToString(), optimise=optimise), ONE)
        assert_same_bits(outputs, form.decode(), (stages, sizes, optimise))


# What it costs

SHAPES = {
    "plain": {"codes": (1, 4, 6), "codebooks": (1, 1, 200, 2), "cols": 12},
    "packed": {"codes": (1, 4, 6), "codebooks": (1, 1, 5, 2), "cols": 12, "scales": (4, 1)},
    "wide": {"codes": (1, 4, 6), "codebooks": (1, 1, 1500, 2), "cols": 12},
    "several": {"codes": (2, 4, 6), "codebooks": (2, 3, 200, 2), "cols": 12},
    "tail": {"codes": (1, 4, 6), "codebooks": (1, 1, 200, 2), "cols": 11, "dtype": np.float16},
    "all": {"codes": (3, 4, 6), "codebooks": (3, 6, 300, 2), "cols": 11, "scales": (4, 1), "dtype": np.float16},
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_onnxruntime_folds_everything(shape: str, opset: int, tmp_path: Path) -> None:
    form = random_form(0, **SHAPES[shape])
    model = readers(form, (2, 2, form.cols), (2, 0, 1), opset)
    session = open_session(model.SerializeToString(), optimised_path=tmp_path / "optimised.onnx")
    assert_same_bits(run(session, ONE), expected(form, (2, 2, form.cols), (2, 0, 1)), opset)
    assert [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node] == ["Mul"] * 3


@pytest.mark.parametrize("opset", OPSETS)
def test_steps_that_nothing_needs_are_left_out(opset: int) -> None:
    lengths = {shape: len(decode_function(opset, features_of(shape)).node) for shape in SHAPES}
    assert lengths["plain"] < min(lengths["packed"], lengths["several"], lengths["tail"])
    packed, wide = Features(packed=True), Features(packed=True, wide=True)
    assert len(decode_function(opset, packed).node) < len(decode_function(opset, wide).node)
    guard = Features(guarded=True)
    assert max(lengths.values()) == lengths["all"]
    assert len(decode_function(opset, features_of("all") | guard).node) == len(decode_function(opset).node)
    assert lengths["all"] + 2 == len(decode_function(opset).node)
    assert not any(node.op_type == "Identity" for node in decode_function(opset).node)


def features_of(shape: str) -> Features:
    return Features.of(random_form(0, **SHAPES[shape]))


def test_features_say_what_a_form_needs() -> None:
    flags = {shape: (f.packed, f.wide, f.several, f.tail, f.scaled) for shape in SHAPES for f in [features_of(shape)]}
    assert flags == {
        "plain": (False, False, False, False, False),
        "packed": (True, False, False, False, True),
        "wide": (True, True, False, False, False),
        "several": (False, False, True, False, False),
        "tail": (False, False, False, True, False),
        "all": (True, True, True, True, True),
    }


@pytest.mark.parametrize("opset", OPSETS)
def test_the_body_says_what_it_is(opset: int) -> None:
    body = decode_function(opset)
    assert (body.domain, body.name) == ("vqonnx", "Decode")
    assert list(body.input) == ["codes", "codebooks", "scales", "layout"]
    assert (list(body.output), list(body.attribute)) == (["weight"], ["perm"])
    assert [(entry.domain, entry.version) for entry in body.opset_import] == [("", opset)]
    assert body.SerializeToString(deterministic=True) == decode_function(opset).SerializeToString(deterministic=True)
    onnx.checker.check_function(body, context(opset))


@pytest.mark.parametrize("opset", OPSETS)
def test_no_transpose_stands_before_the_layer(opset: int) -> None:
    """onnxruntime 1.19 to 1.23 fuses it into a Gemm without a look at its perm, and multiplies by the wrong matrix."""
    assert decode_function(opset).node[-1].op_type == "Reshape"
    writer = Writer(set())
    write_standard(writer, random_form(0, **SHAPES["all"]), (4, 11), (0, 1), "w", opset)
    assert writer.take()[-1].op_type == "Reshape"


def context(opset: int) -> Any:
    made = onnx.checker.DEFAULT_CONTEXT.__class__()
    made.ir_version, made.opset_imports = 8, {"": opset}
    return made


def test_opsets_too_old_are_refused() -> None:
    with pytest.raises(ModelError, match="the model has opset 6; convert it to 7 or newer"):
        decode_function(6)


@pytest.mark.parametrize("optimise", [False, True])
def test_a_code_beyond_the_words_is_an_error(optimise: bool) -> None:
    form = random_form(0, codes=(1, 2, 3), codebooks=(1, 1, 5, 2), cols=6)
    model = readers(form, form.shape, (0, 1), NEWEST)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.UINT8:
            tensor.raw_data = b"\xff" * len(tensor.raw_data)
    with pytest.raises(Exception, match=r"(?s)Gather|indices|not run") as caught:
        run(open_session(model.SerializeToString(), optimise=optimise), ONE)
    assert type(caught.value).__module__ == "vqonnx.errors"


# Golden files


def golden_model(path: Path, *, body: bool) -> tuple[bytes, Weight]:
    """A Decode node over the stored arrays as they are, and the weight that they mean."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    weight, perm = arrays.pop("weight"), arrays.pop("perm")
    constants = {name: numpy_helper.from_array(values, name) for name, values in arrays.items()}
    node = helper.make_node("Decode", list(constants), ["w"], domain=ops.DOMAIN, perm=perm.tolist())
    assert list(node.input) == ["codes", "codebooks", "scales", "layout"]
    model = empty_model(17, [node], constants, weight.shape)
    if body:
        model.functions.append(decode_function(17))
    return model.SerializeToString(), weight


def golden_form(path: Path) -> tuple[Coded, NDArray[np.uint8], tuple[int, ...], tuple[int, ...], Weight]:
    with np.load(path) as stored:
        bits, cols, *split = stored["layout"].tolist()
        codebooks, scales, packed = stored["codebooks"], stored["scales"], stored["codes"]
        codes = unpack(packed, bits, -(-cols // codebooks.shape[3]))
        form = Coded(codes, codebooks, cols, scales)
        return form, packed, tuple(split), tuple(stored["perm"].tolist()), stored["weight"]


def test_there_are_golden_files() -> None:
    assert len(GOLDEN) >= 8
    assert sum(path.stat().st_size for path in GOLDEN) < 40_000


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_numpy_reads_golden_files(path: Path) -> None:
    form, packed, split, perm, weight = golden_form(path)
    assert_same_bits({"numpy": expected(form, split, perm)}, weight, path.stem)
    with np.load(path) as stored:
        np.testing.assert_array_equal(pack(form.codes, int(stored["layout"][0])), packed)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_body_reads_golden_files(path: Path) -> None:
    model, weight = golden_model(path, body=True)
    assert_same_bits(run(open_session(model), ONE), weight, path.stem)
    assert_same_bits({"y": ReferenceEvaluator(onnx.load_from_string(model)).run(None, ONE)[0]}, weight, path.stem)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_standard_nodes_read_golden_files(path: Path) -> None:
    form, _, split, perm, weight = golden_form(path)
    for opset in (7, 9, 10, 13, NEWEST):
        assert_same_bits(run(open_session(readers(form, split, perm, opset).SerializeToString()), ONE), weight, opset)


# THE ONE TEST HERE THAT NEEDS THE LIBRARY: its install builds it, so a missing library is a failure and not a skip.
@pytest.mark.parametrize("body", [False, True], ids=["custom", "hybrid"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_library_reads_golden_files(path: Path, body: bool) -> None:
    model, weight = golden_model(path, body=body)
    assert_same_bits(run(open_session(model, library=True), ONE), weight, path.stem)
