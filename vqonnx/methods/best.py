"""The best accuracy for a size: from a menu of encodings, each layer gets what the whole model gains most by.

`refined` product quantisation at widths of 1 to 4 and small codebooks of whole numbers; or prefix codes (`entropy`) at
every step, in smaller files that take seconds and gigabytes to load (docs/quality.md). Depthwise convolutions hold few
weights and are sensitive: multiples of a step (`settled`) of 5 to 8 bits. Which encodings are on the menu was decided
by what won on real networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Literal

import numpy as np

from vqonnx import uniform
from vqonnx.errors import OptionError
from vqonnx.form import Form
from vqonnx.method import Budgeted, Layer, LeftAlone, Method, Needs, Offer, check_range
from vqonnx.methods.bgd import BGD
from vqonnx.methods.entropy import MOST_WEIGHTS, Entropy
from vqonnx.methods.kmeans import KMeans
from vqonnx.methods.refined import Refined
from vqonnx.methods.rtn import RTN
from vqonnx.methods.settled import Settled
from vqonnx.moments import FULL_COLS
from vqonnx.refine import target_of

# (width, bits) of codes of one length; a codebook must not cost more than its codes. Small layers have narrow
# blocks as well, whose codebooks are small; in large ones a wide block is better at the same bits.
_NARROW = ((2, 7), (2, 8), (1, 2), (1, 3))
_SMALL = ((4, 3), (4, 4), (2, 2), (4, 5), (3, 4), (4, 6), (3, 5), (2, 4), (3, 6), (2, 5), (2, 6), *_NARROW)
_LARGE = ((4, 3), (4, 4), (4, 5), (4, 6), (4, 7), (4, 8), (3, 7), (3, 8), (2, 6), (2, 7), (2, 8))
_FINE = ((1, 4), (1, 5), (1, 6))
_LARGE_WEIGHTS = 2**16
_WIDE_ROWS = ((8, 8), (4, 6), (4, 8), (2, 6))  # of layers whose moments are not kept in full
_WIDE = ((8, 6), (8, 8))  # along the input channels, where kernels have tables for such blocks
_MOST_BITS = 32
_ROUNDS = 6  # of `refined`, when a layer is encoded; a look takes two
_FEW_COLS = 1536  # up to which error feedback is quick enough for a look


@dataclass(frozen=True)
class Best(Budgeted):
    """A mixture, bits shared out over the network.

    Attributes:
        bits: Stored bits for each weight: an average over the layers of a model.
        codes: Codes of one length (``fixed``), or ``prefix`` codes, which differ in length.
        beam: Choices that a row of weights keeps while prefix codes are chosen: fewer are faster, and less exact.
        asymmetric: Aim at the output of the original layer on the original input.
        codebook: Type of the codebooks of `refined`.
        start: Codes that `refined` begins with.
        scale: Factors of rows with `refined`: ``none``, one for each ``row``, or what is worth its bytes (``auto``).
        fine: Where codes lose next to nothing: `settled` on the layer's output, or rounded to nearest (`rtn`).
    """

    id: ClassVar[str] = "best"
    needs: ClassVar[Needs] = Needs.MOMENTS
    depthwise: ClassVar[bool] = True
    bits: float = 2.5
    codes: Literal["fixed", "prefix"] = "fixed"
    beam: int = 16
    asymmetric: bool = True
    codebook: Literal["int8", "float16"] = "int8"
    start: Literal["assign", "feedback"] = "feedback"
    scale: Literal["none", "row", "auto"] = "auto"
    fine: Literal["settled", "rtn"] = "settled"

    @property
    def pairs(self) -> bool:
        return True

    @property
    def width(self) -> int | None:
        """Weights of one code; None where each layer has its own."""
        return 1 if self.codes == "prefix" else None

    def __post_init__(self) -> None:
        if not 0 < self.bits <= _MOST_BITS:
            raise OptionError(f"method '{self.id}': bits is {self.bits:g}; choose more than 0, and up to {_MOST_BITS}")
        check_range(self, "beam", 1, 1024)

    def offers(self, layer: Layer) -> list[Offer]:
        fewest = 5 if layer.depthwise else 7  # others do better by what follows, up to what 256 multiples of a step can
        fine = list(self._fine(layer, range(fewest, 9)))
        if layer.depthwise and self.codes == "fixed":
            return fine
        if layer.weight.shape[1] > FULL_COLS:
            ordinary: list[Method] = [BGD(self.order, w, bits=b, clamp="vectors", first=True) for w, b in _WIDE_ROWS]
            scalar: list[Method] = [KMeans(self.order, bits) for bits in (3, 4, 5, 6)]
            return [*(_offer(layer, method) for method in (*ordinary, *scalar)), *fine]
        if self.codes == "prefix" and layer.weight.size <= MOST_WEIGHTS:
            chosen = Entropy(order=self.order, beam=self.beam, asymmetric=self.asymmetric)
            return [*chosen.offers(layer), *fine]
        weights = layer.weight.size
        choices = _LARGE if weights >= _LARGE_WEIGHTS else _SMALL
        choices = (*choices, *_FINE, *(_WIDE if self.order == "hwi" else ()))
        sizes = [(w, b) for w, b in choices if w <= layer.weight.shape[1] and w * 2**b * w <= weights // 2]
        found = []
        for (width, bits), scale in product(sizes, self._scales(weights)):
            method = Refined(
                self.order,
                width,
                bits,
                rounds=_ROUNDS,
                asymmetric=self.asymmetric,
                start=self.start,
                scale=scale,
                codebook=self.codebook,
            )
            start = self.start if layer.weight.shape[1] <= _FEW_COLS else "assign"
            quick = replace(method, rounds=2, asymmetric=False, start=start, quick=True)
            with suppress(LeftAlone):  # words that float16 does not hold
                found.append(_offer(layer, quick, method))
        return [*found, *fine]

    def _scales(self, weights: int) -> tuple[Literal["none", "row"], ...]:
        """What is on the menu of a layer; in large ones the factors of rows are next to nothing beside the codes."""
        if self.scale != "auto":
            return (self.scale,)
        return ("none", "row") if weights < _LARGE_WEIGHTS else ("row",)

    def _fine(self, layer: Layer, bits: Iterable[int]) -> Iterator[Offer]:
        """Multiples of a step for each row, whose codes lose next to nothing."""
        for number in bits:
            if self.fine == "rtn" or layer.weight.shape[1] > FULL_COLS:
                yield _offer(layer, RTN(self.order, number))
            else:
                method = Settled(self.order, number, asymmetric=self.asymmetric)
                yield _offer(layer, replace(method, rounds=1, asymmetric=False), method)

    def encode(self, layer: Layer) -> Form:
        budget = self.bits * layer.weight.size / 8
        offers = self.offers(layer)
        fitting = [offer for offer in offers if offer.bytes + _shared(offer.method) <= budget]
        if not fitting:
            least = min(offer.bytes + _shared(offer.method) for offer in offers)
            bits = np.ceil(800 * least / layer.weight.size) / 100
            raise LeftAlone(f"{self.bits:g} bits a weight are {budget:.0f} bytes, too few; set bits={bits:g}")
        return min(fitting, key=lambda offer: offer.error).method.encode(layer)


def _offer(layer: Layer, tried: Method, offered: Method | None = None) -> Offer:
    """What a method does to a layer; ``tried`` may be a quicker one than is ``offered``."""
    form = tried.encode(layer)
    size = float(form.nbytes - _shared(tried))
    if layer.weight.shape[1] > FULL_COLS and layer.moments is not None:
        return Offer(offered or tried, size, layer.moments.energy(layer.weight - form.decode()))
    error = target_of(layer, 1, asymmetric=False).distance(form.decode())
    return Offer(offered or tried, size, error)


def _shared(method: Method) -> int:
    """Bytes of a codebook that a model stores once, for all layers that have it."""
    return uniform.book(method.bits).nbytes if isinstance(method, (RTN, Settled)) else 0
