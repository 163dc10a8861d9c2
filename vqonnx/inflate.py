"""The op ``vqonnx.Inflate``: prefix codes become bytes that ``Decode`` reads, all of them at the same time.

Its body is ONNX functions of standard operators: one that looks the classes and trees up, and ``Level``, which reads
the next bit of every code that has one. ``docs/format.md`` gives the meaning. onnxruntime runs the body once, when the
model is loaded; there is no kernel for it in the library.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx.parser
from onnx import FunctionProto

from vqonnx.form import Coded
from vqonnx.ops import DOMAIN, VERSION, range_lines
from vqonnx.prefix import Prefix
from vqonnx.writer import Writer

_COUNTS_IN_FLOAT = 11  # opset from which on CumSum is there; before it, sums are products with a triangle of ones


def write_inflate(writer: Writer, form: Coded) -> str:
    """Add a ``vqonnx.Inflate`` node that yields the codes of a form as uint8 ``[1, rows, groups]``."""
    coding = form.coding
    assert coding is not None
    layout = np.array([*coding.shape, coding.row_span, coding.col_span, coding.offset], np.int64)
    arrays = (form.packed, coding.row_classes, coding.col_classes, coding.trees.roots, coding.trees.children, layout)
    return writer.node("Inflate", [writer.constant(array) for array in arrays], domain=DOMAIN)


def inflate_functions(codings: Iterable[Prefix], opset: int) -> list[FunctionProto]:
    """The bodies of ``Inflate`` and ``Level`` for a model with these codes; none where there are none."""
    levels = max((coding.trees.levels for coding in codings), default=None)
    if levels is None:
        return []
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}]>'
    inflate = "\n".join(_inflate_lines(levels, opset))
    level = "\n".join(_level_lines(opset))
    inputs = "stream, row_classes, col_classes, roots, children, layout"
    return [
        onnx.parser.parse_function(f"{head}\nInflate ({inputs}) => (codes) {{\n{inflate}\n}}"),
        onnx.parser.parse_function(
            f"{head}\nLevel (bytes, tree, inner, node, start, sizes) => (next, end) {{\n{level}\n}}"
        ),
    ]


def _inflate_lines(levels: int, opset: int) -> list[str]:
    lines = [
        *_ints("zero", [0], 7, opset),
        *_ints("one", [1], 7, opset),
        *_ints("two", [2], 7, opset),
        *_ints("four", [4], 7, opset),
        *_ints("any", [-1], 7, opset),
        "rows = Gather (layout, zero)",
        "cols = Gather (layout, one)",
        "sizes = Concat <axis = 0> (rows, cols)",
        *_ints("three", [3], 7, opset),
        "row_span = Gather (layout, two)",
        "col_span = Gather (layout, three)",
        *_repeated_lines("row", "rows", opset),
        *_repeated_lines("col", "cols", opset),
        "by_row = Concat <axis = 0> (any, one)",
        "class_column = Reshape (row_class, by_row)",
        "classes = Add (class_column, col_class)",
        "class = Reshape (classes, any)",
        "roots32 = Cast <to = 6> (roots)",
        "children32 = Cast <to = 6> (children)",
        "bytes = Cast <to = 6> (stream)",
        "sizes_of = Shape (children)",
        "inner64 = Div (sizes_of, two)",
        "inner = Cast <to = 6> (inner64)",
        "node_0 = Gather (roots32, class)",
        *_ints("start_0", [0], 6, opset),
    ]
    for level in range(levels):
        lines.append(
            f"node_{level + 1}, start_{level + 1} = {DOMAIN}.Level "
            f"(bytes, children32, inner, node_{level}, start_{level}, sizes)"
        )
    return [
        *lines,
        "offset = Gather (layout, four)",
        "offset32 = Cast <to = 6> (offset)",
        "first = Add (inner, offset32)",
        f"code = Sub (node_{levels}, first)",
        "code8 = Cast <to = 2> (code)",
        "all = Concat <axis = 0> (one, sizes)",
        "codes = Reshape (code8, all)",
    ]


def _repeated_lines(kind: str, count: str, opset: int) -> list[str]:
    """``row_class`` or ``col_class``, int32 ``[count]``: each class ``span`` times, cut to the count."""
    lines = [
        f"{kind}_once = Cast <to = 6> ({kind}_classes)",
        f"{kind}_down = Unsqueeze <axes = [1]> ({kind}_once)"
        if opset < 13
        else f"{kind}_down = Unsqueeze ({kind}_once, one)",
        f"{kind}_repeats = Concat <axis = 0> (one, {kind}_span)",
        f"{kind}_grid = Tile ({kind}_down, {kind}_repeats)",
        f"{kind}_line = Reshape ({kind}_grid, any)",
    ]
    if opset >= 10:
        return [*lines, f"{kind}_class = Slice ({kind}_line, zero, {count})"]
    return [*lines, *range_lines(f"{kind}_number", count, opset), f"{kind}_class = Gather ({kind}_line, {kind}_number)"]


def _level_lines(opset: int) -> list[str]:
    """One more bit of every code that is not finished: ``node`` is int32 ``[codes]``, ``start`` the bits before."""
    lines = [
        *_ints("two", [2], 6, opset),
        *_ints("eight", [8], 6, opset),
        *_ints("powers", [1, 2, 4, 8, 16, 32, 64, 128], 6, opset),
    ]
    if opset >= 9:
        lines.append("going = Less (node, inner)")
    else:  # floats alone can be compared
        lines += [
            "node_float = Cast <to = 1> (node)",
            "inner_float = Cast <to = 1> (inner)",
            "going = Less (node_float, inner_float)",
        ]
    lines.append("alive = Cast <to = 6> (going)")
    if opset >= _COUNTS_IN_FLOAT:
        lines += [
            *_ints("axis", [0], 6, opset),
            "axis0 = Squeeze (axis)",
            "count = CumSum (alive, axis0)",
            *_ints("final", [-1], 7, opset),
            "total = Gather (count, final)",
        ]
    else:
        lines += _sums(opset)
    return [
        *lines,
        "before = Sub (count, alive)",
        "at = Add (before, start)",
        "byte = Div (at, eight)",
        "whole = Mul (byte, eight)",
        "shift = Sub (at, whole)",
        "value = Gather (bytes, byte)",
        "divisor = Gather (powers, shift)",
        "moved = Div (value, divisor)",
        "half = Div (moved, two)",
        "even = Mul (half, two)",
        "bit = Sub (moved, even)",
        "left = Mul (node, two)",
        "child = Add (left, bit)",
        "index = Mul (child, alive)",
        "found = Gather (tree, index)",
        "change = Sub (found, node)",
        "move = Mul (change, alive)",
        "next = Add (node, move)",
        "end = Add (start, total)",
    ]


def _sums(opset: int) -> list[str]:
    """``count``: the running sum of ``alive``, row by row, and ``total``; exact below 2^24 codes a matrix."""
    return [
        "alive_float = Cast <to = 1> (alive)",
        "matrix = Reshape (alive_float, sizes)",
        *_ints("zero", [0], 7, opset),
        *_ints("one", [1], 7, opset),
        "cols = Gather (sizes, one)",
        "rows = Gather (sizes, zero)",
        *range_lines("col", "cols", opset),
        *range_lines("row", "rows", opset),
        "col_float = Cast <to = 1> (col)",
        "row_float = Cast <to = 1> (row)",
        "col_down = Unsqueeze <axes = [1]> (col_float)",
        "row_down = Unsqueeze <axes = [1]> (row_float)",
        "behind = Greater (col_down, col_float)",  # [i, j]: i > j
        "not_behind = Not (behind)",
        "triangle = Cast <to = 1> (not_behind)",
        "in_row = MatMul (matrix, triangle)",
        "row_sums = ReduceSum <axes = [1], keepdims = 1> (matrix)",
        "above = Greater (row_down, row_float)",
        "lower = Cast <to = 1> (above)",
        "rows_before = MatMul (lower, row_sums)",
        "running = Add (in_row, rows_before)",
        *_ints("any", [-1], 7, opset),
        "running_line = Reshape (running, any)",
        "count = Cast <to = 6> (running_line)",
        "sum = ReduceSum <axes = [0, 1], keepdims = 0> (matrix)",
        "sum_line = Unsqueeze <axes = [0]> (sum)",
        "total = Cast <to = 6> (sum_line)",
    ]


def _ints(name: str, values: list[int], kind: int, opset: int) -> list[str]:
    numbers = ", ".join(map(str, values))
    if opset >= 9:
        return [f"{name} = Constant <value = {'int64' if kind == 7 else 'int32'}[{len(values)}] {{{numbers}}}> ()"]
    return [  # Constant is floating point only before opset 9
        f"{name}_f = Constant <value = float[{len(values)}] {{{numbers}}}> ()",
        f"{name} = Cast <to = {kind}> ({name}_f)",
    ]
