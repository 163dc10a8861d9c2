"""Which constants of a model training may move, and how they are put back into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from vqonnx import modelfile
from vqonnx.form import Dense
from vqonnx.graph import LINEAR, find
from vqonnx.place import Placement, place

_BIAS_INPUT = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}


def bias_names(model: ModelProto) -> tuple[str, ...]:
    """Initializers that are added to the output of a linear layer, each once."""
    floats = _float_initializers(model)
    return tuple(dict.fromkeys(name for name in _biases(model) if name in floats))


def batch_norm_names(model: ModelProto) -> tuple[str, ...]:
    """Initializers that are scale or bias of a BatchNormalization, each once."""
    floats = _float_initializers(model)
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    return tuple(dict.fromkeys(name for node in nodes for name in node.input[1:3] if name in floats))


def statistic_names(model: ModelProto) -> tuple[str, ...]:
    """Initializers that are mean or variance of a BatchNormalization, each once."""
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    return tuple(dict.fromkeys(name for node in nodes for name in node.input[3:5]))


def with_values(model: ModelProto, folder: Path, values: Mapping[str, NDArray[np.float32]]) -> ModelProto:
    """A copy of the model in which constants have other values.

    Args:
        model: The model.
        folder: Where it lies, for external data.
        values: New values by the name under which layers read them, in the shape of the old ones.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    left = dict(values)
    for tensor in copy.graph.initializer:
        if tensor.name in left:
            new = left.pop(tensor.name)
            tensor.CopyFrom(modelfile.make_tensor(new, tensor.data_type, tensor.name))
    sites = [site for site in find(copy, folder).sites if site.name in left and not site.scope.path]
    placements = []
    for site in sites:  # the weight comes from a Constant node, or through nodes such as Transpose
        view = site.view("ihw")
        placements.append(Placement(site, Dense(view.matrix(left.pop(site.name))), view))
    if placements:
        place(copy, placements, "portable")
    if left:
        raise ValueError(f"no constant is named {sorted(left)[0]}")
    return copy


def _float_initializers(model: ModelProto) -> set[str]:
    return {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}


def _biases(model: ModelProto) -> Iterator[str]:
    makers: dict[str, NodeProto] = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in _BIAS_INPUT and len(node.input) > _BIAS_INPUT[node.op_type]:
            yield node.input[_BIAS_INPUT[node.op_type]]
        elif node.op_type == "Add":
            for own, other in (node.input, reversed(node.input)):
                if own not in makers and other in makers and makers[other].op_type in LINEAR:
                    yield own
