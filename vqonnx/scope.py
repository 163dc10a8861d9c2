"""The scopes of an ONNX model: which node makes a name, which ones read it, and which names are constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from vqonnx.modelfile import to_array


@dataclass(eq=False, repr=False)
class Scope:
    """One list of nodes with its own names: the main graph, a subgraph of an attribute, or a function.

    Attributes:
        proto: The graph or function.
        path: Where it is, for messages: ``""`` for the main graph.
        parent: The scope around a subgraph, whose names it sees.
        initializers: Tensors by name (a function has none).
        producers: Node of this scope by each of its outputs.
        uses: For each name that this scope defines, the nodes that read it, those of inner scopes included.
        outputs: Names that leave the scope.
    """

    proto: GraphProto | FunctionProto
    path: str
    parent: Scope | None
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    producers: dict[str, NodeProto] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)

    @property
    def lineage(self) -> list[Scope]:
        """The scope and those around it, the outermost last."""
        return [self] if self.parent is None else [self, *self.parent.lineage]

    def home(self, name: str) -> Scope | None:
        """The scope that makes ``name``: this one or one around it; None for a graph input that has no default."""
        scope: Scope | None = self
        while scope and name not in scope.initializers and name not in scope.producers:
            scope = scope.parent
        return scope


@dataclass(frozen=True, eq=False, repr=False)
class Use:
    """Input ``index`` of ``node``, which lies in ``scope``."""

    scope: Scope
    node: NodeProto
    index: int


def attributes(node: NodeProto) -> dict[str, Any]:
    """Attribute values of a node by name; references to a function's attributes are left out."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}


def scopes(model: ModelProto) -> tuple[Scope, ...]:
    """All scopes of the model, outer ones first; functions at the end."""
    found = list(_graph_scopes(model.graph, "", None))
    for function in model.functions:
        found.extend(_function_scopes(function))
    for scope in found:
        _note_uses(scope)
    return tuple(found)


def node_name(node: NodeProto) -> str:
    """What messages call a node."""
    return node.name or next(filter(None, node.output), node.op_type)


def is_constant(scope: Scope, name: str) -> bool:
    """Whether a name is an initializer or a Constant node's."""
    home = scope.home(name)
    return home is not None and (name in home.initializers or home.producers[name].op_type == "Constant")


def constant_value(scope: Scope, name: str, folder: Path) -> NDArray[Any] | None:
    """The values of a constant by name, or None where it is not one."""
    home = scope.home(name)
    if home is None or not is_constant(home, name):
        return None
    if name in home.initializers:
        return to_array(home.initializers[name], folder)
    node = home.producers[name]
    for attribute in node.attribute:
        if attribute.name == "value":
            return to_array(attribute.t, folder)
        if attribute.name.startswith("value_"):
            return np.asarray(helper.get_attribute_value(attribute))
    return None


def _graph_scopes(graph: GraphProto, path: str, parent: Scope | None) -> Iterator[Scope]:
    scope = Scope(graph, path, parent, outputs={output.name for output in graph.output})
    scope.initializers = {tensor.name: tensor for tensor in graph.initializer}
    yield scope
    yield from _inner_scopes(scope)


def _function_scopes(function: FunctionProto) -> Iterator[Scope]:
    scope = Scope(function, f"function {function.name}", None, outputs=set(function.output))
    yield scope
    yield from _inner_scopes(scope)


def _inner_scopes(scope: Scope) -> Iterator[Scope]:
    for node in scope.proto.node:
        scope.producers.update((name, node) for name in node.output if name)
        for attribute in node.attribute:
            graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for graph in graphs:
                yield from _graph_scopes(graph, f"{scope.path}/{node_name(node)}.{attribute.name}", scope)


def _note_uses(scope: Scope) -> None:
    for node in scope.proto.node:
        for index, name in enumerate(node.input):
            home = scope.home(name) if name else None
            if home:
                home.uses.setdefault(name, []).append(Use(scope, node, index))
    for name in scope.outputs:  # an outer name that leaves an inner scope is in use as well
        home = scope.home(name)
        if home:
            home.outputs.add(name)
