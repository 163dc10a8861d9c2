"""Run an ONNX graph in PyTorch, so that gradients reach its weights.

No converter serves: onnx2torch 1.5 needs torchvision, and refuses MaxPool-1 and SAME_UPPER. The operators are those of
CNNs and MLPs; `call.OPERATORS` lists them. There are no subgraphs (If, Loop, Scan).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor

from vqonnx import modelfile
from vqonnx.errors import DataError, ModelError
from vqonnx.scope import attributes
from vqonnx.training import layers, operators  # noqa: F401 (they fill the table)
from vqonnx.training.call import OPERATORS, Call, Unsupported

_STANDARD = ("", "ai.onnx")
_OLDEST = 7  # before it, operators broadcast by attributes


class TorchGraph:
    """A graph whose constants are tensors, and of which some values are supplied at each run.

    What depends on constants alone is computed once. Supplied values replace what the graph itself would compute:
    weights that training moves, under the names that the layers read.
    """

    def __init__(
        self,
        model: str | Path | ModelProto,
        *,
        supplied: Iterable[str] = (),
        known: Mapping[str, np.ndarray] | None = None,
        folder: str | Path = ".",
    ) -> None:
        """Read the graph.

        Args:
            model: Path or model.
            supplied: Names of values that each run is given.
            known: Values that are known beforehand, by name, such as decoded weights; no node computes them then.
            folder: Where the model lies, for external data; a path says so itself.

        Raises:
            ModelError: An operator or the way in which it is used is not supported; the message names the first.
        """
        if not isinstance(model, ModelProto):
            folder = Path(model).parent
            model = modelfile.load(model)
        graph = model.graph
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 0)
        if self.opset < _OLDEST:
            raise ModelError(f"opset {self.opset} is too old to train; opset {_OLDEST} and newer are supported")
        self.supplied = frozenset(supplied)
        self.values: dict[str, Tensor] = {
            tensor.name: torch.from_numpy(np.array(modelfile.to_array(tensor, Path(folder))))
            for tensor in graph.initializer
            if tensor.name not in self.supplied
        }
        for name, value in (known or {}).items():
            if name not in self.supplied:
                self.values[name] = torch.from_numpy(np.array(value))
        self.inputs = tuple(entry.name for entry in graph.input if entry.name not in self.values)
        self.inputs = tuple(name for name in self.inputs if name not in self.supplied)
        self.outputs = tuple(entry.name for entry in graph.output)
        self._nodes = self._fold(_needed(graph.node, self.outputs, set(self.values) | self.supplied))
        self._last = {name: number for number, (node, _) in enumerate(self._nodes) for name in node.input}

    def run(
        self,
        feeds: Mapping[str, Tensor],
        supplied: Mapping[str, Tensor] | None = None,
        *,
        batch_statistics: bool = False,
    ) -> dict[str, Tensor]:
        """All outputs by name.

        Args:
            feeds: Every input of `inputs`.
            supplied: Every value of `supplied`.
            batch_statistics: BatchNormalization uses the statistics of the batch, and moves those in `values` towards
                them.

        Raises:
            DataError: An input is missing.
            ModelError: An operator is used in a way that is not supported, or its inputs do not fit together.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise DataError(f"no values for input '{missing[0]}'; the model has {', '.join(self.inputs)}")
        values: dict[str, Tensor] = {**feeds, **(supplied or {})}
        for number, (node, given) in enumerate(self._nodes):
            made = self._compute(node, given, values, batch_statistics)
            values.update((name, value) for name, value in zip(node.output, made, strict=False) if name)
            for name in node.input:  # free what nobody reads any more
                if self._last.get(name) == number and name not in self.outputs:
                    values.pop(name, None)
        return {name: values[name] if name in values else self.values[name] for name in self.outputs}

    def to(self, device: str | torch.device) -> TorchGraph:
        """Move the constants to a device; whole numbers, sizes and positions, stay where Python reads them."""
        self.values = {
            name: value.to(device) if value.is_floating_point() else value for name, value in self.values.items()
        }
        return self

    def _fold(self, nodes: list[NodeProto]) -> list[tuple[NodeProto, dict[str, Any]]]:
        """Compute what depends on constants alone; give the rest with its attributes."""
        rest = []
        changing = {*self.inputs, *self.supplied}
        for node in nodes:
            if node.domain not in _STANDARD or node.op_type not in OPERATORS:
                raise ModelError(f"{_label(node)}: operator {node.op_type} is not supported in training")
            given = attributes(node)
            if changing & set(node.input):
                changing |= set(node.output)
                rest.append((node, given))
                continue
            with torch.no_grad():
                made = self._compute(node, given, {}, False)
            self.values.update((name, value) for name, value in zip(node.output, made, strict=False) if name)
        return rest

    def _compute(
        self, node: NodeProto, given: Mapping[str, Any], values: Mapping[str, Tensor], batch_statistics: bool
    ) -> list[Tensor]:
        inputs = [self._read(name, values) for name in node.input]
        wanted = sum(1 for name in node.output if name)
        call = Call(node.op_type, inputs, given, self.opset, wanted, batch_statistics)
        try:
            made = OPERATORS[node.op_type](call)
        except Unsupported as problem:
            raise ModelError(f"{_label(node)}: {node.op_type} {problem} is not supported in training") from problem
        except (RuntimeError, IndexError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(
                f"{_label(node)}: {node.op_type} cannot be computed: {str(error).splitlines()[0]}"
            ) from error
        return [made] if isinstance(made, Tensor) else list(made)

    def _read(self, name: str, values: Mapping[str, Tensor]) -> Tensor | None:
        if not name:
            return None
        found = values.get(name)
        return self.values.get(name) if found is None else found


def _needed(nodes: Iterable[NodeProto], outputs: Iterable[str], known: set[str]) -> list[NodeProto]:
    """The nodes that the outputs depend on, in order; those behind known values are left out."""
    wanted = set(outputs) - known
    kept = []
    for node in reversed(list(nodes)):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input) - known
    return kept[::-1]


def _label(node: NodeProto) -> str:
    return f"node '{node.name or node.output[0]}'"
