"""The loop of every training run: steps, a schedule, checkpoints to go on from, and a stop where the loss is lost."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vqonnx.errors import InputError, OptionError

_log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]


Optimiser = Literal["sgd", "adam"]


@dataclass(frozen=True)
class Schedule:
    """How parameters move: stochastic gradient descent with momentum, or Adam (Kingma and Ba 2015).

    Attributes:
        steps: Number of steps.
        rate: Learning rate of the first. With ``adam`` in units of the root mean square that a parameter begins with,
            so that one rate suits tensors of any size.
        drops: Steps from which on the rate is a tenth of what it was.
        momentum: Of the gradient.
        weight_decay: Times the parameters, added to the gradient; not with ``adam``.
        optimiser: ``sgd`` or ``adam``.
        cosine: The rate falls to zero along half a cosine.
    """

    steps: int
    rate: float
    drops: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimiser: Optimiser = "sgd"
    cosine: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"steps is {self.steps}; choose 1 or more")
        if not 0 < self.rate < float("inf"):
            raise OptionError(f"rate is {self.rate:g}; choose a number above 0, such as 0.01")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        return self.rate * self._share(step)

    def _share(self, step: int) -> float:
        dropped: float = 0.1 ** sum(step >= drop for drop in self.drops)
        return dropped * (0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0)

    def start(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser as it is before the first step."""
        if self.optimiser == "sgd":
            return torch.optim.SGD(parameters, lr=self.rate, momentum=self.momentum, weight_decay=self.weight_decay)
        groups = [{"params": [value], "lr": self.rate * _size(value)} for value in parameters]
        return torch.optim.Adam(groups, betas=(self.momentum, 0.999), eps=1e-12)

    def adjust(self, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Set the rates of a step."""
        for group in optimiser.param_groups:
            group.setdefault("first", group["lr"])
            group["lr"] = group["first"] * self._share(step)


@dataclass
class History:
    """What a run did.

    Attributes:
        losses: (step, mean loss since the entry before).
        steps: Steps whose result is in the parameters.
        diverged: Step whose loss was not finite, where the run stopped; None if it ended as planned.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    diverged: int | None = None


def train(
    loss: Callable[[int], Tensor],
    parameters: Mapping[str, Tensor],
    schedule: Schedule,
    *,
    others: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    every: int = 100,
    progress: Progress | None = None,
) -> History:
    """Move ``parameters`` in place so that the loss falls.

    Every ``every`` steps the state is kept, in memory and in ``checkpoint``. A run that finds a checkpoint of the same
    settings goes on from it, and ends with the same parameters as one that was never interrupted. A loss that is not
    finite ends the run: the parameters are those that were kept last.

    Args:
        loss: The loss of a step by its number; everything random in it must depend on that number alone.
        parameters: Tensors that require gradients, by name.
        schedule: Steps and rates.
        others: Tensors that ``loss`` changes itself (statistics of BatchNormalization), kept and restored as well.
        settings: What else makes the run what it is, JSON-ready; a checkpoint of other settings is refused.
        checkpoint: File to keep the state in; removed by nobody.
        every: Steps between two states that are kept, and between two entries of the history.
        progress: Called with (steps done, steps in all, "loss ...").

    Raises:
        OptionError: The checkpoint belongs to a run with other settings.
        InputError: The checkpoint cannot be read.
    """
    others = others or {}
    optimiser = schedule.start(list(parameters.values()))
    identity = json.dumps({"schedule": asdict(schedule), "settings": settings, "every": every}, sort_keys=True)
    state = _State(parameters, others, optimiser, identity)
    history = History()
    if checkpoint is not None and checkpoint.exists():
        history = state.load(checkpoint)
        _log.info("%s: going on from step %d of %d", checkpoint, history.steps, schedule.steps)
    if history.diverged is not None:
        return history
    kept = state.copy()
    total = 0.0
    start = history.steps
    for step in range(start, schedule.steps):
        schedule.adjust(optimiser, step)
        optimiser.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        number = float(value.detach())
        total += number
        optimiser.step()
        last = step + 1 == schedule.steps
        kept_step = (step + 1) % every == 0 or last
        # The parameters are looked at only where they are kept: bad ones make the next loss bad anyway.
        if number != number or abs(number) == float("inf") or (kept_step and not state.finite()):
            state.restore(kept)
            history.diverged = step
            _log.warning(
                "step %d: the loss is %s; stopped, the state of step %d is kept; choose a rate below %g",
                step,
                number,
                history.steps,
                schedule.rate_at(step),
            )
            break
        if kept_step:
            done = step + 1 - history.steps
            history.steps = step + 1
            history.losses.append((step + 1, total / done))
            if progress:
                progress(step + 1, schedule.steps, f"loss {total / done:.4f}")
            total = 0.0
            kept = state.copy()
            if checkpoint is not None:
                state.save(checkpoint, history, moments=not last)
    if checkpoint is not None and history.diverged is not None:
        state.save(checkpoint, history)
    return history


def _size(value: Tensor) -> float:
    """Root mean square; 1 where everything is zero."""
    size = float(value.detach().double().pow(2).mean().sqrt())
    return size if size > 0 else 1.0


@dataclass(frozen=True)
class _State:
    """All tensors that make the state of a run."""

    parameters: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    optimiser: torch.optim.Optimizer
    identity: str

    def finite(self) -> bool:
        return all(bool(torch.isfinite(value).all()) for value in (*self.parameters.values(), *self.others.values()))

    def copy(self) -> dict[str, Any]:
        tensors = {name: value.detach().clone() for name, value in self.parameters.items()}
        others = {name: value.clone() for name, value in self.others.items()}
        moments = copy.deepcopy(self.optimiser.state_dict()["state"])
        return {"parameters": tensors, "others": others, "optimiser": moments}

    def restore(self, kept: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(kept["parameters"][name])
            for name, value in self.others.items():
                value.copy_(kept["others"][name])
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": copy.deepcopy(kept["optimiser"]), "param_groups": groups})

    def save(self, path: Path, history: History, *, moments: bool = True) -> None:
        """Write the state, at the end without that of the optimiser; the file appears whole or not at all."""
        draft = path.with_name(path.name + ".part")
        kept = self.copy() if moments else {**self.copy(), "optimiser": {}}
        torch.save({"identity": self.identity, "history": asdict(history), **kept}, draft)
        os.replace(draft, path)

    def load(self, path: Path) -> History:
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
            identity, history = kept["identity"], History(**kept["history"])
        except Exception as error:  # torch and pickle have many ways to say that a file is not theirs
            raise InputError(f"{path}: not a checkpoint of this version; delete it to start anew") from error
        if identity != self.identity:
            raise OptionError(f"{path}: belongs to a run with other settings; delete it, or name another checkpoint")
        self.restore(kept)
        history.losses = [(int(step), float(value)) for step, value in history.losses]
        return history
