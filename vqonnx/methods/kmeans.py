"""Scalar k-means: every weight is one of ``2**bits`` values (Gong et al. 2014, arXiv 1412.6115)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vqonnx.cluster import kmeans
from vqonnx.form import Coded
from vqonnx.method import Layer, Method, check_range
from vqonnx.methods.codebook import CodebookType, store


@dataclass(frozen=True)
class KMeans(Method):
    """Scalar k-means over all weights of a layer.

    Attributes:
        bits: Bits per weight; the codebook has ``2**bits`` values.
        codebook: Type of the stored values.
    """

    id: ClassVar[str] = "kmeans"
    bits: int = 4
    codebook: CodebookType = "float16"

    def __post_init__(self) -> None:
        check_range(self, "bits", 1, 8)

    def encode(self, layer: Layer) -> Coded:
        found = kmeans(layer.weight.reshape(-1, 1), 2**self.bits, seed=layer.seed)
        words = store(found.words, self.codebook)
        return Coded.one_stage(codes=found.labels.reshape(layer.weight.shape), codebook=words)
