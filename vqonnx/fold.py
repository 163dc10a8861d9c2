"""Compute in advance what depends on small constants alone, where the result takes no more bytes than the way to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from vqonnx.breakdown import short_bytes
from vqonnx.errors import InputError
from vqonnx.modelfile import remove_entries
from vqonnx.names import STANDARD, Space, entry_names, spaces, subgraphs
from vqonnx.runtime import open_session, run
from vqonnx.tidy import constant_node, constant_tensor, constants, pack

_LIMIT = 16384  # bytes of what goes into a node and of what comes out
_NEVER = (  # constants already; random; or seen by onnxruntime together with their neighbours
    *("Constant", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
)
_CONSTANT_OF_ANY_TYPE = 9  # opset before which Constant is floating point
_ELSEWHERE = -1  # a reader that is no node of the space


def fold_constants(model: ModelProto, kept: Collection[str] = ()) -> None:
    """Replace nodes of standard operators by what they yield, in graphs and functions.

    onnxruntime computes the values, as it does itself when it loads the model.

    Args:
        model: Changed in place.
        kept: Outputs of nodes that stay, such as those that make weights from codes.
    """
    for main in spaces(model):
        imports = main.proto.opset_import if isinstance(main.proto, FunctionProto) else model.opset_import
        standard = [entry for entry in imports if entry.domain in STANDARD]
        for space in reversed(main.all):
            while _Fold(space, standard, model.ir_version, kept).apply():
                pass


@dataclass
class _Fold:
    """One round over the nodes of a space."""

    space: Space
    imports: list[OperatorSetIdProto]
    ir_version: int
    kept: Collection[str]

    def __post_init__(self) -> None:
        proto = self.space.proto
        self.nodes = list(proto.node)
        fed = set(entry_names(proto.input))
        tensors = [t for t in constants(proto) if t.name not in fed and t.data_location != TensorProto.EXTERNAL]
        self.stored = {tensor.name: tensor for tensor in tensors}
        self.readers: dict[str, set[int]] = {}
        for place, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, set()).add(place)
        for name in self.space.leaving:
            self.readers.setdefault(name, set()).add(_ELSEWHERE)
        self.outputs = set(entry_names(proto.output))
        self.computed: dict[str, TensorProto] = {}
        self.makers: dict[str, int] = {}

    def apply(self) -> bool:
        """Compute, choose and replace; gives whether anything was replaced."""
        for place, node in enumerate(self.nodes):
            made = self._compute(node)
            self.computed.update((tensor.name, tensor) for tensor in made)
            self.makers.update((tensor.name, place) for tensor in made)
        gone: set[int] = set()
        results: dict[int, list[TensorProto]] = {}
        unread: set[str] = set()
        for place in sorted(set(self.makers.values()), reverse=True):
            if place in gone:
                continue
            with_it = self._cone(place, gone)
            tensors = [self.computed[n] for n in self.nodes[place].output if self.readers.get(n, set()) - gone]
            dropped = {
                name
                for at in with_it
                for name in self.nodes[at].input
                if name in self.stored and self.readers[name] <= gone | with_it
            }
            before = sum(short_bytes(self.nodes[at]) for at in with_it)
            before += sum(self._bytes(self.stored[name]) for name in dropped - unread)
            if sum(map(self._bytes, tensors)) <= before and self._replaceable(tensors):
                results[place] = tensors
                gone |= with_it
                unread |= dropped
        if results:
            self._replace(gone, unread, results)
        return bool(results)

    def _compute(self, node: NodeProto) -> list[TensorProto]:
        """What a node yields; nothing where it depends on more than small constants, or yields what is no tensor."""
        names = [name for name in node.output if name]
        inputs = [self.stored.get(name) or self.computed.get(name) for name in node.input if name]
        given = [tensor for tensor in inputs if tensor is not None]
        if node.op_type in _NEVER or node.domain not in STANDARD or any(True for _ in subgraphs(node)):
            return []
        if any(attribute.ref_attr_name for attribute in node.attribute) or any(name in self.kept for name in names):
            return []
        if not given or len(given) < len(inputs) or sum(tensor.ByteSize() for tensor in given) > _LIMIT:
            return []
        values = _run(node, {tensor.name: tensor for tensor in given}, names, self.imports, self.ir_version)
        arrays = [values.get(name) for name in names]
        tensors = []
        for name, array in zip(names, arrays, strict=True):
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.nbytes > _LIMIT:
                return []
            tensors.append(pack(numpy_helper.from_array(array, name)))
        return tensors

    def _cone(self, place: int, gone: set[int]) -> set[int]:
        """The node and those before it that nobody else needs."""
        cone = {place}
        for at in range(place - 1, -1, -1):
            outputs = self.nodes[at].output
            if at not in gone and any(self.makers.get(name) == at for name in outputs):
                readers = set().union(*(self.readers.get(name, set()) for name in outputs))
                if readers & cone and readers <= cone | gone:
                    cone.add(at)
        return cone

    def _bytes(self, tensor: TensorProto) -> int:
        """Bytes of a constant where it is stored."""
        return short_bytes(tensor if isinstance(self.space.proto, GraphProto) else constant_node(tensor))

    def _replaceable(self, tensors: list[TensorProto]) -> bool:
        if isinstance(self.space.proto, FunctionProto):
            old = any(entry.version < _CONSTANT_OF_ANY_TYPE for entry in self.imports)
            floats = all(tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE) for tensor in tensors)
            if len(tensors) != 1 or (old and not floats):
                return False
        return not any(tensor.name in self.outputs for tensor in tensors)  # not every runtime takes constant outputs

    def _replace(self, gone: set[int], unread: set[str], results: Mapping[int, list[TensorProto]]) -> None:
        proto = self.space.proto
        doomed = {id(self.nodes[place]) for place in gone}
        doomed |= {id(n) for n in self.nodes if constant_tensor(n) is not None and n.output[0] in unread}
        for place, tensors in results.items():
            if isinstance(proto, FunctionProto):
                self.nodes[place].CopyFrom(constant_node(tensors[0]))
                doomed.discard(id(self.nodes[place]))
            else:
                proto.initializer.extend(tensors)
        remove_entries(proto.node, lambda node: id(node) in doomed)
        if isinstance(proto, GraphProto):
            remove_entries(proto.initializer, lambda tensor: tensor.name in unread)


def _run(
    node: NodeProto,
    given: Mapping[str, TensorProto],
    names: list[str],
    imports: Iterable[OperatorSetIdProto],
    ir_version: int,
) -> dict[str, Any]:
    copy = NodeProto()
    copy.CopyFrom(node)
    outputs = [ValueInfoProto(name=name) for name in names]
    graph = helper.make_graph([copy], "fold", [], outputs, initializer=list(given.values()))
    model = helper.make_model(graph, opset_imports=list(imports), ir_version=max(ir_version, 4))
    try:
        return run(open_session(model.SerializeToString(), threads=1, optimise=False), {})
    except InputError:
        return {}
