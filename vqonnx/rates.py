"""What methods cost before they are run: bytes as the forms store them, and the rates and sizes that papers print.

Pure arithmetic on shapes ``[rows, cols]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log2

from vqonnx.form import code_bits, row_bytes


def coded_bytes(
    rows: int, cols: int, *, words: int, width: int = 1, stages: int = 1, books: int = 1, item: int = 2, scales: int = 0
) -> int:
    """Bytes of a `Coded` form: codes (rows start on a byte), codebooks and scales.

    Args:
        rows: Rows of the matrix.
        cols: Its columns.
        words: Words of a codebook.
        width: Weights of a word.
        stages: Codes per block.
        books: Codebooks per stage.
        item: Bytes of a stored value: 2 for float16, 4 for float32.
        scales: Number of scales.
    """
    codes = stages * rows * row_bytes(-(-cols // width), code_bits(words))
    return codes + item * (stages * books * words * width + scales)


def product_bytes(rows: int, cols: int, rank: int, *, item: int = 2) -> int:
    """Bytes of a `Product` of two dense factors."""
    return item * rank * (rows + cols)


# The rates of Gong et al. 2014 (arXiv 1412.6115): how many times smaller than 32 bits a weight, codebooks in 32 bits.


def svd_rate(rows: int, cols: int, rank: int) -> float:
    """``mn / (r (m + n + 1))``: the singular values are stored too."""
    return rows * cols / (rank * (rows + cols + 1))


def kmeans_rate(words: int) -> float:
    """``32 / log2(k)``: the codebook of scalars counts for nothing.

    >>> [kmeans_rate(words) for words in (2, 4, 16, 256)]
    [32.0, 16.0, 8.0, 4.0]
    """
    return 32 / log2(words)


def binary_rate(planes: int = 1) -> float:
    """One bit a weight and plane, magnitudes counting for nothing."""
    return 32 / planes


def pq_rate(rows: int, cols: int, groups: int, words: int) -> float:
    """``32 mn / (32 kn + m s log2(k))``: a codebook of k words for each of s groups of columns."""
    return 32 * rows * cols / (32 * words * cols + rows * groups * log2(words))


def residual_rate(rows: int, cols: int, stages: int, words: int) -> float:
    """``32 mn / (t (32 kn + m log2(k)))``: whole rows as vectors, t codebooks of k words."""
    return 32 * rows * cols / (stages * (32 * words * cols + rows * log2(words)))


@dataclass(frozen=True)
class PaperLayer:
    """A compressed layer, as the papers that follow Stock et al. 2020 count it.

    Attributes:
        weights: Number of weights.
        width: Weights per word; must divide it.
        words: Words of the codebook, a power of two.
    """

    weights: int
    width: int
    words: int

    @property
    def bits(self) -> int:
        """Codes, not aligned to bytes, and a float16 codebook."""
        return self.weights // self.width * code_bits(self.words) + 16 * self.words * self.width


def paper_size_bits(layers: Iterable[PaperLayer], rest: int) -> int:
    """Bits of a network as Stock et al. 2020 count them.

    Args:
        layers: The compressed layers.
        rest: Number of all other values: uncompressed weights, biases, and two for each channel of a batch
            normalisation; 32 bits each.
    """
    return sum(layer.bits for layer in layers) + 32 * rest


def paper_size_mib(layers: Iterable[PaperLayer], rest: int) -> float:
    """The same in MiB, which the papers call MB."""
    return paper_size_bits(layers, rest) / 8 / 2**20
