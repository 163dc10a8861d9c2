"""Product quantisation refined on the layer's output: each step lowered the error of real layers, and is switchable.

Codes and words whose target is what the original layer gives, not what its weights are, in the centred metric
of the input that the compressed layers before it make: k-means with one metric for each block, then coordinate descent
over the codes and least-squares codewords in turn (formulas: `vqonnx.refine`, `vqonnx.feedback`). The mean that is lost
goes to the layer's bias, which the pass corrects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vqonnx.cluster import kmeans, one_thread
from vqonnx.form import Coded
from vqonnx.method import Layer, LeftAlone, Method, Needs, check_range
from vqonnx.methods.codebook import store, store_scales, whole_numbers
from vqonnx.moments import FULL_COLS
from vqonnx.refine import Array, alternate, assign, descend, feed_back, target_of, update_words

_WIDTH = 4
_METRIC_ROUNDS = 4


@dataclass(frozen=True)
class Refined(Method):
    """Product quantisation refined on the layer's output.

    Attributes:
        width: Weights per codeword; None takes 4, or the columns of a row where there are fewer.
        bits: Bits per code.
        rounds: Of coordinate descent and least-squares codewords.
        asymmetric: Aim at the output of the original layer on the original input.
        start: Codes to begin with: each block's best on its own (``assign``), or error feedback (``feedback``).
        scale: ``none``, or one factor for each ``row``: its root mean square, later that of least error.
        codebook: Type of the stored codebook; ``int8`` is whole numbers, whose factor is a scale.
        quick: K-means in few iterations, for a look at what a layer can do.
    """

    id: ClassVar[str] = "refined"
    needs: ClassVar[Needs] = Needs.MOMENTS
    width: int | None = None
    bits: int = 6
    rounds: int = 3
    asymmetric: bool = True
    start: Literal["assign", "feedback"] = "assign"
    scale: Literal["none", "row"] = "none"
    codebook: Literal["int8", "float16", "float32"] = "float16"
    quick: bool = False

    @property
    def pairs(self) -> bool:
        return True

    def __post_init__(self) -> None:
        check_range(self, "bits", 1, 12)
        check_range(self, "width", 1, 64)
        check_range(self, "rounds", 1, 100)

    def encode(self, layer: Layer) -> Coded:
        with one_thread():  # the same bytes whatever the number of threads, and of layers at the same time
            return self._encode(layer)

    def _encode(self, layer: Layer) -> Coded:
        rows, cols = layer.weight.shape
        if cols > FULL_COLS:
            raise LeftAlone(f"{cols:,} columns are more than {FULL_COLS:,}, whose moments are kept in full; choose bgd")
        width = self.width or min(_WIDTH, cols)
        if cols < width:
            raise LeftAlone(f"width {width} is more than the {cols} columns of a row")
        target = target_of(layer, width, asymmetric=self.asymmetric, scales=self._scales(layer.weight))
        vectors = (target.weight / target.scales[:, None]).reshape(-1, width)
        found = kmeans(vectors, 2**self.bits, seed=layer.seed, quick=self.quick)
        words = found.words.astype(np.float64)
        codes = found.labels.reshape(rows, -1)
        for _ in range(_METRIC_ROUNDS):
            codes = assign(target, words)
            words = update_words(target, codes, words)
        if self.start == "feedback":
            codes = feed_back(target, words)
        scaled = self.scale == "row"
        target, codes, words = alternate(target, codes, words, self.rounds, scaled=scaled)
        book, factors = self._stored(words, target.scales if scaled else np.ones(1))
        # The last descent is with what is stored.
        factor = np.ones(1) if factors is None else factors[:, 0].astype(np.float64)
        target = replace(target, scales=np.broadcast_to(factor, rows))
        codes = descend(target, codes, book.astype(np.float64))
        return Coded.one_stage(codes=codes, codebook=book, cols=cols, scales=factors)

    def _stored(self, words: Array, scales: Array) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """The codebook and the scales."""
        if self.codebook == "int8":
            return whole_numbers(words, scales)
        return store(words, self.codebook), store_scales(scales) if self.scale == "row" else None

    def _scales(self, weight: NDArray[Any]) -> Array | None:
        """Those to begin with."""
        if self.scale == "none":
            return None
        rms = np.sqrt(np.mean(weight.astype(np.float64) ** 2, axis=1))
        return np.where(rms > 0, rms, 1.0)
