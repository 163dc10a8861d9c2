"""How codebooks are distilled: steps, rates and what moves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

from vqonnx.errors import OptionError
from vqonnx.training.coded import Gradient
from vqonnx.training.loop import Optimiser, Schedule
from vqonnx.training.objective import Loss

# The published schedule in passes over the data: 2,500 steps of 128 images for each layer are a quarter of ImageNet's
# 1.28 million, 9 times 10,000 steps are nine times that number.
_LAYER_PASSES, _PASSES = 0.25, 9
# Rates for all codebooks and for each layer: the published ones, and what did best on images held out (decisions.md).
_RATES = {"sgd": (0.01, 0.05), "adam": (0.003, 0.003)}


@dataclass(frozen=True)
class Recipe:
    """How codebooks are distilled; the defaults are the published procedure, scaled to the number of images.

    Attributes:
        steps: Steps in which all codebooks move; None for nine passes over the images. With ``sgd`` the rate is divided
            by ten after each third, with ``adam`` it falls along a cosine.
        rate: Learning rate of these steps; None for that of the optimiser.
        layer_steps: Steps for each layer in turn, before; its codebooks move, the layers before it are compressed and
            those after it are still the original's. None for a quarter of a pass.
        layer_rate: Learning rate of these steps; None for that of the optimiser.
        batch: Images of a step.
        gradient: Of a word: the ``mean`` over the blocks that use it, as published, or the ``sum``.
        loss: ``kl`` for classifiers, ``mse`` for anything (`vqonnx.training.objective`).
        biases: Biases of layers and of BatchNormalization move as well, in the steps for all.
        statistics: BatchNormalization uses the statistics of each batch in the steps for all, and its stored ones
            follow; without it they stay.
        momentum: Of the gradient.
        weight_decay: Times the codebooks, added to the gradient.
        seed: Seed for the choice of images.
        optimiser: ``sgd``, as published, for networks with their BatchNormalization nodes, or ``adam``, whose rates are
            relative to the size of each codebook, for any network.
    """

    steps: int | None = None
    rate: float | None = None
    layer_steps: int | None = None
    layer_rate: float | None = None
    batch: int = 128
    gradient: Gradient = "mean"
    loss: Loss = "kl"
    biases: bool = False
    statistics: bool = True
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    optimiser: Optimiser = "sgd"

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("layer_steps", 0), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} is {value}; choose {least} or more")
        for name in ("rate", "layer_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise OptionError(f"{name} is {value:g}; choose a number above 0, such as 0.01")
        for name, kind in (("gradient", Gradient), ("loss", Loss), ("optimiser", Optimiser)):
            if getattr(self, name) not in get_args(kind):
                raise OptionError(f"{name} '{getattr(self, name)}' is unknown; choose {' or '.join(get_args(kind))}")
        if self.steps == 0 and self.layer_steps == 0:
            raise OptionError("steps and layer_steps are both 0; choose more for one of them")

    def scaled(self, images: int) -> Recipe:
        """The recipe with the numbers of steps for so many images, and the rates of the optimiser."""
        steps, layer_steps = self.steps, self.layer_steps
        if steps is None:
            steps = max(1, round(_PASSES * images / self.batch))
        if layer_steps is None:
            layer_steps = max(1, round(_LAYER_PASSES * images / self.batch))
        rate, layer_rate = _RATES[self.optimiser]
        return dataclasses.replace(
            self, steps=steps, layer_steps=layer_steps, rate=self.rate or rate, layer_rate=self.layer_rate or layer_rate
        )

    def layer_schedule(self, layers: int) -> Schedule:
        """The steps for so many layers, one layer after the other; `scaled` gives their number."""
        return self._schedule((self.layer_steps or 0) * layers, self.layer_rate, ())

    def schedule(self) -> Schedule:
        """The steps for all; `scaled` gives their number."""
        steps = self.steps or 0
        if self.optimiser == "adam":
            return dataclasses.replace(self._schedule(steps, self.rate, ()), cosine=True)
        return self._schedule(steps, self.rate, (steps // 3, 2 * steps // 3))

    def _schedule(self, steps: int, rate: float | None, drops: tuple[int, ...]) -> Schedule:
        return Schedule(steps, rate or 0.0, drops, self.momentum, self.weight_decay, self.optimiser)
