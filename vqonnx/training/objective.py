"""How far the outputs of a student are from those of its teacher: what distillation makes small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto, ValueInfoProto
from torch import Tensor

from vqonnx.errors import OptionError

Loss = Literal["kl", "mse"]
_SAME_ORDER = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")  # they change the shape alone


@dataclass(frozen=True)
class Objective:
    """A loss over all outputs of a model.

    ``kl`` is the divergence ``KL(softmax(teacher) || softmax(student))`` at temperature 1, mean over the batch (Stock
    et al. 2020); it wants outputs with one row of classes for each image. Where an output is the result of a Softmax,
    the student's logits are the values before it, as a logarithm of small probabilities would lose them.
    ``mse`` is the squared error of an output over its energy; it wants nothing.

    Attributes:
        loss: Which.
        names: For each output of the teacher, the student's value that is compared with it.
        probabilities: Outputs of the teacher that are probabilities already.
    """

    loss: Loss
    names: Mapping[str, str]
    probabilities: frozenset[str]

    @classmethod
    def of(cls, model: ModelProto, loss: Loss) -> Objective:
        """The objective for a model's outputs."""
        names = {entry.name: entry.name for entry in model.graph.output}
        probabilities = set()
        if loss == "kl":
            makers = {output: node for node in model.graph.node for output in node.output}
            for output in names:
                node = _softmax_behind(output, makers)
                if node is not None:
                    names[output] = node.input[0]
                    probabilities.add(output)
        return cls(loss, names, frozenset(probabilities))

    def student(self, model: ModelProto) -> ModelProto:
        """A copy of the model whose outputs are the values that are compared."""
        copy = ModelProto()
        copy.CopyFrom(model)
        del copy.graph.output[:]
        copy.graph.output.extend(ValueInfoProto(name=name) for name in dict.fromkeys(self.names.values()))
        return copy

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch, summed over outputs.

        Args:
            student: Values by the names that `names` maps to.
            teacher: Outputs of the original.

        Raises:
            OptionError: ``kl`` for an output that is not one row of classes for each image.
        """
        terms = []
        for output, wanted in teacher.items():
            made = student[self.names[output]]
            if self.loss == "mse":
                energy = (wanted.float() ** 2).sum().clamp(min=torch.finfo(torch.float32).tiny)
                terms.append(((made.float() - wanted.float()) ** 2).sum() / energy)
                continue
            shape = tuple(wanted.shape)
            if len(shape) < 2 or shape[1] < 2 or any(size != 1 for size in shape[2:]):
                raise OptionError(
                    f"output '{output}' is {list(shape)}, not one row of classes for each image; choose loss mse"
                )
            rows = wanted.float().flatten(1)
            logs = F.log_softmax(made.float().reshape(rows.shape), 1)
            if output in self.probabilities:
                terms.append(F.kl_div(logs, rows, reduction="batchmean"))
            else:
                terms.append(F.kl_div(logs, F.log_softmax(rows, 1), reduction="batchmean", log_target=True))
        return torch.stack(terms).sum()


def _softmax_behind(output: str, makers: Mapping[str, NodeProto]) -> NodeProto | None:
    """The Softmax whose result is this output, perhaps in another shape."""
    node = makers.get(output)
    while node is not None and node.op_type in _SAME_ORDER:
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "Softmax" else None
