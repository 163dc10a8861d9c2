"""The models of ``benchmarks/speed.py``: one layer (or copies of it) in each format, and whole networks.

Codes of single layers, of the MLP and of one ResNet-50 are random: what they say does not change how long they take.
The fp32 models hold the very weights that the codes mean, so that outputs can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, prod
from pathlib import Path

import numpy as np
import onnx
from common import data_dir
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from resnet import random_weights, resnet_model
from speed_timing import Way

import vqonnx
from vqonnx.form import Coded
from vqonnx.fusion import fuse_layers
from vqonnx.graph import find
from vqonnx.ops import DOMAIN, VERSION, Features, decode_function, write_decode
from vqonnx.place import Placement, place
from vqonnx.record import LayerRecord, write_record
from vqonnx.strips import in_strips, rearrange, to_rows
from vqonnx.view import conv_view
from vqonnx.writer import Writer

_OPSET, _MICROSOFT = 17, "com.microsoft"
_COLD = 160e6  # bytes over which calls rotate, so that no weight is in a cache
_BLOCK = 32  # weights of one scale in MatMulNBits
Node = Callable[[int], tuple[list[NodeProto], dict[str, np.ndarray]]]


def random_form(rows: int, cols: int, width: int, words: int = 256, seed: int = 0) -> Coded:
    """Normal words, uniform codes; the sum of a row of products is about 1 for inputs of about 1."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, words, (rows, -(-cols // width)))
    return Coded.one_stage(codes, (rng.standard_normal((words, width)) / np.sqrt(cols)).astype(np.float32), cols=cols)


def _rolled(form: Coded, number: int) -> Coded:
    """Another layer of the same cost, so that onnxruntime does not take the two for one."""
    return Coded(np.roll(form.codes, number, axis=1), form.codebooks, form.cols)


def _model(layers: int, make: Node, x: Sequence[int], y: Sequence[int], *domains: str) -> ModelProto:
    """Layers beside each other, each with its own input ``x0, x1 ..``."""
    nodes, arrays = [], {}
    for number in range(layers):
        more, constants = make(number)
        nodes += more
        arrays |= constants
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, x) for i in range(layers)],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, y) for i in range(layers)],
        [numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )
    imports = [helper.make_opsetid("", _OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def _ours(
    form: Coded, split: tuple[int, ...], perm: tuple[int, ...], layers: int, node: Callable[[int], NodeProto], x, y
) -> ModelProto:
    writer = Writer(set())
    for number in range(layers):
        write_decode(writer, _rolled(form, number), split, perm, f"w{number}")
    decodes = writer.take()
    model = _model(layers, lambda i: ([decodes[i], node(i)], {}), x, y)
    model.graph.initializer.extend(writer.constants.values())
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(form.shape[0], np.float32), "b"))
    model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    model.functions.append(decode_function(_OPSET, Features.of(form) | Features(guarded=len(split) == 2)))
    if len(fuse_layers(model, Path())) != layers:
        raise SystemExit("a layer was not fused")
    return model


def _set_precision(model: ModelProto, precision: str) -> None:
    for node in model.graph.node:
        if node.domain == DOMAIN:
            node.attribute.append(helper.make_attribute("precision", precision))


def _by_rows(model: ModelProto) -> ModelProto | None:
    """The same with codes by rows; None if none are in strips."""
    copy = ModelProto()
    copy.CopyFrom(model)
    strips = [t for t in copy.graph.initializer if t.data_type == TensorProto.UINT8 and in_strips(t.dims)]
    for tensor in strips:
        rearrange(tensor, to_rows)
    return copy if strips else None


def _copies(layer_bytes: float, cold: bool) -> int:
    return ceil(_COLD / layer_bytes) if cold else 1


# Gemm


def gemm_ways(outputs: int, inputs: int, batch: int, *, cold: bool, width: int = 8, words: int = 256) -> dict[str, Way]:
    """A Gemm ``[outputs, inputs]`` from codes, in fp32, in dynamic int8 and in 4 bits."""
    form = random_form(outputs, inputs, width, words)
    weight = form.decode()
    x, y = (batch, inputs), (batch, outputs)
    layers = _copies(form.packed.nbytes, cold)
    ours = _ours(
        form,
        (outputs, inputs),
        (0, 1),
        layers,
        lambda i: helper.make_node("Gemm", [f"x{i}", f"w{i}", "b"], [f"y{i}"], transB=1),
        x,
        y,
    )
    ways = {"vqonnx": Way(ours.SerializeToString(), True, layers)}
    rows = _by_rows(ours)
    if rows is not None:
        ways["by rows"] = Way(rows.SerializeToString(), True, layers)

    def fp32(i: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
        constants = {f"w{i}": np.roll(weight, i, axis=0), "b": np.zeros(outputs, np.float32)}
        return [helper.make_node("Gemm", [f"x{i}", f"w{i}", "b"], [f"y{i}"], transB=1)], constants

    layers = _copies(weight.nbytes, cold)
    ways["fp32"] = Way(_model(layers, fp32, x, y).SerializeToString(), layers=layers)
    layers = _copies(weight.size, cold)
    ways["int8"] = Way(_model(layers, _dynamic_int8(weight), x, y).SerializeToString(), layers=layers)
    layers = _copies(weight.size / 2, cold)
    ways["int4"] = Way(_model(layers, _four_bits(weight), x, y, _MICROSOFT).SerializeToString(), layers=layers)
    return ways


def _dynamic_int8(weight: np.ndarray) -> Node:
    """The nodes that onnxruntime's ``quantize_dynamic`` writes."""
    scale = np.float32(np.abs(weight).max() / 127)
    quantised = np.rint(weight.T / scale).astype(np.int8)

    def make(i: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
        nodes = [
            helper.make_node("DynamicQuantizeLinear", [f"x{i}"], [f"q{i}", f"s{i}", f"z{i}"]),
            helper.make_node("MatMulInteger", [f"q{i}", f"w{i}", f"z{i}", "wz"], [f"i{i}"]),
            helper.make_node("Cast", [f"i{i}"], [f"f{i}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"s{i}", "ws"], [f"t{i}"]),
            helper.make_node("Mul", [f"f{i}", f"t{i}"], [f"m{i}"]),
            helper.make_node("Add", [f"m{i}", "b"], [f"y{i}"]),
        ]
        constants = {"ws": scale, "wz": np.array(0, np.int8), "b": np.zeros(len(weight), np.float32)}
        return nodes, {f"w{i}": np.roll(quantised, i, axis=1), **{k: np.asarray(v) for k, v in constants.items()}}

    return make


def _four_bits(weight: np.ndarray) -> Node:
    """MatMulNBits with blocks of 32 and its fastest arithmetic (accuracy level 4: int8 activations)."""
    outputs, inputs = weight.shape
    blocks = weight.reshape(outputs, -1, _BLOCK)
    scales = np.abs(blocks).max(axis=2) / 7 + 1e-12
    levels = (np.rint(blocks / scales[..., None]) + 8).clip(0, 15).astype(np.uint8)
    packed = levels[..., 0::2] | levels[..., 1::2] << 4

    def make(i: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
        node = helper.make_node(
            "MatMulNBits",
            [f"x{i}", f"w{i}", f"s{i}"],
            [f"y{i}"],
            domain=_MICROSOFT,
            K=inputs,
            N=outputs,
            bits=4,
            block_size=_BLOCK,
            accuracy_level=4,
        )
        rolled = np.roll(scales, i, axis=0).astype(np.float32).reshape(-1)
        return [node], {f"w{i}": np.roll(packed, i, axis=0), f"s{i}": rolled}

    return make


# Conv


def conv_ways(
    outputs: int, inputs: int, kernel: int, size: int, *, width: int, order: str = "hwi", precision: str | None = None
) -> dict[str, Way]:
    """A convolution of stride 1 that keeps its ``size x size`` positions, from codes, in fp32 and in static int8."""
    view = conv_view((outputs, inputs, kernel, kernel), order)
    form = random_form(outputs, inputs * kernel**2, width)
    weight = np.ascontiguousarray(view.tensor(form.decode()))
    x, y = (1, inputs, size, size), (1, outputs, size, size)
    pads = {"pads": [kernel // 2] * 4, "kernel_shape": [kernel] * 2}

    def node(i: int) -> NodeProto:
        return helper.make_node("Conv", [f"x{i}", f"w{i}", "b"], [f"y{i}"], **pads)

    ours = _ours(form, view.split, view.perm, 1, node, x, y)
    if precision is not None:
        _set_precision(ours, precision)
    fp32 = _model(1, lambda i: ([node(i)], {f"w{i}": weight, "b": np.zeros(outputs, np.float32)}), x, y)
    int8 = _model(1, _static_int8(weight, pads), x, y)
    return {
        "vqonnx": Way(ours.SerializeToString(), True),
        "fp32": Way(fp32.SerializeToString()),
        "static int8": Way(int8.SerializeToString()),
    }


def _static_int8(weight: np.ndarray, pads: dict[str, list[int]]) -> Node:
    """Quantised input, weight (a scale for each output) and output, which onnxruntime joins to a QLinearConv."""
    scales = (np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127).astype(np.float32)
    quantised = np.rint(weight / scales[:, None, None, None]).astype(np.int8)
    in_scale, out_scale = np.float32(8 / 255), np.float32(12 / 255)  # inputs are normal

    def make(i: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
        nodes = [
            helper.make_node("QuantizeLinear", [f"x{i}", "xs", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
            helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
            helper.make_node("Conv", ["xd", "wd", "bd"], ["c"], **pads),
            helper.make_node("QuantizeLinear", ["c", "ys", "z"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "ys", "z"], [f"y{i}"]),
        ]
        constants = {
            "w": quantised,
            "ws": scales,
            "wz": np.zeros(len(scales), np.int8),
            "b": np.zeros(len(scales), np.int32),
            "bs": scales * in_scale,
            "bz": np.zeros(len(scales), np.int32),
            "xs": np.asarray(in_scale),
            "ys": np.asarray(out_scale),
            "z": np.array(128, np.uint8),
        }
        return nodes, constants

    return make


# Networks


def network_ways(name: str, folder: Path) -> dict[str, Way]:
    """A network from codes with the library, in fp32, and from codes without the library; made once in ``folder``."""
    small, plain = folder / f"{name}.onnx", folder / f"{name}-fp32.onnx"
    if not (small.exists() and plain.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        _NETWORKS[name](small, folder)
        vqonnx.expand(small, plain)
    return {"vqonnx": Way(small, True), "fp32": Way(plain), "vqonnx without the library": Way(small)}


def _random_resnet50(small: Path, folder: Path) -> None:
    onnx.save(resnet_model(50, random_weights(50)), folder / "resnet50-source.onnx")
    _random_codes(folder / "resnet50-source.onnx", small, skipped="conv1.weight")  # three channels: hardly worth codes


def _mlp(*sizes: int) -> Callable[[Path, Path], None]:
    """Layers with a Relu between them."""

    def make(small: Path, folder: Path) -> None:
        source = folder / f"{small.stem}-source.onnx"
        nodes, arrays, value = [], {}, "x"
        rng = np.random.default_rng(0)
        for number, (before, after) in enumerate(pairwise(sizes)):
            arrays[f"w{number}"] = (rng.standard_normal((after, before)) / np.sqrt(before)).astype(np.float32)
            arrays[f"b{number}"] = np.zeros(after, np.float32)
            nodes.append(helper.make_node("Gemm", [value, f"w{number}", f"b{number}"], [f"g{number}"], transB=1))
            value = f"g{number}"
            if number < len(sizes) - 2:
                nodes.append(helper.make_node("Relu", [value], [f"r{number}"]))
                value = f"r{number}"
        graph = helper.make_graph(
            nodes,
            "mlp",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", sizes[0]])],
            [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", sizes[-1]])],
            [numpy_helper.from_array(values, name) for name, values in arrays.items()],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
        _random_codes(source, small)

    return make


def _random_codes(source: Path, small: Path, skipped: str = "") -> None:
    """Codes of width 8, channels innermost, of words as large as the weights were."""
    model = onnx.load(source)
    sites = [site for site in find(model, source.parent).sites if site.name != skipped]
    placements = []
    for number, site in enumerate(sites):
        view = site.view("hwi")
        form = random_form(view.rows, view.cols, 8, words=min(256, prod(site.shape) // 16), seed=number)
        placements.append(Placement(site, form, view))
    place(model, placements, "hybrid")
    fuse_layers(model, source.parent)
    layers = tuple(LayerRecord(s.name, s.op_type, s.shape, "random", {}, 0, None, None) for s in sites)
    write_record(model, source.stat().st_size, layers, ())
    onnx.save(model, small)


def _published(checkpoint: str, depth: int) -> Callable[[Path, Path], None]:
    def make(small: Path, folder: Path) -> None:
        source = folder / f"resnet{depth}-source.onnx"
        onnx.save(resnet_model(depth, random_weights(depth)), source)
        path = data_dir() / "published_vq" / f"{checkpoint}.pth"
        vqonnx.import_kill_the_bits(path, source, fuse=True).save(small, verify=False)

    return make


def _compressed(path: str, method: vqonnx.KMeans | vqonnx.PQ) -> Callable[[Path, Path], None]:
    def make(small: Path, _: Path) -> None:
        (source,) = data_dir().glob(path)
        vqonnx.compress(source, method, fuse=True).save(small, verify=False)

    return make


_NETWORKS: dict[str, Callable[[Path, Path], None]] = {
    "resnet50-hwi8": _random_resnet50,
    "resnet18-small-blocks": _published("resnet18_small_blocks", 18),
    "resnet18-large-blocks": _published("resnet18_large_blocks", 18),
    "resnet50-large-blocks": _published("resnet50_large_blocks", 50),
    "mobilenetv2": _compressed("models/mobilenetv2.onnx", vqonnx.KMeans(bits=6)),
    "squeezenet": _compressed("models/squeezenet.onnx", vqonnx.PQ(width=8, order="hwi")),
    "yolox-nano": _compressed("zoo/yolox_nano/*.onnx", vqonnx.KMeans(bits=6)),
    "mlp": _mlp(784, 4096, 4096, 10),
    "mlp-8x4096": _mlp(*[4096] * 9),
}
NETWORKS = tuple(_NETWORKS)
