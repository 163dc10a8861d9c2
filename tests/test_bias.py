"""A bias for every layer that can have one, without changing what the model computes; and the mean that it takes up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from nets import SMALL, draw, feeds_of, write
from onnx import ModelProto, numpy_helper

import vqonnx
from vqonnx.bias import prepare, store
from vqonnx.graph import find
from vqonnx.methods import DQC
from vqonnx.runtime import open_session, run

TEXT = """<ir_version: 8, opset_import: ["": 17]>
many (float[N, 4, 6, 6] x) => (float[N, 5] y, float[N, 8] kept)
<float[8] shared = {1,2,3,4,5,6,7,8}, float[8] s = {1,1,2,2,1,1,1,1}, float[8] o = {0,1,0,1,0,1,0,1},
 float[8] m = {1,0,1,0,0,0,0,0}, float[8] v = {1,2,1,2,1,1,1,1}, float[5] added = {1,2,3,4,5}, float[1] one = {0.5}>
{
  a = Conv (x, plain_w)
  b = Conv (a, first_w, shared)
  c = Conv (b, second_w, shared)
  d = Conv (c, normed_w)
  n = BatchNormalization (d, s, o, m, v)
  u = ConvTranspose (n, up_w)
  g = GlobalAveragePool (u)
  f = Flatten (g)
  kept = Gemm <beta = 0.5> (f, fc_w, one)
  z = MatMul (kept, head_w)
  y = Add (added, z)
}"""
SHAPES = {
    "plain_w": (8, 4, 3, 3),
    "first_w": (8, 8, 1, 1),
    "second_w": (8, 8, 1, 1),
    "normed_w": (8, 8, 3, 3),
    "up_w": (8, 8, 2, 2),
    "fc_w": (8, 8),
    "head_w": (8, 5),
}


def many() -> ModelProto:
    model = onnx.parser.parse_model(TEXT)
    for seed, (name, shape) in enumerate(SHAPES.items()):
        model.graph.initializer.append(numpy_helper.from_array(4 * draw(shape, seed), name))
    return model


def feed() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((3, 4, 6, 6)).astype(np.float32)}


def outputs(model: ModelProto) -> dict[str, np.ndarray]:
    return run(open_session(model.SerializeToString(), threads=1), feed())


def test_preparing_changes_nothing_and_finds_all() -> None:
    model = many()
    before = outputs(model)
    biases = prepare(model, find(model, ".").sites, Path())
    onnx.checker.check_model(model)
    for name, value in outputs(model).items():
        np.testing.assert_allclose(value, before[name], rtol=1e-5, atol=1e-5)
    assert set(biases) == set(SHAPES)
    assert biases["normed_w"].name == "m"
    assert biases["normed_w"].factor == -1
    assert biases["head_w"].name == "added"
    assert len({bias.name for bias in biases.values()}) == len(biases)  # nobody shares one any more
    assert biases["fc_w"].factor == 0.5


@pytest.mark.parametrize("weight", SHAPES)
def test_a_shift_moves_the_outputs_of_that_layer(weight: str) -> None:
    model = many()
    biases = prepare(model, find(model, ".").sites, Path())
    layer = next(node for node in model.graph.node if weight in node.input)
    watched = layer.output[0]
    if weight in ("normed_w", "head_w"):
        watched = next(node for node in model.graph.node if watched in node.input).output[0]
    if watched not in {entry.name for entry in model.graph.output}:
        model.graph.output.append(onnx.ValueInfoProto(name=watched))
    before = outputs(model)[watched]
    shift = np.arange(1, biases[weight].values.size + 1, dtype=np.float64)
    biases[weight].shift(shift)
    store(model, biases.values())
    moved = outputs(model)[watched] - before
    if weight == "normed_w":  # seen behind the normalisation
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        shift = shift * values["s"] / np.sqrt(values["v"] + 1e-5)
    np.testing.assert_allclose(
        moved, np.broadcast_to(shift.reshape(-1, *[1] * (moved.ndim - 2)), moved.shape), rtol=1e-3
    )


def test_weights_that_cannot_be_corrected_are_left_out() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 8] x) => (float[N, 8] y) {
          a = MatMul (x, twice)  b = MatMul (a, twice)
          c = MatMul (b, bare)  d = Relu (c)
          y = Gemm <beta = 0.0> (d, off, nothing)
        }"""
    )
    for seed, name in enumerate(("twice", "bare", "off")):
        model.graph.initializer.append(numpy_helper.from_array(draw((8, 8), seed), name))
    model.graph.initializer.append(numpy_helper.from_array(draw((8,), 9), "nothing"))
    assert prepare(model, find(model, ".").sites, Path()) == {}


def test_the_mean_error_of_a_layer_is_gone_on_the_calibration_data(tmp_path: Path) -> None:
    path = write(many(), tmp_path / "many.onnx")
    calibration = [feed()]
    kept = vqonnx.compress(path, DQC(bits=3), calibration=calibration).save(tmp_path / "small.onnx")
    before = run(open_session(path, threads=1), feed())["y"]
    after = run(open_session(kept.path, threads=1), feed())["y"]
    np.testing.assert_allclose(after.mean(0), before.mean(0), rtol=1e-3, atol=1e-3)
    plain = vqonnx.compress(path, DQC(bits=3, feedback=False), calibration=calibration).save(tmp_path / "plain.onnx")
    without = run(open_session(plain.path, threads=1), feed())["y"]
    assert np.abs(without.mean(0) - before.mean(0)).max() > 0.05


@pytest.mark.parametrize("name", ["mixed", "half", "bfloat", "branches", "function", "nested"])
def test_every_small_model_is_coded_with_feedback(name: str, tmp_path: Path) -> None:
    path = write(SMALL[name](), tmp_path / "model.onnx")
    saved = vqonnx.compress(path, DQC(bits=5), calibration=feeds_of(name)).save(tmp_path / "small.onnx")
    assert saved.comparison is not None
    assert saved.comparison.snr_db is None or saved.comparison.snr_db > 8


def test_a_layer_in_a_branch_that_reads_weights_of_the_main_graph() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (bool c, float[N, 6] x) => (float[N, 4] y) {
          y = If (c) <
            then_branch = t () => (float[N, 4] a) { a = Gemm (x, w, b) },
            else_branch = e () => (float[N, 4] d) { d = Gemm (x, w, b) }
          >
        }"""
    model = onnx.parser.parse_model(text)
    for name, values in (("w", draw((6, 4), 0)), ("b", draw((4,), 1))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    before = model.SerializeToString()
    assert prepare(model, find(model, ".").sites, Path()) == {}
    assert model.SerializeToString() == before
