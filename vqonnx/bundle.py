"""Small float vectors of a graph (biases, mostly) as parts of one constant, which costs less than many.

A standard ``Split`` takes them apart; runtimes do so once, when they load the model. Vectors whose values float16 holds
exactly are stored so, with a ``Cast`` in front.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vqonnx.breakdown import field_bytes
from vqonnx.graph import attributes
from vqonnx.modelfile import remove_entries, set_nodes
from vqonnx.names import STANDARD, entry_names, short_names, spaces
from vqonnx.tidy import pack

_LIMIT = 65536  # bytes of a vector that is bundled
_SPLIT_INPUT = 13  # opset from which on Split takes its sizes as an input
_MARK = "vq"  # begins the names of what a bundle adds, until they are shortened


def bundle(model: ModelProto) -> None:
    """Store the float32 vectors of the main graph that nodes of it read together, where that takes fewer bytes."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in STANDARD), 0)
    graph = model.graph
    fixed = {*entry_names(graph.input), *entry_names(graph.output)}
    vectors = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and tensor.data_location != TensorProto.EXTERNAL
        and len(tensor.dims) == 1
        and 0 < tensor.dims[0] * 4 <= _LIMIT
        and tensor.name not in fixed
    }
    ordered = dict.fromkeys(name for node in graph.node for name in node.input if name in vectors)
    names = short_names({name for space in spaces(model)[0].all for name in space.uses})
    gone: set[str] = set()
    for half in (True, False):
        own = {name: vectors[name] for name in ordered if _is_half(vectors[name]) == half}
        if len(own) < 2:
            continue
        made = _Bundle.of(own, half, opset, [f"{_MARK}{next(names)}" for _ in range(3)])
        if made.bytes < sum(field_bytes(t) for t in graph.initializer if t.name in own):
            gone |= own.keys()
            graph.initializer.extend(made.tensors)
            set_nodes(graph, [*made.nodes, *graph.node])
    remove_entries(graph.initializer, lambda tensor: tensor.name in gone)


@dataclass(frozen=True)
class _Bundle:
    tensors: list[TensorProto]
    nodes: list[NodeProto]

    @classmethod
    def of(cls, vectors: dict[str, NDArray[np.float32]], half: bool, opset: int, names: list[str]) -> _Bundle:
        values = np.concatenate(list(vectors.values()))
        sizes = [len(vector) for vector in vectors.values()]
        tensors = [numpy_helper.from_array(values.astype(np.float16) if half else values, names[0])]
        nodes = []
        whole = names[0]
        if half:
            whole = names[1]
            nodes.append(helper.make_node("Cast", [names[0]], [whole], to=TensorProto.FLOAT))
        if opset >= _SPLIT_INPUT:
            tensors.append(pack(helper.make_tensor(names[2], TensorProto.INT64, [len(sizes)], sizes)))
            nodes.append(helper.make_node("Split", [whole, names[2]], list(vectors)))
        else:
            nodes.append(helper.make_node("Split", [whole], list(vectors), split=sizes))
        return cls(tensors, nodes)

    @property
    def bytes(self) -> int:
        return sum(map(field_bytes, [*self.tensors, *self.nodes]))


def _is_half(values: NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return np.array_equal(half.astype(np.float32).view(np.uint32), values.view(np.uint32))


def unbundle(model: ModelProto) -> None:
    """Undo `bundle`: constants of their own, float32, under the names that nodes read."""
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
        sizes = _sizes(node, tensors)
        if whole is None or not _is_vector(whole, TensorProto.FLOAT if cast is None else TensorProto.FLOAT16):
            continue
        if sizes is None or sum(sizes) != whole.dims[0] or (cast is not None and len(readers[cast.output[0]]) > 1):
            continue
        parts = np.split(numpy_helper.to_array(whole).astype(np.float32), np.cumsum(sizes)[:-1])
        graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in zip(parts, node.output, strict=True))
        gone |= {id(node), id(cast)}
    if gone:
        before = {name for node in nodes if id(node) in gone for name in node.input}
        remove_entries(graph.node, lambda node: id(node) in gone)
        left = {name for space in spaces(model)[0].all for node in space.proto.node for name in node.input}
        left |= {*entry_names(graph.input), *entry_names(graph.output)}
        remove_entries(graph.initializer, lambda tensor: tensor.name in before - left)


def _is_vector(tensor: TensorProto, elem_type: int) -> bool:
    return tensor.data_type == elem_type and len(tensor.dims) == 1 and tensor.data_location != TensorProto.EXTERNAL


def _sizes(node: NodeProto, tensors: dict[str, TensorProto]) -> list[int] | None:
    """How a Split along the first axis divides; None where it does not say."""
    given = attributes(node)
    if given.get("axis", 0) != 0:
        return None
    sizes = given.get("split")
    if len(node.input) > 1:
        sizes = numpy_helper.to_array(tensors[node.input[1]]).tolist() if node.input[1] in tensors else None
    return None if sizes is None or len(sizes) != len(node.output) else [int(size) for size in sizes]
