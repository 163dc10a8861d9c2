"""Put forms in the place of weights: in one of the three targets, and leave everything else as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from vqonnx import ops
from vqonnx.form import Blocks, Coded, Dense, Form, Product
from vqonnx.graph import Site
from vqonnx.inflate import inflate_functions, write_inflate
from vqonnx.modelfile import remove_entries, set_nodes
from vqonnx.pair import obstacle, pair_of, split
from vqonnx.scope import Scope, scopes
from vqonnx.share import parts_of
from vqonnx.view import View
from vqonnx.writer import Writer

Target = Literal["hybrid", "portable", "custom"]

_GEMM_WITHOUT_BIAS = 11  # opset from which on Gemm can do without
# What a layer costs besides its arrays: a node, names and shapes. A form that saves less is not worth it.
OVERHEAD = 150

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Placement:
    """A form that takes the place of the weight of a site, seen in a view."""

    site: Site
    form: Form
    view: View


@dataclass(eq=False)
class _Edit:
    """What changes in one scope.

    Attributes:
        writer: Makes the new nodes and constants.
        inserts: Nodes to put before the node at a position.
        instead: Nodes to put in the place of a node, by its id; none drops it.
        gone: Names of constants that fall away.
        made: Weights that the new nodes yield under their old names.
    """

    scope: Scope
    writer: Writer
    inserts: dict[int, list[NodeProto]] = field(default_factory=dict)
    instead: dict[int, Sequence[NodeProto]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)


class _Edits(dict[int, _Edit]):
    """The edits by id of their scopes, made when asked for."""

    def __init__(self, taken: set[str]) -> None:
        super().__init__()
        self._taken = taken

    def of(self, scope: Scope) -> _Edit:
        return self.setdefault(id(scope), _Edit(scope, Writer(self._taken)))


def place(model: ModelProto, placements: Sequence[Placement], target: Target) -> tuple[tuple[str, ...], ...]:
    """Rewrite ``model`` in place; the sites must come from it.

    The new nodes yield each weight under its old name, except for a product that is applied to activations (`pair_of`):
    two layers take the place of each layer that reads the weight.

    Returns:
        For each placement the names of the weights of its two layers, or nothing where the weight keeps its name.

    Raises:
        ModelError: The opset is too old for a function body.
    """
    opset = main_opset(model)
    edits = _Edits(all_names(model))
    factors = tuple(_place(placement, edits, target, opset) for placement in placements)
    # Inner scopes first: rewriting a scope copies its nodes, and with them the subgraphs that they hold.
    for edit in sorted(edits.values(), key=lambda edit: -len(edit.scope.lineage)):
        _rewrite(edit)
    coded = [
        placement for placement in placements if any(parts_of(placement.form))
    ]  # the others are standard operators
    if target != "portable" and coded:
        _import_domain(model.opset_import)
        for placement in coded:
            outermost = placement.site.scope.lineage[-1].proto
            if isinstance(outermost, FunctionProto):
                _import_domain(outermost.opset_import)
    if target == "hybrid" and coded:
        features = ops.Features(guarded=any(_feeds_matmul(placement) for placement in coded))
        for part in (part for placement in coded for part in parts_of(placement.form)):
            features |= ops.Features.of(part)
        model.functions.append(ops.decode_function(opset, features))
    if target != "portable":
        parts = [part for placement in coded for part in parts_of(placement.form)]
        model.functions.extend(inflate_functions((part.coding for part in parts if part.coding is not None), opset))
    ours = any(function.domain == ops.DOMAIN for function in model.functions)
    _raise_ir_version(model, ops.FUNCTION_IR_VERSION if ours else 4)
    return factors


def main_opset(model: ModelProto) -> int:
    """Version of the standard operators that the model is written for."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _place(placement: Placement, edits: _Edits, target: Target, opset: int) -> tuple[str, ...]:
    """Note the edits that put one form in place; gives the names of the weights of the two layers, if any."""
    site, form, view = placement.site, placement.form, placement.view
    edit = edits.of(site.scope)
    writer = edit.writer
    makers = {id(node) for node in site.between}
    if site.source in site.scope.producers:
        makers.add(id(site.scope.producers[site.source]))
    edit.instead.update((maker, ()) for maker in makers)
    edit.gone.add(site.source)
    pair = pair_of(site, view, form)
    if pair is None:
        reason = obstacle(site, view, form)
        if reason is not None and not (isinstance(form, Product) and form.apply == "cheaper"):
            _log.warning("%s: the product is multiplied out into the weight, as %s", site.name, reason)
        names: tuple[str, ...] = ()
        edit.made.add(site.name)
        _write(writer, form, view, site.name, site.elem_type, 1, target, opset)
    else:
        names = writer.name(), writer.name()
        _write(writer, pair.first, pair.first_view, names[0], site.elem_type, pair.copies, target, opset)
        _write(writer, pair.second, pair.second_view, names[1], site.elem_type, 1, target, opset)
        zero = None
        if opset < _GEMM_WITHOUT_BIAS and any(use.node.op_type == "Gemm" for use in site.uses):
            zero = writer.constant(np.zeros(1, helper.tensor_dtype_to_np_dtype(site.elem_type)))
        for use in site.uses:
            edits.of(use.scope).instead[id(use.node)] = split(use.node, pair, names, writer.name(), zero)
    nodes = enumerate(site.scope.proto.node)
    position = next(i for i, node in nodes if id(node) in makers or site.name in node_reads(node))
    edit.inserts.setdefault(position, []).extend(writer.take())
    return names


def _rewrite(edit: _Edit) -> None:
    scope, proto = edit.scope, edit.scope.proto
    dropped = {node for node, instead in edit.instead.items() if not instead}
    unused = _unused(scope, edit.gone, dropped)
    dropped |= {id(scope.producers[name]) for name in unused if name in scope.producers}

    nodes: list[NodeProto] = []
    constants = edit.writer.constants
    if isinstance(proto, FunctionProto):  # a function has no initializers
        nodes += [helper.make_node("Constant", [], [name], value=tensor) for name, tensor in constants.items()]
    for position, node in enumerate(proto.node):
        nodes += edit.inserts.get(position, [])
        nodes += edit.instead.get(id(node), [] if id(node) in dropped else [node])
    set_nodes(proto, nodes)
    if isinstance(proto, GraphProto):
        _remove_named(proto.initializer, unused)
        _remove_named(proto.input, unused)
        outputs = {name for node in scope.producers.values() if id(node) in dropped for name in node.output}
        _remove_named(proto.value_info, (unused | outputs) - edit.made)
        proto.initializer.extend(constants.values())


def _write(
    writer: Writer, form: Form, view: View, output: str, elem_type: int, copies: int, target: Target, opset: int
) -> None:
    """Add the nodes that yield a form as a weight, ``copies`` of it along the first axis."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = []  # what follows the tensor `[split]` transposed by `perm`
    if view.transposed != view.shape:
        steps.append(("Reshape", [writer.constant(np.array(view.shape, np.int64))], {}))
    if copies > 1:
        repeats = np.array([copies] + [1] * (len(view.shape) - 1), np.int64)
        steps.append(("Tile", [writer.constant(repeats)], {}))
    if elem_type != TensorProto.FLOAT:
        steps.append(("Cast", [], {"to": elem_type}))
    last = output if not steps else writer.name()
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
        value = writer.node(op_type, [value, *inputs], output if number == len(steps) else None, **attributes)


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
    if target == "portable":  # standard operators read codes of one length
        return ops.write_standard(writer, replace(form, coding=None), split, perm, output, opset)
    codes = None if form.coding is None else write_inflate(writer, form)
    return ops.write_decode(writer, form, split, perm, output, codes=codes)


def _feeds_matmul(placement: Placement) -> bool:
    """Whether a Decode node may stand in front of a Gemm or MatMul: the layer itself, or a product of factors."""
    layers = {use.node.op_type for use in placement.site.uses}
    return bool(layers & {"Gemm", "MatMul"}) or not isinstance(placement.form, Coded)


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


def all_names(model: ModelProto) -> set[str]:
    """Every name of a tensor in the model, in any scope."""
    return names_in(scopes(model))


def names_in(some: Iterable[Scope]) -> set[str]:
    """Every name of a tensor in these scopes."""
    names: set[str] = set()
    for scope in some:
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
