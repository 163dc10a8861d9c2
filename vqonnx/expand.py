"""Turn a compressed model of any target back into a plain one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from vqonnx import modelfile
from vqonnx.compact import restore
from vqonnx.errors import InputError, ModelError
from vqonnx.graph import Scope
from vqonnx.modelfile import make_tensor, remove_entries, set_nodes
from vqonnx.ops import DOMAIN, decode_function
from vqonnx.pair import join, joined_weight
from vqonnx.place import main_opset
from vqonnx.record import erase_record, read_record
from vqonnx.runtime import open_session, run
from vqonnx.stored import StoredWeight, elem_type, find_stored
from vqonnx.tidy import constant_tensor
from vqonnx.unfusion import split_layers


def expand(compressed: str | Path, plain: str | Path) -> int:
    """Write the model with every stored weight decoded; gives the number of weights.

    Raises:
        ModelError: The model cannot be read, or vqonnx did not compress it.
        InputError: The output path is the input's, or cannot be written.
    """
    compressed, plain = Path(compressed), Path(plain)
    modelfile.check_output(plain, compressed)
    model = modelfile.load(compressed)
    restore(model)
    split_layers(model, compressed.parent)
    weights = find_stored(model, compressed.parent, read_record(model))
    if not weights:
        raise ModelError(f"{compressed}: holds no weight that vqonnx compressed; there is nothing to expand")
    opset = main_opset(model)
    # The library's kernel is not used here; a file may carry no body of its op, but those of others it always does.
    others = [f for f in model.functions if f.domain == DOMAIN and f.name != "Decode"]
    decoded = [_decode(weight, opset, [decode_function(opset), *others]) for weight in weights]
    touched = {id(s): s for w in weights for s in (w.scope, *(pair.scope for pair in w.pairs))}
    instead = _replacements(weights)
    # Inner scopes first: rewriting a scope copies its nodes, and with them the subgraphs that they hold.
    for scope in sorted(touched.values(), key=lambda scope: -len(scope.lineage)):
        mine = [(w, tensor) for w, tensor in zip(weights, decoded, strict=True) if w.scope is scope]
        _put_back(scope, mine, instead)
    _forget(model)
    with modelfile.whole_or_nothing(plain) as draft:
        modelfile.save(model, draft, compressed.parent)
    return len(weights)


def _decode(weight: StoredWeight, opset: int, bodies: Sequence[FunctionProto]) -> TensorProto:
    """Run the nodes that make the weight, without the library."""
    kind = elem_type(weight)
    # The last Cast is done here, as numpy has no bfloat16.
    makers = [part if kind == TensorProto.FLOAT else part[:-1] for part in weight.makers]
    nodes = [node for part in makers for node in part]
    outputs = [part[-1].output[0] for part in makers]
    functions = bodies if any(node.domain == DOMAIN for node in nodes) else []
    graph = helper.make_graph(
        nodes, "weight", [], [ValueInfoProto(name=name) for name in outputs], initializer=list(_constants(weight))
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(DOMAIN, 1)] if functions else [])
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)
    try:
        found = run(open_session(model.SerializeToString()), {})
    except InputError as error:
        raise ModelError(f"weight '{weight.name}' cannot be decoded, the file is damaged: {error}") from error
    values: list[NDArray[np.float32]] = [found[name] for name in outputs]
    if weight.pairs:
        values = [joined_weight(weight.pairs[0].first, weight.pairs[0].second, *values)]
    return make_tensor(values[0], kind, weight.name)


def _constants(weight: StoredWeight) -> list[TensorProto]:
    constants = []
    for name in weight.constants:
        home = weight.scope.home(name)
        assert home is not None
        tensor = home.initializers[name] if name in home.initializers else constant_tensor(home.producers[name])
        assert tensor is not None
        copy = TensorProto()
        copy.CopyFrom(modelfile.inlined(tensor, weight.folder))
        copy.name = name
        constants.append(copy)
    return constants


def _replacements(weights: Iterable[StoredWeight]) -> dict[int, list[NodeProto]]:
    """Nodes to put in the place of a node, by its id: none for those that make weights, one for two layers."""
    instead: dict[int, list[NodeProto]] = {}
    for weight in weights:
        instead.update((id(node), []) for node in weight.nodes)
        for pair in weight.pairs:
            instead[id(pair.first)] = []
            instead[id(pair.second)] = [join(pair.first, pair.second, weight.name)]
    return instead


def _put_back(
    scope: Scope, weights: list[tuple[StoredWeight, TensorProto]], instead: dict[int, list[NodeProto]]
) -> None:
    proto = scope.proto
    stored = {name for weight, _ in weights for name in weight.constants}
    stored |= {name for weight, _ in weights for pair in weight.pairs for name in pair.first.input[2:]}
    unused = {n for n in stored if n in scope.uses and all(id(use.node) in instead for use in scope.uses[n])}
    unread = {id(scope.producers[name]) for name in unused if name in scope.producers}
    nodes = []
    if isinstance(proto, FunctionProto):
        nodes = [helper.make_node("Constant", [], [weight.name], value=tensor) for weight, tensor in weights]
    for node in proto.node:
        nodes += instead.get(id(node), [] if id(node) in unread else [node])
    set_nodes(proto, nodes)
    if isinstance(proto, FunctionProto):
        return
    remove_entries(proto.initializer, lambda tensor: tensor.name in unused)
    proto.initializer.extend(tensor for _, tensor in weights)


def _forget(model: ModelProto) -> None:
    """Remove the function, the domain and the record."""
    remove_entries(model.functions, lambda function: function.domain == DOMAIN)
    for entries in (model.opset_import, *(function.opset_import for function in model.functions)):
        remove_entries(entries, lambda entry: entry.domain == DOMAIN)
    erase_record(model)
