"""One node as its operator sees it, and the table of operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """A node with its inputs.

    Attributes:
        op_type: The operator.
        inputs: Its inputs; None for one that is left out.
        attributes: Its attributes as plain values.
        opset: Version of the standard operators.
        outputs: How many outputs are asked for.
        batch_statistics: BatchNormalization uses and updates the statistics of the batch.
    """

    op_type: str
    inputs: Sequence[Tensor | None]
    attributes: Mapping[str, Any]
    opset: int
    outputs: int = 1
    batch_statistics: bool = False

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.tensor(0)

    def tensor(self, index: int) -> Tensor:
        """Input ``index``, which the operator must have."""
        value = self.get(index)
        if value is None:
            raise Unsupported(f"without input {index}")
        return value

    def get(self, index: int) -> Tensor | None:
        """Input ``index``, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute; text comes as str."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def numbers(self, name: str, index: int) -> list[int] | None:
        """Whole numbers that older opsets hold in attribute ``name`` and newer ones in input ``index``."""
        value = self.get(index)
        if value is not None:
            return [int(number) for number in value.reshape(-1).tolist()]
        found = self.attributes.get(name)
        return None if found is None else [int(number) for number in found]

    def number(self, name: str, index: int) -> float | None:
        """The same for one number."""
        value = self.get(index)
        if value is not None:
            return float(value.item())
        found = self.attributes.get(name)
        return None if found is None else float(found)


class Unsupported(Exception):
    """An operator is used in a way that is not built; the message completes "Conv ... is not supported"."""


Operator = Callable[[Call], "Tensor | Sequence[Tensor]"]
OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Enter a function into the table under these operator names."""

    def enter(function: Operator) -> Operator:
        for name in names:
            OPERATORS[name] = function
        return function

    return enter


def flags(call: Call, name: str, default: int) -> bool:
    """An attribute that is 0 or 1."""
    return bool(call.attribute(name, default))


def padded(x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float = 0.0) -> Tensor:
    """``x`` with its last ``len(begins)`` axes padded by a value; negative numbers cut off."""
    if not any(begins) and not any(ends):
        return x
    pairs = [number for pair in zip(reversed(begins), reversed(ends), strict=True) for number in pair]
    return torch.nn.functional.pad(x, pairs, value=value)
