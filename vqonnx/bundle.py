"""Small constants of a graph as parts of one: biases, codebooks of one size, codes of one shape.

A constant costs a dozen bytes or more besides its values, a part four or five. A standard ``Split`` takes them apart;
runtimes do so once, when they load the model. Float32 values that float16 holds exactly are stored so, with a ``Cast``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vqonnx.breakdown import short_bytes
from vqonnx.modelfile import remove_entries, set_nodes
from vqonnx.names import STANDARD, entry_names, short_names, spaces
from vqonnx.ops import DOMAIN
from vqonnx.scope import attributes
from vqonnx.tidy import pack

_LIMIT = 65536  # bytes of a constant that is bundled
_SPLIT_INPUT = 13  # opset from which on Split takes its sizes as an input
_SPLIT_COUNT = 18  # opset from which on Split has to be told into how many equal parts it divides
_ALWAYS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT8)
_Kind = tuple[int, tuple[int, ...], bool]  # element type, shape behind the first axis, whether float16 holds it exactly


def bundle(model: ModelProto) -> None:
    """Store constants of the main graph that differ in their first axis alone together, where that saves bytes."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in STANDARD), 0)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    groups: dict[_Kind, dict[str, NDArray[Any]]] = {}
    for name in _candidates(model):
        tensor = tensors[name]
        array = numpy_helper.to_array(tensor)
        kind = tensor.data_type, tuple(tensor.dims[1:]), tensor.data_type == TensorProto.FLOAT and _is_half(array)
        groups.setdefault(kind, {})[name] = array
    names = short_names({name for space in spaces(model)[0].all for name in space.uses})
    gone: set[str] = set()
    for (_, _, half), arrays in groups.items():
        if len(arrays) < 2:
            continue
        made = _Bundle.of(arrays, half, opset, [next(names) for _ in range(3)])
        if made.bytes < sum(short_bytes(tensors[name]) for name in arrays):
            gone |= arrays.keys()
            graph.initializer.extend(made.tensors)
            set_nodes(graph, [*made.nodes, *graph.node])
    remove_entries(graph.initializer, lambda tensor: tensor.name in gone)


def _candidates(model: ModelProto) -> list[str]:
    """Constants that may be bundled, in the order in which nodes of the main graph read them.

    Sizes of standard operators stay constants of their own: onnxruntime looks at them before it computes anything.
    """
    graph = model.graph
    taboo = {*entry_names(graph.input), *entry_names(graph.output)}
    integers = {name for node in graph.node if node.domain == DOMAIN for name in node.input}
    integers -= {name for node in graph.node if node.domain != DOMAIN for name in node.input}
    integers -= spaces(model)[0].leaving
    fitting = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_location != TensorProto.EXTERNAL
        and len(tensor.dims) > 0
        and 0 not in tensor.dims
        and tensor.ByteSize() <= _LIMIT
        and (tensor.data_type in _ALWAYS or (tensor.data_type == TensorProto.INT64 and tensor.name in integers))
    }
    return list(dict.fromkeys(name for node in graph.node for name in node.input if name in fitting - taboo))


@dataclass(frozen=True)
class _Bundle:
    tensors: list[TensorProto]
    nodes: list[NodeProto]

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]], half: bool, opset: int, names: list[str]) -> _Bundle:
        values = np.concatenate(list(arrays.values()))
        sizes = [len(array) for array in arrays.values()]
        tensors = [pack(numpy_helper.from_array(values.astype(np.float16) if half else values, names[0]))]
        nodes = []
        whole = names[0]
        if half:
            whole = names[1]
            nodes.append(helper.make_node("Cast", [names[0]], [whole], to=TensorProto.FLOAT))
        if len(set(sizes)) == 1:
            more: dict[str, Any] = {"num_outputs": len(sizes)} if opset >= _SPLIT_COUNT else {}
            nodes.append(helper.make_node("Split", [whole], list(arrays), **more))
        elif opset >= _SPLIT_INPUT:
            tensors.append(pack(helper.make_tensor(names[2], TensorProto.INT64, [len(sizes)], sizes)))
            nodes.append(helper.make_node("Split", [whole, names[2]], list(arrays)))
        else:
            nodes.append(helper.make_node("Split", [whole], list(arrays), split=sizes))
        return cls(tensors, nodes)

    @property
    def bytes(self) -> int:
        parts: list[TensorProto | NodeProto] = [*self.tensors, *self.nodes]
        return sum(map(short_bytes, parts))


def _is_half(values: NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return np.array_equal(half.astype(np.float32).view(np.uint32), values.view(np.uint32))


def unbundle(model: ModelProto) -> None:
    """Undo `bundle`: constants of their own under the names that nodes read."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = list(graph.node)  # held, as ids mean nothing once a node is let go
    makers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    gone: set[int] = set()
    for node in nodes:
        cast = makers.get(node.input[0]) if node.input else None
        if node.op_type != "Split" or node.domain not in STANDARD or (cast is not None and cast.op_type != "Cast"):
            continue
        whole = tensors.get(node.input[0] if cast is None else cast.input[0])
        if whole is None or whole.data_location == TensorProto.EXTERNAL or not whole.dims:
            continue
        sizes = _sizes(node, tensors, whole.dims[0])
        if sizes is None or sum(sizes) != whole.dims[0] or not _is_ours(cast, whole, readers):
            continue
        array = numpy_helper.to_array(whole)
        array = array if cast is None else array.astype(np.float32)
        parts = np.split(array, np.cumsum(sizes)[:-1])
        graph.initializer.extend(pack(numpy_helper.from_array(v, n)) for v, n in zip(parts, node.output, strict=True))
        gone |= {id(node), id(cast)}
    if gone:
        before = {name for node in nodes if id(node) in gone for name in node.input}
        remove_entries(graph.node, lambda node: id(node) in gone)
        left = {name for space in spaces(model)[0].all for node in space.proto.node for name in node.input}
        left |= {*entry_names(graph.input), *entry_names(graph.output)}
        remove_entries(graph.initializer, lambda tensor: tensor.name in before - left)


def _is_ours(cast: NodeProto | None, whole: TensorProto, readers: dict[str, list[NodeProto]]) -> bool:
    """Whether what stands between the constant and its Split, if anything, is what `bundle` puts there."""
    if cast is None:
        return whole.data_type in (*_ALWAYS, TensorProto.INT64)
    to = attributes(cast).get("to")
    return (whole.data_type, to) == (TensorProto.FLOAT16, TensorProto.FLOAT) and len(readers[cast.output[0]]) == 1


def _sizes(node: NodeProto, tensors: dict[str, TensorProto], total: int) -> list[int] | None:
    """How a Split along the first axis divides ``total``; None where it does not say, or divides along another one."""
    given = attributes(node)
    if given.get("axis", 0) != 0 or not all(node.output):
        return None
    sizes = given.get("split")
    if len(node.input) > 1:
        sizes = numpy_helper.to_array(tensors[node.input[1]]).tolist() if node.input[1] in tensors else []
    if sizes is None:
        count = len(node.output)
        return [total // count] * count if total % count == 0 else None
    return [int(size) for size in sizes] if len(sizes) == len(node.output) else None
