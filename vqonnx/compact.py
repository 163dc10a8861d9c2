"""Make all that is not weights in a compressed model as small as it gets; the outputs stay the same, bit for bit.

The order of the steps matters: what was computed in advance leaves nodes that nobody reads, and names are given last.
Inputs, outputs and opsets stay. Readers of files call `restore` first, which gives weights the names of the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from vqonnx.bundle import bundle, unbundle
from vqonnx.defaults import drop_defaults
from vqonnx.fold import fold_constants
from vqonnx.macros import gather_runs, inline, write_macros
from vqonnx.names import rename, shorten, spaces, subgraphs
from vqonnx.record import Row, is_packed, read_record, store_record
from vqonnx.stored import StoredWeight, find_stored
from vqonnx.tidy import drop_copies, drop_unread, merge_constants, pack_tensors, store_constants, strip
from vqonnx.unfusion import split_layers

_CONSTANTS_NEED_NO_LISTING = 4  # IR version from which on initializers need not be inputs


def compact(model: ModelProto, folder: str | Path = ".") -> None:
    """Take out of a model, in place, what nobody needs to run it, and shorten what is left.

    What it computes, its inputs, outputs and opsets stay as they are, and so does what the record says of weights.
    Names of nodes and of values inside, texts, and types of values inside go. Doing it twice changes nothing.

    Args:
        model: The model.
        folder: Where it lies, for external data, which are left where they are.
    """
    restore(model)
    split_layers(model, Path(folder))
    unbundle(model)
    strip(model)
    weights = find_stored(model, folder, read_record(model))
    makers = {name for weight in weights for node in weight.nodes for name in node.output}
    before = -1
    while before != (before := model.ByteSize()):  # one step makes room for another
        if model.ir_version >= _CONSTANTS_NEED_NO_LISTING:
            store_constants(model)
        drop_copies(model)
        fold_constants(model, makers)
        drop_unread(model)
        pack_tensors(model)
        merge_constants(model)
        drop_defaults(model)
    gather_runs(model)
    bundle(model)
    if not model.training_info:  # it knows values by their names
        _shorten(model, folder)


def restore(model: ModelProto) -> bool:
    """Undo, in place, what readers of weights would stumble over; models that are not compact stay as they are.

    Weights get the names that the record has for them, constants are no longer parts of one, and the record is JSON.

    Returns:
        Whether the model was compact.
    """
    if not is_packed(model):
        return False
    inline(model)
    unbundle(model)
    record = read_record(model)
    if record is not None:
        names = {row.tensor: row.name for row in record.layers if row.tensor}
        rename(spaces(model)[0], lambda _, name: names.get(name, name))
        store_record(model, replace(record, layers=tuple(replace(row, tensor="") for row in record.layers)))
    return True


def _shorten(model: ModelProto, folder: str | Path) -> None:
    """Write macros, give short names, and note in the record how its weights are called in the end."""
    record = read_record(model)
    rows = () if record is None else record.layers
    found = find_stored(model, folder, record)
    weights = {id(weight.row): weight for weight in found if weight.row is not None}
    nodes = list(_all_nodes(model.graph))
    places = {id(node): place for place, node in enumerate(nodes)}
    makers = {key: [places.get(id(part[-1])) for part in weight.makers] for key, weight in weights.items()}
    ordered = [name for row in rows if id(row) in weights for name in _tensors(weights[id(row)])]
    fixed = {  # two functions may use a short name for two things, so weights in functions keep their names
        name
        for weight in weights.values()
        if isinstance(weight.scope.lineage[-1].proto, FunctionProto)
        for name in _tensors(weight)
    }
    write_macros(model)
    main, *functions = spaces(model)
    shorten(main, [row.name for row in rows], ordered)
    for function in functions:
        for space in function.all:
            space.fixed |= fixed & space.uses.keys()
        shorten(function)
    if record is not None:
        plain = ModelProto()
        plain.CopyFrom(model)
        inline(plain)
        outputs = [node.output[0] for node in _all_nodes(plain.graph)]
        assert len(outputs) == len(nodes)
        tensors = {
            key: [outputs[place] for place in made if place is not None]
            for key, made in makers.items()
            if None not in made
        }
        named = tuple(_named(row, tensors.get(id(row), [])) for row in rows)
        store_record(model, replace(record, layers=named), packed=True)


def _all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of its subgraphs, in order."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _all_nodes(inner)


def _named(row: Row, names: Sequence[str]) -> Row:
    """The row with the names that the tensors of its weight have now; as it is where none is known."""
    if row.factors:
        return replace(row, factors=tuple(names) or row.factors)
    return replace(row, tensor=names[0] if names and names[0] != row.name else "")


def _tensors(weight: StoredWeight) -> tuple[str, ...]:
    """Names of the tensors of a weight."""
    return tuple(nodes[-1].output[0] for nodes in weight.makers)
