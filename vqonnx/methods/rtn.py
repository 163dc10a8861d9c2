"""Rounding to nearest: every weight becomes a whole multiple of a step of its row (*per channel* in other tools)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vqonnx import uniform
from vqonnx.form import Coded
from vqonnx.method import Layer, Method, check_range


@dataclass(frozen=True)
class RTN(Method):
    """Round to nearest, with a step for each row that errs least on its weights.

    Attributes:
        bits: Bits per weight.
    """

    id: ClassVar[str] = "rtn"
    depthwise: ClassVar[bool] = True
    bits: int = 8

    def __post_init__(self) -> None:
        check_range(self, "bits", 1, uniform.DEEPEST)

    def encode(self, layer: Layer) -> Coded:
        rows = layer.weight.astype(np.float64)
        return uniform.coded(rows, uniform.search_steps(rows, self.bits, np.ones((1, 1))), self.bits)
