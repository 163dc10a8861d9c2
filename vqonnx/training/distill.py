"""Distillation of codebooks: the codes stay, the codebooks move until the outputs are those of the original again.

Stock et al. 2020, "And the bit goes down": the original network is the teacher, the images need no labels. First each
layer's codebook is tuned alone, layer after layer, then all of them together.
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from vqonnx import modelfile
from vqonnx.errors import ModelError, OptionError
from vqonnx.moments import snr_db
from vqonnx.record import write_record
from vqonnx.report import report
from vqonnx.result import Result, Saved
from vqonnx.training.coded import CodedModel, Gradient
from vqonnx.training.executor import TorchGraph
from vqonnx.training.loop import History, Progress, Schedule, train
from vqonnx.training.objective import Loss, Objective
from vqonnx.training.teacher import Lesson, Teacher
from vqonnx.training.values import batch_norm_names, bias_names, statistic_names, with_values

_log = logging.getLogger(__name__)
# The published schedule in passes over the data: 2,500 steps of 128 images for each layer are a quarter of ImageNet's
# 1.28 million, 9 times 10,000 steps are nine times that number.
_LAYER_PASSES, _PASSES, _DROP_EVERY = 0.25, 9, 3
_JUDGED = 256  # images on which the loss before and after is taken


@dataclass(frozen=True)
class Recipe:
    """How codebooks are distilled; the defaults are the published procedure, scaled to the number of images.

    Attributes:
        steps: Steps in which all codebooks move; None for nine passes over the images. The rate is divided by ten
            after each third.
        rate: Learning rate of these steps.
        layer_steps: Steps for each layer in turn, before; its codebooks move, the layers before it are compressed and
            those after it are still the original's. None for a quarter of a pass.
        layer_rate: Learning rate of these steps.
        batch: Images of a step.
        gradient: Of a word: the ``mean`` over the blocks that use it, as published, or the ``sum``.
        loss: ``kl`` for classifiers, ``mse`` for anything (`vqonnx.training.objective`).
        biases: Biases of layers and of BatchNormalization move as well, in the steps for all.
        statistics: BatchNormalization uses the statistics of each batch in the steps for all, and its stored ones
            follow; without it they stay.
        momentum: Of the gradient.
        weight_decay: Times the codebooks, added to the gradient.
        seed: Seed for the choice of images.
    """

    steps: int | None = None
    rate: float = 0.01
    layer_steps: int | None = None
    layer_rate: float = 0.05
    batch: int = 128
    gradient: Gradient = "mean"
    loss: Loss = "kl"
    biases: bool = False
    statistics: bool = True
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("layer_steps", 0), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} is {value}; choose {least} or more")
        for name in ("rate", "layer_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise OptionError(f"{name} is {getattr(self, name):g}; choose a number above 0, such as 0.01")
        for name, kind in (("gradient", Gradient), ("loss", Loss)):
            if getattr(self, name) not in get_args(kind):
                raise OptionError(f"{name} '{getattr(self, name)}' is unknown; choose {' or '.join(get_args(kind))}")
        if self.steps == 0 and self.layer_steps == 0:
            raise OptionError("steps and layer_steps are both 0; choose more for one of them")

    def scaled(self, images: int) -> Recipe:
        """The recipe with the numbers of steps for so many images."""
        steps, layer_steps = self.steps, self.layer_steps
        if steps is None:
            steps = max(1, round(_PASSES * images / self.batch))
        if layer_steps is None:
            layer_steps = max(1, round(_LAYER_PASSES * images / self.batch))
        return dataclasses.replace(self, steps=steps, layer_steps=layer_steps)


@dataclass(frozen=True, eq=False)
class Distilled:
    """A model with distilled codebooks.

    Attributes:
        result: The model; its layers tell the new errors of the weights, and no longer those of the outputs, which
            were measured with the old codebooks.
        compressed: Path of the model that was distilled.
        recipe: What was done, with the numbers of steps.
        histories: Losses of the steps for each layer and of those for all, where there were any.
        loss_before: Loss of the compressed model on some of the images, with BatchNormalization as at inference.
        loss_after: The same of the distilled one.
    """

    result: Result
    compressed: Path
    recipe: Recipe
    histories: tuple[History, ...]
    loss_before: float
    loss_after: float

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite; the model is that of the last state that was good."""
        return any(history.diverged is not None for history in self.histories)

    def save(
        self, path: str | Path, *, verify: bool = True, rtol: float | None = None, atol: float | None = None
    ) -> Saved:
        """As `vqonnx.Result.save`; neither the original nor the compressed model is ever written over."""
        modelfile.check_output(path, self.compressed)
        return self.result.save(path, verify=verify, rtol=rtol, atol=atol)


def distill(
    original: str | Path,
    compressed: str | Path,
    data: Any,
    recipe: Recipe | None = None,
    *,
    checkpoint: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Distilled:
    """Move the codebooks of a compressed model so that its outputs are again those of the original.

    Codes, scales and sizes stay as they are. The same seed gives the same bytes on one thread of a processor.

    Args:
        original: Path of the model that was compressed, the teacher.
        compressed: Path of the compressed model, of any target.
        data: Unlabelled inputs, as for ``compress(calibration=...)``; all of them are held in memory.
        recipe: Steps, rates and what moves.
        checkpoint: File in which the state is kept (and beside it one with ``.layers`` after its name), and from which
            a run goes on.
        device: Where PyTorch computes.
        progress: Called with (steps done, steps in all, "loss ...").

    Raises:
        ModelError: A model cannot be read or trained, or the second was not made from the first.
        DataError: The data do not fit the model.
        OptionError: The loss does not fit the outputs, or the checkpoint belongs to another run.
        VqonnxError: Codebooks have grown beyond the type in which they are stored.
    """
    teacher_path, path = Path(original), Path(compressed)
    recipe = recipe or Recipe()
    _check_device(device)
    proto = modelfile.load(path)
    coded = CodedModel(proto, path).to(device)
    teacher = Teacher(teacher_path, data, device=device)
    recipe = recipe.scaled(teacher.count)
    student = _Student(proto, path, coded, recipe, _originals(teacher_path, coded, path), device)
    judged = teacher.sample(_JUDGED)
    before = student.judge(judged)
    settings = _settings(recipe, teacher_path, path, teacher)
    histories = []
    if recipe.layer_steps:
        schedule = student.schedule(recipe.layer_steps * len(student.layers), recipe.layer_rate)
        layers = None if checkpoint is None else checkpoint.with_name(checkpoint.name + ".layers")
        histories.append(
            train(
                lambda step: student.layer_loss(step, teacher),
                student.codebooks,
                schedule,
                settings={**settings, "phase": "layers"},
                checkpoint=layers,
                every=min(recipe.layer_steps, 100),
                progress=progress,
            )
        )
    if recipe.steps and not any(history.diverged is not None for history in histories):
        drops = tuple(recipe.steps * third // _DROP_EVERY for third in range(1, _DROP_EVERY))
        schedule = student.schedule(recipe.steps, recipe.rate, drops)
        histories.append(
            train(
                lambda step: student.loss(step, teacher),
                {**student.codebooks, **student.biases},
                schedule,
                others=student.statistics,
                settings={**settings, "phase": "all"},
                checkpoint=checkpoint,
                every=min(recipe.steps, 100),
                progress=progress,
            )
        )
    student.round()
    after = student.judge(judged)
    if after > before:
        _log.warning("%s: the loss rose from %.4g to %.4g; choose smaller rates", path, before, after)
    result = _result(proto, student, coded, teacher_path, path, recipe, teacher)
    return Distilled(result, path, recipe, tuple(histories), before, after)


class _Student:
    """The compressed model in PyTorch, with everything that may move."""

    def __init__(
        self,
        proto: ModelProto,
        path: Path,
        coded: CodedModel,
        recipe: Recipe,
        originals: Mapping[str, Tensor],
        device: str,
    ) -> None:
        self.coded, self.recipe, self.originals = coded, recipe, originals
        self.objective = Objective.of(proto, recipe.loss)
        shifts = {node.input[2] for node in proto.graph.node if node.op_type == "BatchNormalization"}
        names = [*bias_names(proto), *(name for name in batch_norm_names(proto) if name in shifts)]
        moving = [name for name in names if name not in originals] if recipe.biases else []
        self._graph = TorchGraph(self.objective.student(proto), supplied=[*originals, *moving], folder=path.parent).to(
            device
        )
        constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        values = {name: modelfile.to_array(constants[name], path.parent) for name in moving}
        self.codebooks = coded.parameters(recipe.gradient, device)
        self.layers = [number for number, weight in enumerate(coded.weights) if weight.books]
        self.biases = {name: torch.tensor(value, device=device, requires_grad=True) for name, value in values.items()}
        kept = [name for name in statistic_names(proto) if name in constants]
        self.statistics = {name: self._graph.values[name] for name in kept} if recipe.statistics else {}

    def schedule(self, steps: int, rate: float, drops: tuple[int, ...] = ()) -> Schedule:
        return Schedule(steps, rate, drops, self.recipe.momentum, self.recipe.weight_decay)

    def loss(self, step: int, teacher: Teacher) -> Tensor:
        """The loss of a step in which all codebooks move."""
        lessons = teacher.lessons(step, self.recipe.batch, (self.recipe.seed, 1))
        return self._mean(lessons, {**self.weights(), **self.biases}, bool(self.statistics))

    def layer_loss(self, step: int, teacher: Teacher) -> Tensor:
        """The loss of a step in which one layer's codebooks move, the layers after it being the original's."""
        assert self.recipe.layer_steps is not None
        number = self.layers[step // self.recipe.layer_steps]
        moving = self.coded.weights[number].books
        books = {name: value if name in moving else value.detach() for name, value in self.codebooks.items()}
        supplied = {**self.originals, **{name: value.detach() for name, value in self.biases.items()}}
        supplied |= {weight.name: weight.compute(books) for weight in self.coded.weights[: number + 1]}
        return self._mean(teacher.lessons(step, self.recipe.batch, (self.recipe.seed, 0)), supplied, False)

    def judge(self, lessons: list[Lesson]) -> float:
        """The loss as it stands."""
        with torch.no_grad():
            return float(self._mean(lessons, {**self.weights(), **self.biases}, False))

    def weights(self) -> dict[str, Tensor]:
        """Every stored weight by name."""
        return {weight.name: weight.compute(self.codebooks) for weight in self.coded.weights}

    def round(self) -> None:
        """Round the codebooks as they will be stored."""
        stored = self.coded.stored(self.codebooks)
        with torch.no_grad():
            for name, value in stored.items():
                self.codebooks[name].copy_(torch.from_numpy(value))

    def moved(self) -> dict[str, NDArray[np.float32]]:
        """New values of the model's initializers."""
        tensors = {**self.biases, **self.statistics}
        return {
            **self.coded.stored(self.codebooks),
            **{name: value.detach().cpu().numpy() for name, value in tensors.items()},
        }

    def _mean(self, lessons: list[Lesson], supplied: Mapping[str, Tensor], batch_statistics: bool) -> Tensor:
        losses = []
        for lesson in lessons:
            made = self._graph.run(lesson.feeds, supplied, batch_statistics=batch_statistics)
            losses.append(self.objective(made, lesson.outputs))
        return torch.stack(losses).mean()


def _originals(original: Path, coded: CodedModel, compressed: Path) -> dict[str, Tensor]:
    """The original's weights under the names of the stored ones."""
    values = TorchGraph(original).values
    for weight in coded.weights:
        if weight.name not in values:
            raise ModelError(f"{original}: has no weight '{weight.name}', so {compressed.name} was not made from it")
        shape, stored = list(values[weight.name].shape), list(weight.shape)
        if shape != stored:
            raise ModelError(
                f"{original}: '{weight.name}' is {shape}, in {compressed.name} {stored}, which was not made from it"
            )
    return {weight.name: values[weight.name] for weight in coded.weights}


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device '{device}': {str(error).splitlines()[0]}; choose cpu") from error


def _settings(recipe: Recipe, original: Path, compressed: Path, teacher: Teacher) -> dict[str, Any]:
    """What makes a run what it is; a checkpoint of another one is refused."""
    first = next(iter(teacher.checks[0].values()))
    return {
        "recipe": dataclasses.asdict(recipe),
        "original": zlib.crc32(original.read_bytes()),
        "compressed": zlib.crc32(compressed.read_bytes()),
        "images": [teacher.count, zlib.crc32(np.ascontiguousarray(first).tobytes())],
    }


def _result(
    proto: ModelProto,
    student: _Student,
    coded: CodedModel,
    original: Path,
    compressed: Path,
    recipe: Recipe,
    teacher: Teacher,
) -> Result:
    """The compressed model with the new values, and what is known of it now."""
    model = with_values(proto, compressed.parent, student.moved())
    for tensor in modelfile.external_tensors(model):
        tensor.CopyFrom(modelfile.inlined(tensor, compressed.parent))
    known = report(compressed)
    decoded = {name: value.detach().double().cpu().numpy() for name, value in student.weights().items()}
    layers = []
    for layer in known.layers:
        weight = student.originals[layer.name].double().cpu().numpy()
        error = weight - decoded[layer.name]
        snr = snr_db(float((weight**2).sum()), float((error**2).sum()))
        layers.append(
            dataclasses.replace(layer, weight_snr_db=None if snr is None else round(snr, 2), output_snr_db=None)
        )
    before = known.bytes_before or modelfile.file_bytes(original)
    note = {"images": teacher.count, **dataclasses.asdict(recipe)}
    write_record(model, before, tuple(layers), known.skipped, distilled=note)
    return Result(model, tuple(layers), known.skipped, coded.target, original, before, teacher.checks)
