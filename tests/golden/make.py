"""Write the golden files: stored bytes and the weight that they mean.

Everything here follows docs/format.md with plain integers and single floats, and uses nothing of vqonnx. Run it only
when a new version of the format adds a file; files that exist are never written again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Golden:
    """Sizes of one stored weight."""

    rows: int
    cols: int
    width: int
    bits: int
    words: int
    split: tuple[int, ...]
    perm: tuple[int, ...]
    stages: int = 1
    books: int = 1
    half: bool = False
    whole: bool = False  # int8 words; `half` is then the type of the scales
    scales: int = 0  # 0: the factor 1.0


GOLDEN = {
    "scalar_4_bits": Golden(6, 10, 1, 4, 16, (6, 10), (1, 0), scales=6),
    "bytes_width_8": Golden(4, 36, 8, 8, 200, (4, 3, 3, 4), (0, 3, 1, 2), half=True),
    "binary_two_stages": Golden(5, 21, 1, 1, 2, (5, 21), (0, 1), stages=2, scales=5),
    "three_bits_tail": Golden(3, 14, 4, 3, 7, (3, 2, 7), (1, 2, 0), half=True, scales=1),
    "residual_books": Golden(4, 24, 2, 5, 20, (2, 2, 6, 4), (0, 3, 1, 2), stages=3, books=4, half=True, scales=4),
    "one_number": Golden(1, 1, 3, 1, 1, (1, 1, 1), (2, 0, 1)),
    "seven_bits_long_row": Golden(2, 300, 1, 7, 100, (2, 300), (1, 0), stages=2, books=3),
    "more_bits_than_needed": Golden(3, 11, 2, 6, 5, (3, 11), (0, 1), scales=3),
    "eleven_bits_tail": Golden(5, 25, 2, 11, 1100, (5, 25), (1, 0), half=True, scales=5),
    "sixteen_bits_two_stages": Golden(2, 21, 1, 16, 300, (2, 3, 7), (1, 2, 0), stages=2, half=True),
    "whole_words_one_factor": Golden(4, 19, 3, 6, 40, (4, 19), (1, 0), half=True, scales=1, whole=True),
    "whole_numbers_by_rows": Golden(5, 12, 1, 8, 256, (5, 3, 4), (0, 2, 1), scales=5, whole=True),
    "whole_words_two_stages": Golden(3, 10, 2, 4, 16, (3, 10), (0, 1), stages=2, books=5, whole=True),
}


def numbers(count: int, seed: int) -> list[int]:
    """Reproducible numbers from 0 to 2**31 - 1 that depend on no library (the generator of Park and Miller)."""
    state, found = 1 + seed, []
    for _ in range(count + 8):
        state = state * 48271 % (2**31 - 1)
        found.append(state)
    return found[8:]


def make(golden: Golden, seed: int) -> dict[str, Any]:
    """The arrays of one file."""
    g, float_type = golden, np.float16 if golden.half else np.float32
    groups = -(-g.cols // g.width)
    codes = [number % g.words for number in numbers(g.stages * g.rows * groups, seed)]
    values = [(number % 4001 - 2000) / 777 for number in numbers(g.stages * g.books * g.words * g.width, seed + 1)]
    if g.whole:
        values = [number % 256 - 128 for number in numbers(len(values), seed + 1)]
    word_type = np.int8 if g.whole else float_type
    codebooks = np.array(values, word_type).reshape(g.stages, g.books, g.words, g.width)
    factors = [0.5 + number % 1000 / 700 for number in numbers(g.scales, seed + 2)] or [1.0]
    scales = np.array(factors, float_type).reshape(-1, 1)

    row_bytes = -(-groups * g.bits // 8)
    packed = []
    for start in range(0, len(codes), groups):
        bits = sum(code << i * g.bits for i, code in enumerate(codes[start : start + groups]))
        packed.append(list(bits.to_bytes(row_bytes, "little")))

    matrix = np.zeros((g.rows, g.cols), np.float32)
    for row in range(g.rows):
        for col in range(g.cols):
            group = col // g.width
            total = None
            for stage in range(g.stages):
                code = codes[(stage * g.rows + row) * groups + group]
                value = np.float32(codebooks[stage, group % g.books, code, col % g.width])
                total = value if total is None else np.float32(total + value)
            assert total is not None
            matrix[row, col] = total * np.float32(scales[row if g.scales > 1 else 0, 0])
    return {
        "codes": np.array(packed, np.uint8).reshape(g.stages, g.rows, row_bytes),
        "codebooks": codebooks,
        "scales": scales,
        "layout": np.array([g.bits, g.cols, *g.split], np.int64),
        "perm": np.array(g.perm, np.int64),
        "weight": np.ascontiguousarray(matrix.reshape(g.split).transpose(g.perm)),
    }


if __name__ == "__main__":
    for number, (name, golden) in enumerate(GOLDEN.items()):
        path = Path(__file__).with_name(f"{name}.npz")
        if not path.exists():
            np.savez_compressed(path, **make(golden, 1000 * number))
