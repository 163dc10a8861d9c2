"""Turn a compressed model of any target back into a plain one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper

from vqonnx import modelfile
from vqonnx.compact import restore
from vqonnx.errors import ModelError
from vqonnx.modelfile import make_tensor, remove_entries, set_nodes
from vqonnx.ops import DOMAIN
from vqonnx.pair import join, joined_weight
from vqonnx.recompute import compute
from vqonnx.record import erase_record, read_record
from vqonnx.scope import Scope
from vqonnx.stored import StoredWeight, elem_type, find_stored
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
    decoded = [_decode(weight, model) for weight in weights]
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


def _decode(weight: StoredWeight, model: ModelProto) -> TensorProto:
    """The weight as one tensor."""
    kind = elem_type(weight)
    # The last Cast is done here, as numpy has no bfloat16.
    makers = [part if kind == TensorProto.FLOAT else part[:-1] for part in weight.makers]
    values: list[NDArray[np.float32]] = compute(weight, [part[-1].output[0] for part in makers], model)
    if weight.pairs:
        values = [joined_weight(weight.pairs[0].first, weight.pairs[0].second, *values)]
    return make_tensor(values[0], kind, weight.name)


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
