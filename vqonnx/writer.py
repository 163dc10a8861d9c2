"""Emit nodes and constants into one scope under fresh names; equal constants are stored once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper


class Writer:
    """Collects the nodes and constants that a rewrite adds to one graph or function.

    Attributes:
        constants: Tensors added so far, by name.
        nodes: Nodes added since the last `take`.
    """

    def __init__(self, taken: set[str], prefix: str = "vq") -> None:
        self.constants: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []
        self._taken = taken
        self._prefix = prefix
        self._count = 0
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def name(self) -> str:
        """A short name that nothing else in the model has; names are stored twice or more, so they cost bytes."""
        while True:
            name = f"{self._prefix}{self._count}"
            self._count += 1
            if name not in self._taken:
                self._taken.add(name)
                return name

    def constant(self, values: NDArray[Any]) -> str:
        """Store an array, or find it among those already stored; gives its name."""
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._known:
            self._known[key] = name = self.name()
            self.constants[name] = _tensor(values, name)
        return self._known[key]

    def node(self, op_type: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; gives the output's name."""
        output = output or self.name()
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def take(self) -> list[NodeProto]:
        """The nodes added since the last call."""
        nodes, self.nodes = self.nodes, []
        return nodes


def _tensor(values: NDArray[Any], name: str) -> TensorProto:
    if values.dtype == np.int64:  # protobuf stores small numbers in one byte each; raw data would take eight
        return helper.make_tensor(name, TensorProto.INT64, values.shape, values.ravel().tolist())
    return numpy_helper.from_array(np.ascontiguousarray(values), name)
