"""Product quantisation: cut each row into short vectors and keep only the nearest codeword's number.

Gong et al. 2014 (arXiv 1412.6115) gives each column group its own codebook; one codebook for all groups
is the variant of Stock et al. 2020, without their weighting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from vqonnx.cluster import kmeans
from vqonnx.form import Coded
from vqonnx.method import Layer, LeftAlone, Method, blocks_of, check_range
from vqonnx.methods.codebook import CodebookType, store


@dataclass(frozen=True)
class PQ(Method):
    """Product quantisation by plain k-means.

    Attributes:
        width: Weights per codeword.
        bits: Bits per code; a codebook has up to ``2**bits`` words, and no more than there are vectors.
        books: ``one`` codebook for the layer, or one for each column ``group``.
        codebook: Type of the stored codebooks.
    """

    id: ClassVar[str] = "pq"
    width: int = 8
    bits: int = 8
    books: Literal["one", "group"] = "one"
    codebook: CodebookType = "float16"

    def __post_init__(self) -> None:
        check_range(self, "bits", 1, 12)
        check_range(self, "width", 1, 64)

    def encode(self, layer: Layer) -> Coded:
        _, cols = layer.weight.shape
        if cols < self.width:
            raise LeftAlone(f"width {self.width} is more than the {cols} columns of a row")
        blocks = blocks_of(layer.weight, self.width)  # [rows, groups, width]
        if self.books == "one":
            found = kmeans(blocks.reshape(-1, self.width), 2**self.bits, seed=layer.seed)
            words = store(found.words, self.codebook)
            return Coded.one_stage(codes=found.labels.reshape(blocks.shape[:2]), codebook=words, cols=cols)
        groups = blocks.shape[1]
        each = [kmeans(blocks[:, group], 2**self.bits, seed=layer.seed + group) for group in range(groups)]
        size = max(len(found.words) for found in each)
        books = np.stack([np.pad(found.words, ((0, size - len(found.words)), (0, 0))) for found in each])
        codes = np.stack([found.labels for found in each], axis=1)
        return Coded.one_stage(codes=codes, codebook=store(books, self.codebook), cols=cols)
