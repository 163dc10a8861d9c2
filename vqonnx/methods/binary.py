"""Binarisation: of each weight only the sign is kept.

Gong et al. 2014 (arXiv 1412.6115) store +1 and -1 as they are. With a scale, the mean magnitude is the best one for
the squared error; more planes binarise what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from vqonnx.form import Coded
from vqonnx.method import Layer, Method, check_range
from vqonnx.methods.codebook import CodebookType, store


@dataclass(frozen=True)
class Binary(Method):
    """One bit per weight and plane.

    Attributes:
        scale: What the signs of the first plane are multiplied by: ``none`` (1, as in the paper), or the mean magnitude
            of the weights of the ``layer`` or of each ``row``.
        planes: Number of signs per weight; those after the first are of the residual, times its mean magnitude.
        codebook: Type of the stored magnitudes and scales.
    """

    id: ClassVar[str] = "binary"
    scale: Literal["none", "layer", "row"] = "row"
    planes: int = 1
    codebook: CodebookType = "float16"

    def __post_init__(self) -> None:
        check_range(self, "planes", 1, 8)

    def encode(self, layer: Layer) -> Coded:
        magnitudes = np.abs(layer.weight)
        scales, factors = None, np.ones((len(magnitudes), 1), np.float32)
        if self.scale == "row":
            scales = store(magnitudes.mean(axis=1, keepdims=True, dtype=np.float64), self.codebook)
            factors = scales.astype(np.float32)
        first = store(magnitudes.mean(dtype=np.float64), self.codebook) if self.scale == "layer" else np.float32(1)
        # The same scale holds for all planes of a row, so residuals are taken of rows divided by it; rows count by its
        # square, as they do in the error of the weight.
        target = np.divide(layer.weight, factors, out=np.zeros_like(layer.weight), where=factors > 0)
        importance = factors.astype(np.float64) ** 2
        importance = importance / (importance.sum() * target.shape[1] or 1)
        reached = np.zeros_like(target)
        sizes, codes = [], []
        for plane in range(self.planes):
            residual = target - reached
            size = first if plane == 0 else np.sum(importance * np.abs(residual))
            sizes.append(np.asarray(size).astype(self.codebook))
            codes.append(residual >= 0)
            reached = reached + np.where(codes[-1], 1, -1) * sizes[-1].astype(np.float32)
        a = np.stack(sizes)
        return Coded(
            codes=np.stack(codes).astype(np.uint8),
            codebooks=np.stack([-a, a], axis=1)[:, None, :, None],  # [planes, 1, 2, 1]
            cols=layer.weight.shape[1],
            scales=scales,
        )
