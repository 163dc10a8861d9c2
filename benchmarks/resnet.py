"""The graphs of torchvision's ResNet-18 and ResNet-50 as an export with folded batch normalisation has them.

    python benchmarks/resnet.py 50 resnet50.onnx

Conv with bias, Relu, Add, one Gemm; weights bear their names in torch (``layer1.0.conv1.weight``). The command fills
them with seeded random numbers: the file is the structure into which published weights are imported. As in torchvision
and in the code of Stock et al. 2020, a bottleneck takes its stride in the 3x3 convolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from math import prod

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}  # blocks of each of the four stages
_STAGE_CHANNELS = (64, 128, 256, 512)
_CLASSES = 1000
_OPSET = 17


class _Graph:
    """Nodes so far, and the shape of each weight that they read."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def node(self, op_type: str, name: str, inputs: list[str], **attributes: object) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def conv(self, name: str, source: str, channels: tuple[int, int], kernel: int, stride: int = 1) -> str:
        """A convolution ``channels[0] -> channels[1]`` that keeps the size but for its stride."""
        self.shapes[f"{name}.weight"] = (channels[1], channels[0], kernel, kernel)
        self.shapes[f"{name}.bias"] = (channels[1],)
        pads, sizes = [kernel // 2] * 4, [kernel] * 2
        inputs = [source, f"{name}.weight", f"{name}.bias"]
        return self.node("Conv", name, inputs, kernel_shape=sizes, strides=[stride] * 2, pads=pads)

    def block(self, name: str, source: str, before: int, inner: int, after: int, stride: int) -> str:
        """A residual block: two 3x3 convolutions, or a bottleneck where ``after`` is wider than ``inner``."""
        sizes = (3, 3) if after == inner else (1, 3, 1)
        value, channels = source, before
        for number, kernel in enumerate(sizes, start=1):
            if number > 1:
                value = self.node("Relu", f"{name}.relu{number - 1}", [value])
            wanted = after if number == len(sizes) else inner
            # The first 3x3 convolution strides.
            step = stride if number == sizes.index(3) + 1 else 1
            value = self.conv(f"{name}.conv{number}", value, (channels, wanted), kernel, step)
            channels = wanted
        if stride > 1 or before != after:
            source = self.conv(f"{name}.downsample.0", source, (before, after), 1, stride)
        return self.node("Relu", f"{name}.relu", [self.node("Add", f"{name}.add", [value, source])])


def _resnet(depth: int) -> _Graph:
    graph = _Graph()
    value = graph.node("Relu", "relu", [graph.conv("conv1", "input", (3, 64), 7, 2)])
    value = graph.node("MaxPool", "maxpool", [value], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels, widen = 64, 4 if depth == 50 else 1
    for stage, (blocks, inner) in enumerate(zip(DEPTHS[depth], _STAGE_CHANNELS, strict=True), start=1):
        for number in range(blocks):
            stride = 2 if stage > 1 and number == 0 else 1
            value = graph.block(f"layer{stage}.{number}", value, channels, inner, inner * widen, stride)
            channels = inner * widen
    value = graph.node("Flatten", "flatten", [graph.node("GlobalAveragePool", "avgpool", [value])])
    graph.shapes |= {"fc.weight": (_CLASSES, channels), "fc.bias": (_CLASSES,)}
    graph.node("Gemm", "logits", [value, "fc.weight", "fc.bias"], transB=1)
    return graph


def weight_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Shape of every weight and bias by name, in the order of the graph."""
    return _resnet(depth).shapes


def random_weights(depth: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that keep activations in range; biases are small random numbers."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape, np.float32) / np.sqrt(prod(shape[1:]) or 1) / (1 + (len(shape) == 1) * 9))
        for name, shape in weight_shapes(depth).items()
    }


def resnet_model(depth: int, weights: Mapping[str, np.ndarray]) -> ModelProto:
    """The model: ``input [N, 3, 224, 224]`` to ``logits [N, 1000]``."""
    graph = _resnet(depth)
    for name, shape in graph.shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} is {list(weights[name].shape)}; ResNet-{depth} has {list(shape)}")
    proto = helper.make_graph(
        graph.nodes,
        f"resnet{depth}",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", _CLASSES])],
        [numpy_helper.from_array(weights[name].astype(np.float32), name) for name in graph.shapes],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("depth", type=int, choices=DEPTHS)
    parser.add_argument("output", metavar="OUT.onnx")
    options = parser.parse_args()
    model = resnet_model(options.depth, random_weights(options.depth))
    onnx.checker.check_model(model)
    onnx.save(model, options.output)


if __name__ == "__main__":
    main()
