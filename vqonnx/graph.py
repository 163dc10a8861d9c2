"""Find the linear layers of an ONNX model whose weights are constants, and say why the others are left alone.

`place.py` puts forms in their place; `view.py` knows how a weight becomes a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from vqonnx.modelfile import to_array
from vqonnx.scope import Scope, Use, attributes, is_constant, node_name, scopes
from vqonnx.view import View, ViewOrder, conv_transpose_view, conv_view, matmul_view

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CHAIN = ("Identity", "Transpose", "Reshape", "Cast")
_QUANTISED = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "MatMulNBits", "QGemm")
_RECURRENT = ("LSTM", "GRU", "RNN")
_STANDARD = ("", "ai.onnx")
_ITEM_BYTES: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.DOUBLE: 8}
_FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True, eq=False)
class Site:
    """A weight that can be replaced.

    Attributes:
        name: Name of the weight tensor that the layers read.
        op_type: Operator of the first layer that reads it.
        scope: Scope that owns the weight.
        uses: The layers that read it, in order.
        source: Name of the constant that it comes from; differs from ``name`` if nodes lie between.
        between: Nodes between the two, which fall away.
        shape: Shape of the weight tensor.
        elem_type: Its ONNX element type.
    """

    name: str
    op_type: str
    scope: Scope
    uses: tuple[Use, ...]
    source: str
    between: tuple[NodeProto, ...]
    shape: tuple[int, ...]
    elem_type: int
    _read: Callable[[], NDArray[Any]]

    @property
    def node(self) -> NodeProto:
        """The first layer that reads the weight."""
        return self.uses[0].node

    @property
    def group(self) -> int:
        """Groups of a convolution."""
        return int(attributes(self.node).get("group", 1))

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel sizes of a convolution; empty for Gemm and MatMul."""
        return self.shape[2:] if self.op_type in ("Conv", "ConvTranspose") else ()

    @property
    def depthwise(self) -> bool:
        """Whether each group of a convolution has one input channel."""
        channels = {"Conv": self.shape[1], "ConvTranspose": self.shape[0] // self.group}
        return self.group > 1 and channels.get(self.op_type) == 1

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as the layers read it."""
        return math.prod(self.shape) * _ITEM_BYTES.get(self.elem_type, 2)

    def read(self) -> NDArray[np.float32]:
        """The weight tensor in float32."""
        return self._read()

    def view(self, order: ViewOrder) -> View:
        """The weight seen as a matrix; ``ihw`` and ``hwi`` differ for convolutions only, ``ohw`` for all."""
        if self.op_type == "Conv":
            return conv_view(self.shape, order)
        if self.op_type == "ConvTranspose":
            return conv_transpose_view(self.shape, self.group, order)
        outputs_first = self.op_type == "Gemm" and bool(attributes(self.node).get("transB", 0))
        return matmul_view(self.shape, outputs_first=outputs_first, order=order)


@dataclass(frozen=True)
class Skipped:
    """A layer that is left as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What `find` saw: sites in the order of their first layer, and the layers that are left alone."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]


def find(model: ModelProto, folder: str | Path) -> Found:
    """Find the weights that can be replaced. ``folder`` is where the model lies, for external data."""
    sites: dict[tuple[int, str], Site] = {}
    skipped: dict[str, str] = {}
    for scope in scopes(model):
        for node in scope.proto.node:
            if node.domain not in (*_STANDARD, "com.microsoft"):
                continue
            if node.op_type in _QUANTISED:
                skipped[node_name(node)] = f"already quantised ({node.op_type})"
            elif node.op_type in _RECURRENT and node.domain in _STANDARD:
                skipped[node_name(node)] = f"{node.op_type} weights are not compressed; only {', '.join(LINEAR)} are"
            elif node.op_type in LINEAR and node.domain in _STANDARD:
                try:
                    site = _site(scope, node, Path(folder))
                except _LeftAlone as reason:
                    skipped.setdefault(reason.weight or node_name(node), str(reason))
                else:
                    sites.setdefault((id(site.scope), site.name), site)
    return Found(tuple(sites.values()), tuple(Skipped(name, reason) for name, reason in skipped.items()))


class _LeftAlone(Exception):
    """Says why a layer cannot be compressed; caught in `find`."""

    def __init__(self, reason: str, weight: str = "") -> None:
        super().__init__(reason)
        self.weight = weight


def _site(scope: Scope, node: NodeProto, folder: Path) -> Site:
    """The weight of a linear layer. Raises `_LeftAlone` where it cannot be replaced."""
    weight = node.input[1]
    home, source = _trace(scope, weight)
    name, between = _last_common(home, source)
    _check_users(home, name)
    tensor = _constant(home, source)
    if tensor.data_type not in _FLOAT_TYPES:
        raise _LeftAlone(f"weights are {_type_name(tensor.data_type)}, not floating point", weight)

    def read() -> NDArray[np.float32]:
        return np.asarray(_apply(between, to_array(tensor, folder), home, folder), dtype=np.float32)

    shape, elem_type = _shape_after(between, tensor, home, folder)
    if elem_type not in _FLOAT_TYPES:
        raise _LeftAlone(f"weights are cast to {_type_name(elem_type)}", weight)
    users = tuple(use for use in home.uses[name] if _reads_weight(use))
    first = next(use for use in users if use.node is node) if any(use.node is node for use in users) else users[0]
    ordered = (first, *(use for use in users if use is not first))
    site = Site(name, first.node.op_type, home, ordered, source, between, shape, elem_type, read)
    _check_shape(site)
    return site


def _trace(scope: Scope, weight: str) -> tuple[Scope, str]:
    """Follow a weight back, through nodes that only reshape or cast it, to its constant and the scope of that."""
    name = weight
    home = scope.home(name)
    while home and name not in home.initializers:
        node = home.producers[name]
        if node.op_type == "Constant" and node.domain in _STANDARD:
            break
        if node.op_type == "DequantizeLinear":
            raise _LeftAlone("already quantised (weight behind DequantizeLinear)", weight)
        if node.op_type not in _CHAIN or node.domain not in _STANDARD:
            raise _LeftAlone(f"weight is computed at run time (by {node.op_type} '{node_name(node)}')", weight)
        if node.op_type == "Reshape" and (len(node.input) < 2 or not is_constant(home, node.input[1])):
            raise _LeftAlone(f"weight is reshaped to a size that is not constant (by '{node_name(node)}')", weight)
        name = node.input[0]
        home = home.home(name)
    if home is None:
        raise _LeftAlone("weight is an input of the graph, not a constant", weight)
    return home, name


def _last_common(home: Scope, source: str) -> tuple[str, tuple[NodeProto, ...]]:
    """The last tensor of this scope that every reader of the constant goes through, and the nodes up to it."""
    name, nodes = source, []
    while name not in home.outputs:
        uses = home.uses.get(name, [])
        if len(uses) != 1 or uses[0].scope is not home or not _passes_on(uses[0]):
            break
        nodes.append(uses[0].node)
        name = uses[0].node.output[0]
    return name, tuple(nodes)


def _check_users(home: Scope, name: str) -> None:
    """Every reader must be a layer that takes it as weight, or lead to such layers only."""
    if name in home.outputs:
        raise _LeftAlone("weight is also an output of the graph", name)
    direct = [use for use in home.uses.get(name, []) if _reads_weight(use)]
    for use in home.uses.get(name, []):
        if not _leads_to_weight(use):
            other = f"{use.node.op_type} '{node_name(use.node)}'"
            raise _LeftAlone(f"weight is also read by {other}, so it would stay in the file", name)
    if not direct:
        raise _LeftAlone("weight reaches its layers through different Transpose or Reshape nodes", name)
    if len({_seen_as(use.node) for use in direct}) > 1:
        raise _LeftAlone("weight is read by layers that see it in different ways", name)


def _seen_as(node: NodeProto) -> tuple[str, int]:
    """Layers for which this is equal see the same tensor as the same matrix."""
    values = attributes(node)
    if node.op_type == "Conv":
        return "Conv", 1
    if node.op_type == "ConvTranspose":
        return "ConvTranspose", int(values.get("group", 1))
    return "MatMul", int(values.get("transB", 0))


def _reads_weight(use: Use) -> bool:
    return use.node.op_type in LINEAR and use.node.domain in _STANDARD and use.index == 1


def _passes_on(use: Use) -> bool:
    """Whether the node hands the constant on, only reshaped or cast."""
    return use.node.op_type in _CHAIN and use.node.domain in _STANDARD and use.index == 0


def _leads_to_weight(use: Use) -> bool:
    if _reads_weight(use) or not _passes_on(use):
        return _reads_weight(use)
    output = use.node.output[0]
    return output not in use.scope.outputs and all(_leads_to_weight(later) for later in use.scope.uses.get(output, []))


def _constant(home: Scope, name: str) -> TensorProto:
    if name in home.initializers:
        return home.initializers[name]
    node = home.producers[name]
    for attribute in node.attribute:
        if attribute.name == "value" and not attribute.ref_attr_name:
            value: TensorProto = attribute.t
            return value
    raise _LeftAlone("weight is a Constant without a plain tensor value", name)


def _apply(nodes: tuple[NodeProto, ...], values: NDArray[Any], home: Scope, folder: Path) -> NDArray[Any]:
    for node in nodes:
        if node.op_type == "Transpose":
            values = values.transpose(attributes(node).get("perm"))
        elif node.op_type == "Reshape":
            values = values.reshape(_target_shape(node, values.shape, home, folder))
    return values


def _shape_after(
    nodes: tuple[NodeProto, ...], tensor: TensorProto, home: Scope, folder: Path
) -> tuple[tuple[int, ...], int]:
    elem_type = tensor.data_type
    for node in nodes:
        if node.op_type == "Cast":
            elem_type = int(attributes(node)["to"])
    empty = np.broadcast_to(np.zeros((), np.uint8), tuple(tensor.dims))  # a view without memory, to follow the shape
    return tuple(_apply(nodes, empty, home, folder).shape), elem_type


def _target_shape(node: NodeProto, before: tuple[int, ...], home: Scope, folder: Path) -> list[int]:
    scope = home.home(node.input[1])
    assert scope is not None
    sizes = to_array(_constant(scope, node.input[1]), folder).tolist()
    keep_zero = bool(attributes(node).get("allowzero", 0))
    return [before[axis] if size == 0 and not keep_zero else int(size) for axis, size in enumerate(sizes)]


def _check_shape(site: Site) -> None:
    rank = len(site.shape)
    if 0 in site.shape:
        raise _LeftAlone(f"weight is empty {list(site.shape)}", site.name)
    if rank < 2 or (site.op_type in ("Conv", "ConvTranspose") and rank < 3):
        raise _LeftAlone(f"weight has {rank} axes {list(site.shape)}", site.name)
    if any(a.ref_attr_name for a in site.node.attribute if a.name in ("group", "transB")):
        raise _LeftAlone("an attribute of the layer is set by the caller of its function", site.name)


def _type_name(elem_type: int) -> str:
    return str(TensorProto.DataType.Name(elem_type)).lower()
