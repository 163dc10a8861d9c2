"""Take out of a model what nobody needs to run it: texts, names of nodes, values that are copied or never read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vqonnx.modelfile import remove_entries
from vqonnx.names import STANDARD, Space, entry_names, spaces, subgraphs, substitute

_GRAPH_NAME = "g"  # it must have one
_NOTE = "vqonnx"  # metadata of nodes that are ours
_RAW_ITEM: dict[int, tuple[str, str]] = {
    TensorProto.INT64: ("int64_data", "<i8"),
    TensorProto.INT32: ("int32_data", "<i4"),
}
_CONSTANT_VALUES = 12  # opset from which on Constant takes numbers as attributes
_DROPOUT_MODE = 12  # opset from which on Dropout says in an input whether it is training


def strip(model: ModelProto) -> None:
    """Remove texts, names of nodes, intermediate types, and metadata of everything but the model and our own nodes."""
    for name in ("doc_string", "producer_name", "producer_version"):
        model.ClearField(name)
    _strip(model.graph)
    for function in model.functions:
        _strip(function)


def _strip(proto: GraphProto | FunctionProto) -> None:
    _clear(proto, "doc_string", "metadata_props", "value_info")
    if isinstance(proto, GraphProto):
        proto.name = _GRAPH_NAME
        sparse = [tensor for pair in proto.sparse_initializer for tensor in (pair.values, pair.indices)]
        for entry in (*proto.input, *proto.output, *proto.initializer, *sparse):
            _clear(entry, "doc_string", "metadata_props")
    for node in proto.node:
        _clear(node, "name", "doc_string", *(["domain"] if not node.domain else []))  # said, but empty
        remove_entries(node.metadata_props, lambda entry: entry.key != _NOTE)
        for names in (node.input, node.output):
            while names and not names[-1]:  # what is left out at the end need not be said
                names.pop()
        for attribute in node.attribute:
            _clear(attribute, "doc_string")
            if attribute.HasField("t"):
                _clear(attribute.t, "doc_string", "metadata_props", "name")
        for graph in subgraphs(node):
            _strip(graph)


def _clear(message: Any, *fields: str) -> None:
    for name in fields:
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)


def store_constants(model: ModelProto) -> None:
    """Turn Constant nodes of graphs into initializers, which take fewer bytes."""
    for main in spaces(model):
        for space in main.all:
            if isinstance(space.proto, GraphProto):
                _store_constants(space.proto)


def _store_constants(graph: GraphProto) -> None:
    outputs = {entry.name for entry in graph.output}
    found = [tensor for node in graph.node if (tensor := constant_tensor(node)) is not None]
    moved = {tensor.name: tensor for tensor in found if tensor.name not in outputs}
    remove_entries(graph.node, lambda node: node.op_type == "Constant" and node.output[0] in moved)
    graph.initializer.extend(moved.values())


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """What a Constant node yields, under the name of its output; None for other nodes and sparse values."""
    if node.op_type != "Constant" or node.domain not in STANDARD or len(node.attribute) != 1:
        return None
    (attribute,) = node.attribute
    if attribute.ref_attr_name:
        return None
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = node.output[0]
        return tensor
    types: dict[str, int] = {"value_int": TensorProto.INT64, "value_float": TensorProto.FLOAT}
    for name, elem_type in types.items():
        if attribute.name in (name, name + "s"):
            value = helper.get_attribute_value(attribute)
            values = [value] if attribute.name == name else list(value)
            return helper.make_tensor(
                node.output[0], elem_type, [] if attribute.name == name else [len(values)], values
            )
    return None


def drop_copies(model: ModelProto) -> None:
    """Remove Identity nodes, and Dropout nodes, which do nothing outside of training."""
    for main in spaces(model):
        imports = main.proto.opset_import if isinstance(main.proto, FunctionProto) else model.opset_import
        opset = next((entry.version for entry in imports if entry.domain in STANDARD), 0)
        for space in main.all:
            _drop_copies(space, opset)


def _drop_copies(space: Space, opset: int) -> None:
    proto = space.proto
    read = space.leaving | {name for node in proto.node for name in node.input}
    outputs = set(entry_names(proto.output))
    nodes = list(proto.node)  # held, as ids mean nothing once a node is let go
    makers = {name: node for node in nodes for name in node.output}
    instead: dict[str, str] = {}  # what is read in the place of a value
    dropped: set[int] = set()
    for node in nodes:
        if not _is_copy(node, opset) or read.intersection(node.output[1:]):
            continue
        source, target = instead.get(node.input[0], node.input[0]), node.output[0]
        if target not in outputs:
            instead[target] = source
        elif source in makers and source not in outputs:  # what makes it yields the output itself
            names = makers[source].output
            names[list(names).index(source)] = target
            makers[target] = makers[source]
            instead = {name: target if now == source else now for name, now in instead.items()}
            instead[source] = target
        else:
            continue
        dropped.add(id(node))
    if dropped:
        substitute(space, instead)
        remove_entries(proto.node, lambda node: id(node) in dropped)


def _is_copy(node: NodeProto, opset: int) -> bool:
    if node.domain not in STANDARD or not node.input or not node.input[0]:
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type != "Dropout":
        return False
    return opset < _DROPOUT_MODE or len(node.input) < 3 or not node.input[2]


def drop_unread(model: ModelProto) -> None:
    """Remove nodes and constants whose values nobody reads."""
    for main in spaces(model):
        for space in reversed(main.all):  # inner ones first, as what they read is in use
            _drop_unread(space)


def _drop_unread(space: Space) -> None:
    proto = space.proto
    read = space.leaving
    nodes = list(proto.node)  # held, as ids mean nothing once a node is let go
    unread = set()
    for node in reversed(nodes):
        if any(name in read for name in node.output):
            read.update(node.input)
        else:
            unread.add(id(node))
    remove_entries(proto.node, lambda node: id(node) in unread)
    if isinstance(proto, GraphProto):
        read |= {entry.name for entry in proto.input}
        remove_entries(proto.initializer, lambda tensor: tensor.name not in read)


def merge_constants(model: ModelProto) -> None:
    """Store equal constants of one graph or function once."""
    for main in spaces(model):
        for space in main.all:
            _merge(space)


def _merge(space: Space) -> None:
    proto = space.proto
    known: dict[bytes, str] = {}
    instead: dict[str, str] = {}
    fixed = {*entry_names(proto.input), *entry_names(proto.output)}
    for tensor in constants(proto):
        name = tensor.name
        if name in fixed or tensor.data_location == TensorProto.EXTERNAL:
            continue
        nameless = TensorProto()
        nameless.CopyFrom(tensor)
        nameless.ClearField("name")
        first = known.setdefault(nameless.SerializeToString(deterministic=True), name)
        if first != name:
            instead[name] = first
    if instead:
        substitute(space, instead)
        remove_entries(proto.node, lambda node: constant_tensor(node) is not None and node.output[0] in instead)
        if isinstance(proto, GraphProto):
            remove_entries(proto.initializer, lambda tensor: tensor.name in instead)


def constants(proto: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """Initializers, and what Constant nodes yield, under the names that readers know."""
    if isinstance(proto, GraphProto):
        yield from proto.initializer
    for node in proto.node:
        tensor = constant_tensor(node)
        if tensor is not None:
            yield tensor


def pack_tensors(model: ModelProto) -> None:
    """Write small integers in one byte each where that is shorter, and Constant nodes in the shortest way."""
    for main in spaces(model):
        for space in main.all:
            if isinstance(space.proto, GraphProto):
                for tensor in space.proto.initializer:
                    pack(tensor)
            for node in space.proto.node:
                _pack_node(node, main)


def _pack_node(node: NodeProto, main: Space) -> None:
    tensor = constant_tensor(node)
    if tensor is None:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                pack(attribute.t)
        return
    imports = main.proto.opset_import if isinstance(main.proto, FunctionProto) else []
    short = any(entry.domain in STANDARD and entry.version >= _CONSTANT_VALUES for entry in imports)
    node.CopyFrom(constant_node(pack(tensor), short=short))


def constant_node(tensor: TensorProto, *, short: bool = False) -> NodeProto:
    """A Constant node in few bytes; ``short`` allows numbers as attributes, which opset 12 and later have."""
    nameless = TensorProto()
    nameless.CopyFrom(tensor)
    nameless.ClearField("name")
    ways = [helper.make_attribute("value", nameless)]
    kinds: dict[int, str] = {TensorProto.INT64: "value_int", TensorProto.FLOAT: "value_float"}
    if short and tensor.data_type in kinds and len(tensor.dims) <= 1 and 0 not in tensor.dims:
        values = numpy_helper.to_array(tensor).tolist()
        ways.append(helper.make_attribute(kinds[tensor.data_type] + ("s" if tensor.dims else ""), values))
    best = min(ways, key=lambda way: way.ByteSize())
    return NodeProto(op_type="Constant", output=[tensor.name], attribute=[best])


def pack(tensor: TensorProto) -> TensorProto:
    """Store integers one by one or as raw data, whichever is shorter; gives the tensor itself."""
    if tensor.data_type not in _RAW_ITEM or tensor.data_location == TensorProto.EXTERNAL:
        return tensor
    field, dtype = _RAW_ITEM[tensor.data_type]
    values = numpy_helper.to_array(tensor).ravel()
    single, raw = TensorProto(), TensorProto()
    getattr(single, field).extend(values.tolist())
    raw.raw_data = values.astype(dtype).tobytes()
    best = min(raw, single, key=lambda way: way.ByteSize())
    for name in ("raw_data", field):
        tensor.ClearField(name)
    tensor.MergeFrom(best)
    return tensor
