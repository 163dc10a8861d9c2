"""A small network as kill-the-bits would publish it: the checkpoint, the graph, and the weights by the formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import onnx.parser
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Spec:
    """A layer: its shape, the width and words of its codebook (0 words: not compressed), and its normalisation."""

    shape: tuple[int, ...]
    width: int
    words: int
    norm: str = ""


NETWORK = {
    "conv1": Spec((8, 3, 3, 3), 0, 0, "bn1"),
    "layer1.0.conv1": Spec((8, 8, 3, 3), 9, 13, "layer1.0.bn1"),
    "layer1.0.conv2": Spec((16, 8, 3, 3), 18, 16, "layer1.0.bn2"),
    "layer1.0.downsample.0": Spec((16, 8, 1, 1), 4, 8, "layer1.0.downsample.1"),
    "fc": Spec((10, 16), 4, 30),
}


def coded_entry(spec: Spec, rng: np.random.Generator) -> dict[str, Any]:
    """A compressed layer with random centroids and assignments."""
    blocks = math.prod(spec.shape[1:]) // spec.width
    codes = rng.integers(0, spec.words, blocks * spec.shape[0])
    return {
        "centroids": torch.from_numpy(rng.standard_normal((spec.words, spec.width)).astype(np.float16)),
        "assignments": torch.from_numpy(codes.astype(np.uint8 if spec.words <= 256 else np.int16)),
        "n_blocks": blocks,
        "is_conv": len(spec.shape) > 2,
        "k": spec.shape[2] if len(spec.shape) > 2 else 1,
    }


def entries(network: dict[str, Spec] | None = None, seed: int = 0) -> Entries:
    """A checkpoint in the order of the published ones: compressed layers, the others, normalisations."""
    rng = np.random.default_rng(seed)
    network = network or NETWORK
    made: Entries = {name: coded_entry(spec, rng) for name, spec in network.items() if spec.words}
    for name, spec in network.items():
        if not spec.words:
            made[name] = {"weight": torch.from_numpy(rng.standard_normal(spec.shape).astype(np.float16))}
    for name, spec in network.items():
        values = rng.standard_normal((2, spec.shape[0])).astype(np.float16 if spec.norm else np.float32)
        scale, shift = (torch.from_numpy(row) for row in values)
        if spec.norm:
            made[spec.norm] = {"weight": torch.nn.Parameter(scale), "bias": shift}
        else:
            made[f"{name}_bias"] = {"bias": shift}
    return made


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def formula(made: Entries, name: str, spec: Spec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of a layer, block by block: block j of output c is the centroid number ``a[j * Cout + c]``."""
    entry, after = made[name], made[spec.norm or f"{name}_bias"]
    if spec.words:
        words, flat = entry["centroids"].float().numpy(), entry["assignments"].tolist()
        matrix = np.empty((spec.shape[0], math.prod(spec.shape[1:])), np.float32)
        for j in range(entry["n_blocks"]):
            for c in range(spec.shape[0]):
                matrix[c, j * spec.width : (j + 1) * spec.width] = words[flat[j * spec.shape[0] + c]]
    else:
        matrix = entry["weight"].float().numpy().reshape(spec.shape[0], -1)
    if spec.norm:
        matrix = matrix * after["weight"].detach().float().numpy()[:, None]
    return matrix.reshape(spec.shape), after["bias"].float().numpy()


def weights(made: Entries, network: dict[str, Spec] | None = None) -> dict[str, NDArray[np.float32]]:
    """All weights and biases under the names of torch."""
    found = {}
    for name, spec in (network or NETWORK).items():
        found[f"{name}.weight"], found[f"{name}.bias"] = formula(made, name, spec)
    return found


def graph(values: dict[str, NDArray[np.float32]] | None = None) -> ModelProto:
    """The network of `NETWORK` in ONNX; random weights unless some are given."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        small (float[N, 3, 12, 12] input) => (float[N, 10] logits) {
          [stem] a = Conv <pads = [1, 1, 1, 1]> (input, conv1__weight, conv1__bias)
          b = Relu (a)
          [one] c = Conv <pads = [1, 1, 1, 1]> (b, layer1__0__conv1__weight, layer1__0__conv1__bias)
          d = Relu (c)
          [two] e = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (d, layer1__0__conv2__weight, layer1__0__conv2__bias)
          [side] f = Conv <strides = [2, 2]> (b, layer1__0__downsample__0__weight, layer1__0__downsample__0__bias)
          g = Add (e, f)
          h = Relu (g)
          i = GlobalAveragePool (h)
          j = Flatten (i)
          [head] logits = Gemm <transB = 1> (j, fc__weight, fc__bias)
        }"""
    )
    for node in model.graph.node:  # the parser takes no dots
        for index, name in enumerate(node.input):
            node.input[index] = name.replace("__", ".")
    for seed, (name, spec) in enumerate(NETWORK.items()):
        for kind, shape in (("weight", spec.shape), ("bias", spec.shape[:1])):
            given = None if values is None else values[f"{name}.{kind}"]
            array = nets.draw(shape, seed) if given is None else given
            model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), f"{name}.{kind}"))
    onnx.checker.check_model(model)
    return model


def feed(rows: int = 5) -> dict[str, NDArray[np.float32]]:
    return {"input": np.random.default_rng(3).standard_normal((rows, 3, 12, 12)).astype(np.float32)}
