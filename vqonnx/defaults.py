"""Attributes that say what an operator would do without them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, defs, helper

from vqonnx.modelfile import remove_entries
from vqonnx.names import subgraphs

# Defaults that the schemas give in words only: one value for each axis of the kernel.
_FILLED = {"strides": 1, "dilations": 1, "pads": 0, "output_padding": 0}
_WINDOWED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")
_WEIGHTED = ("Conv", "ConvTranspose")  # the weight says how large the kernel is


def drop_defaults(model: ModelProto) -> None:
    """Remove attributes of standard operators that equal the default at the opset of the model."""
    _drop_in(model.graph, _versions(model.opset_import))
    for function in model.functions:
        _drop_in(function, _versions(function.opset_import))


def _versions(entries: Iterable[OperatorSetIdProto]) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in entries}


def _drop_in(proto: GraphProto | FunctionProto, versions: dict[str, int]) -> None:
    for node in proto.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain in versions and domain in ("", "ai.onnx.ml"):
            _drop(node, _defaults(node.op_type, versions[domain], domain))
        for graph in subgraphs(node):
            _drop_in(graph, versions)


def _drop(node: NodeProto, known: dict[str, AttributeProto]) -> None:
    dropped = {attribute.name for attribute in node.attribute if _is_default(node, attribute, known)}
    remove_entries(node.attribute, lambda attribute: attribute.name in dropped)


@functools.cache
def _defaults(op_type: str, opset: int, domain: str) -> dict[str, AttributeProto]:
    """The defaults that the schema has; none for an operator that onnx does not know."""
    try:
        schema = defs.get_schema(op_type, opset, domain)
    except defs.SchemaError:
        return {}
    values = {name: attribute.default_value for name, attribute in schema.attributes.items()}
    return {name: value for name, value in values.items() if value.type != AttributeProto.UNDEFINED}


def _is_default(node: NodeProto, attribute: AttributeProto, known: dict[str, AttributeProto]) -> bool:
    if attribute.ref_attr_name:
        return False
    if attribute.name in known:
        default = known[attribute.name]
        same_type = attribute.type == default.type
        return same_type and helper.get_attribute_value(attribute) == helper.get_attribute_value(default)
    if node.op_type not in _WINDOWED or node.domain not in ("", "ai.onnx"):
        return False
    if attribute.name == "kernel_shape":
        return node.op_type in _WEIGHTED
    if attribute.name not in _FILLED or any(a.name == "auto_pad" and a.s != b"NOTSET" for a in node.attribute):
        return False
    return all(value == _FILLED[attribute.name] for value in attribute.ints)
