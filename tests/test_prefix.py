"""Prefix codes: what is written is read again, by numpy and by ONNX operators; trees are the best there are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vqonnx.errors import FormError
from vqonnx.form import Coded
from vqonnx.inflate import inflate_functions, write_inflate
from vqonnx.ops import DOMAIN, Features, decode_function, write_decode
from vqonnx.prefix import Prefix, common_trees, sum_classes
from vqonnx.runtime import open_session
from vqonnx.share import share_trees
from vqonnx.trees import LONGEST, Trees, grow
from vqonnx.writer import Writer


def coded(rows: int, cols: int, spans: tuple[int, int], words: int, seed: int) -> Coded:
    """Numbers that are rarer the further they are from zero, more so in low classes."""
    rng = np.random.default_rng(seed)
    triples = -(-cols // 3)
    down = rng.integers(0, 3, -(-rows // spans[0])).astype(np.uint8)
    across = rng.integers(0, 4, -(-triples // spans[1])).astype(np.uint8)
    classes = sum_classes((rows, triples), down, across, *spans)
    spread = 0.1 * 2.0 ** np.repeat(classes, 3, axis=1)[:, :cols]
    codes = np.clip(np.round(words // 2 + spread * rng.standard_normal((rows, cols))), 0, words - 1).astype(np.uint8)
    book = np.sort(rng.standard_normal((words, 1))).astype(np.float16)
    trees = common_trees([(codes.astype(int) - words // 2, classes)])
    coding = Prefix((rows, cols), down, across, *spans, trees, words // 2)
    return Coded(codes[None], book[None, None], cols, coding=coding)


shapes = {
    "rows": st.integers(1, 24),
    "cols": st.integers(1, 40),
    "spans": st.tuples(st.integers(1, 9), st.integers(1, 12)),
    "words": st.integers(1, 40),
    "seed": st.integers(0, 999),
}


@given(**shapes)
def test_what_is_written_is_read_again(rows: int, cols: int, spans: tuple[int, int], words: int, seed: int) -> None:
    form = coded(rows, cols, spans, words, seed)
    assert form.coding is not None
    np.testing.assert_array_equal(form.coding.read(form.packed), form.codes[0])


@given(counts=st.lists(st.integers(0, 10_000), min_size=2, max_size=60).filter(any))
def test_a_tree_is_within_a_bit_of_the_entropy_and_fits_exactly(counts: list[int]) -> None:
    weights = np.array([counts], np.float64)
    found, words = (table[1, : len(counts)] for table in grow(np.zeros(1), weights).codewords)
    used = weights[0] > 0
    assert ((found >= 0) == used).all()
    if used.sum() == 1:
        assert found[used] == 0
        return
    assert (2.0 ** -found[used].astype(float)).sum() == 1, "no bit pattern is left over"
    shares = weights[0][used] / weights.sum()
    entropy = float(-(shares * np.log2(shares)).sum())
    assert entropy - 1e-9 <= float((shares * found[used]).sum()) < entropy + 1
    texts = [f"{word:0{length}b}" for word, length in zip(words[used], found[used], strict=True)]
    assert not any(a != b and b.startswith(a) for a, b in itertools.permutations(texts, 2)), "a code begins another"


def test_no_code_is_longer_than_the_decoder_has_levels() -> None:
    fibonacci = [1.0, 1.0]
    while len(fibonacci) < 60:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    trees = grow(np.array(fibonacci), np.array([fibonacci]))
    assert 10 < int(trees.codewords[0][1].max()) <= trees.levels <= LONGEST
    assert int(trees.codewords[0][0].max()) == 8


def test_classes_that_are_alike_share_a_tree() -> None:
    trees = grow(np.zeros(1), np.array([[0.0, 0.0], [900.0, 90.0], [1000.0, 110.0], [0.0, 4000.0]]))
    assert trees.roots.tolist() == [1, 1, 1, 2]
    assert trees.counts[:, :3].tolist() == [[0, 0, 0], [0, 2, 0], [1, 0, 0]]
    assert trees.leaves.tolist() == [0, 1, 1]


def test_what_is_beyond_three_takes_a_bit_or_more() -> None:
    assert grow(np.array([0.0, 7.0]), np.array([[1.0]])).codewords[0][0, :2].tolist() == [1, 1]


@settings(deadline=None, max_examples=15)
@given(**shapes)
@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 21])
def test_standard_operators_read_the_same(
    opset: int, rows: int, cols: int, spans: tuple[int, int], words: int, seed: int
) -> None:
    form = coded(rows, cols, spans, words, seed)
    assert form.coding is not None
    model = decoder(form, opset)
    onnx.checker.check_model(model)
    (found,) = open_session(model.SerializeToString()).run(None, {})
    np.testing.assert_array_equal(found, form.decode())


def decoder(form: Coded, opset: int) -> onnx.ModelProto:
    """A model without inputs that yields the form."""
    writer = Writer(set())
    write_decode(writer, form, form.shape, (0, 1), "y", codes=write_inflate(writer, form))
    graph = helper.make_graph(
        writer.take(),
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        initializer=list(writer.constants.values()),
    )
    codings = [] if form.coding is None else [form.coding]
    functions = [*inflate_functions(codings, opset), decode_function(opset, Features.of(form))]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


def test_the_bodies_fold_away(tmp_path: Any) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    model = decoder(coded(20, 30, (1, 3), 9, 0), 13)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert not onnx.load(tmp_path / "optimised.onnx").graph.node


def test_layers_share_their_trees_and_keep_their_codes() -> None:
    forms = [coded(20, 18, (1, 9), words, seed) for seed, words in enumerate((5, 9, 31))]
    shared = share_trees(forms)
    trees = {id(form.coding.trees) for form in shared if isinstance(form, Coded) and form.coding}
    assert len(trees) == 1
    for before, after in zip(forms, shared, strict=True):
        assert isinstance(after, Coded)
        assert after.coding is not None
        np.testing.assert_array_equal(after.coding.read(after.packed), before.codes[0])
        np.testing.assert_array_equal(after.decode(), before.decode())
        (found,) = open_session(decoder(after, 13).SerializeToString()).run(None, {})
        np.testing.assert_array_equal(found, before.decode())
    assert share_trees([]) == []


@pytest.mark.parametrize("spread", [0.38, 0.5, 0.8, 1.6])
def test_numbers_take_hardly_more_bits_than_their_entropy(spread: float) -> None:
    rng = np.random.default_rng(0)
    numbers = np.round(spread * rng.standard_normal((192, 192))).astype(np.int64)
    rows, cols = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
    coding = Prefix((192, 192), rows, cols, 192, 64, common_trees([(numbers, np.zeros((192, 64), int))]), 40)
    counts = np.bincount(numbers.ravel() + 40) / numbers.size
    entropy = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum()
    bits = 8 * len(coding.write(numbers + 40)) / numbers.size
    assert 0.98 * entropy < bits < 1.03 * entropy + 0.015


def test_bad_trees_and_classes_are_refused() -> None:
    good = coded(4, 6, (1, 2), 5, 0).coding
    assert good is not None
    one, two = np.array([1], np.uint8), np.array([[0] * 9, [0, 2, *[0] * 7]], np.uint8)
    wide = np.zeros(4, np.uint8)
    cases: list[tuple[Any, str]] = [
        (lambda: Trees(one, two, one), "the trees have 2 codes for 1 values"),
        (lambda: Trees(one + one, two, one), "tree 2 of a class, but there are 2"),
        (lambda: Trees(one, np.roll(two, -1, axis=1), np.zeros(2, np.uint8)), "tree 1 has codes that begin others"),
        (lambda: Trees(one, two[:, :2].copy(), one), "the trees have 1 levels; it must be an even number from 8 on"),
        (lambda: Trees(one, np.pad(two[::-1, 1:], ((0, 0), (9, 0))), one), "a code of tree 0 has more than 8 bits"),
        (lambda: Trees(one.astype(np.int32), two, one), r"roots of the trees are int32\[1\]"),
        (lambda: replace(good, row_classes=good.row_classes[:2]), "2 classes for 4 rows, 1 of them each"),
        (lambda: replace(good, row_classes=wide + np.uint8(16)), "class 16 of rows; the largest is 15"),
        (lambda: replace(good, col_classes=wide[:1] + np.uint8(15)), "class 1.* of a code, but there are"),
        (lambda: replace(good, offset=-1), "offset is -1"),
        (lambda: good.write(np.zeros((3, 6), np.uint8)), r"codes are \[3, 6\], but the classes are for \[4, 6\]"),
        (lambda: good.write(np.full((4, 6), 77, np.uint8)), "has no code for"),
        (lambda: good.read(np.zeros(0, np.uint8)), "but 0 are stored"),
        (lambda: replace(coded(4, 6, (1, 2), 5, 0), cols=5), "groups of width 1 do not make 5"),
    ]
    for make, message in cases:
        with pytest.raises(FormError, match=message):
            make()
