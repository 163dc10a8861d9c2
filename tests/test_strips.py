"""Codes in strips: where they are used, that they are the same codes, and that every reader reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import numbers, parse
from fused import Layer, conv, matrix, open_session
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_fused import optimised
from test_library import random_form
from test_place import FORMS, rewrite

from vqonnx import runtime
from vqonnx.fusion import fuse_layers
from vqonnx.strips import in_strips, suits, to_rows, to_strips
from vqonnx.unfusion import split_layers

OPSETS = (7, 9, 10, 11, 13, 17)


@pytest.fixture
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqonnx.strips._LEAST_BYTES", 1)


def codes_of(model: ModelProto) -> list[TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.UINT8]


def stored(model: ModelProto) -> dict[str, tuple[list[int], bytes]]:
    return {tensor.name: (list(tensor.dims), tensor.raw_data) for tensor in codes_of(model)}


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_a_strip_has_64_rows_byte_by_byte(stages: int, strips: int, row_bytes: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 256, (stages, 64 * strips, row_bytes), np.uint8)
    laid_out = to_strips(codes)
    assert laid_out.shape == (stages, strips, row_bytes, 64)
    assert in_strips(laid_out.shape)
    assert not in_strips(codes.shape)
    for row in range(0, 64 * strips, 7):
        np.testing.assert_array_equal(laid_out[:, row // 64, :, row % 64], codes[:, row])
    np.testing.assert_array_equal(to_rows(laid_out), codes)


# Codes, codebooks, layout, perm, axis of the outputs.
GEMM = ((1, 512, 512), (1, 1, 256, 8), (8, 4096, 512, 4096), (0, 1), 0)
CONV = ((1, 512, 576), (1, 1, 256, 8), (8, 4608, 512, 3, 3, 512), (0, 3, 1, 2), 0)
CHANGED: dict[str, tuple[tuple[Any, ...], bool]] = {
    "a Gemm": (GEMM, True),
    "few codes": (((1, 256, 512), GEMM[1], (8, 4096, 256, 4096), (0, 1), 0), False),
    "rows that are no multiple of 64": (((1, 1000, 512), GEMM[1], (8, 4096, 1000, 4096), (0, 1), 0), False),
    "a MatMul": ((*GEMM[:3], (1, 0), 1), True),
    "rows that are inputs": ((*GEMM[:3], (1, 0), 0), False),
    "three bits": (((1, 1536, 192), (1, 1, 8, 8), (3, 4096, 1536, 4096), (0, 1), 0), True),
    "nine bits": (((1, 512, 576), (1, 1, 512, 8), (9, 4096, 512, 4096), (0, 1), 0), False),
    "words that are too wide": (((1, 1024, 512), (1, 1, 256, 65), (8, 33280, 1024, 33280), (0, 1), 0), False),
    "four bits": (((1, 1024, 256), (1, 1, 16, 8), (4, 4096, 1024, 4096), (0, 1), 0), True),
    "three bits of many stages": (((5, 1536, 192), (5, 1, 8, 8), (3, 4096, 1536, 4096), (0, 1), 0), False),
    "a Conv of four bits": (((1, 1024, 288), (1, 1, 16, 8), (4, 4608, 1024, 3, 3, 512), (0, 3, 1, 2), 0), False),
    "a Conv": (CONV, True),
    "taps in the order of columns": ((*CONV[:2], (8, 4608, 512, 512, 3, 3), (0, 1, 2, 3), 0), False),
    "taps in another order": ((*CONV[:3], (0, 3, 2, 1), 0), False),
    "blocks that cross taps": (((1, 512, 576), CONV[1], (8, 4608, 512, 9, 1, 511), (0, 3, 1, 2), 0), False),
    "one tap": (((1, 512, 512), GEMM[1], (8, 4096, 512, 4096, 1, 1), (0, 1, 2, 3), 0), True),
}


@pytest.mark.parametrize("name", CHANGED)
def test_which_layers_suit(name: str) -> None:
    given_layer, expected = CHANGED[name]
    assert suits(*given_layer) == expected


LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "Gemm": (matrix(random_form(1, rows=128, cols=200), op="Gemm", trans=1), (1, 200)),
    "Gemm, rows": (matrix(random_form(1, rows=128, cols=200), op="Gemm", trans=1), (20, 200)),
    "MatMul": (matrix(random_form(2, rows=192, cols=1040, words=256)), (3, 1040)),
    "single weights": (matrix(random_form(3, rows=64, cols=300, width=1, words=16), op="Gemm", trans=1), (1, 300)),
    "pairs of bits": (matrix(random_form(3, rows=320, cols=300, width=4, words=4), op="Gemm", trans=1), (2, 300)),
    "three bits": (matrix(random_form(3, rows=64, cols=77, width=5, words=7)), (1, 77)),
    "long codes": (matrix(random_form(4, rows=64, cols=77, width=3, words=900)), (1, 77)),
    "stages and books": (matrix(random_form(5, rows=128, cols=96, stages=3, books=4)), (5, 96)),
    "Conv": (conv(random_form(6, rows=128, cols=16 * 9), (128, 16, 3, 3), order="hwi", pads=(1,) * 4), (2, 16, 9, 9)),
    "Conv by channels": (conv(random_form(7, rows=64, cols=54, width=9), (64, 6, 3, 3)), (1, 6, 12, 5)),
    "groups": (conv(random_form(8, rows=192, cols=40), (192, 40, 1), group=4), (1, 160, 30)),
    "one position": (conv(random_form(9, rows=64, cols=80), (64, 80, 1, 1)), (6, 80, 1, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_library_computes_the_same_from_strips(name: str) -> None:
    layer, shape = LAYERS[name]
    feed = {"X": np.random.default_rng(8).standard_normal(shape).astype(np.float32)}
    strips = replace(layer, strips=True)
    by_rows, from_strips = (open_session(one.fused(precision="exact")).run(None, feed)[0] for one in (layer, strips))
    np.testing.assert_array_equal(from_strips, by_rows)
    by_rows, from_strips = (open_session(one.fused(precision="fast")).run(None, feed)[0] for one in (layer, strips))
    assert np.linalg.norm(from_strips - by_rows) <= 1e-6 * np.linalg.norm(by_rows)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 900),
    st.integers(1, 9),
    st.sampled_from([1, 2, 10**6]),
)
def test_any_form_in_strips(seed: int, sets: int, stages: int, width: int, words: int, batch: int, books: int) -> None:
    form = random_form(seed, rows=64 * sets, cols=70 + seed, stages=stages, width=width, words=words, books=books)
    layer = matrix(form, op="Gemm", trans=1)
    feed = {"X": np.random.default_rng(seed).standard_normal((batch, 70 + seed)).astype(np.float32)}
    by_rows, from_strips = (
        open_session(one.fused(precision="exact")).run(None, feed)[0] for one in (layer, replace(layer, strips=True))
    )
    np.testing.assert_array_equal(from_strips, by_rows)


@pytest.mark.parametrize("lanes", [1, 32, 63, 65, 128])
def test_strips_of_other_sizes_are_refused(lanes: int) -> None:
    layer = replace(LAYERS["Gemm"][0], strips=True)
    model = onnx.load_model_from_string(layer.fused())
    (codes,) = codes_of(model)
    codes.dims[1], codes.dims[3] = 128 // lanes or 1, lanes
    codes.raw_data = bytes(int(np.prod(codes.dims)))
    with pytest.raises(Exception, match="a strip has 64 rows"):
        open_session(model.SerializeToString())


TEXT = "(float[2, 64] x) => (float[R, C] y) { h = Gemm <transB = 1> (x, w, b)  r = Relu (h)  y = MatMul (r, v) }"


def two_layers(opset: int, form: str = "pairs") -> ModelProto:
    arrays = {"w": numbers((128, 64), 1), "b": numbers((128,), 2), "v": numbers((128, 30), 3)}
    return rewrite(parse(TEXT, opset=opset, **arrays), "hybrid", exact=FORMS[form])


@pytest.mark.parametrize("form", ["pairs", "two stages and books", "scaled rows"])
@pytest.mark.parametrize("opset", OPSETS)
def test_bodies_read_strips_and_rows(opset: int, form: str, few_are_enough: None, tmp_path: Path) -> None:
    """The first layer has 128 outputs, the second 30."""
    model = two_layers(opset, form)
    feed = {"x": numbers((2, 64), 5)}
    before, plain = model.SerializeToString(), stored(model)
    (wanted,) = runtime.run(runtime.open_session(before), feed).values()
    assert sorted(fuse_layers(model, Path()).values()) == ["GemmRelu", "MatMul"]
    onnx.checker.check_model(model, full_check=True)
    ranks = sorted(len(tensor.dims) for tensor in codes_of(model))
    fused = model.SerializeToString()
    for library, bound in ((False, 1e-6), (True, 3e-4)):
        (found,) = runtime.run(runtime.open_session(fused, library=library), feed).values()
        assert np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted)
    assert optimised(fused, tmp_path) == optimised(before, tmp_path), "all of it is folded"
    by_onnx = ReferenceEvaluator(model).run(None, feed)[0]
    assert np.linalg.norm(by_onnx - wanted) <= 1e-6 * np.linalg.norm(wanted)
    assert ranks == [3, 4]
    split_layers(model)
    assert stored(model) == plain


@pytest.mark.parametrize("shared", [False, True])
def test_codes_that_others_read_stay_rows(shared: bool, few_are_enough: None) -> None:
    """The second weight has two readers, so that its Decode stays; it may have the codes of the first."""
    text = (
        "(float[2, 64] x) => (float[R, C] y, float[R, C] z) { y = MatMul (x, w)  h = MatMul (x, v)  z = MatMul (h, v) }"
    )
    first, second = numbers((64, 64), 1), numbers((64, 64), 1 if shared else 2)
    model = rewrite(parse(text, w=first, v=second), "hybrid", exact=FORMS["pairs"])
    assert fuse_layers(model, Path()) == {"w": "MatMul"}
    assert sorted(len(tensor.dims) for tensor in codes_of(model)) == ([3] if shared else [3, 4])


def test_files_written_before_can_be_fused_anew(few_are_enough: None) -> None:
    model = two_layers(17)
    fuse_layers(model, Path())
    once = stored(model)
    fuse_layers(model, Path())
    assert stored(model) == once


def test_codes_in_another_file_are_read(few_are_enough: None, tmp_path: Path) -> None:
    model = two_layers(17)
    plain = stored(model)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=0)
    outside = onnx.load(path, load_external_data=False)
    fuse_layers(outside, tmp_path)
    (strips,) = (tensor for tensor in codes_of(outside) if in_strips(tensor.dims))
    rows = np.frombuffer(plain[strips.name][1], np.uint8).reshape(plain[strips.name][0])
    np.testing.assert_array_equal(to_rows(numpy_helper.to_array(strips)), rows)
