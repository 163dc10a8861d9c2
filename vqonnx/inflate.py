"""The op ``vqonnx.Inflate``: prefix codes become bytes that ``Decode`` reads, all of them at the same time.

Its body is ONNX functions of standard operators: ``Inflate`` itself; ``Path``, which follows codes to their ends by
``Levels`` and ``Level``, a bit of each at a time; ``Digits``, which cuts numbers into digits; and, before opset 11,
``Sum``. ``docs/format.md`` gives the meaning. onnxruntime runs the body once, when the model is loaded; there is no
kernel for it in the library.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import onnx.parser
from onnx import FunctionProto

from vqonnx.form import Coded
from vqonnx.ops import DOMAIN, VERSION, range_lines
from vqonnx.prefix import TRIPLE, Prefix
from vqonnx.trees import LONGEST_TAIL
from vqonnx.writer import Writer

_CUMSUM = 11  # opset from which on it is there; before it, sums are products with a triangle of ones
_MOD = 10
_SLICE_INPUTS = 10
_LOGIC = 9  # opset from which on whole numbers can be compared, and constants be whole numbers
_SPLIT_COUNT = 18  # opset from which on Split has to be told into how many parts it divides
_INT32, _INT64 = 6, 7


def write_inflate(writer: Writer, form: Coded) -> str:
    """Add a ``vqonnx.Inflate`` node that yields the codes of a form as uint8 ``[1, rows, cols]``."""
    coding = form.coding
    assert coding is not None
    layout = [*coding.shape, coding.row_span, coding.col_span, len(coding.row_classes), coding.offset]
    trees = coding.trees
    arrays = (
        form.packed,
        coding.packed_classes,
        trees.roots,
        trees.counts,
        trees.leaves,
        np.array(layout, np.int64),
    )
    return writer.node("Inflate", [writer.constant(array) for array in arrays], domain=DOMAIN)


def inflate_functions(codings: Iterable[Prefix], opset: int) -> list[FunctionProto]:
    """The bodies of ``Inflate`` and what it calls, for a model with these codes; none where there are none."""
    listed = list(codings)
    if not listed:
        return []
    levels = max(coding.trees.levels for coding in listed)
    ragged = any(coding.shape[1] % TRIPLE for coding in listed)
    functions = {
        "Inflate (stream, classes, roots, counts, leaves, layout) => (codes)": _inflate_lines(levels, ragged, opset),
        "Path (bits, edges, rows, at, node, end) => (last, leaf, stop)": _chain_lines("Levels", LONGEST_TAIL // 2),
        "Levels (bits, edges, rows, at, node, end) => (last, leaf, stop)": _chain_lines("Level", 2),
        "Level (bits, edges, rows, at, node, end) => (at_next, node_next, end_next)": _level_lines(opset),
        "Digits (values, places, base) => (digits)": _digits_lines(opset),
    }
    if opset < _CUMSUM:
        functions["Sum (values, rows) => (sums)"] = _sum_lines(opset)
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}]>'
    texts = (f"{head}\n{name} {{\n" + "\n".join(lines) + "\n}" for name, lines in functions.items())
    unused = "edges, rows," if opset >= _CUMSUM else ""  # only `Sum` wants to know how many rows there are
    return [onnx.parser.parse_function(text.replace(unused, unused[:6])) for text in texts]


def _inflate_lines(levels: int, ragged: bool, opset: int) -> list[str]:
    more = (levels - LONGEST_TAIL) // 2  # a triple may have a longer code than a tail
    count = ", num_outputs = 6" if opset >= _SPLIT_COUNT else ""
    return [
        f"rows, cols, row_span, col_span, row_runs, offset = Split <axis = 0{count}> (layout)",
        *_ints("one", [1], _INT64, opset),
        *_ints("any", [-1], _INT64, opset),
        *_ints("column", [-1, 1], _INT64, opset),
        *_ints("powers", [1, 2, 4, 8, 16, 32, 64, 128], _INT32, opset),
        *_ints("halves", [1, 16], _INT32, opset),
        *_ints("places", [16, 4, 1], _INT32, opset),
        *_ints("two", [2], _INT32, opset),
        *_ints("three", [3], _INT32, opset),
        *_ints("four", [4], _INT32, opset),
        *_ints("sixteen", [16], _INT32, opset),
        "zero = Sub (one, one)",
        "one32 = Sub (three, two)",
        "none = Sub (two, two)",
        f"bits = {DOMAIN}.Digits (stream, powers, two)",
        # how many leaves of all trees come before longer codes
        "counts32 = Cast <to = 6> (counts)",
        "tree_sizes = Shape (counts)",
        "trees = Gather (tree_sizes, zero)",
        "steps64 = Gather (tree_sizes, one)",
        "steps = Cast <to = 6> (steps64)",
        "counts_line = Reshape (counts32, any)",
        *_sums("edges", "counts_line", "trees", opset),
        # the tree of each triple
        "three64 = Cast <to = 7> (three)",
        "two64 = Cast <to = 7> (two)",
        "cols_up = Add (cols, two64)",
        "triples = Div (cols_up, three64)",
        f"class_line = {DOMAIN}.Digits (classes, halves, sixteen)",
        "class_column = Reshape (class_line, column)",
        *_repeated_lines("row", "zero", "rows", opset),
        "col_first = Mul (row_runs, col_span)",
        *_repeated_lines("col", "col_first", "triples", opset),
        "row_column = Reshape (row_class, column)",
        "class_matrix = Add (row_column, col_class)",
        "class = Reshape (class_matrix, any)",
        "roots32 = Cast <to = 6> (roots)",
        "root = Gather (roots32, class)",
        "at = Mul (root, steps)",
        "edge = Gather (edges, at)",
        "own = Gather (counts_line, at)",
        "node = Sub (edge, own)",
        f"at_0, node_0, end_0 = {DOMAIN}.Path (bits, edges, rows, at, node, none)",
        *(
            f"at_{n + 1}, node_{n + 1}, end_{n + 1} = {DOMAIN}.Levels (bits, edges, rows, at_{n}, node_{n}, end_{n})"
            for n in range(more)
        ),
        # magnitudes up to 3, and what is beyond
        "leaves32 = Cast <to = 6> (leaves)",
        f"triple = Gather (leaves32, node_{more})",
        f"digit = {DOMAIN}.Digits (triple, places, four)",
        "cut = Div (digit, three)",
        "cut_node = Sub (cut, one32)",
        f"tail_last, tail_leaf, tail_end = {DOMAIN}.Path (bits, edges, rows, none, cut_node, end_{more})",
        "tail_place = Mul (tail_leaf, cut)",
        "tail_value = Gather (leaves32, tail_place)",
        "tail = Mul (tail_value, cut)",
        "size = Add (digit, tail)",
        # a bit of every number but 0: -1 where it is 0
        "up = Add (digit, three)",
        "some = Div (up, four)",
        "some_node = Sub (some, one32)",
        f"sign_at, sign, sign_end = {DOMAIN}.Level (bits, edges, rows, none, some_node, tail_end)",
        "twice = Mul (size, two)",
        "back = Mul (twice, sign)",
        "number = Sub (size, back)",
        "offset32 = Cast <to = 6> (offset)",
        "code = Add (number, offset32)",
        "code8 = Cast <to = 2> (code)",
        "all = Concat <axis = 0> (one, rows, any)",
        *_cut_lines(ragged, opset),
    ]


def _chain_lines(step: str, count: int) -> list[str]:
    """``count`` steps, each one beginning where the one before ended."""
    names = [["at", "node", "end"], *([f"at{n}", f"node{n}", f"end{n}"] for n in range(1, count))]
    names.append(["last", "leaf", "stop"])
    return [
        f"{', '.join(after)} = {DOMAIN}.{step} (bits, edges, rows, {', '.join(before)})"
        for before, after in pairwise(names)
    ]


def _level_lines(opset: int) -> list[str]:
    """One more bit of every code that is not finished: ``node`` is int32 ``[codes]``, ``end`` the bits before."""
    lines = [*_ints("one", [1], _INT32, opset), "edge = Gather (edges, at)", *_below_lines("node", "edge", opset)]
    return [
        *lines,
        "going = Not (below)",
        "alive = Cast <to = 6> (going)",
        *_sums("count", "alive", "rows", opset),
        "place = Add (count, end)",
        "bit = Gather (bits, place)",
        "ahead = Sub (node, edge)",
        "step = Add (ahead, bit)",
        "move = Mul (step, alive)",
        "node_next = Add (node, move)",
        "end_next = ReduceMax (place)",
        "at_next = Add (at, one)",
    ]


def _below_lines(left: str, right: str, opset: int) -> list[str]:
    """``below``: whether ``left`` is less."""
    if opset >= _LOGIC:
        return [f"below = Less ({left}, {right})"]
    floats = [f"{name}_float = Cast <to = 1> ({name})" for name in (left, right)]
    return [*floats, f"below = Less ({left}_float, {right}_float)"]


def _digits_lines(opset: int) -> list[str]:
    """``digits``, int32: of each value those of all ``places``."""
    lines = [
        *_ints("column", [-1, 1], _INT64, opset),
        *_ints("any", [-1], _INT64, opset),
        "values32 = Cast <to = 6> (values)",
        "upright = Reshape (values32, column)",
        "moved = Div (upright, places)",
    ]
    if opset >= _MOD:
        lines.append("matrix = Mod (moved, base)")
    else:
        lines += ["above = Div (moved, base)", "whole = Mul (above, base)", "matrix = Sub (moved, whole)"]
    return [*lines, "digits = Reshape (matrix, any)"]


def _repeated_lines(kind: str, first: str, count: str, opset: int) -> list[str]:
    """``row_class`` or ``col_class``, int32 ``[count]``: each class ``span`` times, cut out of those of both."""
    lines = [
        f"{kind}_repeats = Concat <axis = 0> (one, {kind}_span)",
        f"{kind}_grid = Tile (class_column, {kind}_repeats)",
        f"{kind}_line = Reshape ({kind}_grid, any)",
    ]
    if opset >= _SLICE_INPUTS:
        return [
            *lines,
            f"{kind}_stop = Add ({first}, {count})",
            f"{kind}_class = Slice ({kind}_line, {first}, {kind}_stop)",
        ]
    return [
        *lines,
        *range_lines(f"{kind}_number", count, opset),
        f"{kind}_place = Add ({kind}_number, {first})",
        f"{kind}_class = Gather ({kind}_line, {kind}_place)",
    ]


def _cut_lines(ragged: bool, opset: int) -> list[str]:
    """The codes as ``[1, rows, cols]``, without what fills the last triples."""
    if not ragged:
        return ["codes = Reshape (code8, all)"]
    lines = ["whole = Reshape (code8, all)"]
    if opset >= _SLICE_INPUTS:
        return [*lines, "codes = Slice (whole, zero, cols, two64)"]
    return [*lines, *range_lines("kept", "cols", opset), "codes = Gather <axis = 2> (whole, kept)"]


def _sums(name: str, values: str, rows: str, opset: int) -> list[str]:
    """``name``: the running sums of int32 values."""
    if opset < _CUMSUM:
        return [f"{name} = {DOMAIN}.Sum ({values}, {rows})"]
    return [f"{name}_axis = Constant <value = int32 {{0}}> ()", f"{name} = CumSum ({values}, {name}_axis)"]


def _sum_lines(opset: int) -> list[str]:
    """Running sums of a matrix in ``rows`` rows, row by row; exact below 2^24."""
    return [
        *_ints("one", [1], _INT64, opset),
        *_ints("zero", [0], _INT64, opset),
        *_ints("any", [-1], _INT64, opset),
        "values_float = Cast <to = 1> (values)",
        "sizes = Concat <axis = 0> (rows, any)",
        "matrix = Reshape (values_float, sizes)",
        "shape = Shape (matrix)",
        "cols = Gather (shape, one)",
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
        "line = Reshape (running, any)",
        "sums = Cast <to = 6> (line)",
    ]


def _ints(name: str, values: list[int], kind: int, opset: int) -> list[str]:
    numbers = ", ".join(map(str, values))
    if opset >= _LOGIC:
        return [f"{name} = Constant <value = {'int64' if kind == _INT64 else 'int32'}[{len(values)}] {{{numbers}}}> ()"]
    return [  # Constant is floating point only before opset 9
        f"{name}_f = Constant <value = float[{len(values)}] {{{numbers}}}> ()",
        f"{name} = Cast <to = {kind}> ({name}_f)",
    ]
