"""What each operator does with channels: how those of its inputs meet, and where they lie in its outputs.

An operator without a rule is taken to mix them.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx import NodeProto

from vqonnx.permute.atoms import Piece
from vqonnx.permute.moves import (
    first_reason,
    from_last,
    on_pad,
    on_reduce,
    on_reshape,
    on_resize,
    on_slice,
    on_split,
    on_transpose,
    rank_of,
    single,
)
from vqonnx.permute.reader import Channels, Reader, Unknown, label
from vqonnx.scope import attributes

Rule = Callable[[Reader, NodeProto], None]


def _conv(read: Reader, node: NodeProto) -> None:
    shape = read.constant_shape(node, 1)
    group, rank = int(attributes(node).get("group", 1)), len(shape)
    inputs = read.channels(node.input[0], 1 - rank, shape[1] * group)
    if group == 1:
        outputs = read.fresh(shape[0])
        read.declare(node, 1, 1, inputs, "consumer")
        read.declare(node, 1, 0, outputs, "producer")
    elif shape[1] == 1:
        outputs = tuple(Piece(piece.atom, piece.run * (shape[0] // group)) for piece in inputs)
        read.declare(node, 1, 0, outputs)
    else:
        raise Unknown(f"{label(node)} has {group} groups of {shape[1]} channels")
    _bias(read, node, outputs)
    read.give(node.output[0], 1 - rank, outputs, rank)


def _conv_transpose(read: Reader, node: NodeProto) -> None:
    shape = read.constant_shape(node, 1)
    group, rank = int(attributes(node).get("group", 1)), len(shape)
    inputs = read.channels(node.input[0], 1 - rank, shape[0])
    if group == 1:
        outputs = read.fresh(shape[1])
        read.declare(node, 1, 0, inputs, "consumer")
        read.declare(node, 1, 1, outputs, "producer")
    elif group == shape[0]:
        outputs = tuple(Piece(piece.atom, piece.run * shape[1]) for piece in inputs)
        read.declare(node, 1, 0, inputs)
    else:
        raise Unknown(f"{label(node)} has {group} groups of {shape[0] // group} channels")
    _bias(read, node, outputs)
    read.give(node.output[0], 1 - rank, outputs, rank)


def _bias(read: Reader, node: NodeProto, outputs: tuple[Piece, ...]) -> None:
    if len(node.input) > 2 and node.input[2]:
        read.declare(node, 2, 0, outputs)


def _gemm(read: Reader, node: NodeProto) -> None:
    values = attributes(node)
    shape = read.constant_shape(node, 1)
    if values.get("transA", 0):
        raise Unknown(f"{label(node)} transposes its input")
    by_rows = int(bool(values.get("transB", 0)))
    inputs, outputs = read.channels(node.input[0], -1, shape[by_rows]), read.fresh(shape[1 - by_rows])
    read.declare(node, 1, by_rows, inputs, "consumer")
    read.declare(node, 1, 1 - by_rows, outputs, "producer")
    merged = Channels(-1, outputs, 2)
    if len(node.input) > 2 and node.input[2]:
        merged = _meet(read, node, merged, [2])
    read.give(node.output[0], -1, merged.pieces, 2)


def _matmul(read: Reader, node: NodeProto) -> None:
    shape = read.constant_shape(node, 1)
    if len(shape) != 2:
        raise Unknown(f"the weight of {label(node)} has {len(shape)} axes")
    before = read.shape(node.input[0])
    inputs, outputs = read.channels(node.input[0], -1, shape[0]), read.fresh(shape[1])
    read.declare(node, 1, 0, inputs, "consumer")
    read.declare(node, 1, 1, outputs, "producer")
    seen = read.seen.get(node.input[0])
    rank = len(before) if before is not None else seen.rank if seen else None
    read.give(node.output[0], -1, outputs, rank)


def _normalise(read: Reader, node: NodeProto) -> None:
    """BatchNormalization and InstanceNormalization: vectors along the second axis."""
    found = single(read, node)
    if any(node.output[1:]):
        raise Unknown(f"{label(node)} is in training mode")
    _second_axis(node, found)
    for index in range(1, len(node.input)):
        read.declare(node, index, 0, found.pieces)
    read.give(node.output[0], found.axis, found.pieces, found.rank)


def _pool(read: Reader, node: NodeProto) -> None:
    found = single(read, node)
    if any(node.output[1:]):
        raise Unknown(f"{label(node)} gives indices, which count channels")
    _second_axis(node, found)
    read.give(node.output[0], found.axis, found.pieces, found.rank)


def _unary(read: Reader, node: NodeProto) -> None:
    found = single(read, node)
    for name in filter(None, node.output):
        read.give(name, found.axis, found.pieces, found.rank)


def _elementwise(read: Reader, node: NodeProto) -> None:
    wide = [index for index, name in enumerate(node.input) if name in read.seen and read.seen[name].length > 1]
    if not wide:
        raise Unknown(first_reason(read, node))
    found = _meet(read, node, read.seen[node.input[wide[0]]], [i for i in range(len(node.input)) if i != wide[0]])
    read.give(node.output[0], found.axis, found.pieces, found.rank)


def _meet(read: Reader, node: NodeProto, first: Channels, others: list[int]) -> Channels:
    """Broadcast other inputs against channels: those that have as many entries along that axis move with them."""
    rank = first.rank
    for index in others:
        name = node.input[index]
        if not name:
            continue
        seen, shape = read.seen.get(name), read.shape(name)
        if seen is not None and seen.length > 1 and seen.axis == first.axis:
            read.join(node, first.pieces, seen.pieces)
        elif seen is not None and seen.axis == first.axis:
            pass  # one channel for all
        elif shape is None or (len(shape) >= -first.axis and shape[first.axis] != 1):
            if name not in read.known.constants:
                raise Unknown(f"{label(node)} joins them to '{name}', whose channels are not known")
            read.declare(node, index, first.axis, first.pieces)
        elif seen is not None and seen.length > 1:
            raise Unknown(f"{label(node)} joins channels along different axes")
        ranks = [len(shape) if shape is not None else seen.rank if seen else None, rank]
        rank = None if None in ranks else max(size for size in ranks if size is not None)
    return Channels(first.axis, first.pieces, rank)


def _concat(read: Reader, node: NodeProto) -> None:
    names = list(node.input)
    seen = [read.seen[name] for name in names if name in read.seen]
    if not seen:
        raise Unknown(first_reason(read, node))
    axis = from_last(node, int(attributes(node).get("axis", 1)), seen[0])
    if any(channels.axis != seen[0].axis for channels in seen):
        raise Unknown(f"{label(node)} joins channels along different axes")
    if axis != seen[0].axis:
        if len(seen) < len(names):
            raise Unknown(f"{label(node)} joins them to channels that are not known")
        for other in seen[1:]:
            read.join(node, seen[0].pieces, other.pieces)
        read.give(node.output[0], seen[0].axis, seen[0].pieces, seen[0].rank)
        return
    pieces: list[Piece] = []
    for name in names:
        if name in read.seen:
            pieces += read.seen[name].pieces
            continue
        size = (read.shape(name) or (None,) * -axis)[axis]
        if size is None:
            raise Unknown(f"{label(node)} joins them to '{name}', whose channels are not known")
        pieces += read.pinned(size, f"'{name}' is constant" if name in read.known.constants else read.reason(name))
    read.give(node.output[0], axis, pieces, seen[0].rank)


def _size_only(read: Reader, node: NodeProto) -> None:
    """Shape and Size: the order of channels does not matter to them."""
    read.why.update((name, f"made by {label(node)}") for name in node.output)


def _second_axis(node: NodeProto, found: Channels) -> None:
    if found.axis != 1 - rank_of(node, found):
        raise Unknown(f"{label(node)} works along an axis that is not the channels'")


_UNARY = (
    *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh"),
    *("Softplus", "Softsign", "Mish", "Gelu", "Swish", "Clip", "Abs", "Neg", "Exp", "Log", "Sqrt", "Reciprocal"),
    *("Floor", "Ceil", "Round", "Sign", "Erf", "Sin", "Cos", "Not", "Identity", "Dropout", "Cast"),
)
_BROADCAST = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "PRelu", "Where"),
    *("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor"),
)
_POOLS = ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")

RULES: dict[str, Rule] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _normalise,
    "InstanceNormalization": _normalise,
    "Concat": _concat,
    "Split": on_split,
    "Slice": on_slice,
    "Pad": on_pad,
    "Resize": on_resize,
    "Upsample": on_resize,
    "Transpose": on_transpose,
    "Shape": _size_only,
    "Size": _size_only,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), on_reshape),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), on_reduce),
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BROADCAST, _elementwise),
    **dict.fromkeys(_POOLS, _pool),
}
