"""Put forms in the place of weights: in one of the three targets, and leave everything else as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from vqonnx import ops
from vqonnx.form import Blocks, Coded, Dense, Form, Product
from vqonnx.graph import Scope, Site, scopes
from vqonnx.modelfile import remove_entries, set_nodes
from vqonnx.view import View
from vqonnx.writer import Writer

Target = Literal["hybrid", "portable", "custom"]

# What a layer costs besides its arrays: a node, names and shapes. A form that saves less is not worth it.
OVERHEAD = 150


@dataclass(frozen=True, eq=False)
class Placement:
    """A form that takes the place of the weight of a site, seen in a view."""

    site: Site
    form: Form
    view: View


def place(model: ModelProto, placements: Sequence[Placement], target: Target) -> None:
    """Rewrite ``model`` in place; the sites must come from it.

    Raises:
        ModelError: The opset is too old for a function body.
    """
    opset = main_opset(model)
    taken = _all_names(model)
    by_scope: dict[int, list[Placement]] = {}
    for placement in placements:
        by_scope.setdefault(id(placement.site.scope), []).append(placement)
    # Inner scopes first: rewriting a scope copies its nodes, and with them the subgraphs that they hold.
    for group in sorted(by_scope.values(), key=lambda group: -len(group[0].site.scope.lineage)):
        _rewrite(group[0].site.scope, group, taken, target, opset)
    coded = [placement for placement in placements if any(_coded(placement.form))]  # the others are standard operators
    if target != "portable" and coded:
        _import_domain(model.opset_import)
        for placement in coded:
            outermost = placement.site.scope.lineage[-1].proto
            if isinstance(outermost, FunctionProto):
                _import_domain(outermost.opset_import)
    if target == "hybrid" and coded:
        features = ops.Features(guarded=any(_feeds_matmul(placement) for placement in coded))
        for part in (part for placement in coded for part in _coded(placement.form)):
            features |= ops.Features.of(part)
        model.functions.append(ops.decode_function(opset, features))
    _raise_ir_version(model, ops.FUNCTION_IR_VERSION if target == "hybrid" and coded else 4)


def main_opset(model: ModelProto) -> int:
    """Version of the standard operators that the model is written for."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _rewrite(scope: Scope, placements: list[Placement], taken: set[str], target: Target, opset: int) -> None:
    proto = scope.proto
    writer = Writer(taken)
    inserts: dict[int, list[NodeProto]] = {}
    dropped: set[int] = set()
    for placement in placements:
        site = placement.site
        makers = {id(node) for node in site.between}
        if site.source in scope.producers:
            makers.add(id(scope.producers[site.source]))
        dropped |= makers
        position = next(i for i, node in enumerate(proto.node) if id(node) in makers or site.name in node_reads(node))
        _write(writer, placement, target, opset)
        inserts.setdefault(position, []).extend(writer.take())
    unused = _unused(scope, {placement.site.source for placement in placements}, dropped)
    dropped |= {id(scope.producers[name]) for name in unused if name in scope.producers}

    nodes: list[NodeProto] = []
    if isinstance(proto, FunctionProto):  # a function has no initializers
        nodes += [helper.make_node("Constant", [], [name], value=tensor) for name, tensor in writer.constants.items()]
    for position, node in enumerate(proto.node):
        nodes += inserts.get(position, [])
        if id(node) not in dropped:
            nodes.append(node)
    set_nodes(proto, nodes)
    if isinstance(proto, GraphProto):
        _remove_named(proto.initializer, unused)
        _remove_named(proto.input, unused)
        outputs = {name for node in scope.producers.values() if id(node) in dropped for name in node.output}
        _remove_named(proto.value_info, (unused | outputs) - {placement.site.name for placement in placements})
        proto.initializer.extend(writer.constants.values())


def _write(writer: Writer, placement: Placement, target: Target, opset: int) -> None:
    """Add the nodes that yield the weight under its old name."""
    site, form, view = placement.site, placement.form, placement.view
    steps: list[tuple[str, list[str], dict[str, Any]]] = []  # what follows the tensor `[split]` transposed by `perm`
    if view.transposed != view.shape:
        steps.append(("Reshape", [writer.constant(np.array(view.shape, np.int64))], {}))
    if site.elem_type != TensorProto.FLOAT:
        steps.append(("Cast", [], {"to": site.elem_type}))
    last = site.name if not steps else writer.name()
    if isinstance(form, Coded):
        value = _write_coded(writer, form, view.split, view.perm, last, target, opset)
    else:
        matrix = _write_matrix(writer, form, target, opset)
        plain = view.perm == tuple(range(len(view.perm)))
        sizes = writer.constant(np.array(view.split, np.int64))
        value = writer.node("Reshape", [matrix, sizes], last if plain else None)
        if not plain:
            value = writer.node("Transpose", [value], last, perm=view.perm)
    for number, (op_type, inputs, attributes) in enumerate(steps, start=1):
        value = writer.node(op_type, [value, *inputs], site.name if number == len(steps) else None, **attributes)


def _write_matrix(writer: Writer, form: Form, target: Target, opset: int) -> str:
    """Add the nodes that yield a form as a float32 matrix."""
    if isinstance(form, Coded):
        return _write_coded(writer, form, form.shape, (0, 1), writer.name(), target, opset)
    if isinstance(form, Dense):
        values = writer.constant(form.values)
        return values if form.values.dtype == np.float32 else writer.node("Cast", [values], to=TensorProto.FLOAT)
    if isinstance(form, Product):
        factors = [_write_matrix(writer, factor, target, opset) for factor in (form.left, form.right)]
        return writer.node("MatMul", factors)
    assert isinstance(form, Blocks)
    return writer.node("Concat", [_write_matrix(writer, part, target, opset) for part in form.parts], axis=form.axis)


def _write_coded(
    writer: Writer, form: Coded, split: tuple[int, ...], perm: tuple[int, ...], output: str, target: Target, opset: int
) -> str:
    if target == "portable":
        return ops.write_standard(writer, form, split, perm, output, opset)
    return ops.write_decode(writer, form, split, perm, output)


def _feeds_matmul(placement: Placement) -> bool:
    """Whether a Decode node may stand in front of a Gemm or MatMul: the layer itself, or a product of factors."""
    layers = {use.node.op_type for use in placement.site.uses}
    return bool(layers & {"Gemm", "MatMul"}) or not isinstance(placement.form, Coded)


def _coded(form: Form) -> Iterator[Coded]:
    if isinstance(form, Coded):
        yield form
    elif isinstance(form, Product):
        yield from _coded(form.left)
        yield from _coded(form.right)
    elif isinstance(form, Blocks):
        for part in form.parts:
            yield from _coded(part)


def node_reads(node: NodeProto) -> set[str]:
    """Names that a node reads, those that its subgraphs take from outside included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            names |= {output.name for output in graph.output}
            for inner in graph.node:
                names |= node_reads(inner)
    return names


def _unused(scope: Scope, sources: set[str], dropped: set[int]) -> set[str]:
    """Constants that only dropped nodes read: the old weights, and the sizes of dropped Reshape nodes."""
    unused = set(sources)
    for name, uses in scope.uses.items():
        constant = name in scope.initializers or scope.producers[name].op_type == "Constant"
        if constant and name not in scope.outputs and all(id(use.node) in dropped for use in uses):
            unused.add(name)
    return unused


def _import_domain(entries: Any) -> None:
    if all(entry.domain != ops.DOMAIN for entry in entries):
        entries.append(helper.make_opsetid(ops.DOMAIN, ops.VERSION))


def _raise_ir_version(model: ModelProto, version: int) -> None:
    """Raise the IR version where needed.

    Before version 4 every initializer had to be listed as an input too, and none could be overridden; from 4 on a
    listed one can, and runtimes then no longer treat it as a constant. So the listing goes where the version changes.
    """
    if model.ir_version < 4 <= version:
        _remove_named(model.graph.input, {tensor.name for tensor in model.graph.initializer})
    model.ir_version = max(model.ir_version, version)


def _all_names(model: ModelProto) -> set[str]:
    names: set[str] = set()
    for scope in scopes(model):
        names |= set(scope.initializers) | set(scope.producers) | set(scope.uses) | scope.outputs
        names |= {name for node in scope.proto.node for name in node.input}
        names |= set(_input_names(scope.proto.input))
        if isinstance(scope.proto, GraphProto):
            names |= {tensor.values.name for tensor in scope.proto.sparse_initializer}
    return names


def _input_names(inputs: Iterable[Any]) -> Iterator[str]:
    for entry in inputs:
        yield entry if isinstance(entry, str) else entry.name


def _remove_named(entries: Any, names: set[str]) -> None:
    remove_entries(entries, lambda entry: entry.name in names)
