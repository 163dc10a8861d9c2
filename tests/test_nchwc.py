"""Without the library, onnxruntime makes the same graph of a compressed model as of the original.

It rewrites convolutions into a layout that fits the processor (NCHWc), which is where their speed comes from, and does
so only where it sees the weight as a constant.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from pathlib import Path

import onnx
import pytest
from nets import CONV
from onnx import helper

import vqonnx
from vqonnx.methods import PQ
from vqonnx.runtime import open_session


def optimised(model: Path, written: Path) -> onnx.GraphProto:
    """The graph that onnxruntime runs."""
    open_session(model, optimised_path=written)
    return onnx.load(written).graph


def blocked_convs(graph: onnx.GraphProto) -> list[tuple[str, list[str]]]:
    """Names and outputs; onnxruntime numbers the values that it adds in the order in which it comes upon them."""
    convs = [node for node in graph.node if (node.op_type, node.domain) == ("Conv", "com.microsoft.nchwc")]
    return sorted(
        (node.name, [re.sub(r"reorder_token_\d+", "reordered", name) for name in node.output]) for node in convs
    )


def activations(graph: onnx.GraphProto) -> Counter[tuple[str, int, bytes]]:
    """How often each convolution is there, with what is computed with it: a sum is one more input."""
    attribute_of = helper.get_node_attr_value
    convs = [node for node in graph.node if node.op_type in ("Conv", "FusedConv")]
    has = {id(node): any(attribute.name == "activation" for attribute in node.attribute) for node in convs}
    return Counter(
        (node.domain, len(node.input), attribute_of(node, "activation") if has[id(node)] else b"") for node in convs
    )


def check(source: Path, folder: Path, convs: int, fuse: bool) -> None:
    """``convs`` is how many convolutions the model has, depthwise ones included."""
    path = folder / "compressed.onnx"
    result = vqonnx.compress(source, PQ(width=9, bits=2), fuse=fuse)
    result.save(path, verify=False)
    assert {"Conv"} <= {layer.op_type for layer in result.layers}
    assert all(bool(layer.fused) == fuse for layer in result.layers)
    before, after = optimised(source, folder / "before.onnx"), optimised(path, folder / "after.onnx")
    counts = [Counter((node.domain, node.op_type) for node in graph.node) for graph in (before, after)]
    assert counts[0] == counts[1], f"{source.name}: {counts[1] - counts[0]} more, {counts[0] - counts[1]} fewer"
    assert activations(before) == activations(after), source.name
    if not fuse:  # onnxruntime names what it puts in the place of a fused op itself
        assert blocked_convs(before) == blocked_convs(after), source.name
    if platform.machine() in ("x86_64", "AMD64"):
        assert len(blocked_convs(before)) == convs, f"{source.name}: the original is not what this test is about"


@pytest.mark.parametrize("fuse", [False, True])
def test_digits(fuse: bool, tmp_path: Path) -> None:
    check(CONV, tmp_path, 9, fuse)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("name", "convs"), [("resnet20", 19), ("resnet56", 55), ("mobilenetv2", 53), ("squeezenet", 26)]
)
def test_real_networks(name: str, convs: int, fuse: bool, data_dir: Path, tmp_path: Path) -> None:
    check(data_dir / "models" / f"{name}.onnx", tmp_path, convs, fuse)
