"""Tuning of each layer's codebooks while a model is compressed: the layers behind it are encoded for the result.

Stock et al. 2020, the procedure as it is published: a layer is encoded, its words are tuned with the original network
as teacher, and only then the next layer's inputs are taken. `vqonnx.training.distill` then tunes all layers together.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqonnx import modelfile
from vqonnx.form import Coded, Form
from vqonnx.graph import Site, find
from vqonnx.training.coded import FixedCodes, moving, rounded
from vqonnx.training.executor import TorchGraph
from vqonnx.training.loop import History, train
from vqonnx.training.objective import Objective
from vqonnx.training.recipe import Recipe
from vqonnx.training.teacher import Teacher
from vqonnx.view import View


class Tuner:
    """What ``compress(tune=...)`` calls for each layer.

    Only forms that are codes and codebooks are tuned; products of factors stay as they are.

    Attributes:
        histories: What was done to each layer, by the name of its weight.
    """

    def __init__(self, original: str | Path, data: Any, recipe: Recipe | None = None) -> None:
        """Read the model and the data.

        Args:
            original: Path of the model that is compressed.
            data: Unlabelled inputs, as for `vqonnx.training.distill.distill`.
            recipe: Its steps and rate for layers are used, and all that does not belong to the steps for all.

        Raises:
            ModelError: The model cannot be trained.
            DataError: The data do not fit it.
        """
        path = Path(original)
        proto = modelfile.load(path)
        self._teacher = Teacher(path, data)
        self._recipe = (recipe or Recipe()).scaled(self._teacher.count)
        self._objective = Objective.of(proto, self._recipe.loss)
        values = TorchGraph(path).values
        names = [site.name for site in find(proto, path.parent).sites if not site.scope.path]
        self._weights = {name: values[name] for name in names}
        self._graph = TorchGraph(self._objective.student(proto), supplied=names, folder=path.parent)
        self.histories: dict[str, History] = {}

    def __call__(self, site: Site, view: View, form: Form) -> Form:
        """The form with tuned codebooks; layers seen before are compressed and tuned, the others the original's."""
        dtype = self._weights[site.name].dtype
        if not isinstance(form, Coded) or not self._recipe.layer_steps:
            self._weights[site.name] = torch.from_numpy(view.tensor(form.decode())).to(dtype)
            return form
        codes, steps = FixedCodes.of(form), self._recipe.layer_steps
        codebooks = moving(form.codebooks, codes.uses, self._recipe.gradient)
        first = steps * len(self.histories)

        def loss(step: int) -> Tensor:
            matrix = codes.decode(codebooks)
            weight = matrix.reshape(view.split).permute(view.perm).reshape(view.shape).to(dtype)
            lessons = self._teacher.lessons(first + step, self._recipe.batch, (self._recipe.seed, 0))
            supplied = {**self._weights, site.name: weight}
            losses = [self._objective(self._graph.run(entry.feeds, supplied), entry.outputs) for entry in lessons]
            return torch.stack(losses).mean()

        self.histories[site.name] = train(
            loss, {site.name: codebooks}, self._recipe.layer_schedule(1), every=min(steps, 100)
        )
        tuned = dataclasses.replace(form, codebooks=rounded(site.name, codebooks, form.codebooks.dtype))
        self._weights[site.name] = torch.from_numpy(view.tensor(tuned.decode())).to(dtype)
        return tuned
