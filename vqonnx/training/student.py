"""The compressed network as student: what of it may move, and how far it is from its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from vqonnx import modelfile
from vqonnx.training.coded import CodedModel
from vqonnx.training.executor import TorchGraph
from vqonnx.training.objective import Objective
from vqonnx.training.recipe import Recipe
from vqonnx.training.teacher import Lesson, Teacher
from vqonnx.training.values import batch_norm_names, bias_names, statistic_names


class Student:
    """The compressed model in PyTorch, with everything that may move.

    Attributes:
        originals: The original's weights under the names of the stored ones.
        layers: Positions of the weights that have codebooks.
        codebooks: Parameters by name.
        biases: The same; empty unless the recipe lets them move.
        statistics: Means and variances of BatchNormalization by name; empty unless they move.
    """

    def __init__(
        self,
        proto: ModelProto,
        path: Path,
        coded: CodedModel,
        recipe: Recipe,
        originals: Mapping[str, Tensor],
        device: str,
    ) -> None:
        self.originals = originals
        self._coded, self._recipe = coded, recipe
        self._objective = Objective.of(proto, recipe.loss)
        shifts = {node.input[2] for node in proto.graph.node if node.op_type == "BatchNormalization"}
        names = [*bias_names(proto), *(name for name in batch_norm_names(proto) if name in shifts)]
        moving = [name for name in names if name not in originals] if recipe.biases else []
        graph = TorchGraph(self._objective.student(proto), supplied=[*originals, *moving], folder=path.parent)
        self._graph = graph.to(device)
        constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        values = {name: modelfile.to_array(constants[name], path.parent) for name in moving}
        self.codebooks = coded.parameters(recipe.gradient, device)
        self.layers = [number for number, weight in enumerate(coded.weights) if weight.books]
        self.biases = {name: torch.tensor(value, device=device, requires_grad=True) for name, value in values.items()}
        kept = [name for name in statistic_names(proto) if name in constants]
        self.statistics = {name: self._graph.values[name] for name in kept} if recipe.statistics else {}

    def loss(self, step: int, teacher: Teacher) -> Tensor:
        """The loss of a step in which all codebooks move."""
        lessons = teacher.lessons(step, self._recipe.batch, (self._recipe.seed, 1))
        return self._mean(lessons, {**self.weights(), **self.biases}, bool(self.statistics))

    def layer_loss(self, step: int, teacher: Teacher) -> Tensor:
        """The loss of a step in which one layer's codebooks move, the layers after it being the original's."""
        assert self._recipe.layer_steps is not None
        number = self.layers[step // self._recipe.layer_steps]
        moving = self._coded.weights[number].books
        books = {name: value if name in moving else value.detach() for name, value in self.codebooks.items()}
        supplied = {**self.originals, **{name: value.detach() for name, value in self.biases.items()}}
        supplied |= {weight.name: weight.compute(books) for weight in self._coded.weights[: number + 1]}
        return self._mean(teacher.lessons(step, self._recipe.batch, (self._recipe.seed, 0)), supplied, False)

    def judge(self, lessons: list[Lesson]) -> float:
        """The loss as it stands."""
        with torch.no_grad():
            return float(self._mean(lessons, {**self.weights(), **self.biases}, False))

    def weights(self) -> dict[str, Tensor]:
        """Every stored weight by name."""
        return {weight.name: weight.compute(self.codebooks) for weight in self._coded.weights}

    def round(self) -> None:
        """Round the codebooks as they will be stored."""
        stored = self._coded.stored(self.codebooks)
        with torch.no_grad():
            for name, value in stored.items():
                self.codebooks[name].copy_(torch.from_numpy(value))

    def moved(self) -> dict[str, NDArray[np.float32]]:
        """New values of the model's initializers."""
        tensors = {**self.biases, **self.statistics}
        return {
            **self._coded.stored(self.codebooks),
            **{name: value.detach().cpu().numpy() for name, value in tensors.items()},
        }

    def _mean(self, lessons: list[Lesson], supplied: Mapping[str, Tensor], batch_statistics: bool) -> Tensor:
        losses = []
        for lesson in lessons:
            made = self._graph.run(lesson.feeds, supplied, batch_statistics=batch_statistics)
            losses.append(self._objective(made, lesson.outputs))
        return torch.stack(losses).mean()
