"""Activation-weighted product quantisation: k-means that counts errors where the inputs are large.

Stock et al. 2020, "And the bit goes down": minimise the layer's output error on real inputs, with one
pooled second moment of the input blocks as metric. Here the full second moment of the calibration data replaces the
row samples that the released code draws anew in every iteration; the problem is then ordinary k-means in the whitened
space. A layer whose inputs were not observed (inside a subgraph or function) gets the plain distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from vqonnx.cluster import kmeans, kmeans_in_metric
from vqonnx.form import Coded
from vqonnx.method import Layer, LeftAlone, Method, Needs, blocks_of, check_range
from vqonnx.methods.codebook import CodebookType, clamp_words, store


@dataclass(frozen=True)
class BGD(Method):
    """Product quantisation in the metric of the layer's input.

    Attributes:
        width: Weights per codeword; None takes the paper's block for the kind of layer; 8 with ``hwi``.
        blocks: The paper's ``small`` blocks (3x3 kernels: 9, 1x1: 4) or ``large`` ones (18 and 8); Gemm and MatMul: 4.
        bits: Bits per code.
        classifier_bits: Bits per code of the last layer where that is a Gemm or MatMul; None for as many as elsewhere.
            The paper takes 11 for ResNet-18 and 10 for ResNet-50.
        clamp: Keep the codebook below a ``quarter`` of the number of vectors, as the paper does, or only at the number
            of ``vectors``.
        first: Compress the first layer of the model too; the paper leaves it alone.
        codebook: Type of the stored codebook.
    """

    id: ClassVar[str] = "bgd"
    needs: ClassVar[Needs] = Needs.MOMENTS
    width: int | None = None
    blocks: Literal["small", "large"] = "small"
    bits: int = 8
    classifier_bits: int | None = None
    clamp: Literal["quarter", "vectors"] = "quarter"
    first: bool = False
    codebook: CodebookType = "float16"

    def __post_init__(self) -> None:
        check_range(self, "bits", 1, 12)
        check_range(self, "classifier_bits", 1, 12)
        check_range(self, "width", 1, 64)

    def encode(self, layer: Layer) -> Coded:
        if layer.first and not self.first:
            raise LeftAlone("the first layer is left alone by this method; set first=true to compress it")
        _, cols = layer.weight.shape
        width = self.width or self._paper_width(layer)
        if cols < width:
            raise LeftAlone(f"width {width} is more than the {cols} columns of a row")
        blocks = blocks_of(layer.weight, width)
        vectors = blocks.reshape(-1, width)
        words = 2 ** self._bits(layer)
        if self.clamp == "quarter":
            words = clamp_words(words, len(vectors))
        if words < 2:
            raise LeftAlone(f"{len(vectors)} vectors of width {width} are too few for a codebook")
        if layer.moments is None:  # in a subgraph or function, where inputs are not observed
            found = kmeans(vectors, words, seed=layer.seed)
        else:
            found = kmeans_in_metric(vectors, words, layer.moments.pooled_gram(width), seed=layer.seed)
        stored = store(found.words, self.codebook)
        return Coded.one_stage(codes=found.labels.reshape(blocks.shape[:2]), codebook=stored, cols=cols)

    def _bits(self, layer: Layer) -> int:
        is_classifier = layer.last and not layer.kernel
        return self.classifier_bits if is_classifier and self.classifier_bits is not None else self.bits

    def _paper_width(self, layer: Layer) -> int:
        taps = prod(layer.kernel)
        if not layer.kernel:
            return 4
        if self.order == "hwi":  # a block is neighbouring channels of one tap; kernels like eight
            return 8
        if taps == 1:
            return 4 if self.blocks == "small" else 8
        return taps if self.blocks == "small" else 2 * taps
