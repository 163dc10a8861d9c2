"""Where the bytes of a model are: values, and all that lies around them."""

from __future__ import annotations

from math import prod
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto

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
    return 1 + _varint_bytes(size) + size


def short_bytes(message: NodeProto | TensorProto) -> int:
    """Bytes of a node or tensor as a field, if every name had two letters: what it takes when names are given."""
    size: int = message.ByteSize()
    names = [message.name] if isinstance(message, TensorProto) else [*message.input, *message.output]
    size += sum(4 - _text_bytes(name) for name in names if name)
    if isinstance(message, NodeProto) and message.name:
        size -= _text_bytes(message.name)
    return 1 + _varint_bytes(size) + size


def _text_bytes(text: str) -> int:
    length = len(text.encode())
    return 1 + _varint_bytes(length) + length


def _varint_bytes(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))


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
