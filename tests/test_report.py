"""Report: what is promised to other tools, for every kind of model, with and without the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import vqonnx
from vqonnx.errors import ModelError
from vqonnx.methods import PQ, KMeans
from vqonnx.place import Target
from vqonnx.record import erase_record

TARGETS: tuple[Target, ...] = ("hybrid", "portable", "custom")
LAYER_KEYS = [
    "name",
    "op_type",
    "shape",
    "method",
    "options",
    "bits_per_weight",
    "bytes",
    "weight_snr_db",
    "output_snr_db",
    "multiplications",
    "fused",
]


def compress(name: str, target: Target, folder: Path, **options: Any) -> Path:
    source = nets.write(nets.SMALL[name](), folder / f"{name}.onnx")
    path = folder / f"{name}-{target}.onnx"
    vqonnx.compress(source, KMeans(bits=3), target=target, **options).save(path)
    return path


def strip(path: Path) -> Path:
    """The same file without the record."""
    model = onnx.load(path)
    erase_record(model)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_the_promised_keys(target: Target, tmp_path: Path) -> None:
    path = compress("mixed", target, tmp_path, calibration=nets.feeds_of("mixed"))
    content = vqonnx.report(path).to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert list(content) == ["bytes", "ratio", "layers", "skipped", "parts"]
    assert sum(content["parts"].values()) == content["bytes"]["after"]
    before, after = (tmp_path / "mixed.onnx").stat().st_size, path.stat().st_size
    assert content["bytes"] == {"before": before, "after": after}
    assert content["ratio"] == round(before / after, 4)
    shapes = {"conv_w": [16, 4, 3, 3], "up_w": [16, 12, 2, 2], "fc_w": [40, 12], "head_w": [40, 20]}
    operators = dict(zip(shapes, ("Conv", "ConvTranspose", "Gemm", "MatMul"), strict=True))
    assert [layer["name"] for layer in content["layers"]] == [*shapes, "tiny_w"]
    for layer in content["layers"]:
        name = layer["name"]
        assert list(layer) == LAYER_KEYS
        assert layer["shape"] == shapes.get(name, [20, 5])
        assert layer["op_type"] == operators.get(name, "MatMul")
        assert layer["method"] == "kmeans"
        assert layer["options"] == {"order": "ihw", "bits": 3, "codebook": "float16"}
        assert layer["multiplications"] == 1
        assert layer["bits_per_weight"] == round(8 * layer["bytes"] / np.prod(layer["shape"]), 4)
        assert 3 <= layer["bits_per_weight"] < 5, name
        # Eight values for a normal distribution: 14.6 dB with an unlimited number of weights, more with few.
        assert 13 < layer["weight_snr_db"] < 18, name
        assert 8 < layer["output_snr_db"] < 30, name
    assert content["skipped"] == [{"name": "depth_w", "reason": "depthwise convolution (16 groups of one channel)"}]


def test_bytes_are_those_of_the_stored_arrays(tmp_path: Path) -> None:
    path = compress("mixed", "hybrid", tmp_path, fuse=False)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    nodes = {node.output[0]: node for node in onnx.load(path).graph.node if node.domain == "vqonnx"}
    report = vqonnx.report(path)
    assert {layer.name for layer in report.layers} == set(nodes)
    for layer in report.layers:
        codes, codebook, scales, _ = nodes[layer.name].input
        assert stored[scales].shape == (1, 1)  # the factor 1.0, which is no information
        assert layer.bytes == stored[codes].nbytes + stored[codebook].nbytes, layer.name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", nets.SMALL)
def test_without_the_record(name: str, target: Target, tmp_path: Path) -> None:
    path = compress(name, target, tmp_path)
    known = vqonnx.report(path)
    strip(path)
    if target == "portable":  # nothing but standard operators is left
        with pytest.raises(ModelError, match="holds no weight that vqonnx compressed"):
            vqonnx.report(path)
        return
    found = vqonnx.report(path)
    assert (found.bytes_before, found.ratio, found.skipped) == (None, None, ())
    assert found.to_json()["bytes"] == {"before": None, "after": path.stat().st_size}
    assert len(found.layers) == len(known.layers)
    for layer in found.layers:
        assert (layer.method, layer.options, layer.weight_snr_db) == ("unknown", {}, None), layer
    # A weight that is cast or reshaped after decoding is then known by the name of the decoded tensor.
    sizes = [sorted((layer.shape, layer.bytes) for layer in report.layers) for report in (found, known)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_one_name_in_two_branches(target: Target, tmp_path: Path) -> None:
    source, path = nets.write(nets.branches(), tmp_path / "m.onnx"), tmp_path / "out.onnx"
    result = vqonnx.compress(source, PQ(width=4, bits=4), target=target)
    result.save(path)
    report = vqonnx.report(path)
    assert report.layers == result.layers
    assert [layer.name for layer in report.layers] == ["shared", "own", "own"]
    assert report.layers[1] != report.layers[2]


@pytest.mark.parametrize("name", ["weight", "codes", "table", "scaled", "sizes"])
def test_a_weight_called_like_a_value_in_the_body_of_decode(name: str, tmp_path: Path) -> None:
    model = nets.dense(1, 64)
    model.graph.node[0].input[1] = model.graph.initializer[0].name = name
    result = vqonnx.compress(nets.write(model, tmp_path / "m.onnx"), KMeans(bits=2))
    result.save(tmp_path / "out.onnx")
    assert vqonnx.report(tmp_path / "out.onnx").layers == result.layers
    assert vqonnx.expand(tmp_path / "out.onnx", tmp_path / "plain.onnx") == 1


def test_a_shared_weight_is_one_layer(tmp_path: Path) -> None:
    path = compress("branches", "hybrid", tmp_path)
    assert [layer.name for layer in vqonnx.report(path).layers].count("shared") == 1


def test_a_model_that_is_not_compressed(tmp_path: Path) -> None:
    path = nets.write(nets.mixed(), tmp_path / "plain.onnx")
    with pytest.raises(ModelError, match=r"plain\.onnx: holds no weight .*; give a file that 'vqonnx compress' wrote"):
        vqonnx.report(path)
