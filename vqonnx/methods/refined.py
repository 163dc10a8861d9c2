"""Product quantisation refined on the layer's output: each step lowered the error of real layers, and is switchable.

Codes and words whose target is what the original layer gives, not what its weights are, in the centred metric
of the input that the compressed layers before it make: k-means with one metric for each block, then coordinate descent
over the codes and least-squares codewords in turn (formulas: `vqonnx.refine`, `vqonnx.feedback`). The mean that is lost
goes to the layer's bias, which the pass corrects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from vqonnx.cluster import kmeans, one_thread
from vqonnx.form import Coded
from vqonnx.method import Layer, LeftAlone, Method, Needs, check_range
from vqonnx.methods.codebook import CodebookType, store
from vqonnx.moments import FULL_COLS
from vqonnx.refine import Array, alternate, assign, feed_back, target_of, update_words

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
        scale: ``none``, or one factor for each ``row`` (the root of its mean square).
        codebook: Type of the stored codebook.
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
    codebook: CodebookType = "float16"
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
        scales = self._scales(layer.weight)
        target = target_of(layer, width, asymmetric=self.asymmetric, scales=scales)
        vectors = (target.weight / target.scales[:, None]).reshape(-1, width)
        found = kmeans(vectors, 2**self.bits, seed=layer.seed, quick=self.quick)
        words = found.words.astype(np.float64)
        codes = found.labels.reshape(rows, -1)
        for _ in range(_METRIC_ROUNDS):
            codes = assign(target, words)
            words = update_words(target, codes, words)
        if self.start == "feedback":
            codes = feed_back(target, words)

        def stored(values: Array) -> Array:
            return store(values, self.codebook).astype(np.float64)

        codes, words = alternate(target, codes, words, self.rounds, stored)
        return Coded.one_stage(
            codes=codes,
            codebook=store(words, self.codebook),
            cols=cols,
            scales=None if scales is None else scales[:, None].astype(np.float16),
        )

    def _scales(self, weight: NDArray[Any]) -> Array | None:
        if self.scale == "none":
            return None
        rms = np.sqrt(np.mean(weight.astype(np.float64) ** 2, axis=1))
        rounded = rms.astype(np.float16).astype(np.float64)
        return np.where(rounded > 0, rounded, 1.0)
