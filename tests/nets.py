"""Whole models for the tests of compress, report, expand and the command line: the digits, and small ones made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper

from vqonnx.modelfile import make_tensor
from vqonnx.runtime import open_session, run

MODELS = Path(__file__).parents[1] / "models"
CONV, MLP = MODELS / "digits_conv.onnx", MODELS / "digits_mlp.onnx"
CALIBRATION, TEST = MODELS / "digits_calibration.npz", MODELS / "digits_test.npz"

# Weight and node of each layer of `mixed` that can be compressed, in order; and the two that cannot.
MIXED = {"conv_w": "conv", "up_w": "up", "fc_w": "fc", "head_w": "head"}
MIXED_SKIPPED = ("depth_w", "tiny_w")


def images(count: int) -> NDArray[np.float32]:
    """The first calibration images."""
    with np.load(CALIBRATION) as arrays:
        return np.asarray(arrays["image"][:count])


def draw(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Small weights of a normal distribution."""
    return (np.random.default_rng(seed).standard_normal(shape) / 8).astype(np.float32)


def _with_weights(model: ModelProto, shapes: dict[str, tuple[int, ...]], dtype: type = np.float32) -> ModelProto:
    for seed, (name, shape) in enumerate(shapes.items()):
        model.graph.initializer.append(numpy_helper.from_array(draw(shape, seed).astype(dtype), name))
    return model


def write(model: ModelProto, path: Path) -> Path:
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def mixed() -> ModelProto:
    """Every kind of layer, two of which cannot be compressed; ``x [N, 4, 8, 8]`` to ``y [N, 5]``."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17], metadata_props: ["author": "somebody", "task": "tests"]>
        mixed (float[N, 4, 8, 8] x) => (float[N, 5] y) {
          [conv] a = Conv <pads = [1, 1, 1, 1]> (x, conv_w)
          [relu] b = Relu (a)
          [depth] c = Conv <group = 16, pads = [1, 1, 1, 1]> (b, depth_w)
          [up] d = ConvTranspose <strides = [2, 2]> (c, up_w)
          [pool] e = GlobalAveragePool (d)
          [flat] f = Flatten (e)
          [fc] g = Gemm <transB = 1> (f, fc_w)
          [head] h = MatMul (g, head_w)
          [tiny] y = MatMul (h, tiny_w)
        }"""
    )
    shapes = {
        "conv_w": (16, 4, 3, 3),
        "depth_w": (16, 1, 3, 3),
        "up_w": (16, 12, 2, 2),
        "fc_w": (40, 12),
        "head_w": (40, 20),
        "tiny_w": (20, 5),
    }
    return _with_weights(model, shapes)


def dense(depth: int, size: int, name: str = "w", variety: int | None = None) -> ModelProto:
    """Gemm layers of ``size x size``; ``variety`` limits the distinct vectors of width 8."""
    steps = "".join(f"h{i + 1} = Gemm <transB = 1> (h{i}, {name}{i})\n" for i in range(depth))
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        dense (float[N, {size}] h0) => (float[N, {size}] h{depth}) {{ {steps} }}"""
    )
    for i in range(depth):
        weight = draw((size, size), i) if variety is None else _of_few_vectors(size, variety, i)
        model.graph.initializer.append(numpy_helper.from_array(weight, f"{name}{i}"))
    return model


def _of_few_vectors(size: int, variety: int, seed: int) -> NDArray[np.float32]:
    vectors = draw((variety, 8), seed) / 16
    return vectors[np.random.default_rng(seed).integers(0, variety, (size, size // 8))].reshape(size, size)


def half() -> ModelProto:
    """float16 throughout: a Conv and a MatMul."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 13]>
        half (float16[N, 8, 4, 4] x) => (float16[N, 64, 4, 240] y) {
          a = Conv (x, conv_w)
          y = MatMul (a, proj_w)
        }"""
    )
    return _with_weights(model, {"conv_w": (64, 8, 1, 1), "proj_w": (4, 240)}, np.float16)


def bfloat() -> ModelProto:
    """A bfloat16 weight behind a Cast, as exporters write it for processors that lack the type."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        bfloat (float[N, 40] x) => (float[N, 32] y) {
          w = Cast <to = 1> (stored)
          y = MatMul (x, w)
        }"""
    )
    model.graph.initializer.append(make_tensor(draw((40, 32), 1), TensorProto.BFLOAT16, "stored"))
    return model


def branches() -> ModelProto:
    """Weights in both branches of an If (under the same name, which is allowed) and one outside that both read."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        branches (float[N, 32] x, bool c) => (float[N, 32] y) {
          h = MatMul (x, shared)
          y = If (c) <
            then_branch = t () => (float[N, 32] a) { n = MatMul (h, shared)  a = MatMul (n, own) },
            else_branch = e () => (float[N, 32] b) { b = MatMul (h, own) }>
        }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(draw((32, 32), 1), "shared"))
    for seed, attribute in enumerate(model.graph.node[-1].attribute):
        attribute.g.initializer.append(numpy_helper.from_array(draw((32, 32), 10 + seed), "own"))
    return model


def function() -> ModelProto:
    """A weight in the body of a function that is called twice."""
    weight = draw((24, 24), 3)
    values = ", ".join(repr(float(value)) for value in weight.ravel())
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17, "local": 1]>
        function (float[N, 24] x) => (float[N, 24] y) {{ h = local.Mix (x)  y = local.Mix (h) }}
        <domain: "local", opset_import: ["": 17]> Mix (x) => (y) {{
          inner = Constant <value = float[24, 24] {{{values}}}> ()
          y = MatMul (x, inner)
        }}"""
    )


def nested_function() -> ModelProto:
    """A weight in a branch of an If in the body of a function."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "local": 1]>
        nested (float[N, 32] x, bool c) => (float[N, 32] y) { y = local.Choose (x, c) }
        <domain: "local", opset_import: ["": 17]> Choose (x, c) => (y) {
          y = If (c) <
            then_branch = t () => (a) { a = MatMul (x, then_w) },
            else_branch = e () => (b) { b = MatMul (x, else_w) }>
        }"""
    )
    for seed, attribute in enumerate(model.functions[0].node[0].attribute):
        name = attribute.g.node[0].input[1]
        attribute.g.initializer.append(numpy_helper.from_array(draw((32, 32), 20 + seed), name))
    return model


SMALL = {
    "mixed": mixed,
    "half": half,
    "bfloat": bfloat,
    "branches": branches,
    "function": function,
    "nested": nested_function,
}


def small_feed(name: str, rows: int = 3) -> dict[str, NDArray[np.generic]]:
    """An input of one of the models in `SMALL`."""
    shapes = {
        "mixed": (4, 8, 8),
        "half": (8, 4, 4),
        "bfloat": (40,),
        "branches": (32,),
        "function": (24,),
        "nested": (32,),
    }
    x = np.random.default_rng(5).random((rows, *shapes[name]))
    feed: dict[str, NDArray[np.generic]] = {"x": x.astype(np.float16 if name == "half" else np.float32)}
    return feed | {"c": np.array(True)} if name in ("branches", "nested") else feed


def feeds_of(name: str) -> list[dict[str, NDArray[np.generic]]]:
    """Inputs that run every part of one of the models in `SMALL`."""
    feed = small_feed(name)
    return [feed, feed | {"c": np.array(False)}] if "c" in feed else [feed]


def outputs(path: Path, feed: dict[str, NDArray[np.generic]], *, library: bool = False) -> list[NDArray[np.generic]]:
    """All outputs, on one thread."""
    return list(run(open_session(path, library=library, threads=1), feed).values())


def weights_of(graph: GraphProto) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
