"""Find the weights that a compressed model stores as codes, and the nodes and constants that make each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto

from vqonnx.graph import Scope, attributes, constant_value, scopes
from vqonnx.ops import DOMAIN
from vqonnx.record import Record, Row


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight that is made from codes.

    Attributes:
        name: Name of the weight tensor.
        scope: The graph or function that makes it.
        nodes: The nodes that make it, in order; their other inputs are constants.
        constants: Names of those constants.
        row: What the record says of it; None if nothing.
        folder: Where the model lies, for external data.
    """

    name: str
    scope: Scope
    nodes: tuple[NodeProto, ...]
    constants: tuple[str, ...]
    row: Row | None
    folder: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, as its last nodes say."""
        shape: tuple[int, ...] = ()
        for node in self.nodes:
            if node.op_type == "Decode":
                layout = self._numbers(node.input[3])
                shape = tuple(layout[2:][axis] for axis in attributes(node)["perm"])
            elif node.op_type == "Reshape":
                shape = tuple(self._numbers(node.input[1]))
            elif node.op_type == "Transpose":
                shape = tuple(shape[axis] for axis in attributes(node)["perm"])
        return shape

    def stored_bytes(self, counted: set[str]) -> int:
        """Bytes of codes, codebooks and scales, without constants in ``counted``, to which it adds its own."""
        total = 0
        scales = {node.input[2] for node in self.nodes if node.op_type == "Decode"}
        for name in self.constants:
            values = self.constant(name)
            no_scales = name in scales and values.size == 1 and values.item() == 1
            if name in counted or values.dtype.kind == "i" or no_scales:
                continue  # sizes and positions, and the factor 1.0 where there are no scales
            counted.add(name)
            total += values.nbytes
        return total

    def constant(self, name: str) -> NDArray[Any]:
        """The values of one of the constants."""
        values = constant_value(self.scope, name, self.folder)
        assert values is not None
        return values

    def _numbers(self, name: str) -> list[int]:
        return [int(value) for value in np.ravel(self.constant(name))]


def find_stored(model: ModelProto, folder: str | Path, record: Record | None) -> tuple[StoredWeight, ...]:
    """The stored weights in the order of the record, or of the nodes where there is none."""
    rows = () if record is None else record.layers
    places: dict[str, list[int]] = {}  # of equal names in several scopes the first row is the first scope's
    for place, row in enumerate(rows):
        places.setdefault(row.name, []).append(place)
    found: list[tuple[int, StoredWeight]] = []
    for scope in scopes(model):
        if isinstance(scope.proto, FunctionProto) and scope.proto.domain == DOMAIN:
            continue  # the body of the op, whose names mean nothing here
        recorded = [name for name, left in places.items() if left and name in scope.producers]
        made = {id(node) for name in recorded for node in _makers(scope, name)}
        others = [n.output[0] for n in scope.proto.node if n.domain == DOMAIN and id(n) not in made]
        for name in recorded:
            place = places[name].pop(0)
            found.append((place, _stored(scope, name, rows[place], Path(folder))))
        found += [(len(rows), _stored(scope, name, None, Path(folder))) for name in others]
    return tuple(weight for _, weight in sorted(found, key=lambda entry: entry[0]))


def _stored(scope: Scope, name: str, row: Row | None, folder: Path) -> StoredWeight:
    nodes = _makers(scope, name)
    made = {output for node in nodes for output in node.output}
    constants = dict.fromkeys(entry for node in nodes for entry in node.input if entry and entry not in made)
    return StoredWeight(name, scope, tuple(nodes), tuple(constants), row, folder)


def _makers(scope: Scope, name: str) -> list[NodeProto]:
    """The nodes behind a value, Constant nodes aside, in order of computation."""
    needed = {name}
    makers: list[NodeProto] = []
    for node in reversed(scope.proto.node):
        if needed & set(node.output) and node.op_type != "Constant":
            makers.append(node)
            needed |= set(node.input)
    return makers[::-1]


def elem_type(weight: StoredWeight) -> int:
    """ONNX element type of the weight: float32 unless the last node casts it."""
    last = weight.nodes[-1]
    return int(attributes(last)["to"]) if last.op_type == "Cast" else TensorProto.FLOAT
