"""Where the bytes of a model are: data, and all that lies around them."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, TensorProto

_DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def breakdown(model: ModelProto) -> dict[str, int]:
    """Bytes of each kind of content of a model; they add up to its size.

    Returns:
        ``data``: values of initializers, of which there are more than a handful of bytes. ``nodes``. ``initializers``:
        their names, shapes, types. ``functions``. ``metadata``. ``other``: inputs, outputs, opsets, texts.
    """
    graph = model.graph
    data = sum(_data_bytes(tensor) for tensor in graph.initializer)
    parts = {
        "data": data,
        "nodes": sum(map(field_bytes, graph.node)),
        "initializers": sum(map(field_bytes, graph.initializer)) - data,
        "functions": sum(map(field_bytes, model.functions)),
        "metadata": sum(map(field_bytes, model.metadata_props)),
    }
    return {**parts, "other": model.ByteSize() - sum(parts.values())}


def field_bytes(message: Any) -> int:
    """Bytes of a message as a field of another one: itself, its tag (of one byte), and its length."""
    size: int = message.ByteSize()
    return 1 + _varint_bytes(size) + size


def _varint_bytes(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))


def _data_bytes(tensor: TensorProto) -> int:
    if tensor.data_type in (TensorProto.INT32, TensorProto.INT64):
        return 0  # sizes, shapes and positions: what decoding and the graph need, not values
    values = TensorProto()
    for name in _DATA:
        if name != "raw_data":
            getattr(values, name).extend(getattr(tensor, name))
    content = len(tensor.raw_data)
    return content + (values.ByteSize() if not content else 0)
