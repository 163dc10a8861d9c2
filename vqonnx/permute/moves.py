"""Operators that cut, move, widen or drop axes: where channels lie behind them."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto

from vqonnx.permute.atoms import Piece, cut
from vqonnx.permute.reader import Channels, Reader, Unknown, carried, label
from vqonnx.scope import attributes


def on_split(read: Reader, node: NodeProto) -> None:
    """Split: along the axis of channels each output gets some."""
    found, values = single(read, node), attributes(node)
    if from_last(node, int(values.get("axis", 0)), found) != found.axis:
        for name in filter(None, node.output):
            read.give(name, found.axis, found.pieces, found.rank)
        return
    sizes = _numbers(read, node, 1, values.get("split"))
    if sizes is None and len(node.input) > 1 and node.input[1]:
        raise Unknown(f"{label(node)} has sizes that are not constant")
    if sizes is None:
        count = len(node.output)
        step = -(-found.length // count)
        sizes = [min(step, found.length - step * number) for number in range(count)]
    start = 0
    for name, size in zip(node.output, sizes, strict=True):
        if name:
            read.give(name, found.axis, _cut(node, found, start, start + size), found.rank)
        start += size


def on_slice(read: Reader, node: NodeProto) -> None:
    """Slice: along the axis of channels, neighbouring ones only."""
    found, values = single(read, node), attributes(node)
    starts, ends = _numbers(read, node, 1, values.get("starts")), _numbers(read, node, 2, values.get("ends"))
    if starts is None or ends is None:
        raise Unknown(f"{label(node)} has bounds that are not constant")
    axes = _numbers(read, node, 3, values.get("axes"))
    steps = _numbers(read, node, 4, None)
    if (len(node.input) > 3 and node.input[3] and axes is None) or (len(node.input) > 4 and steps is None):
        raise Unknown(f"{label(node)} has axes that are not constant")
    axes = list(range(len(starts))) if axes is None else axes
    pieces = found.pieces
    for number, axis in enumerate(axes):
        if from_last(node, axis, found) != found.axis:
            continue
        if steps is not None and steps[number] != 1:
            raise Unknown(f"{label(node)} skips channels")
        start, stop, _ = slice(starts[number], ends[number]).indices(found.length)
        pieces = tuple(_cut(node, found, start, stop))
    read.give(node.output[0], found.axis, pieces, found.rank)


def on_pad(read: Reader, node: NodeProto) -> None:
    """Pad: along the axis of channels, with new ones of one value."""
    found, values = single(read, node), attributes(node)
    pads = _numbers(read, node, 1, values.get("pads"))
    axes = _numbers(read, node, 3, None)
    if pads is None or (len(node.input) > 3 and node.input[3] and axes is None):
        raise Unknown(f"{label(node)} has pads that are not constant")
    axes = list(range(len(pads) // 2)) if axes is None else axes
    pieces = list(found.pieces)
    for number, axis in enumerate(axes):
        before, after = pads[number], pads[len(axes) + number]
        if from_last(node, axis, found) != found.axis or not (before or after):
            continue
        if values.get("mode", b"constant") != b"constant" or before < 0 or after < 0:
            raise Unknown(f"{label(node)} repeats or drops channels")
        # Channels of one value: any order of them is the same, but others in their place would not be.
        pieces = [*(read.fresh(before) if before else ()), *pieces, *(read.fresh(after) if after else ())]
    read.give(node.output[0], found.axis, pieces, found.rank)


def on_resize(read: Reader, node: NodeProto) -> None:
    """Resize and Upsample, along other axes."""
    found, values = single(read, node), attributes(node)
    if values.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise Unknown(f"{label(node)} crops")
    axes = values.get("axes")
    kept = axes is not None and all(from_last(node, int(axis), found) != found.axis for axis in axes)
    scales = read.known.values.get(node.input[2 if len(node.input) > 2 else 1]) if len(node.input) > 1 else None
    scales = np.asarray(values["scales"]) if "scales" in values else scales
    if axes is None and scales is not None and scales.size >= -found.axis:
        kept = float(scales.ravel()[found.axis]) == 1.0
    after = read.shape(node.output[0])
    kept = kept or (after is not None and len(after) >= -found.axis and after[found.axis] == found.length)
    if not kept:
        raise Unknown(f"{label(node)} may resize the axis of channels")
    read.give(node.output[0], found.axis, found.pieces, found.rank)


def on_reduce(read: Reader, node: NodeProto) -> None:
    """ReduceMean and the like, along other axes."""
    found, values = single(read, node), attributes(node)
    axes = _numbers(read, node, 1, values.get("axes"))
    if not axes:
        raise Unknown(f"{label(node)} reduces channels")
    gone = {from_last(node, axis, found) for axis in axes}
    if found.axis in gone:
        raise Unknown(f"{label(node)} reduces channels")
    if values.get("keepdims", 1):
        read.give(node.output[0], found.axis, found.pieces, found.rank)
        return
    axis = found.axis + sum(axis > found.axis for axis in gone)
    read.give(node.output[0], axis, found.pieces, None if found.rank is None else found.rank - len(gone))


def on_transpose(read: Reader, node: NodeProto) -> None:
    """Transpose: the axis moves."""
    found = single(read, node)
    rank = rank_of(node, found)
    perm = list(attributes(node).get("perm", range(rank)[::-1]))
    read.give(node.output[0], perm.index(found.axis + rank) - rank, found.pieces, rank)


def on_reshape(read: Reader, node: NodeProto) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: channels may become runs of entries."""
    found = single(read, node)
    before, after = read.shape(node.input[0]), read.shape(node.output[0])
    if before is None and found.rank is not None:
        before = tuple(found.length if at == found.axis + found.rank else None for at in range(found.rank))
    moved = None if before is None else carried(before, found.axis, found.pieces, after)
    if moved is None or after is None:
        raise Unknown(f"{label(node)} mixes channels, or its sizes are not known")
    read.give(node.output[0], moved[0] - len(after), moved[1], len(after))


def single(read: Reader, node: NodeProto) -> Channels:
    """The channels of the first input."""
    found = read.seen.get(node.input[0])
    if found is None:
        raise Unknown(first_reason(read, node))
    return found


def first_reason(read: Reader, node: NodeProto) -> str:
    """Why nothing is known of the channels of the first activation that a node reads."""
    names = [name for name in node.input if name and name not in read.known.constants and name not in read.seen]
    return read.reason(names[0]) if names else f"made by {label(node)}"


def rank_of(node: NodeProto, found: Channels) -> int:
    """Axes of the tensor that a node reads."""
    if found.rank is None:
        raise Unknown(f"the input of {label(node)} has an unknown number of axes")
    return found.rank


def from_last(node: NodeProto, axis: int, found: Channels) -> int:
    """An axis counted from the last."""
    return axis if axis < 0 else axis - rank_of(node, found)


def _cut(node: NodeProto, found: Channels, start: int, stop: int) -> list[Piece]:
    pieces = cut(found.pieces, start, stop)
    if pieces is None:
        raise Unknown(f"{label(node)} cuts through channels")
    return pieces


def _numbers(read: Reader, node: NodeProto, index: int, attribute: Any) -> list[int] | None:
    """Whole numbers from an attribute, or from an input that is a constant; None where there are none."""
    if attribute is not None:
        return [int(value) for value in attribute]
    if index >= len(node.input) or not node.input[index]:
        return None
    values = read.known.values.get(node.input[index])
    return None if values is None else [int(value) for value in values.ravel()]
