"""Compact files: the same outputs to the bit, the same graph in onnxruntime, and everything that reads them works."""

from __future__ import annotations

import os
import string
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

import vqonnx
from vqonnx import modelfile
from vqonnx.breakdown import breakdown
from vqonnx.cli import main
from vqonnx.compact import compact, restore
from vqonnx.errors import InputError, ModelError, OptionError, VerifyError
from vqonnx.generate import generate_feeds
from vqonnx.macros import inline
from vqonnx.methods import PQ, SVD, KMeans
from vqonnx.names import short_names
from vqonnx.place import Target
from vqonnx.runtime import open_session, run

ARRAYS = dict[str, Any]


def optimised(model: Path | ModelProto, written: Path) -> Counter[tuple[str, str]]:
    """The operators that onnxruntime runs."""
    open_session(model if isinstance(model, Path) else model.SerializeToString(), optimised_path=written)
    return Counter((node.domain, node.op_type) for node in onnx.load(written, load_external_data=False).graph.node)


def results(model: Path | ModelProto, feeds: list[ARRAYS], *, library: bool = False) -> list[ARRAYS]:
    source = model if isinstance(model, Path) else model.SerializeToString()
    session = open_session(source, library=library, threads=1)
    return [run(session, feed) for feed in feeds]


def assert_same(before: list[ARRAYS], after: list[ARRAYS], what: str) -> None:
    for one, other in zip(before, after, strict=True):
        assert list(one) == list(other), what
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], err_msg=f"{what}: {name}", strict=True)


def compacted(model: ModelProto, folder: Path = Path()) -> ModelProto:
    onnx.checker.check_model(model)
    copy = ModelProto()
    copy.CopyFrom(model)
    compact(copy, folder)
    return copy


def interface(model: ModelProto) -> tuple[Any, ...]:
    """What must stay; a domain for macros may be added."""
    opsets = [(entry.domain, entry.version) for entry in model.opset_import if entry.domain != "v"]
    return list(model.graph.input), list(model.graph.output), opsets, model.ir_version


def assert_sound(model: ModelProto, feeds: list[ARRAYS], what: str) -> ModelProto:
    """Compact the model; gives the result, which computes the same, is valid, no larger, and as compact as it gets."""
    small = compacted(model)
    onnx.checker.check_model(small, full_check=True)
    assert small.ByteSize() <= model.ByteSize(), what
    assert interface(small) == interface(model), what
    assert_same(results(model, feeds), results(small, feeds), what)
    assert compacted(small).SerializeToString() == small.SerializeToString(), f"{what}: not the same a second time"
    return small


# Laws on random graphs

LONG = "/some/module/with/a/long/name/output_"
UNARY = ["Relu", "Identity", "Neg", "Abs", "Transpose", "Dropout", "Flatten"]


@st.composite
def graphs(draw: st.DrawFn) -> ModelProto:
    """Nodes of all kinds on ``x [3, 4]``: copies, constants, dead ends, shape arithmetic, names of every length."""
    opset = draw(st.sampled_from([7, 9, 11, 12, 13, 17, 21]))
    names = st.text(string.ascii_letters + string.digits + "/:_.", min_size=1, max_size=3)
    used = {"x", "a", ""}
    values = ["x"]
    nodes, initializers = [], []

    def fresh() -> str:
        name = draw(names)
        while name in used:
            name += draw(names)
        used.add(name)
        return name

    def constant() -> str:
        value = draw(st.sampled_from([0.0, 1.0, 0.5, -2.25, 1e-3]))
        array = np.full(draw(st.sampled_from([(), (1,), (4,)])), value, np.float32)
        name = fresh()
        if draw(st.booleans()):
            initializers.append(numpy_helper.from_array(array, name))
        else:
            node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))
            nodes.append(node)
        return name

    for _ in range(draw(st.integers(1, 10))):
        source = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["unary", "binary", "constant", "folded"]))
        output = fresh()
        doc = draw(st.sampled_from(["", "a text"]))
        if kind == "unary":
            op_type = draw(st.sampled_from(UNARY))
            more: dict[str, Any] = {}
            if op_type == "Flatten":
                more = {"axis": 1}
            if op_type == "Transpose":
                more = {"perm": [0, 1]}
            if op_type == "Dropout" and opset < 12:
                more = {"ratio": 0.5}
            nodes.append(helper.make_node(op_type, [source], [output], name=LONG + output, doc_string=doc, **more))
        elif kind == "binary":
            other = draw(st.sampled_from(values))
            nodes.append(helper.make_node(draw(st.sampled_from(["Add", "Mul"])), [source, other], [output]))
        elif kind == "constant":
            nodes.append(helper.make_node("Add", [source, constant()], [output], name=LONG + output))
        else:  # what depends on constants alone
            between = fresh()
            nodes.append(helper.make_node("Mul", [constant(), constant()], [between]))
            nodes.append(helper.make_node("Sub", [source, between], [output]))
        values.append(output)
    outputs = draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique=True))
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 4]) for name in (*outputs, "x")]
    graph = helper.make_graph(nodes, "random", info[-1:], info[:-1], initializer=initializers, doc_string="a text")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model.metadata_props.add(key="author", value="somebody")
    return model


@settings(max_examples=60)
@given(graphs())
def test_random_graphs(model: ModelProto) -> None:
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    small = assert_sound(model, [{"x": x}], "random")
    assert not any(node.name or node.doc_string for node in small.graph.node)
    assert list(small.metadata_props) == list(model.metadata_props)
    assert not any(node.op_type == "Constant" for node in small.graph.node if node.output[0] not in outputs_of(small))


def outputs_of(model: ModelProto) -> set[str]:
    return {entry.name for entry in model.graph.output}


# Whole models of every target


@pytest.mark.parametrize("target", ["hybrid", "portable", "custom"])
@pytest.mark.parametrize("name", nets.SMALL)
def test_small_models(name: str, target: Target, tmp_path: Path) -> None:
    source = nets.write(nets.SMALL[name](), tmp_path / "source.onnx")
    path, small, plain = (tmp_path / f"{part}.onnx" for part in ("compressed", "compact", "plain"))
    vqonnx.compress(source, KMeans(bits=2), target=target, fuse=False).save(path)
    made = vqonnx.compact_file(path, small)
    assert made.bytes == small.stat().st_size < path.stat().st_size == made.bytes_before
    assert sum(made.parts.values()) == made.bytes
    feeds = nets.feeds_of(name)
    for library in ([False] if target != "custom" else []) + [True] * (target != "portable"):
        assert_same(results(path, feeds, library=library), results(small, feeds, library=library), f"library {library}")
    before, after = vqonnx.report(path), vqonnx.report(small)
    assert (after.layers, after.skipped, after.bytes_before) == (before.layers, before.skipped, before.bytes_before)
    assert vqonnx.expand(small, plain) == len(before.layers)
    onnx.checker.check_model(plain, full_check=True)
    if target != "custom":
        assert_same(results(small, feeds), results(plain, feeds), "expanded")
    assert vqonnx.compress(source, KMeans(bits=2), target=target, compact=True).save(path).bytes == made.bytes
    assert path.read_bytes() == small.read_bytes(), "the same in one step"
    vqonnx.compact_file(small, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == small.read_bytes()


def test_weights_keep_their_names_for_readers(tmp_path: Path) -> None:
    source = nets.write(nets.mixed(), tmp_path / "source.onnx")
    result = vqonnx.compress(source, KMeans(bits=2), compact=True)
    assert all(len(name) == 1 for node in result.model.graph.node for name in node.output)
    result.save(tmp_path / "small.onnx")
    vqonnx.expand(tmp_path / "small.onnx", tmp_path / "plain.onnx")
    weights = nets.weights_of(onnx.load(tmp_path / "plain.onnx").graph)
    assert {"conv_w", "up_w", "fc_w", "head_w"} <= weights.keys()


def test_layers_that_are_run_as_two(tmp_path: Path) -> None:
    source = nets.write(nets.dense(2, 96), tmp_path / "source.onnx")
    path = tmp_path / "small.onnx"
    result = vqonnx.compress(source, SVD(share=0.3, apply="activations"), compact=True)
    assert all(layer.factors for layer in result.layers)
    result.save(path)
    report = vqonnx.report(path)
    assert [layer.name for layer in report.layers] == ["w0", "w1"]
    assert all(len(layer.factors) == 2 and layer.multiplications < 1 for layer in report.layers)
    assert vqonnx.expand(path, tmp_path / "plain.onnx") == 2
    assert {"w0", "w1"} <= nets.weights_of(onnx.load(tmp_path / "plain.onnx").graph).keys()


# Macros

STEPS = [
    ("LeakyRelu", {"alpha": 0.125}),
    ("Elu", {"alpha": 0.5}),
    ("HardSigmoid", {"alpha": 0.25, "beta": 0.5}),
    ("Neg", {}),
    ("Abs", {}),
    ("Add", {}),
    ("Mul", {}),
]


@st.composite
def repetitive(draw: st.DrawFn) -> ModelProto:
    """A few blocks of nodes many times, some of which read what was before the block, or one constant."""
    model = nets.function()  # has a function already, so that others may be added
    model.graph.initializer.append(numpy_helper.from_array(np.full(24, 1.5, np.float32), "constant"))
    kinds = draw(st.lists(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4), min_size=1, max_size=2))
    value, made = model.graph.node[-1].output[0], 0
    model.graph.node[-1].output[0] = value = "begin"
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=14)):
        entry = value
        for op_type, given_attributes in kind:
            other = [draw(st.sampled_from([entry, "constant"]))] if op_type in ("Add", "Mul") else []
            made += 1
            model.graph.node.append(
                helper.make_node(op_type, [value, *other], [f"value_{made}"], name=f"node_{made}", **given_attributes)
            )
            value = f"value_{made}"
    model.graph.node[-1].output[0] = "y"
    return model


@settings(max_examples=40)
@given(repetitive())
def test_repeated_runs_become_functions_and_nodes_again(model: ModelProto) -> None:
    feeds = [{"x": nets.draw((2, 24), 4)}]
    small = assert_sound(model, feeds, "repetitive")
    kinds = Counter(node.op_type for node in small.graph.node if node.domain == "v")
    assert all(count > 1 for count in kinds.values())
    assert kinds.keys() == {function.name for function in small.functions if function.domain == "v"}
    plain = ModelProto()
    plain.CopyFrom(small)
    inline(plain)
    onnx.checker.check_model(plain, full_check=True)
    assert not any(entry.domain == "v" for entry in plain.opset_import)
    assert Counter(n.op_type for n in plain.graph.node) == Counter(n.op_type for n in model.graph.node)
    assert_same(results(small, feeds), results(plain, feeds), "inlined")


@pytest.mark.parametrize("target", ["hybrid", "portable", "custom"])
def test_only_files_with_functions_get_more_of_them(target: Target, tmp_path: Path) -> None:
    source = nets.write(nets.dense(16, 32), tmp_path / "source.onnx")
    model = vqonnx.compress(source, KMeans(bits=1), target=target, compact=True).model
    calls = Counter(node.domain for node in model.graph.node)
    assert (calls["v"] > 0) == (target == "hybrid")
    assert any(entry.domain == "v" for entry in model.opset_import) == (target == "hybrid")


def test_a_domain_that_is_in_use_is_left_alone() -> None:
    model = nets.function()
    for entry in (model.opset_import[1], model.functions[0], *model.graph.node):
        entry.domain = "v"
    small = assert_sound(model, [{"x": nets.draw((2, 24), 1)}], "domain v")
    assert [node.op_type for node in small.graph.node] == ["Mix", "Mix"]


# What is kept


def test_short_names_collide_with_nothing(tmp_path: Path) -> None:
    """Inputs, outputs and weights are called what compaction would call others."""
    first, second, third = islice(short_names(set()), 3)
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        collide (float[N, 32] {first}) => (float[N, 32] {second}) {{
          hidden_value = MatMul ({first}, {third})
          activated_value = Relu (hidden_value)
          {second} = MatMul (activated_value, second_weight)
        }}"""
    )
    for seed, name in enumerate((third, "second_weight")):
        model.graph.initializer.append(numpy_helper.from_array(nets.draw((32, 32), seed), name))
    source = nets.write(model, tmp_path / "source.onnx")
    result = vqonnx.compress(source, KMeans(bits=2), compact=True)
    result.save(tmp_path / "small.onnx")
    names_used = [name for node in result.model.graph.node for name in node.output]
    assert len(set(names_used)) == len(names_used)
    assert third not in names_used, "the name of a weight stays free for expand"
    assert [layer.name for layer in vqonnx.report(tmp_path / "small.onnx").layers] == [third, "second_weight"]
    vqonnx.expand(tmp_path / "small.onnx", tmp_path / "plain.onnx")
    feed = [{first: nets.draw((2, 32), 9)}]
    assert_same(results(tmp_path / "small.onnx", feed), results(tmp_path / "plain.onnx", feed), "expanded")


def test_subgraphs_see_renamed_values_and_keep_what_they_read() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        loop (float[4] x, int64 n, bool c) => (float[4] y, float[k, 4] scan) {
          copied_value = Identity (x)
          read_inside_only = Abs (copied_value)
          nobody_reads_this = Neg (x)
          always = Constant <value = bool {1}> ()
          y, scan = Loop (n, always, copied_value) <body = b (int64 i, bool going, float[4] state)
              => (bool still, float[4] next, float[4] seen) {
            still = Identity (going)
            step = Constant <value = float[1] {0.5}> ()
            moved = Add (state, step)
            inner_copy = Identity (moved)
            next = If (c) <
              then_branch = t () => (float[4] a) { a = Add (inner_copy, read_inside_only) },
              else_branch = e () => (float[4] b) { b = Mul (inner_copy, copied_value) }>
            seen = Identity (state)
          }>
        }"""
    )
    x = np.array([1, -2, 3, -4], np.float32)
    feeds = [{"x": x, "n": np.array(3, np.int64), "c": np.array(flag)} for flag in (True, False)]
    small = assert_sound(model, feeds, "loop")
    assert sum(node.op_type in ("Identity", "Neg") for node in small.graph.node) == 0


def test_equal_names_in_sibling_branches_stay_two_values(tmp_path: Path) -> None:
    source = nets.write(nets.branches(), tmp_path / "source.onnx")
    result = vqonnx.compress(source, KMeans(bits=2), compact=True)
    result.save(tmp_path / "small.onnx")
    assert [layer.name for layer in vqonnx.report(tmp_path / "small.onnx").layers] == [
        layer.name for layer in result.layers
    ]


def test_initializers_that_can_be_fed_stay() -> None:
    """From IR 4 on a listed initializer is an input with a default; before, every one had to be listed."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 13]>
        fed (float[2, 4] input_value, float[4] bias_value) => (float[2, 4] y)
        <float[4] bias_value = {1, 2, 3, 4}, float[4] other_bias = {1, 2, 3, 4}> {
          between_value = Add (input_value, bias_value)
          y = Add (between_value, other_bias)
        }"""
    )
    x = nets.draw((2, 4), 1)
    feeds = [{"input_value": x}, {"input_value": x, "bias_value": np.ones(4, np.float32)}]
    small = assert_sound(model, feeds, "fed")
    assert [tensor.name for tensor in small.graph.initializer][:1] == ["bias_value"]


def test_ir_version_3(tmp_path: Path) -> None:
    model = nets.dense(2, 48)
    model.ir_version = 3
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 7))
    for node in model.graph.node:
        node.input.append("zero_bias")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(48, np.float32), "zero_bias"))
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims))
    onnx.save(model, tmp_path / "old.onnx")
    assert_sound(model, [{"h0": nets.draw((2, 48), 1)}], "IR version 3, not compressed")
    for target in ("hybrid", "portable"):
        result = vqonnx.compress(tmp_path / "old.onnx", KMeans(bits=2), target=target, compact=True)
        result.save(tmp_path / f"{target}.onnx")


def test_defaults_go_and_other_values_stay() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 12]>
        defaults (float[1, 4, 9, 9] x) => (float[1, 4] y, float[1, 4] z) {
          a = Conv <auto_pad = "NOTSET", dilations = [1, 1], group = 1, kernel_shape = [3, 3], pads = [0, 0, 0, 0],
                    strides = [1, 1]> (x, w)
          b = Conv <dilations = [2, 2], kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 1]> (a, w)
          c = MaxPool <ceil_mode = 0, kernel_shape = [2, 2], pads = [0, 0, 0, 0], storage_order = 0,
                       strides = [1, 1]> (b)
          d = ReduceMean <axes = [2, 3], keepdims = 0> (c)
          y = Softmax <axis = 1> (d)
          e = LeakyRelu <alpha = 0.01> (d)
          f = Gemm <alpha = 1.0, beta = 0.5, transA = 0, transB = 1> (e, m, v)
          z = Softmax <axis = 0> (f)
        }"""
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(nets.draw(shape, seed), name)
        for seed, (name, shape) in enumerate({"w": (4, 4, 3, 3), "m": (4, 4), "v": (4,)}.items())
    )
    small = assert_sound(model, [{"x": nets.draw((1, 4, 9, 9), 3)}], "defaults")
    left = [(node.op_type, {a.name for a in node.attribute}) for node in small.graph.node]
    assert left == [
        ("Conv", set()),
        ("Conv", {"dilations", "pads", "strides"}),
        ("MaxPool", {"kernel_shape"}),
        ("ReduceMean", {"axes", "keepdims"}),
        ("Softmax", set()),
        ("LeakyRelu", set()),
        ("Gemm", {"beta", "transB"}),
        ("Softmax", {"axis"}),
    ]


def test_shape_arithmetic_is_computed_only_where_it_saves() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        shapes (float[2, 8] x) => (float[4, 4] y, float[500] large, float[2] random) {
          two = Constant <value = int64[1] {2}> ()
          doubled = Mul (two, two)
          shape = Concat <axis = 0> (doubled, doubled)
          reshaped = Reshape (x, shape)
          y = Add (reshaped, offset)
          many = Constant <value = int64[1] {500}> ()
          zeros = ConstantOfShape (many)
          total = ReduceSum <keepdims = 0> (x)
          large = Add (zeros, total)
          drawn = RandomNormal <seed = 1.0, shape = [2]> ()
          shifted = Add (drawn, scalar)
          random = Mul (shifted, total)
        }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(nets.draw((4, 4), 1), "offset"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.5), "scalar"))
    small = assert_sound(model, [{"x": nets.draw((2, 8), 2)}], "shapes")
    left = Counter(node.op_type for node in small.graph.node)
    assert left["Concat"] == 0
    assert left["ConstantOfShape"] == 1, "500 zeros take more bytes than the node"
    assert left["RandomNormal"] == 1


def test_copies_before_outputs() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 13]>
        copies (float[4] x) => (float[4] y, float[4] z, float[4] same, float[4] kept, bool[4] mask) {
          a = Relu (x)
          y = Identity (a)
          b = Neg (a)
          c = Dropout (b)
          z = Identity (c)
          same = Identity (x)
          kept, mask = Dropout (b)
        }"""
    )
    small = assert_sound(model, [{"x": np.array([1, -1, 2, -2], np.float32)}], "copies")
    assert Counter(node.op_type for node in small.graph.node) == {"Relu": 1, "Neg": 1, "Identity": 1, "Dropout": 1}


def test_vectors_are_bundled_and_taken_apart_again() -> None:
    sizes = [5, 7, 300, 2, 9, 11, 4, 6, 3, 200, 8, 12, 1, 13, 14, 15]
    steps = "".join(f"y{i} = Add (x, bias_{i})\n" for i in range(len(sizes)))
    outputs = ", ".join(f"float[k{i}] y{i}" for i in range(len(sizes)))
    for opset in (11, 13, 18):
        head = f'<ir_version: 8, opset_import: ["": {opset}]>'
        model = onnx.parser.parse_model(f"{head} vectors (float[1] x) => ({outputs}) {{ {steps} }}")
        for i, size in enumerate(sizes):
            values = nets.draw((size,), i) if i % 2 else np.arange(size, dtype=np.float32) / 8
            model.graph.initializer.append(numpy_helper.from_array(values, f"bias_{i}"))
        small = assert_sound(model, [{"x": np.ones(1, np.float32)}], f"opset {opset}")
        assert Counter(node.op_type for node in small.graph.node) == {"Cast": 1, "Split": 2, "Add": len(sizes)}
        halves = [tensor for tensor in small.graph.initializer if tensor.data_type == TensorProto.FLOAT16]
        assert [list(tensor.dims) for tensor in halves] == [[sum(sizes[::2])]], "what float16 holds exactly"


def test_a_model_without_a_record_is_restored_to_itself() -> None:
    model = nets.mixed()
    before = model.SerializeToString()
    assert not restore(model)
    assert model.SerializeToString() == before


def test_parts_add_up() -> None:
    for make in nets.SMALL.values():
        model = make()
        parts = breakdown(model)
        assert sum(parts.values()) == model.ByteSize()
        assert min(parts.values()) >= 0


# float16 biases


def test_halved_biases(tmp_path: Path) -> None:
    source = nets.CONV
    whole = vqonnx.compress(source, KMeans(bits=4), compact=True).save(tmp_path / "whole.onnx")
    half = vqonnx.compress(source, KMeans(bits=4), compact=True, half_biases=True).save(tmp_path / "half.onnx")
    assert half.bytes < whole.bytes
    biases = {
        name: values
        for name, values in nets.weights_of(onnx.load(source).graph).items()
        if values.ndim == 1 and values.dtype == np.float32
    }
    saved = 2 * sum(values.size for values in biases.values())
    assert whole.bytes - half.bytes == pytest.approx(saved, abs=80)
    model = onnx.load(tmp_path / "half.onnx")
    restore(model)
    rounded = sorted(values.tobytes() for values in biases_of(model))
    assert rounded == sorted(values.astype(np.float16).astype(np.float32).tobytes() for values in biases.values())
    feeds = generate_feeds(source, count=1)
    (one,), (other,) = results(tmp_path / "whole.onnx", feeds), results(tmp_path / "half.onnx", feeds)
    for name, value in one.items():
        assert 0 < np.abs(value - other[name]).max() < 2e-3 * np.abs(value).max()
    assert optimised(source, tmp_path / "a.onnx") == optimised(tmp_path / "half.onnx", tmp_path / "b.onnx")


def biases_of(model: ModelProto) -> list[NDArray[Any]]:
    return [
        values for values in nets.weights_of(model.graph).values() if values.ndim == 1 and values.dtype == np.float32
    ]


def test_biases_beyond_float16_stay(tmp_path: Path) -> None:
    model = nets.dense(1, 48)
    model.graph.node[0].input.append("bias")
    model.graph.initializer.append(numpy_helper.from_array(np.full(48, 1e6, np.float32), "bias"))
    source = nets.write(model, tmp_path / "source.onnx")
    result = vqonnx.compress(source, KMeans(bits=2), compact=True, half_biases=True)
    assert any((values == 1e6).all() for values in biases_of(result.model))


def test_halved_biases_need_a_compact_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="half_biases saves nothing unless the file is compact"):
        vqonnx.compress(nets.MLP, KMeans(bits=2), half_biases=True)


# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, small = str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")
    assert main(["compress", str(nets.MLP), path, "--method", "kmeans", "--bits", "3", "--quiet"]) == 0
    assert main(["compact", path, small]) == 0
    assert "nodes" in capsys.readouterr().out
    assert os.path.getsize(small) < os.path.getsize(path)
    assert main(["verify", path, small, "--check-atol", "0", "--quiet"]) == 0
    arguments = ["--method", "kmeans", "--bits", "3", "--quiet", "--compact", "--half-biases"]
    assert main(["compress", str(nets.MLP), path, *arguments]) == 0
    assert main(["compress", str(nets.MLP), path, *arguments, "--no-compact"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("vqonnx: half_biases saves nothing")


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    plain = nets.write(nets.mixed(), tmp_path / "plain.onnx")
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"\x00" * 40)
    for source, kind, message in [
        (plain, ModelError, "holds no weight that vqonnx compressed"),
        (junk, ModelError, "not an ONNX model"),
        (tmp_path / "none.onnx", ModelError, "cannot be read"),
    ]:
        with pytest.raises(kind, match=message) as caught:
            vqonnx.compact_file(source, tmp_path / "out.onnx")
        assert "\n" not in str(caught.value)
    vqonnx.compress(plain, KMeans(bits=2), fuse=False).save(tmp_path / "small.onnx")
    with pytest.raises(InputError, match="is the input itself"):
        vqonnx.compact_file(tmp_path / "small.onnx", tmp_path / "small.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = nets.write(nets.dense(2, 48), tmp_path / "source.onnx")
    vqonnx.compress(source, KMeans(bits=2), fuse=False).save(tmp_path / "small.onnx")

    def damage(model: ModelProto, folder: Path) -> None:
        compact(model, folder)
        codes = next(tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.UINT8)
        codes.raw_data = bytes(len(codes.raw_data))

    monkeypatch.setattr(sys.modules["vqonnx.compact_file"], "compact", damage)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(VerifyError, match=r"output 'h2' differs without the library \(.* dB\), so it was not written"):
        vqonnx.compact_file(tmp_path / "small.onnx", tmp_path / "out.onnx")
    assert sorted(tmp_path.iterdir()) == before


def test_external_data_are_brought_in(tmp_path: Path) -> None:
    vqonnx.compress(nets.MLP, KMeans(bits=2)).save(tmp_path / "small.onnx")
    model = onnx.load(tmp_path / "small.onnx")
    (tmp_path / "apart").mkdir()
    path = tmp_path / "apart" / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=64)
    assert list(modelfile.external_tensors(modelfile.load(path)))
    made = vqonnx.compact_file(path, tmp_path / "out.onnx")
    assert made.bytes < made.bytes_before
    assert len(vqonnx.report(tmp_path / "out.onnx").layers) == len(vqonnx.report(tmp_path / "small.onnx").layers)


# Real networks

# Bytes of all that is neither codes, codebooks, scales nor biases, with 2-bit k-means and the target `hybrid`.
OVERHEAD = {"resnet20": 3514, "resnet56": 4994, "squeezenet": 5178, "mobilenetv2": 6910}


def check_real(source: Path, folder: Path, *, fused_alike: bool = True, method: Any = None) -> vqonnx.Compacted:
    """``fused_alike``: with the library onnxruntime fuses the same, though the file says less of shapes."""
    path, small, plain = (folder / f"{part}.onnx" for part in ("compressed", "compact", "plain"))
    vqonnx.compress(source, method or PQ(), fuse=False).save(path, verify=False)
    made = vqonnx.compact_file(path, small)
    onnx.checker.check_model(small)
    assert optimised(path, folder / "a.onnx") == optimised(small, folder / "b.onnx")
    feeds = generate_feeds(source, count=1)
    assert_same(results(path, feeds), results(small, feeds), "without the library")
    before, after = results(path, feeds, library=True), results(small, feeds, library=True)
    if fused_alike:
        assert_same(before, after, "with the library")
    for name, value in before[0].items():
        if not fused_alike:
            np.testing.assert_allclose(value, after[0][name], rtol=1e-4, atol=1e-4 * np.abs(value).max())
    one, other = vqonnx.report(path), vqonnx.report(small)
    assert (one.layers, one.skipped) == (other.layers, other.skipped)
    assert vqonnx.expand(small, plain) == len(one.layers)
    assert_same(results(small, feeds), results(plain, feeds), "expanded")
    again = folder / "again.onnx"
    vqonnx.compact_file(small, again, verify=False)
    assert again.read_bytes() == small.read_bytes()
    return made


@pytest.mark.parametrize("name", [*OVERHEAD, "mobilenetv1", "resnet20_bn"])
def test_real_networks(name: str, data_dir: Path, tmp_path: Path) -> None:
    made = check_real(data_dir / "models" / f"{name}.onnx", tmp_path, method=KMeans(bits=2))
    overhead = made.bytes - made.parts["data"]
    if name in OVERHEAD:
        assert overhead == pytest.approx(OVERHEAD[name], rel=0.03)


SLOW = {"candy_style_winml"}
REFUSED = {"bert_tokenizer_customop", "mobilenetv2_cifar10_int8"}
FUSED_OTHERWISE = {"fastestdet", "mnist_cntk"}  # their makers wrote down shapes that onnxruntime cannot infer


def zoo() -> list[Any]:
    names = [
        *("candy_style_winml", "digits_extdata", "dtln_1", "fastestdet", "iris_mlp_torch", "magika_standard_v3_3"),
        *("mnist_cntk", "oww_embedding", "oww_hey_jarvis", "oww_melspectrogram", "ppocr_mobile_v2_cls"),
        *("ppocr_mobile_v2_det_prune", "silero_vad_16k_op15", "silero_vad_op18_ifless", "silero_vad_v4_old"),
        *("squeezenet1.1_fp16_op7", "ultraface_rfb320", "ultraface_slim320_simplified", "yolox_nano", "yunet_n_320"),
    ]
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.mark.parametrize("name", zoo())
def test_zoo(name: str, data_dir: Path, tmp_path: Path) -> None:
    (source,) = (data_dir / "zoo" / name).glob("*.onnx")
    check_real(source, tmp_path, fused_alike=name not in FUSED_OTHERWISE)
