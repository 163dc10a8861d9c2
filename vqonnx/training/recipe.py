"""How codebooks are distilled: steps, rates and what moves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

from vqonnx.errors import OptionError
from vqonnx.training.coded import Gradient
from vqonnx.training.loop import Schedule
from vqonnx.training.objective import Loss

# The published schedule in passes over the data: 2,500 steps of 128 images for each layer are a quarter of ImageNet's
# 1.28 million, 9 times 10,000 steps are nine times that number.
_LAYER_PASSES, _PASSES = 0.25, 9


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

    def layer_schedule(self, layers: int) -> Schedule:
        """The steps for so many layers, one layer after the other; `scaled` gives their number."""
        return Schedule((self.layer_steps or 0) * layers, self.layer_rate, (), self.momentum, self.weight_decay)

    def schedule(self) -> Schedule:
        """The steps for all; `scaled` gives their number."""
        steps = self.steps or 0
        return Schedule(steps, self.rate, (steps // 3, 2 * steps // 3), self.momentum, self.weight_decay)
