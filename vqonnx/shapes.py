"""Shapes of the values of a graph, as onnx infers them from its inputs; what the file says of others is not trusted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

from vqonnx.ops import DOMAIN

_SMALL = 1024  # elements; constants up to this size may be shapes or axes, the others are weights
# Exporters' spellings of "unknown"; two of them need not be the same size.
UNKNOWN_SIZES = {"", "?", "None", "-1"}

Shape = tuple[int | str | None, ...]


def infer_shapes(
    model: ModelProto, known: Mapping[str, tuple[int, ...]], left_out: Collection[int]
) -> dict[str, Shape]:
    """Shapes by name: sizes, names of symbolic sizes, None where neither is known.

    Weights are not copied. Values behind operators that onnx does not know are left out, as are those in subgraphs.

    Args:
        model: The model.
        known: float32 shapes of values that the nodes in ``left_out`` make.
        left_out: Ids of those nodes.
    """
    skeleton = ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(function for function in model.functions if function.domain != DOMAIN)
    graph, whole = skeleton.graph, model.graph
    graph.name = whole.name or "graph"
    for name, shape in known.items():
        _add_input(graph, name, TensorProto.FLOAT, shape)
    stored = {tensor.name for tensor in whole.initializer}
    for tensor in whole.initializer:
        if prod(tensor.dims) <= _SMALL and tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.add().CopyFrom(tensor)
        else:
            _add_input(graph, tensor.name, tensor.data_type, tuple(tensor.dims))
    for value in whole.input:
        if value.name not in stored:
            graph.input.add().CopyFrom(value)
            _forget_unknown(graph.input[-1].type)
    for node in whole.node:
        constant = _constant(node)
        if constant is not None and prod(constant.dims) > _SMALL:
            _add_input(graph, node.output[0], constant.data_type, tuple(constant.dims))
        elif id(node) not in left_out:
            graph.node.add().CopyFrom(node)
    for value in whole.output:
        graph.output.add(name=value.name)
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    shapes = {tensor.name: tuple(map(int, tensor.dims)) for tensor in inferred.initializer}
    found: dict[str, Shape] = dict(shapes)
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        tensor_type = value.type.tensor_type
        if value.type.HasField("tensor_type") and tensor_type.HasField("shape"):
            found[value.name] = tuple(_size(dim) for dim in tensor_type.shape.dim)
    return found


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) or None


def _forget_unknown(kind: TypeProto) -> None:
    """Clear sizes that only say that they are unknown."""
    for dim in kind.tensor_type.shape.dim:
        if dim.dim_param in UNKNOWN_SIZES and dim.dim_value <= 0:
            dim.Clear()


def _constant(node: NodeProto) -> TensorProto | None:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return next((attribute.t for attribute in node.attribute if attribute.HasField("t")), None)


def _add_input(graph: GraphProto, name: str, elem_type: int, shape: tuple[int, ...]) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info(name, elem_type, shape))
