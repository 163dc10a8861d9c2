"""All methods, by the name that the command line uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqonnx.errors import OptionError
from vqonnx.method import Method, make_method
from vqonnx.methods.best import Best
from vqonnx.methods.bgd import BGD
from vqonnx.methods.binary import Binary
from vqonnx.methods.dqc import DQC
from vqonnx.methods.entropy import Entropy
from vqonnx.methods.kmeans import KMeans
from vqonnx.methods.pq import PQ
from vqonnx.methods.refined import Refined
from vqonnx.methods.residual import Residual
from vqonnx.methods.rtn import RTN
from vqonnx.methods.settled import Settled
from vqonnx.methods.svd import SVD
from vqonnx.methods.transform import Transform

__all__ = [
    "BGD",
    "DQC",
    "METHODS",
    "PQ",
    "RTN",
    "SVD",
    "Best",
    "Binary",
    "Entropy",
    "KMeans",
    "Refined",
    "Residual",
    "Settled",
    "Transform",
    "method_by_name",
]

METHODS: tuple[type[Method], ...] = (
    KMeans,
    RTN,
    PQ,
    BGD,
    Residual,
    Binary,
    SVD,
    DQC,
    Transform,
    Refined,
    Settled,
    Entropy,
    Best,
)


def method_by_name(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method called ``name`` with options as a user writes them.

    Raises:
        OptionError: There is no such method, or it does not take such an option.
    """
    for kind in METHODS:
        if kind.id == name:
            return make_method(kind, options or {})
    raise OptionError(f"method '{name}' is unknown; choose one of {', '.join(kind.id for kind in METHODS)}")
