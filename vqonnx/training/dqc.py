"""Dynamic quantisation coding with training: the weights are powers of two at every step, and learn to live with it.

Rao et al. 2019, Acta Automatica Sinica 45(10), 1960-1968. The codebook is made anew from the largest weight at every
step; the float weights behind it are what moves.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from vqonnx import modelfile
from vqonnx.compress import compress
from vqonnx.errors import ModelError, OptionError
from vqonnx.graph import find
from vqonnx.methods import DQC
from vqonnx.place import Target
from vqonnx.result import Result
from vqonnx.training.device import as_tensor, check_device
from vqonnx.training.executor import TorchGraph
from vqonnx.training.loop import History, Progress, Schedule, train
from vqonnx.training.power import Rule, quantise
from vqonnx.training.values import batch_norm_names, bias_names, statistic_names, with_values

Batches = Callable[[int], tuple[Mapping[str, NDArray[Any]], NDArray[np.int64]]]


@dataclass(frozen=True)
class Recipe:
    """How the training goes.

    Attributes:
        schedule: Steps and rates.
        rule: Gradient of a weight: ``magnitude`` (the authors') or ``identity``.
        l1: Times the sum of the absolute values of the quantised weights, added to the loss.
        l2: Times half the sum of the squares of the quantised weights and the BatchNormalization scales.
        teacher: Share (0 to 1) of the loss that is the divergence from the outputs of the model that teaches,
            ``KL(softmax(teacher) || softmax(trained))``, in the place of the cross-entropy with the labels. Not in the
            paper; with few images it keeps what the teacher has learned from more.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(steps=1000, rate=0.01, drops=(600, 850)))
    rule: Rule = "identity"
    l1: float = 0.0
    l2: float = 0.0
    teacher: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("l1", self.l1), ("l2", self.l2)):
            if not 0 <= value < float("inf"):
                raise OptionError(f"{name} is {value:g}; choose 0 or more")
        if self.rule not in get_args(Rule):
            raise OptionError(f"rule '{self.rule}' is unknown; choose one of {', '.join(get_args(Rule))}")
        if not 0 <= self.teacher <= 1:
            raise OptionError(f"teacher is {self.teacher:g}; choose 0 to 1")


@dataclass(frozen=True)
class Trained:
    """What came out.

    Attributes:
        result: The compressed model, ready to save.
        history: Losses, and whether the run ended as planned.
    """

    result: Result
    history: History


def train_dqc(
    model: str | Path,
    batches: Batches,
    method: DQC | None = None,
    recipe: Recipe | None = None,
    *,
    original: str | Path | None = None,
    teacher: str | Path | None = None,
    checkpoint: Path | None = None,
    data_name: str = "",
    target: Target = "hybrid",
    device: str = "cpu",
    progress: Progress | None = None,
) -> Trained:
    """Train a classifier with power-of-two weights, and code it.

    All linear layers are quantised, the first and the last too; biases and BatchNormalization are trained in float32.

    Args:
        model: Path of a float32 model with one output, the logits ``[N, classes]``; best with its BatchNormalization
            nodes, which follow the quantised weights.
        batches: The feeds and the labels ``[N]`` of a step, by its number; the same number gives the same batch.
        method: Bits and zero; its ``fit`` must be ``paper`` (the codebook that the training uses) and its ``scale``
            ``none``. By default 4 bits with zero.
        recipe: Schedule, gradient rule and penalties.
        original: The model that the result is compared with, where ``model`` is one that was coded after training and
            expanded again: starting from such weights shortens the schedule. By default ``model``.
        teacher: The model that teaches, where the recipe has one; by default ``original``. Another one, larger or more
            accurate, must have the same inputs and classes.
        checkpoint: File in which the state is kept, and from which a run goes on.
        data_name: Tells checkpoints of different data apart.
        target: As in `compress`.
        device: Where PyTorch computes; a checkpoint goes on on any.
        progress: Called with (steps done, steps in all, "loss ...").

    Raises:
        ModelError: An operator cannot be trained, the model has no weights to train or several outputs, or the outputs
            of the teacher are of another shape.
        OptionError: The method or recipe cannot be trained, the checkpoint belongs to another run, or PyTorch does not
            have the device.
    """
    check_device(device)
    method = method or DQC(fit="paper")
    recipe = recipe or Recipe()
    if method.fit != "paper" or method.scale != "none":
        raise OptionError(
            f"trained dqc uses the codebook of the paper; fit is {method.fit} (choose paper), scale is {method.scale} "
            "(choose none)"
        )
    if teacher is not None and not recipe.teacher:
        raise OptionError(f"{teacher} teaches with a share of 0 of the loss; set teacher above 0, such as 1")
    path = Path(model)
    proto = modelfile.load(path)
    sites = [site for site in find(proto, path.parent).sites if not site.scope.path]
    if not sites or len(proto.graph.output) != 1:
        raise ModelError(
            f"{path}: {len(sites)} layers and {len(proto.graph.output)} outputs; training needs one output"
        )
    weights = {site.name: torch.from_numpy(site.read().copy()).to(device).requires_grad_() for site in sites}
    known = TorchGraph(proto, folder=path.parent).values
    source = path if original is None else Path(original)
    taught_by = TorchGraph(source if teacher is None else teacher).to(device) if recipe.teacher else None
    names = [name for name in (*bias_names(proto), *batch_norm_names(proto)) if name not in weights]
    rest = {name: known[name].clone().to(device).requires_grad_() for name in names}
    graph = TorchGraph(proto, supplied=[*weights, *rest], folder=path.parent).to(device)
    statistics = {name: graph.values[name] for name in statistic_names(proto)}
    scales = {node.input[1] for node in proto.graph.node if node.op_type == "BatchNormalization"} & set(rest)

    def loss(step: int) -> Tensor:
        feeds, labels = batches(step)
        coded = {name: quantise(w, method.bits, zero=method.zero, rule=recipe.rule) for name, w in weights.items()}
        inputs = {name: as_tensor(value, device) for name, value in feeds.items()}
        right = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
        (logits,) = graph.run(inputs, {**coded, **rest}, batch_statistics=True).values()
        value = (1 - recipe.teacher) * F.cross_entropy(logits, right)
        if taught_by is not None:
            with torch.no_grad():
                (wanted,) = taught_by.run(inputs).values()
            if wanted.shape != logits.shape:
                shapes = f"{list(logits.shape)} and {list(wanted.shape)}"
                raise ModelError(f"{path} and its teacher give outputs of {shapes}; choose one of the same classes")
            value = value + recipe.teacher * F.kl_div(
                F.log_softmax(logits, 1), F.log_softmax(wanted, 1), reduction="batchmean", log_target=True
            )
        if recipe.l1:
            value = value + recipe.l1 * torch.stack([w.abs().sum() for w in coded.values()]).sum()
        if recipe.l2:
            squares = [(w**2).sum() for w in (*coded.values(), *(rest[name] for name in scales))]
            value = value + recipe.l2 / 2 * torch.stack(squares).sum()
        return value

    settings = {"method": method.options, "recipe": dataclasses.asdict(recipe), "model": path.name, "data": data_name}
    if teacher is not None:
        settings["teacher"] = Path(teacher).name
    history = train(
        loss,
        {**weights, **rest},
        recipe.schedule,
        others=statistics,
        settings=settings,
        checkpoint=checkpoint,
        progress=progress,
    )
    # The codes are exact for these: the largest of them is the power of two that the codebook starts from.
    final = {name: quantise(w, method.bits, zero=method.zero, rule=recipe.rule) for name, w in weights.items()}
    moved = {name: value.detach().cpu().numpy() for name, value in {**final, **rest, **statistics}.items()}
    trained = with_values(proto, path.parent, moved)
    return Trained(_code(trained, path, source, method, target), history)


def _code(trained: ModelProto, path: Path, source: Path, method: DQC, target: Target) -> Result:
    """The trained model in codes, as if it had been made from the original file."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / source.name
        modelfile.save(trained, draft, path.parent)
        result = compress(draft, method, target=target)
    return dataclasses.replace(result, source=source, bytes_before=modelfile.file_bytes(source))
