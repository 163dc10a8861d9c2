"""Compute values that a compressed model makes of its stored codes, without the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from vqonnx import modelfile
from vqonnx.errors import InputError, ModelError
from vqonnx.ops import DOMAIN, decode_function
from vqonnx.place import main_opset
from vqonnx.runtime import open_session, run
from vqonnx.stored import StoredWeight
from vqonnx.tidy import constant_tensor


def compute(weight: StoredWeight, outputs: Sequence[str], model: ModelProto) -> list[NDArray[Any]]:
    """Values on the way to a weight, by the names that its nodes have for them.

    Args:
        weight: The weight.
        outputs: Outputs of its nodes.
        model: The model that it is in.

    Raises:
        ModelError: The nodes do not run.
    """
    needed, nodes = set(outputs), []
    for node in reversed(weight.nodes):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    opset = main_opset(model)
    # A file may carry no body of Decode; those of other ops it always does.
    bodies = [f for f in model.functions if f.domain == DOMAIN and f.name != "Decode"]
    called = any(node.domain == DOMAIN for node in nodes)
    graph = helper.make_graph(
        nodes[::-1],
        "weight",
        [],
        [ValueInfoProto(name=name) for name in outputs],
        initializer=[tensor for tensor in _constants(weight) if tensor.name in needed],
    )
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(DOMAIN, 1)] if called else [])]
    functions = [decode_function(opset), *bodies] if called else []
    part = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)
    try:
        found = run(open_session(part.SerializeToString()), {})
    except InputError as error:
        raise ModelError(f"weight '{weight.name}' cannot be decoded, the file is damaged: {error}") from error
    return [found[name] for name in outputs]


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
