"""Entropy-coded scalar quantisation: whole multiples of a step, with short codes for those that are frequent.

The step is one for a layer; where weights are small against it, or their inputs weak, most multiples are zero and take
hardly any bits, so that no table of bit depths is needed. How the multiples are chosen is in `vqonnx.ecsq`, how they
are stored in `vqonnx.prefix`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import ClassVar

import numpy as np
from threadpoolctl import threadpool_limits

from vqonnx.ecsq import Quantised, exponent_of, quantise
from vqonnx.errors import OptionError
from vqonnx.feedback import Frame
from vqonnx.form import Coded
from vqonnx.method import Budgeted, Layer, LeftAlone, Needs, Offer, check_range
from vqonnx.moments import FULL_COLS
from vqonnx.prefix import Prefix, common_trees
from vqonnx.refine import Target, target_of

_EXPONENTS = np.arange(-5, 2.51, 1 / 32)  # of 2, for steps in units of the root mean square of the weights
_TRIED = (-5.0, -3.0, -1.5, -0.5, 0.25, 1.0, 1.75, 2.5)
_SEARCH = 10
_CLOSE = 0.02  # octaves between a step that is too small and one that fits
_LARGE, _MORE = 2**15, 4  # weights of a layer from which on `beam` holds; smaller ones have so many times as much
_ENOUGH, _AIM = 0.985, 0.995  # of a budget
MOST_WEIGHTS = 2**22  # of a layer: onnxruntime takes some 770 bytes for each when it loads prefix codes
_MOST_BITS = 32  # a small layer takes more than the 7 that its levels can, with what it has besides
_FIXED = 20  # bytes that a layer takes besides: its part of the trees and of the codebook
_SMALLEST, _LARGEST = 2.0**-18, 60000.0  # steps that float16 holds with 7 bits or more; others are float32


@dataclass(frozen=True)
class Entropy(Budgeted):
    """Multiples of a step in prefix codes.

    Attributes:
        bits: Stored bits for each weight: an average over the layers of a model.
        step: The step of a layer in units of the root mean square of its weights; None finds the one that ``bits``
            allow.
        sweeps: Of coordinate descent.
        beam: Choices that a row of weights keeps while they are decided one after the other; small layers have more.
        asymmetric: Aim at the output of the original layer on the original input.
    """

    id: ClassVar[str] = "entropy"
    needs: ClassVar[Needs] = Needs.MOMENTS
    bits: float = 2.0
    step: float | None = None
    sweeps: int = 2
    beam: int = 16
    asymmetric: bool = True

    @property
    def pairs(self) -> bool:
        return True

    @property
    def shares(self) -> bool:
        return self.step is None

    def __post_init__(self) -> None:
        if not 0 < self.bits <= _MOST_BITS:
            raise OptionError(f"method '{self.id}': bits is {self.bits:g}; choose more than 0, and up to {_MOST_BITS}")
        if self.step is not None and not 0 < self.step < 100:
            raise OptionError(f"method '{self.id}': step is {self.step:g}; choose a number above 0, such as 0.5")
        check_range(self, "sweeps", 1, 100)
        check_range(self, "beam", 1, 1024)

    def offers(self, layer: Layer) -> list[Offer]:
        _refuse_large(layer)
        with threadpool_limits(limits=1):
            target = target_of(layer, 1, asymmetric=False)
            frame = Frame.of(target)
            sizes, errors = [], []
            for exponent in _TRIED:
                form = self._form(layer, target, frame, float(2**exponent), quick=True)
                sizes.append(float(_bytes(form)))
                errors.append(target.distance(form.decode()))
        # Between steps that were tried, bytes and the logarithm of the error are nearly straight lines.
        logs = np.interp(_EXPONENTS, _TRIED, np.log(np.maximum(errors, 1e-300)))
        between = np.interp(_EXPONENTS, _TRIED, sizes)
        return [
            Offer(replace(self, step=float(2**exponent)), float(size), float(np.exp(error)))
            for exponent, size, error in zip(_EXPONENTS, between, logs, strict=True)
        ]

    def encode(self, layer: Layer) -> Coded:
        _refuse_large(layer)
        with threadpool_limits(limits=1):
            target = target_of(layer, 1, asymmetric=self.asymmetric)
            frame = Frame.of(target)
            if self.step is not None:
                return self._form(layer, target, frame, self.step)
            return self._within(layer, target, frame, self.bits * layer.weight.size / 8)

    def _within(self, layer: Layer, target: Target, frame: Frame, budget: float) -> Coded:
        """The form of the smallest step that keeps within the budget of bytes, or nearly so."""
        low, high = float(_EXPONENTS[0]), float(_EXPONENTS[-1]) + 4
        side = _FIXED + layer.weight.size / 1000  # bytes that are not codes, a guess
        middle = exponent_of(max(8 * (budget - side) / layer.weight.size, 0))
        best = None
        for _ in range(_SEARCH):
            middle = min(max(middle, low), high)
            form = self._form(layer, target, frame, 2**middle)
            size = _bytes(form)
            if size <= budget:
                best, high = form, middle
            else:
                low = middle
            if high - low < _CLOSE or _ENOUGH * budget <= size <= budget:
                break
            # The rate of other steps, from how far that of this one is from what was expected.
            shift = middle - exponent_of(8 * (size - side) / layer.weight.size)
            middle = shift + exponent_of(max(8 * (_AIM * budget - side) / layer.weight.size, 0))
            if not low < middle < high:
                middle = (low + high) / 2
        if best is None or (best.words == 1 and layer.weight.any()):
            least = _bytes(self._form(layer, target, frame, 1.0, quick=True))  # a step as large as the weights
            bits = ceil(800 * least / layer.weight.size) / 100
            raise LeftAlone(f"{self.bits:g} bits a weight are {budget:.0f} bytes, too few; set bits={bits:g}")
        return best

    def _form(self, layer: Layer, target: Target, frame: Frame, step: float, *, quick: bool = False) -> Coded:
        size = step * float(np.sqrt(np.mean(layer.weight.astype(np.float64) ** 2)) or 1.0)
        taps = prod(layer.kernel) if self.order == "ihw" else 1
        more = min(max(_LARGE // layer.weight.size, 1), _MORE)
        sweeps, beam = (0, more) if quick else (self.sweeps, self.beam * more)
        return _store(
            target,
            quantise(target, size, taps, sweeps=sweeps, beam=beam, learn=not quick or more > 1, frame=frame),
            size,
        )


def _refuse_large(layer: Layer) -> None:
    if layer.weight.size > MOST_WEIGHTS:
        raise LeftAlone(
            f"{layer.weight.size:,} weights are too many for prefix codes, which take gigabytes to load; up to "
            f"{MOST_WEIGHTS:,} can have them, choose refined or bgd"
        )
    if layer.weight.shape[1] > FULL_COLS:
        raise LeftAlone(f"{layer.weight.shape[1]:,} columns are more than {FULL_COLS:,}; choose bgd")


def _store(target: Target, made: Quantised, step: float) -> Coded:
    """The form: levels as codes, and the step that makes the error smallest."""
    levels = made.levels
    most = int(np.abs(levels).max())
    error, energy = 0.0, 0.0
    for rows, metric in target.parts():
        seen = levels[rows] @ metric
        error += float(np.einsum("ij,ij->", seen, target.weight[rows]))
        energy += float(np.einsum("ij,ij->", seen, levels[rows]))
    best = step if energy <= 0 or error <= 0 else error / energy
    kind = np.float16 if _SMALLEST <= best <= _LARGEST else np.float32
    return Coded(
        (levels + most).astype(np.uint8)[None],
        np.arange(-most, most + 1, dtype=np.int8)[None, None, :, None],
        levels.shape[1],
        np.array([[best]], kind),
        Prefix(
            (levels.shape[0], levels.shape[1]),
            made.row_classes,
            made.col_classes,
            made.row_span,
            made.col_span,
            common_trees([(levels, made.classes)]),
            most,
        ),
    )


def _bytes(form: Coded) -> int:
    """With a part of what layers share."""
    assert form.coding is not None
    return form.nbytes - form.coding.trees.nbytes - form.codebooks.nbytes + _FIXED
