"""Put the channels of a group in another order: constants change, the graph does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from onnx import ModelProto, TensorProto

from vqonnx.errors import OptionError
from vqonnx.modelfile import inlined
from vqonnx.permute.groups import Group, Part

_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def apply(model: ModelProto, group: Group, permutation: ArrayLike, folder: str | Path) -> None:
    """Change the order of the channels of a group, in place: channel ``i`` becomes what ``permutation[i]`` was.

    Args:
        model: The model that the group was found in.
        group: The channels.
        permutation: Each number below ``group.size`` once.
        folder: Where the model lies, for external data; what changes is brought in.

    Raises:
        OptionError: It is not a permutation of that size.
        ModelError: External data are not there or too short.
    """
    order = np.asarray(permutation)
    if order.shape != (group.size,) or not np.array_equal(np.sort(order), np.arange(group.size)):
        raise OptionError(f"permutation: not the numbers 0 to {group.size - 1}, each once (shape {list(order.shape)})")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    for part in group.constants:
        _reorder(tensors[part.name], part, order, Path(folder))


def index_of(part: Part, order: NDArray[np.integer], entries: int) -> NDArray[np.int64]:
    """Where each entry of the axis comes from, ``[entries]``."""
    index = np.arange(entries)
    size = len(order) * part.run
    moved = order[:, None] * part.run + np.arange(part.run)
    index[part.start : part.start + size] = part.start + moved.ravel()
    return index


def _reorder(tensor: TensorProto, part: Part, order: NDArray[np.integer], folder: Path) -> None:
    """Move the entries of a tensor as they are stored, whatever their type."""
    whole = inlined(tensor, folder)
    if whole is not tensor:
        tensor.CopyFrom(whole)
    shape = tuple(tensor.dims)
    index = index_of(part, order, shape[part.axis])

    def moved(values: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(values.reshape(shape).take(index, axis=part.axis)).reshape(-1)

    if tensor.HasField("raw_data"):
        count = int(np.prod(shape))
        values = np.frombuffer(tensor.raw_data, f"V{len(tensor.raw_data) // count}")
        tensor.raw_data = moved(values).tobytes()
        return
    for name in _FIELDS:
        field = getattr(tensor, name)
        if len(field):
            values = moved(np.asarray(field))
            del field[:]
            field.extend(values.tolist())
