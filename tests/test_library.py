"""The custom-op library: `vqonnx.Decode` in onnxruntime against `Coded.decode`, bit for bit, and every refusal."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vqonnx.form import Coded, code_bits, pack, row_bytes
from vqonnx.runtime import get_library_path

INPUTS = ("codes", "codebooks", "scales", "layout")
ISAS = ("portable", "avx2", "avx512", "avx512vbmi", "neon")


@dataclass(frozen=True)
class Node:
    """One Decode node: its four inputs and its attributes."""

    codes: NDArray[Any]
    codebooks: NDArray[Any]
    scales: NDArray[Any]
    layout: NDArray[Any]
    attributes: dict[str, Any]
    name: str = "conv1.weight"

    @classmethod
    def of(cls, form: Coded, sizes: tuple[int, ...], perm: tuple[int, ...]) -> Node:
        scales = np.ones((1, 1), np.float32) if form.scales is None else form.scales
        layout = np.array([form.bits, form.cols, *sizes], np.int64)
        return cls(form.packed, form.codebooks, scales, layout, {"perm": list(perm)})

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in INPUTS}

    def with_layout(self, *values: int) -> Node:
        return replace(self, layout=np.array(values, np.int64))

    def model(self, dynamic: Collection[str] = ()) -> bytes:
        """A model of this node alone. Inputs named in ``dynamic`` are inputs of the graph, the others are constants."""
        node = helper.make_node("Decode", INPUTS, ["weight"], name=self.name, domain="vqonnx", **self.attributes)
        values = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in self.arrays.items()
            if name in dynamic
        ]
        tensors = [numpy_helper.from_array(a, name) for name, a in self.arrays.items() if name not in dynamic]
        output = helper.make_tensor_value_info("weight", TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "g", values, [output], tensors)
        return _serialize(graph)

    def run(self, dynamic: Collection[str] = (), threads: int = 1) -> NDArray[np.float32]:
        feed = {name: array for name, array in self.arrays.items() if name in dynamic}
        return open_session(self.model(dynamic), threads).run(None, feed)[0]


def _serialize(graph: onnx.GraphProto) -> bytes:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("vqonnx", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def open_session(model: bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(get_library_path())
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def random_form(
    seed: int,
    *,
    stages: int = 1,
    rows: int = 4,
    cols: int = 72,
    width: int = 8,
    words: int = 200,
    books: int = 1,
    dtype: Any = np.float32,
    scales: Any = np.float32,
) -> Coded:
    rng = np.random.default_rng(seed)
    groups = -(-cols // width)
    codes = rng.integers(0, words, (stages, rows, groups), dtype=np.uint16)
    shape = (stages, min(books, groups), words, width)
    whole = dtype == np.int8
    return Coded(
        codes=codes,
        codebooks=rng.integers(-128, 128, shape, np.int8) if whole else rng.standard_normal(shape).astype(dtype),
        cols=cols,
        scales=None if scales is None else rng.standard_normal((rows, 1)).astype(scales),
    )


def assert_same_bits(got: NDArray[np.float32], want: NDArray[np.float32], what: object) -> None:
    assert got.dtype == want.dtype == np.float32, what
    assert got.shape == want.shape, what
    np.testing.assert_array_equal(got.view(np.uint32), np.ascontiguousarray(want).view(np.uint32), err_msg=repr(what))


def expected(form: Coded, sizes: tuple[int, ...], perm: tuple[int, ...]) -> NDArray[np.float32]:
    return np.ascontiguousarray(form.decode().reshape(sizes).transpose(perm))


# Every row of the table in docs/format.md, sizes that make several tasks, and axes that do not end with rows.
LAYOUTS = [
    pytest.param(24, 270, (24, 30, 3, 3), (0, 1, 2, 3), id="conv-ihw"),
    pytest.param(24, 270, (24, 3, 3, 30), (0, 3, 1, 2), id="conv-hwi"),
    pytest.param(40, 54, (2, 20, 6, 3, 3), (0, 2, 1, 3, 4), id="convtranspose-ihw"),
    pytest.param(40, 54, (2, 20, 3, 3, 6), (0, 4, 1, 2, 3), id="convtranspose-hwi"),
    pytest.param(40, 54, (1, 40, 3, 3, 6), (0, 4, 1, 2, 3), id="convtranspose-hwi-one-group"),
    pytest.param(64, 1, (64, 1, 1, 1, 1), (0, 2, 1, 3, 4), id="one-column"),
    pytest.param(1, 64, (1, 64), (1, 0), id="one-row"),
    pytest.param(70, 90, (70, 90), (0, 1), id="gemm"),
    pytest.param(70, 90, (70, 90), (1, 0), id="matmul"),
    pytest.param(70, 3000, (70, 3000), (1, 0), id="matmul-long"),
    pytest.param(3, 40000, (3, 40000), (1, 0), id="matmul-few-long-rows"),
    pytest.param(3, 40000, (3, 40000), (0, 1), id="gemm-few-long-rows"),
    pytest.param(3000, 5, (3000, 5), (1, 0), id="matmul-short-rows"),
    pytest.param(70, 90, (5, 14, 90), (0, 2, 1), id="matmul-stacked"),
    pytest.param(70, 90, (5, 7, 2, 90), (0, 1, 3, 2), id="matmul-stacked-twice"),
    pytest.param(300, 300, (10, 30, 15, 20), (3, 1, 2, 0), id="all-axes"),
    pytest.param(30, 84, (84, 30), (1, 0), id="axes-across-rows"),
    pytest.param(300, 84, (7, 60, 60), (2, 1, 0), id="axes-across-many-rows"),
]


@pytest.mark.parametrize("dynamic", [(), INPUTS], ids=["constant", "dynamic"])
@pytest.mark.parametrize(("rows", "cols", "sizes", "perm"), LAYOUTS)
def test_layouts(rows: int, cols: int, sizes: tuple[int, ...], perm: tuple[int, ...], dynamic: Collection[str]) -> None:
    for width, words in ((9, 100), (4, 256), (1, 16), (4, 2048)):
        form = random_form(rows, rows=rows, cols=cols, width=width, words=words)
        got = Node.of(form, sizes, perm).run(dynamic, threads=2)
        assert_same_bits(got, expected(form, sizes, perm), (width, words))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Coded, tuple[int, ...], tuple[int, ...]]:
    floats = st.sampled_from([np.float16, np.float32])
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    split = draw(st.integers(0, len(sizes)))
    rows, cols = prod(sizes[:split]), prod(sizes[split:])
    width = draw(st.integers(1, 20))
    words = draw(st.integers(1, 256) | st.integers(257, 3000))
    form = random_form(
        draw(st.integers(0, 2**32 - 1)),
        stages=draw(st.integers(1, 3) | st.just(9)),
        rows=rows,
        cols=cols,
        width=width,
        words=words,
        books=draw(st.sampled_from([1, 2, 10**6] if words <= 256 else [1, 2])),
        dtype=draw(st.just(np.int8) | floats),
        scales=draw(st.none() | floats),
    )
    if form.scales is not None and draw(st.booleans()):
        form = replace(form, scales=form.scales[:1])
    return form, tuple(draw(st.permutations(sizes))), tuple(draw(st.permutations(range(len(sizes)))))


@settings(max_examples=150)
@given(case=cases(), dynamic=st.sets(st.sampled_from(INPUTS)))
def test_decode_is_what_the_form_says(
    case: tuple[Coded, tuple[int, ...], tuple[int, ...]], dynamic: Collection[str]
) -> None:
    form, sizes, perm = case
    assert_same_bits(Node.of(form, sizes, perm).run(dynamic), expected(form, sizes, perm), case)


def test_bits_beyond_what_the_words_need() -> None:
    form = random_form(1, words=5)
    for bits in range(code_bits(5), 17):
        node = Node.of(form, (4, 72), (0, 1)).with_layout(bits, 72, 4, 72)
        node = replace(node, codes=pack(form.codes, bits))
        assert_same_bits(node.run(), form.decode(), bits)


def test_left_over_bits_are_ignored() -> None:
    form = random_form(2, words=32)  # 9 codes of 5 bits leave 3 bits
    node = Node.of(form, (4, 72), (0, 1))
    dirty = node.codes.copy()
    dirty[..., -1] |= 0xE0
    assert_same_bits(replace(node, codes=dirty).run(), form.decode(), "dirty")


def test_half_values_are_widened_exactly() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]  # all of them, subnormals too; a codebook holds no -0.0
    form = Coded(np.arange(248, dtype=np.uint8)[None, None], halves.reshape(1, 1, 248, -1), cols=halves.size)
    got = Node.of(form, (1, halves.size), (0, 1)).run()
    assert_same_bits(got, halves.astype(np.float32)[None] + np.float32(0), "halves")


def test_infinite_and_absent_numbers_pass_through() -> None:
    form = random_form(3, stages=2, words=4)
    node = Node.of(form, (4, 72), (0, 1))
    books = node.codebooks.copy()
    books[0, 0, :3, 0] = np.inf, -np.inf, np.nan
    want = (books[0, 0][form.codes[0]] + books[1, 0][form.codes[1]]).reshape(4, 72) * node.scales
    got = replace(node, codebooks=books).run()
    np.testing.assert_array_equal(got, want)  # NaN equals NaN here
    assert np.isnan(got).any()
    assert np.isinf(got).any()


def test_a_constant_of_the_outer_graph_inside_a_branch() -> None:
    form = random_form(4, stages=2, words=100, dtype=np.float16)
    node = Node.of(form, (4, 72), (1, 0))

    def branch(name: str) -> onnx.GraphProto:
        decode = helper.make_node("Decode", INPUTS, [name], name=name, domain="vqonnx", **node.attributes)
        return helper.make_graph([decode], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    choose = helper.make_node("If", ["flag"], ["weight"], then_branch=branch("then"), else_branch=branch("else"))
    graph = helper.make_graph(
        [choose],
        "g",
        [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("weight", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in node.arrays.items()],
    )
    session = open_session(_serialize(graph))
    for flag in (True, False):
        got = session.run(None, {"flag": np.array(flag)})[0]
        assert_same_bits(got, expected(form, (4, 72), (1, 0)), flag)


GOOD = Node.of(random_form(5, stages=2, rows=4, cols=70, words=128), (4, 7, 10), (0, 2, 1))


def _with_code(stage: int, row: int, group: int, code: int, words: int = 130) -> Node:
    form = random_form(6, stages=2, rows=4, cols=70, words=words)
    codes = form.codes.copy()
    codes[stage, row, group] = code
    return replace(Node.of(form, (4, 7, 10), (0, 2, 1)), codes=pack(codes, code_bits(words)))


def _cut(array: NDArray[Any], axis: int, size: int) -> NDArray[Any]:
    return np.ascontiguousarray(np.take(array, range(size), axis))


# What is wrong, and what the message must say: both numbers, and what they are.
REFUSED = [
    pytest.param(replace(GOOD, attributes={}), "perm is missing", id="no-perm"),
    pytest.param(replace(GOOD, attributes={"perm": [0, 1]}), r"5 values; .*perm of 2 axes .*4", id="short-perm"),
    pytest.param(replace(GOOD, attributes={"perm": [0, 1, 1]}), r"\[0, 1, 1\] .*3 axes: axis 1", id="perm-twice"),
    pytest.param(replace(GOOD, attributes={"perm": [0, 1, 3]}), r"\[0, 1, 3\] .*3 axes: axis 3", id="perm-beyond"),
    pytest.param(replace(GOOD, attributes={"perm": [0, 1, -1]}), r"\[0, 1, -1\] .*3 axes: axis -1", id="perm-negative"),
    pytest.param(replace(GOOD, attributes={"perm": [0, 1, 2], "coding": "rans"}), "coding is 'rans'", id="coding"),
    pytest.param(replace(GOOD, attributes={"perm": [0, 1, 2], "coding": 1}), "coding is no string", id="coding-number"),
    pytest.param(replace(GOOD, codes=GOOD.codes[0]), r"codes have 2 axes \[4, 8\], not 3", id="codes-rank"),
    pytest.param(replace(GOOD, codes=GOOD.codes[:, :0]), r"codes are \[2, 0, 8\]; .*at least 1", id="codes-empty"),
    pytest.param(replace(GOOD, codes=GOOD.codes[:1]), "codes have 1 stages, codebooks 2", id="stages"),
    pytest.param(replace(GOOD, codes=_cut(GOOD.codes, 2, 7)), "has 7 bytes.* 9 groups .* 7 bits", id="row-bytes"),
    pytest.param(
        replace(GOOD, codebooks=GOOD.codebooks[0]), r"codebooks have 3 axes \[1, 128, 8\], not 4", id="books-rank"
    ),
    pytest.param(replace(GOOD, codebooks=GOOD.codebooks[:, :, :0]), r"\[2, 1, 0, 8\]; .*at least 1", id="books-empty"),
    pytest.param(replace(GOOD, codebooks=GOOD.codebooks.astype(np.float64)), "codebooks are float64", id="books-type"),
    pytest.param(
        replace(GOOD, codebooks=GOOD.codebooks.repeat(10, 1)), "10 books for 9 groups", id="more-books-than-groups"
    ),
    pytest.param(
        replace(GOOD, codebooks=GOOD.codebooks.repeat(3, 2)), "384 words; 7 bits reach 128", id="more-words-than-codes"
    ),
    pytest.param(replace(GOOD, scales=GOOD.scales[:3]), r"scales are \[3, 1\]; .*\[4, 1\] or \[1, 1\]", id="scales"),
    pytest.param(replace(GOOD, scales=GOOD.scales.T), r"scales are \[1, 4\]", id="scales-across"),
    pytest.param(replace(GOOD, scales=GOOD.scales[:, 0]), r"scales have 1 axes \[4\], not 2", id="scales-rank"),
    pytest.param(replace(GOOD, scales=GOOD.scales.astype(np.int32)), "scales are int32", id="scales-type"),
    pytest.param(replace(GOOD, scales=np.full((4, 1), "x")), "scales are string", id="scales-text"),
    pytest.param(replace(GOOD, layout=GOOD.layout[None]), r"layout have 2 axes \[1, 5\], not 1", id="layout-rank"),
    pytest.param(GOOD.with_layout(7, 70, 4, 70), "4 values; .*3 axes .*5", id="layout-short"),
    pytest.param(GOOD.with_layout(7), "1 values; .*3 axes .*5", id="layout-very-short"),
    pytest.param(GOOD.with_layout(0, 70, 4, 7, 10), "holds 0; .*at least 1", id="bits-0"),
    pytest.param(GOOD.with_layout(9, 70, 4, 7, 10), "has 8 bytes.* 9 groups .* 9 bits", id="bits-9"),
    pytest.param(GOOD.with_layout(17, 70, 4, 7, 10), "17 bits; .*1 to 16", id="bits-17"),
    pytest.param(GOOD.with_layout(2**62, 70, 4, 7, 10), f"{2**62} bits", id="bits-huge"),
    pytest.param(GOOD.with_layout(7, 64, 4, 8, 8), r"8 bytes.* 8 groups \(64 columns of width 8\)", id="cols-small"),
    pytest.param(GOOD.with_layout(7, 0, 4, 7, 10), "holds 0;", id="cols-0"),
    pytest.param(GOOD.with_layout(7, -70, 4, 7, 10), "holds -70;", id="cols-negative"),
    pytest.param(GOOD.with_layout(7, 2**63 - 1, 4, 7, 10), f"8 bytes.*{2**63 - 1} columns", id="cols-huge"),
    pytest.param(GOOD.with_layout(7, 2**62, 4, 7, 10), f"8 bytes.*{2**62} columns", id="cols-overflow"),
    pytest.param(GOOD.with_layout(7, 70, 4, 7, 11), r"\[4, 7, 11\], .*4 rows of 70", id="sizes"),
    pytest.param(GOOD.with_layout(7, 70, 4, 0, 10), "holds 0;", id="size-0"),
    pytest.param(GOOD.with_layout(7, 70, -4, -7, 10), "holds -4;", id="sizes-negative"),
    pytest.param(GOOD.with_layout(7, 70, 2**32, 2**32, 280), f"{2**32}, {2**32}, 280.*4 rows of 70", id="sizes-wrap"),
    pytest.param(GOOD.with_layout(7, 70, 2**63 - 1, 3, 4), f"{2**63 - 1}, 3, 4", id="sizes-huge"),
    pytest.param(_with_code(0, 0, 0, 130), "code 130 at stage 0, row 0, group 0 .* 130 words", id="first-code"),
    pytest.param(_with_code(1, 3, 8, 255), "code 255 at stage 1, row 3, group 8 .* 130 words", id="last-code"),
    pytest.param(_with_code(0, 0, 0, 1500, words=1500), "code 1500 at stage 0, row 0, .* 1500 words", id="first-wide"),
    pytest.param(_with_code(1, 3, 8, 2047, words=1500), "code 2047 at stage 1, row 3, .* 1500 words", id="last-wide"),
]


@pytest.mark.parametrize("dynamic", [(), INPUTS], ids=["constant", "dynamic"])
@pytest.mark.parametrize(("node", "message"), REFUSED)
def test_bad_nodes_are_refused(node: Node, message: str, dynamic: Collection[str]) -> None:
    with pytest.raises(Exception, match=message) as error:
        node.run(dynamic)
    assert str(error.value).count("vqonnx.Decode 'conv1.weight': ") >= 1
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("dynamic", [(), INPUTS], ids=["constant", "dynamic"])
@pytest.mark.parametrize("name", ["codes", "layout"])
def test_onnxruntime_itself_refuses_fixed_types(name: str, dynamic: Collection[str]) -> None:
    node = replace(GOOD, **{name: getattr(GOOD, name).astype(np.int8)})
    with pytest.raises(Exception, match=rf"tensor\(int8\).*{name}.*conv1.weight"):
        node.run(dynamic)


def test_a_node_without_name_is_called_after_its_output() -> None:
    with pytest.raises(Exception, match=r"vqonnx\.Decode 'weight': the attribute perm is missing"):
        replace(GOOD, name="", attributes={}).run()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("層" * 80, "層" * 66 + "..."),
        ("a" * 199 + "é", "a" * 199 + "..."),
        ("a" * 200, "a" * 200),
        ("😀\n\x7f", "😀??"),
    ],
    ids=["cut before a character", "of two bytes", "not too long", "control characters"],
)
def test_errors_are_text_whatever_the_name_is(name: str, shown: str) -> None:
    with pytest.raises(Exception, match="perm of 2 axes") as caught:
        replace(GOOD, name=name, attributes={"perm": [0, 1]}).run()
    assert f"'{shown}'" in str(caught.value)


@pytest.mark.parametrize(
    ("coding", "shown"),
    [
        (b"\xff\xfe", "??"),
        (b"a\xe5\xb1", "a??"),
        (b"\xed\xa0\x80", "???"),
        (b"\xc0\x80b", "??b"),
        (b"\xf4\x90\x80\x80", "????"),
    ],
    ids=["no UTF-8", "a part", "half a pair", "too long a form", "beyond the last"],
)
def test_errors_are_text_whatever_an_attribute_is(coding: bytes, shown: str) -> None:
    with pytest.raises(Exception, match="knows only 'fixed'") as caught:
        replace(GOOD, attributes={**GOOD.attributes, "coding": coding}).run()
    assert f"coding is '{shown}'" in str(caught.value)


def test_a_bad_code_of_a_later_block_is_found() -> None:
    form = random_form(7, rows=3, cols=2000, width=1, words=100)
    codes = form.codes.copy()
    codes[0, 2, 1999] = 127
    node = replace(Node.of(form, (3, 2000), (0, 1)), codes=pack(codes, 7))
    with pytest.raises(Exception, match="code 127 at stage 0, row 2, group 1999 is beyond the codebook of 100 words"):
        node.run()


def test_threads_do_not_change_the_result() -> None:
    form = random_form(8, stages=2, rows=512, cols=1152, width=9)
    for sizes, perm in (((512, 1152), (0, 1)), ((512, 1152), (1, 0)), ((512, 9, 128), (0, 2, 1))):
        node = Node.of(form, sizes, perm)
        for threads in (1, 2):
            session = open_session(node.model(), threads)
            for _ in range(3):
                assert_same_bits(session.run(None, {})[0], expected(form, sizes, perm), (sizes, perm, threads))


def test_concurrent_runs_of_one_session() -> None:
    form = random_form(9, rows=256, cols=576, width=9)
    sizes, perm = (256, 9, 64), (0, 2, 1)
    session = open_session(Node.of(form, sizes, perm).model(), threads=2)
    dynamic = open_session(Node.of(form, sizes, perm).model(INPUTS), threads=2)
    feed = Node.of(form, sizes, perm).arrays
    want = expected(form, sizes, perm)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(session.run, None, {}) for _ in range(40)]
        runs += [pool.submit(dynamic.run, None, feed) for _ in range(40)]
        for done in runs:
            assert_same_bits(done.result()[0], want, "concurrent")


def test_sessions_outlive_each_other() -> None:
    node = Node.of(random_form(10), (4, 72), (0, 1))
    first = open_session(node.model())
    want = first.run(None, {})[0]
    for _ in range(20):
        second = open_session(node.model())
    del first
    assert_same_bits(second.run(None, {})[0], want, "second session")


_IN_CHILD = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
arrays = {}
for i, path in enumerate(sys.argv[2:]):
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays[str(i)] = session.run(None, {})[0]
np.savez(sys.stdout.buffer, **arrays)
"""


def _run_isa(isa: str, *paths: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", _IN_CHILD, get_library_path(), *map(str, paths)]
    return subprocess.run(command, env={**os.environ, "VQONNX_ISA": isa}, capture_output=True, check=False)


@pytest.mark.parametrize("isa", ["", *ISAS])
def test_every_instruction_set_decodes_the_same(isa: str, tmp_path: Path) -> None:
    sizes = [(w, bits, stages) for w in (1, 2, 4, 8, 9, 16, 17) for bits in (1, 4, 5, 8, 11, 13) for stages in (1, 2)]
    forms = [random_form(i, cols=9 * 34, width=w, words=2**b, stages=s) for i, (w, b, s) in enumerate(sizes)]
    paths = [tmp_path / f"{i}.onnx" for i in range(len(forms))]
    for path, form in zip(paths, forms, strict=True):
        path.write_bytes(Node.of(form, (4, 9, 34), (0, 2, 1)).model())
    child = _run_isa(isa, *paths)
    if b"which this processor lacks" in child.stderr or b"which is no instruction set of this library" in child.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert child.returncode == 0, child.stderr.decode()
    result = tmp_path / "out.npz"
    result.write_bytes(child.stdout)
    with np.load(result) as arrays:
        for i, form in enumerate(forms):
            assert_same_bits(arrays[str(i)], expected(form, (4, 9, 34), (0, 2, 1)), (isa, sizes[i]))


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2 ", "portable,avx2"])
def test_an_unknown_instruction_set_is_an_error(isa: str) -> None:
    child = _run_isa(isa)
    assert child.returncode != 0
    text = child.stderr.decode()
    assert re.search(rf"VQONNX_ISA is '{re.escape(isa)}'.*known are: portable", text), text


def _exported(path: Path) -> set[str]:
    """Names that an ELF library defines for others, read from its table of dynamic symbols."""
    data = path.read_bytes()
    section_offset, entry_size, count = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_offset + i * entry_size) for i in range(count)]
    names = set()
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind != 11:  # SHT_DYNSYM
            continue
        strings = sections[link][4]
        for start in range(offset, offset + size, 24):
            name, info, _, section = struct.unpack_from("<IBBH", data, start)
            if section and info >> 4:  # defined here, and not local
                begin = strings + name
                names.add(data[begin : data.index(b"\0", begin)].decode())
    return names


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF, which only Linux has")
def test_only_the_entry_is_exported() -> None:
    path = Path(get_library_path())
    assert path.read_bytes()[:6] == b"\x7fELF\x02\x01"
    assert _exported(path) == {"RegisterCustomOps"}


def test_an_older_onnxruntime_is_told_what_is_missing() -> None:
    """A stand-in for onnxruntime before 1.17: it knows version 1 of the table, and nothing of 17."""
    messages = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, text: messages.append((code, text)) or 1
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version == 1 else None
    )
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), None)
    register = ctypes.CDLL(get_library_path()).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert messages == [(1, b"vqonnx: this library needs onnxruntime 1.17 or later")]


def test_row_bytes_agree_with_the_kernel() -> None:
    for bits in range(1, 17):
        for cols in range(1, 20):
            form = random_form(bits, rows=3, cols=cols, width=1, words=2**bits)
            node = Node.of(form, (3, cols), (1, 0))
            assert node.codes.shape[2] == row_bytes(cols, bits)
            assert_same_bits(node.run(), form.decode().T, (bits, cols))
