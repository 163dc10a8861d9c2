"""Distillation of codebooks: the codes stay, the codebooks move until the outputs are those of the original again.

Stock et al. 2020, "And the bit goes down": the original network is the teacher, the images need no labels. First each
layer's codebook is tuned alone, layer after layer, then all of them together.
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto
from torch import Tensor

from vqonnx import modelfile
from vqonnx.compact import compact, restore
from vqonnx.errors import ModelError
from vqonnx.fusion import fuse_layers
from vqonnx.moments import snr_db
from vqonnx.record import read_record, write_record
from vqonnx.report import report
from vqonnx.result import Result, Saved
from vqonnx.training.coded import CodedModel
from vqonnx.training.device import check_device
from vqonnx.training.executor import TorchGraph
from vqonnx.training.loop import History, Progress, train
from vqonnx.training.recipe import Recipe
from vqonnx.training.student import Student
from vqonnx.training.teacher import Teacher
from vqonnx.training.values import with_values
from vqonnx.unfusion import split_layers

_log = logging.getLogger(__name__)
_JUDGED = 256  # images on which the loss before and after is taken


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
    held_out: Any = None,
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
        held_out: Inputs on which the losses before and after are taken; None takes some of ``data``.
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
    check_device(device)
    proto = modelfile.load(path)
    was_compact = restore(proto)
    fused = bool(split_layers(proto, path.parent))
    _refuse_permuted(proto, path, teacher_path)
    coded = CodedModel(proto, path).to(device)
    teacher = Teacher(teacher_path, data, device=device)
    recipe = recipe.scaled(teacher.count)
    student = Student(proto, path, coded, recipe, _originals(teacher_path, coded, path, device), device)
    judged = (teacher if held_out is None else Teacher(teacher_path, held_out, device=device)).sample(_JUDGED)
    before = student.judge(judged)
    settings = _settings(recipe, teacher_path, path, teacher)
    histories = []
    if recipe.layer_steps:
        layers = None if checkpoint is None else checkpoint.with_name(checkpoint.name + ".layers")
        histories.append(
            train(
                lambda step: student.layer_loss(step, teacher),
                student.codebooks,
                recipe.layer_schedule(len(student.layers)),
                settings={**settings, "phase": "layers"},
                checkpoint=layers,
                every=min(recipe.layer_steps, 100),
                progress=progress,
            )
        )
    if recipe.steps and not any(history.diverged is not None for history in histories):
        histories.append(
            train(
                lambda step: student.loss(step, teacher),
                {**student.codebooks, **student.biases},
                recipe.schedule(),
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
    if fused:
        fuse_layers(result.model, path.parent)
    if was_compact:
        compact(result.model, path.parent)
    return Distilled(result, path, recipe, tuple(histories), before, after)


def _originals(original: Path, coded: CodedModel, compressed: Path, device: str) -> dict[str, Tensor]:
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
    return {weight.name: values[weight.name].to(device) for weight in coded.weights}


def _refuse_permuted(proto: ModelProto, path: Path, original: Path) -> None:
    record = read_record(proto)
    if record is not None and record.permuted:
        raise ModelError(
            f"{path}: {record.permuted} groups of channels lie in another order than in {original.name}, so the "
            "weights of that cannot teach; compress without --permute"
        )


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
    student: Student,
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
