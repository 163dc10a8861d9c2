"""Fuse layers: one op for the codes of a weight, the layer that reads it, and what follows it (Relu, Clip, Silu, Add).

Nodes of subgraphs and functions keep their Decode, and so does every layer for which `fused.py` has no op.
`unfusion.py` takes the ops apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import AttributeProto, ModelProto, NodeProto, helper

from vqonnx.errors import OptionError
from vqonnx.fused import FUSED
from vqonnx.fusible import Graph, Group
from vqonnx.modelfile import remove_entries, set_nodes
from vqonnx.ops import DOMAIN
from vqonnx.origin import KEY, Origin, texts_of
from vqonnx.place import Target, node_reads
from vqonnx.strips import rearrange, to_strips
from vqonnx.unfusion import split_layers

# Whether `compress` fuses unless it is told otherwise.
BY_DEFAULT = True


def is_fused(asked: bool | None, target: Target) -> bool:
    """Whether a file for a target gets fused ops; ``asked`` is what the user says of it, if anything.

    Raises:
        OptionError: They are asked for in a file of standard operators.
    """
    if asked and target == "portable":
        raise OptionError("fuse: target portable has standard operators only; choose hybrid or custom")
    return target != "portable" and (BY_DEFAULT if asked is None else asked)


def fuse_layers(model: ModelProto, folder: Path) -> dict[str, str]:
    """Fuse what can be fused, in place; what was fused before is fused anew.

    Args:
        model: A model with ``Decode`` nodes.
        folder: Where it lies, for external data.

    Returns:
        Name of the op by name of the weight; that of a MaxPool by name of the output.
    """
    split_layers(model, folder)
    graph = Graph(model, folder)
    groups = graph.groups()
    if not groups:
        return {}
    before = {name for node in graph.nodes for name in node_reads(node)}
    place = {id(node): position for position, node in enumerate(graph.nodes)}
    instead = {id(group.nodes[-1]): _node(group, place) for group in groups}
    gone = {id(node) for group in groups for node in group.nodes} - set(instead)
    set_nodes(model.graph, [instead.get(id(node), node) for node in graph.nodes if id(node) not in gone])
    after = {name for node in model.graph.node for name in node_reads(node)}
    model.graph.initializer.extend(tensor for name, tensor in graph.writer.constants.items() if name in after)
    unused = before - after
    unused -= {value.name for value in (*model.graph.input, *model.graph.output)}
    remove_entries(model.graph.initializer, lambda tensor: tensor.name in unused)
    strips = _store_strips(model, graph, groups, folder)
    if any(function.domain == DOMAIN for function in model.functions):
        names = sorted({group.op.name for group in groups})
        model.functions.extend(FUSED[name].function(graph.opset, strips=name in strips) for name in names)
    return {group.layer.name: group.op.name for group in groups}


def _store_strips(model: ModelProto, graph: Graph, groups: list[Group], folder: Path) -> set[str]:
    """Store codes in strips where every node that reads them can do with it; gives the names of those ops."""
    layers = {group.nodes[-1].output[0]: group for group in groups if graph.suits_strips(group.layer)}
    others = {output.name for output in model.graph.output}
    others.update(*(node_reads(node) for node in model.graph.node if layers.keys().isdisjoint(node.output)))
    kept = [group for group in layers.values() if others.isdisjoint(group.layer.codes)]
    codes = {name for group in kept for name in group.layer.codes}
    for tensor in model.graph.initializer:
        if tensor.name in codes:
            rearrange(tensor, to_strips, folder)
    return {group.op.name for group in kept}


def _node(group: Group, place: dict[int, int]) -> NodeProto:
    """The op's node, which keeps the name and texts of the layer."""
    layer, decode = group.layer, group.layer.decode
    names = tuple(node.name for node in group.others)
    origin = Origin(
        weight="" if decode is None else decode.output[0],
        places=tuple(place[id(node)] for node in group.nodes),
        values=tuple(node.output[0] for node in group.nodes[group.op.coded : -1]),
        names=names if any(names) else (),
        added=tuple(layer.missing),
        texts=texts_of(group.others),
        **group.origin,
    )
    node = NodeProto()
    node.CopyFrom(layer.node)
    node.op_type, node.domain = group.op.name, DOMAIN
    del node.input[:], node.output[:]
    bias = [] if layer.bias is None else [layer.bias]
    weight = layer.weight if decode is None else decode.input
    node.input.extend([layer.node.input[0], *weight, *bias, *group.further])
    node.output.append(group.nodes[-1].output[0])
    node.attribute.extend(_attribute(name, value) for name, value in layer.missing.items())
    node.attribute.extend([] if decode is None else decode.attribute)
    node.metadata_props.add(key=KEY, value=origin.to_json())
    return node


def _attribute(name: str, value: int | Sequence[int]) -> AttributeProto:
    kind = AttributeProto.INT if isinstance(value, int) else AttributeProto.INTS
    return helper.make_attribute(name, value, attr_type=kind)
