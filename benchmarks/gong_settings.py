"""The five methods of Gong et al. 2014 as options of ours: rates by the paper's formulas, and bytes in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import vqonnx
from vqonnx import rates
from vqonnx.method import Method

SEEDS = (0, 1, 2)
Shape = tuple[int, int]  # outputs, inputs


@dataclass(frozen=True)
class Setting:
    """A method of the paper with its options, for layers of any shape.

    Attributes:
        family: ``KM``, ``PQ`` (each group of inputs has a codebook), ``PQ outputs`` (the split along the other axis),
            ``PQ one`` (all groups share one codebook; not in the paper), ``RQ``, ``SVD``, ``Binary``.
        words: Words of a codebook; a layer with fewer vectors takes as many as it has.
        width: Weights of a sub-vector.
        stages: Stages of residual quantisation, on whole rows.
        rate: What the singular value decomposition aims at.
        scale: What signs are multiplied by.
    """

    family: str
    words: int = 0
    width: int = 1
    stages: int = 1
    rate: int = 0
    scale: str = "none"

    @property
    def label(self) -> str:
        return {
            "KM": f"k={self.words}",
            "RQ": f"k={self.words}, t={self.stages}",
            "SVD": f"aims at {self.rate}",
            "Binary": {"none": "no scale"}.get(self.scale, f"a scale per {self.scale}"),
        }.get(self.family, f"k={self.words}, length {self.width}")

    @property
    def seeds(self) -> tuple[int, ...]:
        """One for hundreds of codebooks, which average by themselves, but for those of the paper's figure."""
        many_books = self.family in ("PQ", "PQ outputs") and self.words != 8
        return SEEDS[:1] if many_books or self.family in ("SVD", "Binary") else SEEDS

    def method(self, shape: Shape) -> Method:
        bits = (self._words(shape) - 1).bit_length()
        match self.family:
            case "KM":
                return vqonnx.KMeans(bits=bits)
            case "PQ":
                return vqonnx.PQ(width=self.width, bits=bits, books="group")
            case "PQ outputs":
                return vqonnx.PQ(width=self.width, bits=bits, books="group", along="outputs")
            case "PQ one":
                return vqonnx.PQ(width=self.width, bits=bits)
            case "RQ":
                return vqonnx.Residual(width=None, bits=bits, stages=self.stages)
            case "SVD":
                return vqonnx.SVD(rank=self._rank(shape))
            case _:
                return vqonnx.Binary(scale=self.scale)

    def paper_rate(self, shape: Shape) -> float:
        """How many times smaller than 32 bits a weight, as the paper counts."""
        rows, cols = shape
        words = self._words(shape)
        match self.family:
            case "KM":
                return rates.kmeans_rate(words)
            case "PQ":
                return rates.pq_rate(rows, cols, -(-cols // self.width), words)
            case "PQ outputs":
                return rates.pq_rate(cols, rows, -(-rows // self.width), words)
            case "PQ one":  # one group of all sub-vectors
                return rates.pq_rate(rows * cols // self.width, self.width, 1, words)
            case "RQ":
                return rates.residual_rate(rows, cols, self.stages, words)
            case "SVD":
                return rates.svd_rate(rows, cols, self._rank(shape))
            case _:
                return rates.binary_rate()

    def stored_bytes(self, shape: Shape) -> int:
        """Bytes in the file: codes of whole bytes a row, codebooks in float16."""
        rows, cols = shape
        words = self._words(shape)
        match self.family:
            case "PQ":
                return rates.coded_bytes(rows, cols, words=words, width=self.width, books=-(-cols // self.width))
            case "PQ outputs":
                return rates.coded_bytes(cols, rows, words=words, width=self.width, books=-(-rows // self.width))
            case "RQ":
                return rates.coded_bytes(rows, cols, words=words, width=cols, stages=self.stages)
            case "SVD":
                return rates.product_bytes(rows, cols, self._rank(shape))
            case "Binary":
                return rates.coded_bytes(rows, cols, words=2, scales=rows if self.scale == "row" else 0)
            case _:
                return rates.coded_bytes(rows, cols, words=words, width=self.width)

    def _words(self, shape: Shape) -> int:
        rows, cols = shape
        vectors = {"PQ": rows, "RQ": rows, "PQ outputs": cols, "PQ one": rows * -(-cols // self.width)}
        return min(self.words, vectors.get(self.family, self.words))

    def _rank(self, shape: Shape) -> int:
        rows, cols = shape
        return max(1, rows * cols // (self.rate * (rows + cols + 1)))


def settings() -> Iterator[Setting]:
    """What the paper plots, and settings around it."""
    for words in (256, 64, 16, 8, 4, 2):
        yield Setting("KM", words)
    for family in ("PQ", "PQ outputs"):
        for words in (16, 8, 4):
            yield from (Setting(family, words, width) for width in (1, 2, 3, 4))
        yield from (Setting(family, 2, width) for width in (1, 2))
    for words, width in ((256, 2), (64, 2), (16, 2), (4, 2), (256, 4), (16, 4)):
        yield Setting("PQ one", words, width)
    for words in (256, 64, 16, 4):
        yield from (Setting("RQ", words, stages=stages) for stages in (1, 2, 4, 8))
    yield from (Setting("SVD", rate=rate) for rate in (2, 4, 8, 16, 24, 32))
    yield from (Setting("Binary", scale=scale) for scale in ("none", "layer", "row"))
