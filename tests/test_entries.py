"""Layers of many outputs and rows or positions, which every instruction set computes by tables of entries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from fused import F32, Layer, conv, matrix, open_session
from numpy.typing import NDArray
from test_fused_library import EXACT, FAST, bias, feeds
from test_library import ISAS, random_form

from vqonnx.runtime import get_library_path


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set that the library is held to."""
    monkeypatch.setenv("VQONNX_ISA", request.param)
    try:
        onnxruntime.SessionOptions().register_custom_ops_library(get_library_path())
    except Exception as error:  # onnxruntime has no type of its own for it
        if "which this processor lacks" not in str(error) and "no instruction set of this library" not in str(error):
            raise
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


BOUNDS = {"exact": EXACT, "fast": FAST}


def differs(layer: Layer, shape: tuple[int, ...], precision: str) -> float:
    """The relative error against standard operators; the same on one and more threads."""
    x = np.random.default_rng(8).standard_normal(shape).astype(F32)
    want = open_session(layer.plain()).run(None, feeds(layer, x))[0]
    model = layer.fused(precision=precision)
    got, again = (open_session(model, threads).run(None, feeds(layer, x))[0] for threads in (1, 3))
    np.testing.assert_array_equal(got, again)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("rows", [2, 3, 8, 17, 70])
@pytest.mark.parametrize(
    ("outputs", "width", "words", "stages", "books", "strips"),
    [
        (1000, 8, 64, 1, 1, False),
        (700, 4, 16, 2, 3, False),
        (640, 8, 200, 1, 1, True),
        (640, 8, 250, 2, 1, True),
        (640, 5, 30, 1, 2, True),
        (4225, 8, 64, 1, 1, False),
    ],
)
def test_matrices(
    outputs: int, width: int, words: int, stages: int, books: int, strips: bool, rows: int, precision: str, isa: str
) -> None:
    form = random_form(rows, rows=outputs, cols=1101, width=width, words=words, stages=stages, books=books)
    layer = matrix(form, op="GemmRelu", trans=1, bias=bias(outputs))
    assert differs(replace(layer, strips=strips), (rows, 1101), precision) <= BOUNDS[precision], isa


@pytest.mark.parametrize(
    ("weight", "options", "shape"),
    [
        pytest.param((192, 64, 3, 3), {"pads": (1, 1, 1, 1)}, (1, 64, 14, 14), id="3x3"),
        pytest.param((192, 64, 3, 3), {"pads": (2, 0, 1, 3), "dilations": (1, 2)}, (3, 64, 9, 7), id="odd-pads"),
        pytest.param((128, 16, 3, 3), {}, (1, 16, 60, 58), id="bands"),
        pytest.param((2112, 16, 1, 3), {"pads": (0, 1, 0, 1)}, (1, 16, 3, 20), id="pieces"),
        pytest.param((1024, 24, 1, 1), {}, (2, 24, 13, 11), id="1x1"),
        pytest.param((1024, 24, 1, 1), {"strides": (2, 3)}, (1, 24, 13, 17), id="1x1-strided"),
        pytest.param((512, 16, 5), {"pads": (2, 1)}, (2, 16, 90), id="1-d"),
    ],
)
@pytest.mark.parametrize("op", ["Conv", "ConvAddRelu", "ConvSilu"])
@pytest.mark.parametrize("precision", BOUNDS)
def test_convolutions(
    weight: tuple[int, ...], options: dict[str, object], shape: tuple[int, ...], op: str, precision: str, isa: str
) -> None:
    taps = int(np.prod(weight[2:]))
    stages = 1 + (taps == 1)
    form = random_form(taps, rows=weight[0], cols=weight[1] * taps, width=8, words=64 // stages, stages=stages)
    layer = conv(form, weight, op=op, order="hwi", bias=bias(weight[0]), **options)  # type: ignore[arg-type]
    assert differs(replace(layer, strips=weight[0] % 64 == 0), shape, precision) <= BOUNDS[precision], isa
    assert differs(layer, shape, precision) <= BOUNDS[precision], isa


@pytest.mark.parametrize("longest", [1, 10])
def test_entries_are_rounded_where_that_loses_little(longest: float, isa: str) -> None:
    form = random_form(5, rows=4096, cols=960, width=8, words=200)
    form.codebooks[0, 0, 0] *= longest  # one word of 200, in whose units all others are
    layer = matrix(form, op="Gemm", trans=1, bias=bias(4096))
    assert EXACT < differs(layer, (32, 960), "fast") <= longest * FAST, isa
    error = differs(layer, (32, 960), "auto")
    assert error <= FAST, isa
    assert (error > EXACT) == (longest == 1), isa


def test_rows_are_rounded_each_in_units_of_its_own(isa: str) -> None:
    layer = matrix(random_form(5, rows=4096, cols=96, width=8, words=200), op="Gemm", trans=1, bias=np.zeros(4096, F32))
    x = np.random.default_rng(1).standard_normal((33, 96)).astype(F32) * np.logspace(-9, 9, 33, dtype=F32)[:, None]
    want = open_session(layer.plain()).run(None, {"X": x})[0]
    got = open_session(layer.fused(precision="fast")).run(None, {"X": x})[0]
    for row in range(33):
        assert np.linalg.norm(got[row] - want[row]) <= FAST * np.linalg.norm(want[row]), (row, isa)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20])
def test_inputs_that_cannot_be_rounded_are_computed_exactly(value: float, isa: str) -> None:
    layer = matrix(random_form(5, rows=4096, cols=96, width=8, words=200), op="Gemm", trans=1, bias=bias(4096))
    x = np.random.default_rng(1).standard_normal((32, 96)).astype(F32)
    fast, exact = (open_session(layer.fused(precision=precision)) for precision in ("fast", "exact"))
    assert (fast.run(None, {"X": x})[0] != exact.run(None, {"X": x})[0]).any(), isa
    x[7, 5] = value
    np.testing.assert_array_equal(fast.run(None, {"X": x})[0], exact.run(None, {"X": x})[0])


def test_what_is_no_number_stays_in_its_row(isa: str) -> None:
    layer = matrix(random_form(1, rows=1024, cols=96, width=8, words=32), op="Gemm", trans=1, bias=bias(1024))
    x: NDArray[np.float32] = np.random.default_rng(1).standard_normal((20, 96)).astype(F32)
    session = open_session(layer.fused(precision="exact"))
    want = session.run(None, {"X": x})[0]
    x[3, 5], x[11, 90] = np.nan, np.inf
    got = session.run(None, {"X": x})[0]
    assert not np.isfinite(got[[3, 11]]).any(), isa
    others = np.delete(np.arange(20), [3, 11])
    np.testing.assert_array_equal(got[others], want[others])
