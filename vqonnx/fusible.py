"""Which layers of a graph can be fused, and what follows them and is computed with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from vqonnx.fused import CLIP_OPSET, FUSED, LAYERS, SILU, FusedOp
from vqonnx.ops import DOMAIN
from vqonnx.padding import conv_attributes, pool_attributes
from vqonnx.place import all_names, main_opset
from vqonnx.scope import Scope, attributes, constant_value, scopes
from vqonnx.shapes import Shape, infer_shapes
from vqonnx.strips import suits
from vqonnx.writer import Writer

# Operators whose first output has the type of all inputs.
_SAME_TYPE = {
    "Abs",
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Elu",
    "HardSigmoid",
    "HardSwish",
    "LRN",
    "LeakyRelu",
    "MaxPool",
} | {"Mul", "Neg", "PRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Sub", "Tanh"}

_FLOAT_LIMITS = np.finfo(np.float32)


# Nodes that follow a layer, further inputs of the op, and what the note must say of them.
_Tail = tuple[tuple[NodeProto, ...], tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weight is one Decode, a depthwise convolution, or a MaxPool.

    Attributes:
        decode: Yields the weight; None if that is stored as it is, or there is none.
        node: Reads it.
        attributes: Those of the op, besides what follows the layer.
        bias: Name of the bias; None where the op has none.
        origin: What the note must say of the bias.
    """

    decode: NodeProto | None
    node: NodeProto
    attributes: dict[str, Any]
    bias: str | None
    origin: dict[str, Any]

    @property
    def kind(self) -> str:
        """Layer of the op."""
        is_depthwise = self.decode is None and self.node.op_type == "Conv"
        return "DepthwiseConv" if is_depthwise else self.node.op_type

    @property
    def missing(self) -> dict[str, Any]:
        """Attributes that the op needs and the node does not have."""
        given = attributes(self.node)
        return {name: value for name, value in self.attributes.items() if name not in given}

    @property
    def weight(self) -> list[str]:
        """Name of the weight, if it has one."""
        return list(self.node.input[1:2])

    @property
    def codes(self) -> list[str]:
        """Name of the codes, if it has some."""
        return [] if self.decode is None else list(self.decode.input[:1])

    @property
    def output_axis(self) -> int:
        """Axis of the weight that counts outputs."""
        return 0 if self.node.op_type == "Conv" else 1 - self.attributes.get("transB", 0)

    @property
    def name(self) -> str:
        """Name of the weight, or of the output."""
        return next(iter(self.weight), self.node.output[0])


@dataclass(frozen=True, eq=False)
class Group:
    """Nodes that one op takes the place of.

    Attributes:
        layer: The layer and its Decode.
        tail: What follows, first to last.
        op: The op.
        origin: What the note must say besides weight, places, names and texts.
        further: Inputs of the op behind the bias.
    """

    layer: Layer
    tail: tuple[NodeProto, ...]
    op: FusedOp
    origin: dict[str, Any]
    further: tuple[str, ...]

    @property
    def nodes(self) -> list[NodeProto]:
        """Decode, the layer, and what follows."""
        return [*self.others[: self.op.coded], self.layer.node, *self.tail]

    @property
    def others(self) -> list[NodeProto]:
        """The same without the layer."""
        decode = self.layer.decode
        return [*([] if decode is None else [decode]), *self.tail]


def _keeps_type(node: NodeProto, output: str) -> bool:
    """Whether an output has the type of every input."""
    return not node.domain and node.op_type in _SAME_TYPE and output == node.output[0]


def _is_plain(node: NodeProto) -> bool:
    """Whether a node is a standard operator of one output, without attributes."""
    return not node.domain and not node.attribute and len(node.output) == 1


def _given(node: NodeProto) -> dict[str, Any] | None:
    """The attributes of a node; None if the caller of a function sets some."""
    return None if any(attribute.ref_attr_name for attribute in node.attribute) else attributes(node)


class Graph:
    """The main graph of a model, and what of it can be fused."""

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self._model, self._folder = model, folder
        self.nodes = list(model.graph.node)  # held, as ids mean nothing once a node is let go
        self._scope: Scope = scopes(model)[0]
        self.opset = main_opset(model)
        self.writer = Writer(all_names(model))
        listed = {value.name for value in model.graph.input}
        self._fixed = {name for name in self._scope.initializers if name not in listed}
        # onnxruntime folds Inflate when it loads a file, before the library looks at constants.
        inflated = (n for n in self.nodes if (n.domain, n.op_type) == (DOMAIN, "Inflate"))
        self._known = self._fixed.union(*(n.output for n in inflated if self._fixed.issuperset(n.input)))
        self._decodes: dict[str, tuple[NodeProto, tuple[int, ...]]] = {}
        for node in self.nodes:
            shape = self._weight_shape(node)
            if shape is not None:
                self._decodes[node.output[0]] = node, shape

    def groups(self) -> list[Group]:
        """What can be fused, in order."""
        layers = {node.output[0]: layer for node in self.nodes if (layer := self._layer(node)) is not None}
        convs = {name for name, layer in layers.items() if layer.node.op_type == "Conv"}
        if layers:
            layers |= self._helpers(set(layers))
        return [self._group(layer, convs) for layer in layers.values()]

    def suits_strips(self, layer: Layer) -> bool:
        """Whether the op can compute from codes in strips as well, and has so many that it matters."""
        if (
            layer.decode is None
            or not self._fixed.issuperset(layer.decode.input)
            or layer.attributes.get("group", 1) > 1
        ):
            return False
        codes, codebooks = (self._scope.initializers[name].dims for name in layer.decode.input[:2])
        layout = constant_value(self._scope, layer.decode.input[3], self._folder)
        perm = attributes(layer.decode)["perm"]
        return layout is not None and suits(codes, codebooks, layout.tolist(), perm, layer.output_axis)

    def _helpers(self, fused: set[str]) -> dict[str, Layer]:
        """Depthwise convolutions and MaxPools behind a layer that is fused, by name of the output."""
        made = {name: node for node in self.nodes for name in node.output}
        found: dict[str, Layer] = {}
        for node in self.nodes:
            layer = self._pool(node) or self._depthwise(node)
            if layer is not None and self._is_behind(node, fused | set(found), made):
                found[node.output[0]] = layer
        return found

    def _pool(self, node: NodeProto) -> Layer | None:
        """A MaxPool that yields nothing but values, if it can be fused."""
        if node.domain or node.op_type != "MaxPool" or len(node.output) != 1:
            return None
        given = _given(node)
        found = None if given is None else pool_attributes(given, lambda: self._shapes.get(node.input[0]))
        return None if found is None else Layer(None, node, found, None, {})

    def _depthwise(self, node: NodeProto) -> Layer | None:
        """A depthwise convolution whose weight is stored as it is, if it can be fused."""
        if node.domain or node.op_type != "Conv" or len(node.input) < 2 or len(node.output) != 1:
            return None
        tensor = self._scope.initializers.get(node.input[1])
        if tensor is None or node.input[1] not in self._fixed or tensor.data_type != TensorProto.FLOAT:
            return None
        shape = tuple(map(int, tensor.dims))
        given = _given(node)
        if given is None or len(shape) < 3 or min(shape) < 1:
            return None
        after = self._only_reader(node.output[0])
        if after is not None and after.op_type == "BatchNormalization":
            return None  # onnxruntime folds it into the weight
        found = conv_attributes(given, shape, lambda: self._shapes.get(node.input[0]))
        if found is None or shape[1] != 1 or shape[0] != found["group"]:
            return None
        bias = self._bias(node, shape)
        return None if bias is None else Layer(None, node, found, *bias)

    def _is_behind(self, node: NodeProto, fused: set[str], made: dict[str, NodeProto]) -> bool:
        """Whether a value that a fused layer makes reaches a node with no other layer in between.

        For a MaxPool, which has no weight that says so, there must be float32 all the way.
        """
        is_pool = node.op_type == "MaxPool"
        waiting, seen = [node.input[0]], set()
        while waiting:
            name = waiting.pop()
            if name in fused:
                return True
            maker = made.get(name)
            if maker is not None and name not in seen:
                passes = _keeps_type(maker, name) if is_pool else maker.op_type not in LAYERS
                waiting.extend(maker.input if passes else [])
            seen.add(name)
        return False

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        known = {name: shape for name, (_, shape) in self._decodes.items()}
        return infer_shapes(self._model, known, {id(node) for node, _ in self._decodes.values()})

    def _weight_shape(self, node: NodeProto) -> tuple[int, ...] | None:
        """Shape of the weight that a Decode node yields from constants; None for other nodes."""
        if (node.domain, node.op_type) != (DOMAIN, "Decode") or not self._known.issuperset(node.input):
            return None
        if len(node.input) != 4 or len(node.output) != 1:
            return None
        layout = constant_value(self._scope, node.input[3], self._folder)
        perm = attributes(node).get("perm", [])
        sizes = [] if layout is None or layout.ndim != 1 else [int(size) for size in layout[2:]]
        if sorted(perm) != list(range(len(sizes))) or min(sizes, default=0) < 1:
            return None
        return tuple(sizes[axis] for axis in perm)

    def _layer(self, layer: NodeProto) -> Layer | None:
        """The layer and its Decode, if they can be fused."""
        if layer.domain or layer.op_type not in LAYERS or len(layer.input) < 2 or len(layer.output) != 1:
            return None
        decode, shape = self._decodes.get(layer.input[1], (None, ()))
        if decode is None or self._only_reader(layer.input[1]) is not layer or layer.input[0] == layer.input[1]:
            return None
        given = _given(layer)
        if given is None:
            return None
        found: dict[str, Any] | None = None
        if layer.op_type == "Conv":
            found = conv_attributes(given, shape, lambda: self._shapes.get(layer.input[0]))
        elif len(shape) == 2 and layer.op_type == "MatMul":
            found = {}
        elif len(shape) == 2 and given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA"):
            found = {"transB": int(given.get("transB", 0))}
        if found is None:
            return None
        bias = self._bias(layer, shape)
        return None if bias is None else Layer(decode, layer, found, *bias)

    def _group(self, layer: Layer, convs: set[str]) -> Group:
        tail, further, more = self._tail(layer.node, convs)
        op = FusedOp(layer.kind, tuple(node.op_type for node in tail))
        if op.name not in FUSED:
            op, tail, further, more = FusedOp(layer.kind), (), (), {}
        return Group(layer, tail, op, {**layer.origin, **more}, further)

    def _bias(self, layer: NodeProto, weight: tuple[int, ...]) -> tuple[str | None, dict[str, Any]] | None:
        """Name of a bias of one value for each output, and what the note must say of it; None if it is another."""
        if layer.op_type == "MatMul":
            return None, {}
        outputs_last = layer.op_type == "Gemm" and not attributes(layer).get("transB", 0)
        outputs = weight[-1 if outputs_last else 0]
        if len(layer.input) < 3 or not layer.input[2]:
            return self.writer.constant(np.zeros(outputs, np.float32)), {"bias": tuple(layer.input[2:])}
        name = layer.input[2]
        if layer.op_type == "Conv":
            return name, {}
        values = self._constant(name)
        if values is None:
            return (name, {}) if self._shapes.get(name) == (outputs,) else None
        if values.shape == (outputs,):
            return name, {}
        if values.dtype != np.float32 or (values.size != 1 and values.shape != (1, outputs)):
            return None
        each = np.broadcast_to(values.reshape(-1), outputs)
        return self.writer.constant(each), {"bias": (name,), "bias_shape": values.shape}

    def _only_reader(self, name: str) -> NodeProto | None:
        """The node of the main graph that is all that reads a value, once; None if there is more, or less."""
        uses = self._scope.uses.get(name, [])
        if len(uses) != 1 or uses[0].scope is not self._scope or name in self._scope.outputs:
            return None
        return uses[0].node

    def _constant(self, name: str) -> NDArray[Any] | None:
        """The values of a constant that nobody can feed."""
        if name in self._scope.initializers and name not in self._fixed:
            return None
        return constant_value(self._scope, name, self._folder)

    def _tail(self, layer: NodeProto, convs: set[str]) -> _Tail:
        """What follows a layer and is computed with it, its further inputs, and what the note must say of it.

        Of two convolutions (outputs in ``convs``) that are added, the first summand takes the sum, as in onnxruntime.
        """
        nothing: _Tail = (), (), {}
        silu = self._silu(layer.output[0])
        if silu is not None:
            return silu, (), {"swapped": True} if silu[1].input[1] == layer.output[0] else {}
        first = self._follower(layer.output[0])
        if first is None or layer.op_type == "MatMul":
            return nothing
        if first.op_type == "Relu":
            return (first,), (), {}
        if layer.op_type == "Conv" and first.op_type == "Clip" and self.opset >= CLIP_OPSET:
            limits = self._limits(first)
            return nothing if limits is None else ((first,), *limits)
        if layer.op_type == "Conv" and first.op_type == "Add" and len(first.input) == 2:
            swapped = first.input[1] == layer.output[0]
            residual = first.input[0 if swapped else 1]
            takes = swapped and residual in convs and self._follower(residual) is first
            if takes or not self._equal_shapes(layer.output[0], residual):
                return nothing
            second = self._follower(first.output[0])
            relu = (second,) if second is not None and second.op_type == "Relu" else ()
            return (first, *relu), (residual,), {"swapped": True} if swapped else {}
        return nothing

    def _silu(self, name: str) -> tuple[NodeProto, NodeProto] | None:
        """The Sigmoid of a value and its product with it, if these two are all that reads it."""
        uses = self._scope.uses.get(name, [])
        if len(uses) != 2 or any(use.scope is not self._scope for use in uses) or name in self._scope.outputs:
            return None
        for sigmoid, product in (uses, uses[::-1]):
            nodes = sigmoid.node, product.node
            if tuple(node.op_type for node in nodes) == SILU and _is_plain(sigmoid.node):
                return nodes if self._follower(sigmoid.node.output[0]) is product.node else None
        return None

    def _follower(self, name: str) -> NodeProto | None:
        """The only reader of a value, if it is a plain operator."""
        node = self._only_reader(name)
        return None if node is None or not _is_plain(node) else node

    def _limits(self, clip: NodeProto) -> tuple[tuple[str, ...], dict[str, Any]] | None:
        """Names of a Clip's constant limits; one that is not given is made."""
        given = tuple(clip.input[1:])
        names = []
        for place, least in enumerate((_FLOAT_LIMITS.min, _FLOAT_LIMITS.max)):
            if place < len(given) and given[place]:
                values = self._constant(given[place])
                if values is None or values.shape not in ((), (1,)) or values.dtype != np.float32:
                    return None
                names.append(given[place])
            else:
                names.append(self.writer.constant(np.array(least, np.float32)))
        return tuple(names), {} if given == tuple(names) else {"limits": given}

    def _equal_shapes(self, one: str, other: str) -> bool:
        """Whether two values surely have the same shape, so that an Add repeats neither."""
        shape = self._shapes.get(one)
        return shape is not None and None not in shape and shape == self._shapes.get(other)
