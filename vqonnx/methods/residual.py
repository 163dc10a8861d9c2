"""Residual quantisation: k-means on the vectors, then on what is left of them, stage after stage.

Gong et al. 2014 (arXiv 1412.6115) take whole rows as vectors; short blocks make the codebooks small enough to pay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vqonnx.cluster import kmeans
from vqonnx.form import Coded
from vqonnx.method import Along, Layer, LeftAlone, Method, blocks_of, check_along, check_range
from vqonnx.methods.codebook import CodebookType, store
from vqonnx.view import ViewOrder


@dataclass(frozen=True)
class Residual(Method):
    """Residual quantisation: a vector is the sum of one word of each stage.

    Attributes:
        width: Weights per codeword; None takes whole rows, as the paper does.
        bits: Bits per code of one stage; a codebook has up to ``2**bits`` words, and no more than there are vectors.
        stages: Number of codes per vector; fewer where nothing is left that the codebook's type can hold.
        along: A codeword holds weights of neighbouring ``inputs`` of one output, or of neighbouring ``outputs`` of one
            input; whole rows are then all weights of that input.
        codebook: Type of the stored codebooks.
    """

    id: ClassVar[str] = "residual"
    width: int | None = 8
    bits: int = 8
    stages: int = 2
    along: Along = "inputs"
    codebook: CodebookType = "float16"

    def __post_init__(self) -> None:
        check_range(self, "width", 1, 64)
        check_range(self, "bits", 1, 8)
        check_range(self, "stages", 1, 8)
        check_along(self, self.along)

    @property
    def view_order(self) -> ViewOrder:
        return "ohw" if self.along == "outputs" else self.order

    def encode(self, layer: Layer) -> Coded:
        rows, cols = layer.weight.shape
        width = self.width or cols
        if cols < width:
            raise LeftAlone(f"width {width} is more than the {cols} columns of a row; choose 1 to {cols}")
        vectors = blocks_of(layer.weight, width).reshape(-1, width)
        reached = np.zeros_like(vectors)  # the sum of the stages so far, in the order in which decoding adds them
        books, codes = [], []
        for stage in range(self.stages):
            found = kmeans(vectors - reached, 2**self.bits, seed=layer.seed + stage)
            try:
                words = store(found.words, self.codebook)
            except LeftAlone:
                if stage == 0:
                    raise
                break  # what is left is too small for float16
            books.append(words)
            codes.append(found.labels.reshape(rows, -1))
            reached = reached + words.astype(np.float32)[found.labels]
        size = max(len(words) for words in books)
        return Coded(
            codes=np.stack(codes).astype(np.uint8),
            codebooks=np.stack([np.pad(words, ((0, size - len(words)), (0, 0))) for words in books])[:, None],
            cols=cols,
        )
