"""The four forms of a compressed weight matrix: checks, decoding, bit packing and sizes in bytes.

This file is the definition of the codec; ``docs/format.md`` says the same in words. A form is immutable, describes a
matrix ``[rows, cols]`` (rows are outputs) and knows nothing of ONNX.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import FormError
from vqonnx.prefix import Prefix

MAX_BITS = 16

Matrix = NDArray[np.float32]
Codes = NDArray[np.unsignedinteger[Any]]  # uint8 or uint16
Apply = Literal["weights", "activations", "cheaper"]
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
WORD_TYPES = (np.dtype(np.int8), *_FLOATS)


def code_bits(words: int) -> int:
    """Bits that one code takes when a codebook has ``words`` words: at least 1.

    >>> [code_bits(words) for words in (1, 2, 3, 16, 17, 256, 2048)]
    [1, 1, 2, 4, 5, 8, 11]
    """
    return max(1, (words - 1).bit_length())


def row_bytes(groups: int, bits: int) -> int:
    """Bytes of one row of ``groups`` codes: a whole number, rows start on a byte."""
    return -(-groups * bits // 8)


def code_dtype(bits: int) -> type[np.uint8] | type[np.uint16]:
    """The type that holds codes of ``bits`` bits in memory: uint8 up to 8 bits, uint16 beyond."""
    return np.uint8 if bits <= 8 else np.uint16


def pack(codes: Codes, bits: int) -> NDArray[np.uint8]:
    """Pack codes ``[..., groups]`` into little-endian bit strings ``[..., row_bytes]``.

    Code ``i`` of a row is the bits ``[i*bits, (i+1)*bits)`` of the row's bytes, lowest bit first; the rest is zero.

    Raises:
        FormError: ``bits`` is not 1..16, or a code needs more than that.
    """
    if not 1 <= bits <= MAX_BITS:
        raise FormError(f"bits is {bits}; choose 1 to {MAX_BITS}")
    if codes.size and int(codes.max()) >> bits:
        raise FormError(f"code {int(codes.max())} does not fit in {bits} bits")
    planes = codes[..., None] >> np.arange(bits).astype(codes.dtype) & 1
    return np.packbits(planes.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack(packed: NDArray[np.uint8], bits: int, groups: int) -> Codes:
    """Undo `pack`: bit strings ``[..., row_bytes]`` to codes ``[..., groups]`` of the type `code_dtype`.

    Raises:
        FormError: ``bits`` is not 1..16, or the rows do not have `row_bytes` bytes.
    """
    if not 1 <= bits <= MAX_BITS:
        raise FormError(f"bits is {bits}; choose 1 to {MAX_BITS}")
    if packed.shape[-1] != row_bytes(groups, bits):
        raise FormError(
            f"{groups} codes of {bits} bits take {row_bytes(groups, bits)} bytes a row, not {packed.shape[-1]}"
        )
    start = np.arange(groups) * bits
    window = np.zeros((*packed.shape[:-1], groups), np.uint32)
    for place in range(2 if bits <= 8 else 3):  # a code and what is before it in its first byte: at most 7 + 16 bits
        byte = np.minimum(start // 8 + place, packed.shape[-1] - 1)  # beyond the row there is only what is masked away
        window |= packed[..., byte].astype(np.uint32) << np.uint32(8 * place)
    codes: Codes = (window >> (start % 8).astype(np.uint32) & (2**bits - 1)).astype(code_dtype(bits))
    return codes


class Form(ABC):
    """A compressed matrix ``[rows, cols]``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the stored arrays: packed codes, codebooks, scales, dense values."""

    @abstractmethod
    def decode(self) -> Matrix:
        """The matrix in float32."""


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """The matrix itself.

    Attributes:
        values: float32 or float16 ``[rows, cols]``.
    """

    values: NDArray[Any]

    def __post_init__(self) -> None:
        _check_numbers("values", self.values, 2)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def decode(self) -> Matrix:
        return self.values.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Coded(Form):
    """Codes and codebooks: row *r*, block *g* is ``scales[r] * sum_s codebooks[s, g % books, codes[s, r, g]]``.

    The blocks of a row lie side by side; what reaches beyond ``cols`` is cut off: ``width`` need not divide it.

    Attributes:
        codes: ``[stages, rows, groups]``, not packed: uint8, or uint16 where there are more than 256 words (made so).
        codebooks: int8, float16 or float32 ``[stages, books, words, width]``, at most 65,536 words; no -0.0 (made 0.0).
        cols: Columns of the matrix; ``groups == ceil(cols / width)``.
        scales: float16 or float32 ``[rows, 1]`` or ``[1, 1]``; None means 1.
        coding: How the codes are stored: None with a fixed number of bits, or prefix codes (one stage, one book, at
            most 256 words).
    """

    codes: Codes
    codebooks: NDArray[Any]
    cols: int
    scales: NDArray[Any] | None = None
    coding: Prefix | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype not in (np.uint8, np.uint16) or self.codes.ndim != 3 or not self.codes.size:
            raise FormError(
                f"codes are {self.codes.dtype}{list(self.codes.shape)}; "
                "they must be uint8 or uint16 [stages, rows, groups]"
            )
        _check_numbers("codebooks", self.codebooks, 4, WORD_TYPES)
        # Adding 0 makes 0.0 of -0.0: runtimes may start the sum over stages from 0.0, and then lose that sign.
        object.__setattr__(self, "codebooks", self.codebooks + self.codebooks.dtype.type(0))
        stages, rows, groups = self.codes.shape
        if self.codebooks.shape[0] != stages:
            raise FormError(f"codes have {stages} stages, codebooks {self.codebooks.shape[0]}")
        if self.words > 2**MAX_BITS:
            raise FormError(f"codebooks have {self.words} words; codes of {MAX_BITS} bits reach {2**MAX_BITS}")
        if int(self.codes.max()) >= self.words:
            raise FormError(f"code {int(self.codes.max())} is beyond the codebook of {self.words} words")
        # One type for the same words, so that equal forms have equal arrays.
        object.__setattr__(self, "codes", self.codes.astype(code_dtype(self.bits), copy=False))
        if self.cols < 1 or groups != -(-self.cols // self.width):
            raise FormError(f"{groups} groups of width {self.width} do not make {self.cols} columns")
        if self.books > groups:
            raise FormError(f"{self.books} books for {groups} groups; at most one book a group")
        if self.scales is not None:
            _check_numbers("scales", self.scales, 2)
            if self.scales.shape not in ((rows, 1), (1, 1)):
                raise FormError(f"scales are {list(self.scales.shape)}; they must be [{rows}, 1] or [1, 1]")
        if self.coding is not None and (stages > 1 or self.books > 1 or self.words > 256):
            raise FormError(
                f"{stages} stages, {self.books} books and {self.words} words cannot have prefix codes; it takes one "
                "stage and one book of at most 256 words"
            )
        if self.coding is not None and self.coding.shape != (rows, groups):
            raise FormError(f"codes are {[rows, groups]}, but their prefix codes are for {list(self.coding.shape)}")

    @classmethod
    def one_stage(
        cls,
        codes: NDArray[Any],
        codebook: NDArray[Any],
        cols: int | None = None,
        scales: NDArray[Any] | None = None,
    ) -> Coded:
        """One stage: codes ``[rows, groups]``, a codebook ``[words, width]`` or books ``[books, words, width]``."""
        codebooks = codebook[None, None] if codebook.ndim == 2 else codebook[None]
        return cls(
            codes=codes.astype(np.uint16)[None],
            codebooks=codebooks,
            cols=codes.shape[1] * codebooks.shape[3] if cols is None else cols,
            scales=scales,
        )

    @property
    def stages(self) -> int:
        return int(self.codes.shape[0])

    @property
    def groups(self) -> int:
        return int(self.codes.shape[2])

    @property
    def books(self) -> int:
        return int(self.codebooks.shape[1])

    @property
    def words(self) -> int:
        return int(self.codebooks.shape[2])

    @property
    def width(self) -> int:
        return int(self.codebooks.shape[3])

    @property
    def bits(self) -> int:
        """Bits of one stored code."""
        return code_bits(self.words)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1], self.cols

    @cached_property
    def packed(self) -> NDArray[np.uint8]:
        """The stored codes: uint8 ``[stages, rows, row_bytes]``, or ``[bytes]`` of prefix codes."""
        return pack(self.codes, self.bits) if self.coding is None else self.coding.write(self.codes[0])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in stored_arrays(self))

    def decode(self) -> Matrix:
        codebooks = self.codebooks.astype(np.float32)
        book = np.arange(self.groups) % self.books
        blocks = codebooks[0][book, self.codes[0]]  # [rows, groups, width]
        for stage in range(1, self.stages):  # first to last: the order of the sum is part of the format
            blocks = blocks + codebooks[stage][book, self.codes[stage]]
        matrix = blocks.reshape(self.shape[0], -1)
        if self.scales is not None:
            matrix = matrix * self.scales.astype(np.float32)
        return np.ascontiguousarray(matrix[:, : self.cols])


@dataclass(frozen=True, eq=False)
class Product(Form):
    """``left @ right``; at run time the right factor may be applied to the activations first.

    Attributes:
        left: ``[rows, inner]``.
        right: ``[inner, cols]``.
        apply: How it is run: multiplied out into the ``weights``, one factor after the other on the ``activations``
            (where it is the whole weight and not a part of one), or as is ``cheaper`` in multiplications. The matrix is
            the same.
    """

    left: Form
    right: Form
    apply: Apply = "weights"

    def __post_init__(self) -> None:
        if self.apply not in get_args(Apply):
            raise FormError(f"apply is '{self.apply}'; choose one of {', '.join(get_args(Apply))}")
        if self.left.shape[1] != self.right.shape[0]:
            raise FormError(f"left has {self.left.shape[1]} columns, right {self.right.shape[0]} rows")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def decode(self) -> Matrix:
        return self.left.decode() @ self.right.decode()


@dataclass(frozen=True, eq=False)
class Blocks(Form):
    """Parts set side by side.

    Attributes:
        parts: One or more forms.
        axis: 0 stacks them as rows, 1 as columns.
    """

    parts: tuple[Form, ...]
    axis: int

    def __post_init__(self) -> None:
        if not self.parts or self.axis not in (0, 1):
            raise FormError(f"blocks have {len(self.parts)} parts on axis {self.axis}; give parts, and axis 0 or 1")
        across = {part.shape[1 - self.axis] for part in self.parts}
        if len(across) > 1:
            raise FormError(f"parts on axis {self.axis} have different sizes across it: {sorted(across)}")

    @property
    def shape(self) -> tuple[int, int]:
        along = sum(part.shape[self.axis] for part in self.parts)
        across = self.parts[0].shape[1 - self.axis]
        return (along, across) if self.axis == 0 else (across, along)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def decode(self) -> Matrix:
        return np.concatenate([part.decode() for part in self.parts], axis=self.axis)


def stored_arrays(form: Form) -> Iterator[NDArray[Any]]:
    """The arrays that a model keeps of a form; of equal ones it keeps one."""
    if isinstance(form, Dense):
        yield form.values
    elif isinstance(form, Coded):
        yield from (form.packed, form.codebooks)
        if form.coding is not None:
            trees = form.coding.trees
            yield from (form.coding.packed_classes, trees.roots, trees.counts, trees.leaves)
        if form.scales is not None and not (form.scales.size == 1 and form.scales.item() == 1):
            yield form.scales
    elif isinstance(form, Product):
        yield from (*stored_arrays(form.left), *stored_arrays(form.right))
    elif isinstance(form, Blocks):
        for part in form.parts:
            yield from stored_arrays(part)


def _check_numbers(name: str, array: NDArray[Any], ndim: int, kinds: tuple[np.dtype[Any], ...] = _FLOATS) -> None:
    if array.dtype not in kinds or array.ndim != ndim or not array.size:
        *some, last = map(str, kinds)
        raise FormError(
            f"{name} are {array.dtype}{list(array.shape)}; they must be {', '.join(some)} or {last} with {ndim} axes"
        )
    if not np.isfinite(array).all():
        raise FormError(f"{name} hold a value that is not finite; check the weights, or use float32 codebooks")
