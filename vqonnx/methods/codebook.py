"""How codebooks are stored, the same for every method that has one."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vqonnx.method import LeftAlone

CodebookType = Literal["float16", "float32"]
_MOST = 127  # the largest of the whole numbers of an int8 codebook
_SMALLEST, _LARGEST = 2.0**-13, 60000.0  # scales that float16 holds with 10 bits or more; others are float32


def store(words: NDArray[np.floating], kind: CodebookType, *, option: str = "codebook") -> NDArray[Any]:
    """The words in the type in which they are stored; ``option`` is the name of the option that chooses it.

    Raises:
        LeftAlone: The words are beyond the range of float16, at either end.
    """
    largest = float(np.abs(words).max(initial=0))
    high, low = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_normal)
    if kind == "float16" and largest > high:
        raise LeftAlone(f"weights up to {largest:.3g} exceed float16 ({high:.0f}); set {option}=float32")
    if kind == "float16" and 0 < largest < low:
        raise LeftAlone(f"weights of at most {largest:.3g} are lost in float16 ({low:.2g}); set {option}=float32")
    return words.astype(kind)


def whole_numbers(words: NDArray[np.floating], scales: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Words as whole numbers of -127 to 127, and the factors ``[n, 1]`` that make them what they were.

    Args:
        words: ``[words, width]``.
        scales: What rows of words are multiplied by besides: ``[rows]``, or ``[1]`` where that is the same for all.
    """
    step = float(np.abs(words).max(initial=0)) / _MOST or 1.0
    factors = store_scales(scales * step)
    if len(scales) == 1:  # the words are multiples of the step as it is stored
        step = float(factors.item()) / float(scales.item()) or step  # zero where the type has nothing so small
    return np.clip(np.rint(words / step), -_MOST, _MOST).astype(np.int8), factors


def store_scales(scales: NDArray[np.floating]) -> NDArray[Any]:
    """Positive scales ``[n]`` as they are stored, ``[n, 1]``: float16, or float32 where that would hold them badly."""
    fine = scales.min() >= _SMALLEST and scales.max() <= _LARGEST
    return scales[:, None].astype(np.float16 if fine else np.float32)


def clamp_words(words: int, vectors: int) -> int:
    """Fewer words than a quarter of the vectors: the largest power of two strictly smaller than ``vectors / 4``.

    The rule of the released code of Stock et al. 2020; at least 1.

    >>> clamp_words(256, 512), clamp_words(256, 100_000), clamp_words(256, 3)
    (64, 256, 1)
    """
    power = 1
    while 4 * 2 * power < vectors and 2 * power <= words:
        power *= 2
    return power
