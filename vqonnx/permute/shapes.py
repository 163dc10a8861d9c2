"""What can be known of tensors without data: the values of small constants and static shapes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, shape_inference

from vqonnx.modelfile import inlined, to_array
from vqonnx.runtime import open_session, run
from vqonnx.scope import Scope, attributes

_SMALL = 1024  # values of constants: sizes, pads, axes
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
# Inputs that say what an operator does with the axes of another.
_SAYS: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Pad": (1, 3), "Slice": (1, 2, 3, 4), "Squeeze": (1,), "Unsqueeze": (1,), "Split": (1,),
    "Resize": (1, 2), "Upsample": (1,), "ReduceMean": (1,), "ReduceSum": (1,), "ReduceMax": (1,), "ReduceMin": (1,),
    "ReduceL2": (1,),
}  # fmt: skip

Shape = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of the tensors of the main graph.

    Attributes:
        constants: Names of the tensors that do not depend on the model's inputs.
        values: Values of the small ones of whole numbers or factors that operators ask for.
        shapes: Shapes; None for a size that is open.
    """

    constants: frozenset[str]
    values: dict[str, NDArray[Any]]
    shapes: dict[str, Shape]


def look(model: ModelProto, scope: Scope, folder: Path) -> Known:
    """Read the main graph, whose scope is given.

    Raises:
        ModelError: Its constants cannot be computed by onnxruntime.
    """
    folded = _constant_nodes(model, scope)
    constants = frozenset(scope.initializers) | {name for node in folded for name in node.output if name}
    values = _values(model, scope, folder, folded, constants)
    shapes: dict[str, Shape] = {name: tuple(tensor.dims) for name, tensor in scope.initializers.items()}
    shapes = {**_shapes(model, values), **shapes}
    for node in model.graph.node:  # a Reshape to a computed size is what the Gemm behind it asks for
        if node.op_type == "Gemm" and node.input[0] not in shapes and len(shapes.get(node.input[1], ())) == 2:
            transposed = [bool(attributes(node).get(name, 0)) for name in ("transA", "transB")]
            if not transposed[0]:
                shapes[node.input[0]] = (None, shapes[node.input[1]][int(transposed[1])])
    return Known(constants, values, shapes)


def _constant_nodes(model: ModelProto, scope: Scope) -> list[NodeProto]:
    """The nodes that depend on constants only."""
    known, found = set(scope.initializers) | {""}, []
    for node in model.graph.node:
        inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        plain = node.domain in ("", "ai.onnx") and node.op_type not in _RANDOM and not inner
        if plain and known.issuperset(node.input):
            known.update(node.output)
            found.append(node)
    return found


def _values(
    model: ModelProto, scope: Scope, folder: Path, folded: list[NodeProto], constants: frozenset[str]
) -> dict[str, NDArray[Any]]:
    """The constants that say what operators do with axes; what nodes make of constants is computed in one run."""
    wanted = {
        node.input[index]
        for node in model.graph.node
        for index in _SAYS.get(node.op_type, ())
        if index < len(node.input) and node.input[index] in constants
    }
    stored = {name: to_array(scope.initializers[name], folder) for name in wanted & scope.initializers.keys()}
    computed = sorted(wanted - stored.keys())
    if computed:
        needed, names = [], set(computed)
        for node in reversed(folded):
            if names.intersection(node.output):
                needed.append(node)
                names |= set(node.input)
        tensors = [inlined(scope.initializers[name], folder) for name in sorted(names & scope.initializers.keys())]
        graph = helper.make_graph(
            needed[::-1], "constants", [], [ValueInfoProto(name=name) for name in computed], tensors
        )
        part = helper.make_model(
            graph,
            opset_imports=model.opset_import,
            ir_version=max(model.ir_version, 4),
            functions=model.functions,
        )
        stored |= run(open_session(part.SerializeToString()), {})
    return {name: np.asarray(value) for name, value in stored.items() if np.size(value) <= _SMALL}


def _shapes(model: ModelProto, values: dict[str, NDArray[Any]]) -> dict[str, Shape]:
    """Shapes by inference from the inputs on; those that the file claims for other tensors are not trusted."""
    bare = ModelProto()
    bare.CopyFrom(_without_data(model))
    known = {tensor.name for tensor in bare.graph.initializer}
    bare.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in values.items() if name not in known)
    kept = [node for node in bare.graph.node if not values.keys() & set(node.output)]
    graph = helper.make_graph(kept, "shapes", bare.graph.input, [], bare.graph.initializer)
    for output in model.graph.output:  # without their claims
        kind = output.type.tensor_type.elem_type
        graph.output.append(helper.make_tensor_value_info(output.name, kind or TensorProto.FLOAT, None))
    bare.graph.CopyFrom(graph)
    try:
        inferred = shape_inference.infer_shapes(bare, data_prop=True).graph
    except shape_inference.InferenceError:
        return {}
    return {
        info.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim
        )
        for info in (*inferred.value_info, *inferred.input, *inferred.output)
        if info.type.tensor_type.HasField("shape")
    }


def _without_data(model: ModelProto) -> ModelProto:
    """The model with empty large tensors of the main graph: shapes do not need their data."""
    graph = helper.make_graph(model.graph.node, "bare", model.graph.input, [])
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= _SMALL and tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            graph.initializer.append(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
    return helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=max(model.ir_version, 4), functions=model.functions
    )
