"""How codebooks are stored, the same for every method that has one."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vqonnx.method import LeftAlone

CodebookType = Literal["float16", "float32"]


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
