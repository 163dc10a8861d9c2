"""Take fused ops apart again: ``Decode``, the layer, and what follows it, as they were before."""

from __future__ import annotations

from math import prod
from pathlib import Path

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from vqonnx.errors import ModelError
from vqonnx.fused import FUSED, FusedOp
from vqonnx.modelfile import remove_entries, set_nodes, to_array
from vqonnx.ops import DOMAIN
from vqonnx.origin import Origin, restore
from vqonnx.place import all_names, names_in, node_reads
from vqonnx.scope import scopes
from vqonnx.strips import in_strips, rearrange, to_rows
from vqonnx.writer import Writer


def split_layers(model: ModelProto, folder: Path = Path()) -> dict[str, str]:
    """Undo `vqonnx.fusion.fuse_layers`, in place: the nodes are those of before, in their order.

    Where a node has lost its note (some tools drop metadata), the values that it hides get new names.

    Args:
        model: Any model.
        folder: Where it lies, for external data.

    Returns:
        Name of the op by name of the weight; that of a MaxPool by name of the output.

    Raises:
        ModelError: A fused node lacks inputs, or lies where none is written.
    """
    _refuse_elsewhere(model)
    nodes = list(model.graph.node)  # held, as ids mean nothing once a node is let go
    fused = {id(node): op for node in nodes if (op := _op(node)) is not None}
    if not fused:
        return {}
    before = {name for node in nodes if id(node) in fused for name in node.input}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = names_in(scope for scope in scopes(model) if isinstance(scope.lineage[-1].proto, GraphProto))
    writer = Writer(all_names(model))
    parts: dict[int, list[NodeProto]] = {}
    places: dict[int, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    biases: dict[str, TensorProto] = {}
    for node in nodes:
        op = fused.get(id(node))
        if op is None:
            continue
        origin = _origin(node, op, taken, writer)
        parts[id(node)], places[id(node)] = restore(node, op, origin), origin.places
        names[origin.weight or (node.input[1] if "W" in op.inputs else node.output[0])] = op.name
        if origin.bias and origin.bias_shape is not None and origin.bias[0] not in constants:
            own = constants.get(node.input[op.inputs.index("B")])
            biases[origin.bias[0]] = _own_bias(own, origin.bias[0], origin.bias_shape, folder)
    set_nodes(model.graph, _in_order(nodes, parts, places))
    codes = {name for part in parts.values() for node in part if node.op_type == "Decode" for name in node.input[:1]}
    for tensor in model.graph.initializer:
        if tensor.name in codes and in_strips(tensor.dims):
            rearrange(tensor, to_rows, folder)
    model.graph.initializer.extend(biases.values())
    unused = before - {name for node in model.graph.node for name in node_reads(node)}
    unused -= {value.name for value in (*model.graph.input, *model.graph.output)}
    remove_entries(model.graph.initializer, lambda tensor: tensor.name in unused)
    remove_entries(model.functions, lambda function: function.domain == DOMAIN and function.name in FUSED)
    return names


def _refuse_elsewhere(model: ModelProto) -> None:
    """Refuse fused nodes in subgraphs and functions, where `fuse_layers` writes none."""
    for scope in scopes(model)[1:]:
        if isinstance(scope.proto, FunctionProto) and scope.proto.domain == DOMAIN:
            continue  # a body
        for node in scope.proto.node:
            if _op(node) is not None:
                raise ModelError(f"{_label(node)} is in {scope.path}; only layers of the main graph are ever fused")


def _origin(node: NodeProto, op: FusedOp, taken: set[str], writer: Writer) -> Origin:
    """What the node's note says, or an origin with new names; adds its names to ``taken``."""
    if len(node.input) != len(op.inputs) or len(node.output) != 1:
        raise ModelError(
            f"{_label(node)} has {len(node.input)} inputs instead of {len(op.inputs)}; the file is damaged"
        )
    origin = Origin.of(node, op)
    names = () if origin is None else (*([origin.weight] if op.coded else []), *origin.values)
    if origin is None or len(set(names)) < len(names) or taken.intersection(names):
        return Origin(writer.name() if op.coded else "", (), tuple(writer.name() for _ in op.tail))
    taken.update(names)
    return origin


def _op(node: NodeProto) -> FusedOp | None:
    return FUSED.get(node.op_type) if node.domain == DOMAIN else None


def _label(node: NodeProto) -> str:
    return f"node '{node.name or next(iter(node.output), '')}' ({DOMAIN}.{node.op_type})"


def _own_bias(tensor: TensorProto | None, name: str, shape: tuple[int, ...], folder: Path) -> TensorProto:
    """The bias that a layer had, from the one of one value for each output."""
    values = None if tensor is None else to_array(tensor, folder).reshape(-1)
    if values is None or not 1 <= prod(shape) <= values.size:
        raise ModelError(f"bias '{name}' {list(shape)} cannot be made again; the file is damaged")
    return numpy_helper.from_array(values[: prod(shape)].reshape(shape), name)


def _in_order(
    nodes: list[NodeProto], parts: dict[int, list[NodeProto]], places: dict[int, tuple[int, ...]]
) -> list[NodeProto]:
    """The nodes where they were before; in the place of the fused ones if the file has been changed meanwhile."""
    at_hand = [part for node in nodes for part in parts.get(id(node), [node])]
    placed = {place: part for key, each in parts.items() for place, part in zip(places[key], each, strict=False)}
    moved = sum(map(len, parts.values()))
    if len(placed) != moved or not 0 <= min(placed) <= max(placed) < len(at_hand):
        return at_hand
    others = (node for node in nodes if id(node) not in parts)
    ordered = [placed[i] if i in placed else next(others) for i in range(len(at_hand))]
    return ordered if _is_sorted(ordered) else at_hand


def _is_sorted(nodes: list[NodeProto]) -> bool:
    made = {name for node in nodes for name in node.output if name}
    known: set[str] = set()
    for node in nodes:
        if node_reads(node) & made - known - {name for name in node.output if name}:
            return False
        known.update(node.output)
    return True
