"""Find the weights that a compressed model stores as codes, and the nodes and constants that make each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto

from vqonnx.errors import ModelError
from vqonnx.ops import DOMAIN
from vqonnx.pair import count, joined_shape
from vqonnx.record import Record, Row
from vqonnx.scope import Scope, attributes, constant_value, scopes


@dataclass(frozen=True, eq=False)
class LayerPair:
    """Two nodes that one layer is run as, and the scope that they are in."""

    scope: Scope
    first: NodeProto
    second: NodeProto


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight that is made from codes, or the two weights of a layer that is run as two.

    Attributes:
        name: Name of the weight tensor (of the one that the two stand for).
        scope: The graph or function that makes it.
        makers: For each of its tensors the nodes that make it, in order; their other inputs are constants.
        constants: Names of those constants.
        pairs: The layers that are run as two; empty if the weight is one tensor.
        row: What the record says of it; None if nothing.
        folder: Where the model lies, for external data.
    """

    name: str
    scope: Scope
    makers: tuple[tuple[NodeProto, ...], ...]
    constants: tuple[str, ...]
    pairs: tuple[LayerPair, ...]
    row: Row | None
    folder: Path

    @property
    def nodes(self) -> tuple[NodeProto, ...]:
        """All nodes that make its tensors."""
        return tuple(node for nodes in self.makers for node in nodes)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its tensors: the weight, or the two weights of a layer that is run as two."""
        return tuple(nodes[-1].output[0] for nodes in self.makers)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, as the last nodes of its tensors say."""
        shapes = [self._shape_after(nodes) for nodes in self.makers]
        if not self.pairs:
            return shapes[0]
        return joined_shape(self.pairs[0].first, self.pairs[0].second, *shapes)

    @property
    def multiplications(self) -> float:
        """Part of the layer's multiplications that is left; 1 unless it is run as two."""
        if not self.pairs:
            return 1.0
        shapes = [self._shape_after(nodes) for nodes in self.makers]
        return count(self.pairs[0].first, self.pairs[0].second, *shapes).share

    def _shape_after(self, nodes: tuple[NodeProto, ...]) -> tuple[int, ...]:
        shape: tuple[int, ...] = ()
        for node in nodes:
            if node.op_type == "Decode":
                layout = self._numbers(node.input[3])
                shape = tuple(layout[2:][axis] for axis in attributes(node)["perm"])
            elif node.op_type == "Reshape":
                shape = tuple(self._numbers(node.input[1]))
            elif node.op_type == "Transpose":
                shape = tuple(shape[axis] for axis in attributes(node)["perm"])
            elif node.op_type == "Tile":
                shape = tuple(size * times for size, times in zip(shape, self._numbers(node.input[1]), strict=True))
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
    """The stored weights in the order of the record, or of the nodes where there is none.

    Fused layers must have been taken apart (`vqonnx.unfusion.split_layers`).
    """
    rows = () if record is None else record.layers
    places: dict[tuple[str, ...], list[int]] = {}  # of equal names in several scopes the first row is the first scope's
    for place, row in enumerate(rows):
        places.setdefault(row.factors or (row.name,), []).append(place)
    found: list[tuple[int, StoredWeight]] = []
    for scope in scopes(model):
        if isinstance(scope.proto, FunctionProto) and scope.proto.domain == DOMAIN:
            continue  # the body of the op, whose names mean nothing here
        recorded = [names for names, left in places.items() if left and all(name in scope.producers for name in names)]
        made = {id(node) for names in recorded for name in names for node in _makers(scope, name)}
        others = [n.output[0] for n in scope.proto.node if n.domain == DOMAIN and id(n) not in made]
        for names in recorded:
            place = places[names].pop(0)
            found.append((place, _stored(scope, names, rows[place], Path(folder))))
        found += [(len(rows), _stored(scope, (name,), None, Path(folder))) for name in others]
    return tuple(weight for _, weight in sorted(found, key=lambda entry: entry[0]))


def _stored(scope: Scope, names: tuple[str, ...], row: Row | None, folder: Path) -> StoredWeight:
    makers = tuple(tuple(_makers(scope, name)) for name in names)
    nodes = [node for part in makers for node in part]
    made = {output for node in nodes for output in node.output}
    constants = dict.fromkeys(entry for node in nodes for entry in node.input if entry and entry not in made)
    name = names[0] if row is None else row.name
    pairs = tuple(_pairs(scope, name, *names)) if len(names) == 2 else ()
    return StoredWeight(name, scope, makers, tuple(constants), pairs, row, folder)


def _pairs(scope: Scope, name: str, first: str, second: str) -> Iterator[LayerPair]:
    """The layers that read the two weights, one after the other."""
    for use in scope.uses.get(first, []):
        between = use.node.output[0]
        later = use.scope.uses.get(between, [])
        if len(later) != 1 or between in use.scope.outputs or list(later[0].node.input[:2]) != [between, second]:
            raise ModelError(f"weight '{name}': its two layers are no longer one after the other; compress it again")
        yield LayerPair(use.scope, use.node, later[0].node)


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
    last = weight.makers[0][-1]
    return int(attributes(last)["to"]) if last.op_type == "Cast" else TensorProto.FLOAT
