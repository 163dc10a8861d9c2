"""Low rank: a weight is the product of two thin factors (Gong et al. 2014, arXiv 1412.6115)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from vqonnx.errors import OptionError
from vqonnx.form import Apply, Dense, Matrix, Product
from vqonnx.method import Layer, LeftAlone, Method, check_range
from vqonnx.methods.codebook import CodebookType, store


@dataclass(frozen=True)
class SVD(Method):
    """Truncated singular value decomposition.

    Attributes:
        rank: Singular values that are kept; None takes as many as ``share`` allows. A layer that has fewer, or that
            so many do not make smaller, is left alone; the reason names the largest rank that does.
        share: The two factors take at most this part of the weight's bytes in float32, where no rank is given.
        factors: Type of the stored factors.
        apply: How the layer is run: with the product of the factors as ``weights``, with one factor after the other on
            the ``activations``, or as is ``cheaper`` in multiplications.
    """

    id: ClassVar[str] = "svd"
    rank: int | None = None
    share: float = 0.5
    factors: CodebookType = "float16"
    apply: Apply = "cheaper"

    def __post_init__(self) -> None:
        check_range(self, "rank", 1, 2**16)
        if not 0 < self.share < 1:
            raise OptionError(f"method '{self.id}': share is {self.share:g}; choose a number between 0 and 1")

    def encode(self, layer: Layer) -> Product:
        factors = factorise(layer.weight, self._rank(layer.weight))
        left, right = (Dense(store(factor, self.factors, option="factors")) for factor in factors)
        return Product(left, right, self.apply)

    def _rank(self, weight: Matrix) -> int:
        rows, cols = map(int, weight.shape)
        each = (rows + cols) * np.dtype(self.factors).itemsize  # bytes that one singular value costs
        size = weight.nbytes
        most = min(rows, cols, (size - 1) // each)
        if most == 0:
            raise LeftAlone(f"rank 1 takes {each} bytes, the weight {size}: no rank makes it smaller")
        if self.rank is None:
            rank = min(most, int(self.share * size) // each)
            if rank == 0:
                raise LeftAlone(
                    f"rank 1 takes {each} of {size} bytes, more than the share {self.share:g}; set rank, or "
                    "share closer to 1"
                )
            return rank
        if self.rank > min(rows, cols):
            raise LeftAlone(
                f"rank {self.rank} is more than the {min(rows, cols)} of {rows} x {cols}; choose 1 to {most}"
            )
        if self.rank > most:
            raise LeftAlone(f"rank {self.rank} takes {self.rank * each} bytes, the weight {size}; choose 1 to {most}")
        return self.rank


def factorise(weight: Matrix, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The nearest matrix of a rank as ``[rows, rank] @ [rank, cols]``, the singular values shared evenly.

    The singular vectors of the shorter side are the eigenvectors of its gram matrix, much quicker than the whole
    decomposition; the other factor is the projection on them. One thread, so that the same weight gives the same bytes.
    """
    if weight.shape[0] > weight.shape[1]:
        left, right = factorise(weight.T, rank)
        return np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
    exact = weight.astype(np.float64)
    with threadpool_limits(limits=1):
        values, vectors = np.linalg.eigh(exact @ exact.T)
        basis = vectors[:, ::-1][:, :rank]  # [rows, rank], the largest first
        projected = basis.T @ exact
    roots = np.maximum(values[::-1][:rank], 0) ** 0.25  # square roots of the singular values
    kept = roots > 1e-4 * roots[0]  # smaller ones are rounding errors of the gram matrix
    inverse = np.divide(1, roots, out=np.zeros_like(roots), where=kept)
    return (basis * (roots * kept)).astype(np.float32), (projected * inverse[:, None]).astype(np.float32)
