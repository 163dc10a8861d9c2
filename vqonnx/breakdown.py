"""Where the bytes of a model are: values, and all that lies around them."""

from __future__ import annotations

from math import prod
from typing import Any

from onnx import ModelProto, TensorProto

from vqonnx.modelfile import graph_tensors

_FEW = 128  # integers up to this number are sizes, axes or positions, which belong to the nodes that read them


def breakdown(model: ModelProto) -> dict[str, int]:
    """Bytes of each kind of content of a model; they add up to its size. Data in other files are not counted.

    Returns:
        ``data``: values of constants, in subgraphs too; ``nodes``: all else of nodes; ``initializers``: names, shapes
        and types of constants, and those that are a few integers; ``functions``; ``metadata``; ``other``: inputs,
        outputs, opsets, texts.
    """
    graph = model.graph
    stored = sum(map(_value_bytes, graph.initializer))
    inside = sum(map(_value_bytes, graph_tensors(graph))) - stored
    parts = {
        "data": stored + inside,
        "nodes": sum(map(field_bytes, graph.node)) - inside,
        "initializers": sum(map(field_bytes, graph.initializer)) - stored,
        "functions": sum(map(field_bytes, model.functions)),
        "metadata": sum(map(field_bytes, model.metadata_props)),
    }
    return {**parts, "other": model.ByteSize() - sum(parts.values())}


def field_bytes(message: Any) -> int:
    """Bytes of a message as a field of another one: itself, its tag (of one byte), and its length."""
    size: int = message.ByteSize()
    return 1 + max(1, -(-size.bit_length() // 7)) + size


def _value_bytes(tensor: TensorProto) -> int:
    """Bytes of the values of a tensor, without what says where they are."""
    count = prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT32, TensorProto.INT64) and count <= _FEW:
        return 0
    if tensor.raw_data:
        return len(tensor.raw_data)
    values = TensorProto()
    for field, content in tensor.ListFields():
        if field.name.endswith("_data") and field.name != "raw_data":
            getattr(values, field.name).extend(content)
    size: int = values.ByteSize()
    return size
