"""The op ``vqonnx.Decode``: its node, its body as an ONNX function, and the same steps as plain nodes.

``docs/format.md`` gives the meaning. A body is written for the opset of the model that it travels in (onnxruntime
refuses one at another opset), and leaves out steps that no layer of that model needs: each step that touches whole
weights costs their size in memory once more while the model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import onnx.parser
from onnx import FunctionProto

from vqonnx.errors import ModelError
from vqonnx.form import Coded
from vqonnx.writer import Writer

DOMAIN = "vqonnx"
VERSION = 1
FUNCTION_IR_VERSION = 8
OLDEST_OPSET = 7

_END = 100  # beyond the number of axes of any weight


@dataclass(frozen=True)
class Features:
    """Steps that a body needs beyond looking up whole bytes in one codebook.

    Attributes:
        packed: Some codes do not have 8 bits.
        wide: Some codes have more than 8 bits.
        several: Some layers have several stages or several books.
        tail: Some layers have columns that the width does not divide.
        scaled: Some layers have scales.
        guarded: Some layers are Gemm or MatMul, which onnxruntime 1.19 to 1.23 fuses with any Transpose in front.
    """

    packed: bool = False
    wide: bool = False
    several: bool = False
    tail: bool = False
    scaled: bool = False
    guarded: bool = False

    @classmethod
    def of(cls, form: Coded) -> Features:
        """What decoding this form takes."""
        return cls(
            packed=form.bits != 8 and form.coding is None,
            wide=form.bits > 8,
            several=form.stages * form.books > 1,
            tail=form.cols % form.width != 0,
            scaled=form.scales is not None,
        )

    def __or__(self, other: Features) -> Features:
        return Features(*(getattr(self, f.name) or getattr(other, f.name) for f in fields(Features)))


ALL_FEATURES = Features(packed=True, wide=True, several=True, tail=True, scaled=True, guarded=True)


def write_decode(
    writer: Writer,
    form: Coded,
    split: tuple[int, ...],
    perm: tuple[int, ...],
    output: str,
    *,
    codes: str | None = None,
) -> str:
    """Add a ``vqonnx.Decode`` node that yields the form as a float32 tensor named ``output``.

    ``codes`` is a value that holds the codes as bytes, where they are not stored as `Coded.packed` has them.
    """
    scales = np.ones((1, 1), np.float32) if form.scales is None else form.scales
    layout = np.array([form.bits if codes is None else 8, form.cols, *split], np.int64)
    codes = codes or writer.constant(form.packed)
    inputs = [codes, *(writer.constant(array) for array in (form.codebooks, scales, layout))]
    return writer.node("Decode", inputs, output, domain=DOMAIN, perm=perm)


def write_standard(
    writer: Writer, form: Coded, split: tuple[int, ...], perm: tuple[int, ...], output: str, opset: int
) -> str:
    """Add the same steps as standard nodes, with everything that is known beforehand stored as a constant."""
    stages, rows, groups = form.codes.shape
    code = writer.constant(form.packed)
    code = _write_unpack(writer, code, form.bits, groups) if form.bits != 8 else writer.node("Cast", [code], to=6)
    if stages * form.books > 1:
        first_word = np.arange(stages)[:, None, None] * form.books + np.arange(groups) % form.books
        code = writer.node("Add", [code, writer.constant((first_word * form.words).astype(np.int32))])
    words = writer.constant(form.codebooks.reshape(-1, form.width))
    if form.codebooks.dtype != np.float32:
        words = writer.node("Cast", [words], to=1)
    value = writer.node("Gather", [words, code], axis=0)  # [stages, rows, groups, width]
    if stages > 1:
        if opset >= 13:
            value = writer.node("ReduceSum", [value, writer.constant(np.array([0], np.int64))], keepdims=0)
        else:
            value = writer.node("ReduceSum", [value], axes=[0], keepdims=0)
    if form.scales is not None or form.cols % form.width:
        value = writer.node("Reshape", [value, writer.constant(np.array([rows, -1], np.int64))])
    if form.scales is not None:
        scales = writer.constant(form.scales)
        if form.scales.dtype != np.float32:
            scales = writer.node("Cast", [scales], to=1)
        value = writer.node("Mul", [value, scales])
    if form.cols % form.width:
        if opset >= 10:
            ends = [writer.constant(np.array([number], np.int64)) for number in (0, form.cols, 1)]
            value = writer.node("Slice", [value, *ends])
        else:
            value = writer.node("Slice", [value], starts=[0], ends=[form.cols], axes=[1])
    plain = perm == tuple(range(len(perm)))
    shape = writer.constant(np.array(split, np.int64))
    value = writer.node("Reshape", [value, shape], output if plain else None)
    return value if plain else writer.node("Transpose", [value], output, perm=perm)


def _write_unpack(writer: Writer, codes: str, bits: int, groups: int) -> str:
    start = np.arange(groups) * bits
    wide = writer.node("Cast", [codes], to=6)
    window = writer.node("Gather", [wide, writer.constant((start // 8).astype(np.int32))], axis=2)
    for place in range(1, 2 if bits < 8 else 3):
        byte = np.minimum(start // 8 + place, (start + bits - 1) // 8)  # what is beyond the code is cut off below
        above = writer.node("Gather", [wide, writer.constant(byte.astype(np.int32))], axis=2)
        above = writer.node("Mul", [above, writer.constant(np.array(256**place, np.int32))])
        window = writer.node("Add", [window, above])
    moved = writer.node("Div", [window, writer.constant((2 ** (start % 8)).astype(np.int32))])
    modulus = writer.constant(np.array(2**bits, np.int32))
    whole = writer.node("Mul", [writer.node("Div", [moved, modulus]), modulus])
    return writer.node("Sub", [moved, whole])


def decode_function(opset: int, features: Features = ALL_FEATURES) -> FunctionProto:
    """The body of ``vqonnx.Decode`` for a model at ``opset``.

    Raises:
        ModelError: The opset is older than 7, the oldest that onnxruntime runs.
    """
    if opset < OLDEST_OPSET:
        raise ModelError(f"the model has opset {opset}; convert it to {OLDEST_OPSET} or newer (onnx.version_converter)")
    body = "\n".join(_steps(opset, features))
    text = f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
Decode <perm> (codes, codebooks, scales, layout) => (weight) {{
{body}
}}"""
    return onnx.parser.parse_function(text)


def _steps(opset: int, features: Features) -> list[str]:
    """The body, one step a line. Sizes are int64 tensors of shape [1]; codes are int32."""
    lines = [
        *int64_lines("one", [1], opset),
        "two = Add (one, one)",  # shorter than a constant
        "three = Add (two, one)",
        "cols = Gather (layout, one)",
        *slice_lines("split", "layout", 2, _END, opset),
        "sizes = Shape (codebooks)",
        "width = Gather (sizes, three)",
        "wide = Cast <to = 6> (codes)",
    ]
    if features.packed or features.several or features.tail:
        lines.append("zero = Sub (one, one)")
    if features.packed or features.several:
        lines += ["reach = Add (cols, width)", "last = Sub (reach, one)", "groups = Div (last, width)"]
        lines += range_lines("group", "groups", opset)
    if features.packed:
        lines += [
            *int64_lines("powers", [2**i for i in range(17 if features.wide else 9)], opset),
            *int64_lines("eight", [8], opset),
            "bits = Gather (layout, zero)",
            "start = Mul (group, bits)",
            "byte = Div (start, eight)",
            *_modulo("shift", "start", "eight", opset),
            "next = Add (start, bits)",
            "end = Sub (next, one)",
            "final = Div (end, eight)",  # the byte with the code's last bit; the same byte where it ends there
            "low = Gather <axis = 2> (wide, byte)",
            "above = Gather <axis = 2> (wide, final)",
            "powers32 = Cast <to = 6> (powers)",
            "byte_size = Gather (powers32, eight)",
        ]
        if features.wide:  # a code may reach over three bytes; the middle one is one of the others where it does not
            lines += [
                "ends = Add (byte, final)",
                "ends_up = Add (ends, one)",
                "middle = Div (ends_up, two)",
                "between = Gather <axis = 2> (wide, middle)",
                "top = Mul (above, byte_size)",
                "upper = Add (top, between)",
            ]
        else:
            lines.append("upper = Identity (above)")
        lines += [
            "high = Mul (upper, byte_size)",
            "window = Add (low, high)",
            "divisor = Gather (powers32, shift)",
            "moved = Div (window, divisor)",
            "modulus = Gather (powers32, bits)",
            *_modulo("code", "moved", "modulus", opset),
        ]
    else:
        lines.append("code = Identity (wide)")
    if features.several:
        lines += [
            "books = Gather (sizes, one)",
            "words = Gather (sizes, two)",
            *_modulo("book", "group", "books", opset),
            "stages = Gather (sizes, zero)",
            *range_lines("stage", "stages", opset),
            *int64_lines("column", [-1, 1, 1], opset),
            "stage3 = Reshape (stage, column)",
            "shelf = Mul (stage3, books)",
            "place = Add (shelf, book)",
            "first_word = Mul (place, words)",
            "first_word32 = Cast <to = 6> (first_word)",
            "index = Add (code, first_word32)",
        ]
    else:
        lines.append("index = Identity (code)")
    if features.several or features.scaled or features.tail:
        lines += int64_lines("rest_of", [-1], opset)
    lines.append("table = Cast <to = 1> (codebooks)")
    if features.several:
        lines += [
            "flat = Concat <axis = 0> (rest_of, width)",
            "list = Reshape (table, flat)",
            "blocks = Gather <axis = 0> (list, index)",
        ]
    else:  # one stage and one book: axes of one entry, which the next Reshape takes away
        lines.append("blocks = Gather <axis = 2> (table, index)")
    if not features.several:
        lines.append("total = Identity (blocks)")
    elif opset >= 13:
        lines.append("total = ReduceSum <keepdims = 1> (blocks, zero)")
    else:
        lines.append("total = ReduceSum <axes = [0], keepdims = 1> (blocks)")
    if features.scaled or features.tail:
        lines += [
            "extent = Shape (codes)",
            "rows = Gather (extent, one)",
            "by_rows = Concat <axis = 0> (rows, rest_of)",
            "plain = Reshape (total, by_rows)",
        ]
    else:
        lines.append("plain = Identity (total)")
    if features.scaled:
        lines += ["factor = Cast <to = 1> (scales)", "scaled = Mul (plain, factor)"]
    else:
        lines.append("scaled = Identity (plain)")
    if not features.tail:
        lines.append("matrix = Identity (scaled)")
    elif opset >= 10:
        lines.append("matrix = Slice (scaled, zero, cols, one)")
    else:
        lines += [*range_lines("column_index", "cols", opset), "matrix = Gather <axis = 1> (scaled, column_index)"]
    lines.append("tensor = Reshape (matrix, split)")
    if features.guarded:  # hide the Transpose: it would be taken for that of a matrix, whatever its perm
        lines += [
            "turned = Transpose <perm: ints = @perm> (tensor)",
            "turned_sizes = Shape (turned)",
            "weight = Reshape (turned, turned_sizes)",
        ]
    else:
        lines.append("weight = Transpose <perm: ints = @perm> (tensor)")
    return _without_identities(lines)


def int64_lines(name: str, values: list[int], opset: int) -> list[str]:
    """``name``: a vector of these values, as int64."""
    numbers = ", ".join(map(str, values))
    if opset >= 9:
        return [f"{name} = Constant <value = int64[{len(values)}] {{{numbers}}}> ()"]
    return [  # Constant is floating point only before opset 9
        f"{name}_float = Constant <value = float[{len(values)}] {{{numbers}}}> ()",
        f"{name} = Cast <to = 7> ({name}_float)",
    ]


def _modulo(name: str, value: str, divisor: str, opset: int) -> list[str]:
    """The rest of a division of numbers that are not negative."""
    if opset >= 10:
        return [f"{name} = Mod ({value}, {divisor})"]
    return [
        f"{name}_whole = Div ({value}, {divisor})",
        f"{name}_product = Mul ({name}_whole, {divisor})",
        f"{name} = Sub ({value}, {name}_product)",
    ]


def slice_lines(name: str, source: str, start: int, end: int, opset: int) -> list[str]:
    """``name``: a vector from ``start`` to before ``end``."""
    if opset < 10:
        return [f"{name} = Slice <starts = [{start}], ends = [{end}], axes = [0]> ({source})"]
    return [
        *int64_lines(f"{name}_start", [start], opset),
        *int64_lines(f"{name}_end", [end], opset),
        f"{name} = Slice ({source}, {name}_start, {name}_end)",
    ]


def range_lines(name: str, count: str, opset: int) -> list[str]:
    """``name = 0, 1, .. count - 1`` as int64, ``count`` having shape [1]."""
    if opset >= 11:
        return [
            f"{name}_from = Sub ({count}, {count})",
            f"{name}_start = Squeeze ({name}_from)",
            f"{name}_stop = Squeeze ({count})",
            f"{name}_step = Squeeze (one)",
            f"{name} = Range ({name}_start, {name}_stop, {name}_step)",
        ]
    # Before opset 11 nothing counts that onnxruntime folds (it does not fold NonZero). Write count = 256*q + r. Row 0
    # of 0..255 repeated and reshaped to [256, n] is 0..n-1 (n <= 256); one number too many is made and dropped, because
    # a size of zero cannot be reshaped to.
    page = f"{name}_page"
    lines = [
        *int64_lines(f"{page}_digits", list(range(16)), opset),  # 0..255 are 16 of them for each of 16
        *int64_lines(f"{page}_sixteen", [16], opset),
        *int64_lines(f"{page}_column", [-1, 1], opset),
        *int64_lines(f"{page}_flat", [-1], opset),
        f"{page}_size = Mul ({page}_sixteen, {page}_sixteen)",
        f"{page}_upright = Reshape ({page}_digits, {page}_column)",
        f"{page}_tens = Mul ({page}_upright, {page}_sixteen)",
        f"{page}_grid = Add ({page}_tens, {page}_digits)",
        f"{page}_numbers = Reshape ({page}_grid, {page}_flat)",
        f"{page}s = Div ({count}, {page}_size)",
        f"{page}d = Mul ({page}s, {page}_size)",
        f"{page}_rest = Sub ({count}, {page}d)",
    ]
    for part, length in (("upper", f"{page}s"), ("lower", f"{page}_rest")):
        part = f"{name}_{part}"
        lines += [
            f"{part}_more = Add ({length}, one)",
            f"{part}_many = Tile ({page}_numbers, {part}_more)",
            f"{part}_shape = Concat <axis = 0> ({page}_size, {part}_more)",
            f"{part}_grid = Reshape ({part}_many, {part}_shape)",
            f"{part}_row = Gather <axis = 0> ({part}_grid, zero)",
            f"{part}_line = Reshape ({part}_row, {page}_flat)",
            *slice_lines(part, f"{part}_line", 0, -1, opset),
        ]
    return [
        *lines,
        f"{page}_upper = Reshape ({name}_upper, {page}_column)",
        f"{page}_first = Mul ({page}_upper, {page}_size)",
        f"{page}_all = Add ({page}_first, {page}_numbers)",
        f"{page}_line = Reshape ({page}_all, {page}_flat)",
        f"{page}_offset = Add ({name}_lower, {page}d)",
        f"{name} = Concat <axis = 0> ({page}_line, {page}_offset)",
    ]


def _without_identities(lines: list[str]) -> list[str]:
    """Drop ``a = Identity (b)`` lines, which stand for steps that are left out, and read ``b`` for ``a``."""
    renamed: dict[str, str] = {}
    kept = []
    for line in lines:
        output, call = line.split(" = ", 1)
        if call.startswith("Identity"):
            renamed[output] = renamed.get(call[10:-1], call[10:-1])
            continue
        start = call.rindex("(")
        inputs = [renamed.get(name, name) for name in call[start + 1 : -1].split(", ")]
        kept.append(f"{output} = {call[:start]}({', '.join(inputs)})")
    return kept
