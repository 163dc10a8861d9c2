"""Rounding to whole multiples of a step of the row, settled on the layer's output: each step lowered its error.

What `rtn` is to plain weights: the target is what the original layer gives (asymmetric, as for `refined`), the levels
are chosen by exact coordinate descent with the full second moment of the input, and the steps are the least-squares
ones for them. A layer whose codes lose next to nothing so still makes good what the layers before it have lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vqonnx import uniform
from vqonnx.cluster import one_thread
from vqonnx.form import Coded
from vqonnx.method import Layer, LeftAlone, Method, Needs, check_range
from vqonnx.moments import FULL_COLS
from vqonnx.refine import Array, Target, row_factors, target_of


@dataclass(frozen=True)
class Settled(Method):
    """Uniform quantisation, with a step for each row, refined on the layer's output.

    Attributes:
        bits: Bits per weight.
        rounds: Of coordinate descent and least-squares steps.
        asymmetric: Aim at the output of the original layer on the original input.
    """

    id: ClassVar[str] = "settled"
    needs: ClassVar[Needs] = Needs.MOMENTS
    depthwise: ClassVar[bool] = True
    bits: int = 8
    rounds: int = 2
    asymmetric: bool = True

    @property
    def pairs(self) -> bool:
        return True

    def __post_init__(self) -> None:
        check_range(self, "bits", 1, uniform.DEEPEST)
        check_range(self, "rounds", 1, 100)

    def encode(self, layer: Layer) -> Coded:
        cols = layer.weight.shape[1]
        if cols > FULL_COLS:
            raise LeftAlone(f"{cols:,} columns are more than {FULL_COLS:,}, whose moments are kept in full; choose rtn")
        with one_thread():  # the same bytes whatever the number of threads
            target = target_of(layer, 1, asymmetric=self.asymmetric)
            spread = np.concatenate([np.broadcast_to(np.diag(h), target.weight[at].shape) for at, h in target.parts()])
            steps = uniform.search_steps(target.weight, self.bits, spread)
            levels = uniform.quantise(target.weight, steps, self.bits)
            for _ in range(self.rounds):
                wide = steps.astype(np.float64)
                levels = settle(target, levels, wide, self.bits)
                fitted = (wide * row_factors(target, levels * wide[:, None])).astype(steps.dtype)
                steps = np.where(fitted > 0, fitted, steps)  # not where the type has nothing so small
            levels = settle(target, levels, steps.astype(np.float64), self.bits)
        return uniform.form_of(levels, steps, self.bits)


def settle(target: Target, levels: Array, steps: Array, bits: int) -> Array:
    """One sweep of coordinate descent over all weights; never makes ``trace(E H E^T)`` larger.

    All rows of all groups of a convolution take a column at the same time: with the others held, the best level is the
    one nearest to where the error has no slope.

    Args:
        target: What to come close to; its width is 1.
        levels: Whole numbers ``[rows, cols]``.
        steps: ``[rows]``, more than 0.
        bits: The levels are ``-2^(bits-1) .. 2^(bits-1) - 1``.
    """
    groups, (rows, cols) = len(target.metrics), levels.shape
    metrics = np.stack(target.metrics) if groups > 1 else target.metrics[0][None]
    found = levels.reshape(groups, rows // groups, cols).copy()
    wide = steps.reshape(groups, -1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    influence = (target.weight.reshape(found.shape) - found * wide[..., None]) @ metrics
    for _, at in target.panels():
        near, own = influence[..., at].copy(), metrics[:, at, at]
        before = found[..., at].copy()
        for column in range(near.shape[2]):
            slope = near[..., column] / own[:, column, column, None]
            chosen = np.clip(np.rint(before[..., column] + slope / wide), low, high)
            near += ((before[..., column] - chosen) * wide)[..., None] * own[:, None, column]
            found[..., at.start + column] = chosen
        if at.stop < cols:  # what comes behind is all that is read again
            influence[..., at.stop :] += ((before - found[..., at]) * wide[..., None]) @ metrics[:, at, at.stop :]
    return np.asarray(found.reshape(rows, cols), np.float64)
