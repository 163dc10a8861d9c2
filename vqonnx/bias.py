"""The constant that is added to a layer's output: where it lies, and how compression corrects the mean it lost.

With weights What on inputs xh the layer's mean output is What mean(xh) instead of W mean(x); the difference goes to the
bias, which makes the error of each output zero-mean on the calibration data (Nagel et al. 2019, arXiv 1906.04721).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from vqonnx.graph import LINEAR, Site
from vqonnx.modelfile import make_tensor, to_array
from vqonnx.place import node_reads
from vqonnx.scope import attributes

_INPUT = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}


@dataclass(eq=False)
class Bias:
    """An initializer of the main graph that shifts the outputs of one layer and of nothing else.

    Attributes:
        name: Name of the initializer.
        values: Its values, float32, in its own shape.
        elem_type: Its ONNX element type.
        factor: What its values are multiplied by on their way to the output: beta of Gemm, -1 for the mean of a
            BatchNormalization.
    """

    name: str
    values: NDArray[np.float32]
    elem_type: int
    factor: float = 1.0

    def shift(self, outputs: NDArray[np.floating]) -> TensorProto:
        """Move the layer's outputs by ``outputs [rows]``; gives the new tensor."""
        moved = self.values.astype(np.float64) + (outputs / self.factor).reshape(self.values.shape)
        self.values = moved.astype(np.float32)
        return self.tensor()

    def tensor(self) -> TensorProto:
        """The values as they are stored."""
        return make_tensor(self.values, self.elem_type, self.name)


def prepare(model: ModelProto, sites: Iterable[Site], folder: Path) -> dict[str, Bias]:
    """Give each layer a bias of its own, by the name of its weight; layers without an entry cannot be corrected.

    A layer is corrected where one node of the main graph reads its weight. A bias that others read too is copied, one
    that is not there is added as zeros, so the model computes the same as before.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    inner = {name for node in model.graph.node for name in node_reads(node) - set(node.input)}
    outputs = {entry.name for entry in model.graph.output}
    listed = {entry.name for entry in model.graph.input}
    taken = set(tensors) | set(readers) | {name for node in model.graph.node for name in node.output} | listed
    found = {}
    for site in sites:
        if len(site.uses) != 1 or site.uses[0].scope.proto is not model.graph:  # a branch of an If may read a weight
            continue
        place = _place(site, readers, tensors, outputs | inner)
        if place is None:
            continue
        node, index, rows, factor = place
        old = node.input[index] if index < len(node.input) else ""
        if old and (old not in tensors or old in listed):
            continue
        values = to_array(tensors[old], folder).astype(np.float32) if old else np.zeros(rows, np.float32)
        if values.size != rows:
            values = np.broadcast_to(values, rows).copy() if values.size == 1 else values
        if values.size != rows or values.shape[-1:] != (rows,):
            continue
        elem_type = tensors[old].data_type if old else site.elem_type
        name = old
        if not old or len(readers[old]) > 1 or old in inner or values.shape != tuple(tensors[old].dims):
            name = next(n for i in range(len(taken) + 1) if (n := f"{site.name}_bias{i or ''}") not in taken)
            taken.add(name)
            model.graph.initializer.append(make_tensor(values, elem_type, name))
            while len(node.input) <= index:
                node.input.append("")
            node.input[index] = name
        found[site.name] = Bias(name, values, elem_type, factor)
    return found


def store(model: ModelProto, biases: Iterable[Bias]) -> None:
    """Write the present values into the model."""
    by_name = {bias.name: bias for bias in biases}
    for tensor in model.graph.initializer:
        if tensor.name in by_name:
            tensor.CopyFrom(by_name[tensor.name].tensor())


def halve_biases(model: ModelProto, folder: Path) -> None:
    """Round the float32 biases of layers of the main graph to float16; those beyond its range stay as they are."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    outputs = {name for node in model.graph.node if node.op_type in LINEAR for name in node.output}
    others = {entry.name for entry in (*model.graph.input, *model.graph.output)}
    found = set()
    for node in model.graph.node:
        biases = [name for index, name in enumerate(node.input) if index == _INPUT.get(node.op_type)]
        if node.op_type == "Add" and outputs.intersection(node.input):
            biases = [name for name in node.input if name in tensors]
        found.update(biases)
        others |= node_reads(node) - set(biases)
    for name in tensors.keys() & found - others:
        values = to_array(tensors[name], folder)
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float16).astype(np.float32)
        if np.isfinite(rounded).all():
            tensors[name].CopyFrom(make_tensor(rounded, TensorProto.FLOAT, name))


def _place(
    site: Site, readers: dict[str, list[NodeProto]], tensors: dict[str, TensorProto], kept: set[str]
) -> tuple[NodeProto, int, int, float] | None:
    """The node and input that shift the layer's output, the number of outputs, and the factor."""
    node = site.node
    if site.op_type == "Conv":
        rows = site.shape[0]
    elif site.op_type == "ConvTranspose":
        rows = site.shape[1] * site.group
    elif site.op_type == "Gemm":
        rows = site.shape[0] if attributes(node).get("transB", 0) else site.shape[1]
    else:
        rows = site.shape[-1] if len(site.shape) == 2 and node.input[1] == site.name else 0
    if not rows:
        return None
    output = node.output[0]
    after = readers.get(output, [])
    alone = len(after) == 1 and output not in kept
    has = site.op_type in _INPUT and len(node.input) > _INPUT[site.op_type] and node.input[_INPUT[site.op_type]]
    if alone and not has and after[0].op_type == "BatchNormalization" and after[0].input[0] == output:
        return (after[0], 3, rows, -1.0) if after[0].input[3] in tensors else None
    if site.op_type in _INPUT:
        factor = float(attributes(node).get("beta", 1.0)) if site.op_type == "Gemm" else 1.0
        return (node, _INPUT[site.op_type], rows, factor) if factor else None
    if alone and after[0].op_type == "Add":
        index = 1 if after[0].input[0] == output else 0
        return (after[0], index, rows, 1.0) if after[0].input[index] in tensors else None
    return None
