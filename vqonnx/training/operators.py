"""Elementwise operators, reductions, and everything that moves values about, as ONNX defines them, in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor

from vqonnx.modelfile import to_array
from vqonnx.training.call import Call, Unsupported, flags, operator, padded

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Identity": lambda x: x,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
    "HardSwish": F.hardswish,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Sub": torch.sub,
}
_VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
    "Mean": torch.add,
}
_SLOPED: dict[str, Callable[[Tensor, float], Tensor]] = {"LeakyRelu": F.leaky_relu, "Elu": F.elu, "Celu": F.celu}
_NOWHERE = Path()  # a value in a node is never external
_TORCH_TYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


@operator(*_UNARY)
def unary(call: Call) -> Tensor:
    """One tensor in, value by value."""
    return _UNARY[call.op_type](call.x)


@operator(*_BINARY)
def binary(call: Call) -> Tensor:
    """Two tensors, broadcast against each other."""
    return _BINARY[call.op_type](call.x, call.tensor(1))


@operator("Div")
def divide(call: Call) -> Tensor:
    """Whole numbers are cut off towards zero."""
    return torch.div(call.x, call.tensor(1), rounding_mode=None if call.x.is_floating_point() else "trunc")


@operator("Max", "Min", "Sum", "Mean")
def variadic(call: Call) -> Tensor:
    """Any number of tensors, broadcast against each other."""
    y = call.x
    for index in range(1, len(call.inputs)):
        y = _VARIADIC[call.op_type](y, call.tensor(index))
    return y / len(call.inputs) if call.op_type == "Mean" else y


@operator("Clip")
def clip(call: Call) -> Tensor:
    """Limits come as attributes before opset 11, as inputs from then on."""
    low, high = call.number("min", 1), call.number("max", 2)
    return call.x if low is None and high is None else torch.clamp(call.x, low, high)


@operator("LeakyRelu", "Elu", "Celu", "ThresholdedRelu")
def sloped(call: Call) -> Tensor:
    """Activations with one parameter ``alpha``."""
    alpha = call.attribute("alpha", 0.01 if call.op_type == "LeakyRelu" else 1.0)
    if call.op_type == "ThresholdedRelu":
        return torch.where(call.x > alpha, call.x, torch.zeros_like(call.x))
    return _SLOPED[call.op_type](call.x, alpha)


@operator("Selu")
def selu(call: Call) -> Tensor:
    """Scaled ELU."""
    y: Tensor = call.attribute("gamma", 1.0507010) * F.elu(call.x, call.attribute("alpha", 1.6732632))
    return y


@operator("HardSigmoid")
def hard_sigmoid(call: Call) -> Tensor:
    """A straight line between 0 and 1."""
    return torch.clamp(call.attribute("alpha", 0.2) * call.x + call.attribute("beta", 0.5), 0, 1)


@operator("PRelu")
def prelu(call: Call) -> Tensor:
    """A slope for each value below 0, broadcast."""
    return torch.where(call.x < 0, call.x * call.tensor(1), call.x)


@operator("Gelu")
def gelu(call: Call) -> Tensor:
    """Exact, or by tanh."""
    return F.gelu(call.x, approximate=call.attribute("approximate", "none"))


@operator("Softmax", "LogSoftmax")
def softmax(call: Call) -> Tensor:
    """Before opset 13 over all axes from ``axis`` on, from then on along it."""
    function = F.softmax if call.op_type == "Softmax" else F.log_softmax
    if call.opset >= 13:
        return function(call.x, call.attribute("axis", -1))
    axis = call.attribute("axis", 1) % call.x.ndim
    return function(call.x.flatten(axis), axis).reshape(call.x.shape)


@operator("Dropout")
def dropout(call: Call) -> Sequence[Tensor]:
    """As at inference: nothing falls out, and the mask is all ones (in the type of the data before opset 10)."""
    return call.x, torch.ones_like(call.x, dtype=torch.bool if call.opset >= 10 else call.x.dtype)


@operator("Where")
def where(call: Call) -> Tensor:
    """One or the other."""
    return torch.where(call.x, call.tensor(1), call.tensor(2))


@operator("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare")
def reduce(call: Call) -> Tensor:
    """Over ``axes``, or over all of them."""
    axes = call.numbers("axes", 1)
    if not axes:
        if flags(call, "noop_with_empty_axes", 0):
            return call.x
        axes = list(range(call.x.ndim))
    keep = flags(call, "keepdims", 1)
    x = call.x
    if call.op_type == "ReduceProd":
        for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
            x = x.prod(dim=axis, keepdim=keep)
        return x
    functions: dict[str, Callable[[], Tensor]] = {
        "ReduceMean": lambda: x.mean(axes, keep),
        "ReduceSum": lambda: x.sum(axes, keep),
        "ReduceMax": lambda: x.amax(axes, keep),
        "ReduceMin": lambda: x.amin(axes, keep),
        "ReduceL2": lambda: (x**2).sum(axes, keep).sqrt(),
        "ReduceSumSquare": lambda: (x**2).sum(axes, keep),
    }
    return functions[call.op_type]()


@operator("ArgMax", "ArgMin")
def arg(call: Call) -> Tensor:
    """Where the largest or smallest value is."""
    function = torch.argmax if call.op_type == "ArgMax" else torch.argmin
    return function(call.x, dim=call.attribute("axis", 0), keepdim=flags(call, "keepdims", 1))


@operator("Flatten")
def flatten(call: Call) -> Tensor:
    """Two axes."""
    axis = call.attribute("axis", 1)
    axis = axis + call.x.ndim if axis < 0 else axis
    return call.x.reshape(math.prod(call.x.shape[:axis]), -1)


@operator("Reshape")
def reshape(call: Call) -> Tensor:
    """A size of 0 keeps the axis, unless ``allowzero``."""
    sizes = call.numbers("shape", 1) or []
    if not flags(call, "allowzero", 0):
        sizes = [call.x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return torch.reshape(call.x, sizes)


@operator("Transpose")
def transpose(call: Call) -> Tensor:
    """Axes in the order of ``perm``, by default reversed."""
    return call.x.permute(call.attribute("perm") or list(range(call.x.ndim))[::-1])


@operator("Squeeze")
def squeeze(call: Call) -> Tensor:
    """Without axes of size 1."""
    axes = call.numbers("axes", 1)
    return call.x.squeeze() if axes is None else call.x.squeeze(tuple(axes))


@operator("Unsqueeze")
def unsqueeze(call: Call) -> Tensor:
    """With new axes of size 1."""
    axes = call.numbers("axes", 1) or []
    x = call.x
    for axis in sorted(axis % (call.x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(call: Call) -> Tensor:
    """One behind the other."""
    return torch.cat([call.tensor(index) for index in range(len(call.inputs))], dim=call.attribute("axis", 1))


@operator("Split")
def split(call: Call) -> Sequence[Tensor]:
    """Into parts of given sizes, or as equal as possible."""
    axis = call.attribute("axis", 0)
    sizes = call.numbers("split", 1)
    if not sizes:
        part = -(-call.x.shape[axis] // (call.attribute("num_outputs") or call.outputs))
        return torch.split(call.x, part, dim=axis)
    return torch.split(call.x, sizes, dim=axis)


@operator("Slice")
def slice_(call: Call) -> Tensor:
    """From starts to ends, by steps."""
    starts, ends = call.numbers("starts", 1) or [], call.numbers("ends", 2) or []
    axes = call.numbers("axes", 3) or list(range(len(starts)))
    steps = (call.numbers("steps", 4) if call.opset >= 10 else None) or [1] * len(starts)
    x = call.x
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = range(x.shape[axis])[start:end:step] if step > 0 else _backwards(x.shape[axis], start, end, step)
        if step == 1:
            x = x.narrow(axis, at.start, len(at))
        else:
            x = x.index_select(axis, torch.tensor(list(at), dtype=torch.int64, device=x.device))
    return x


def _backwards(size: int, start: int, end: int, step: int) -> range:
    """Positions of a slice with a negative step: starts are cut to ``0..size-1``, ends to ``-1..size-1``."""
    start = min(max(start + size if start < 0 else start, 0), size - 1)
    end = min(max(end + size if end < 0 else end, -1), size - 1)
    return range(start, end, step)


@operator("Pad")
def pad(call: Call) -> Tensor:
    """By a constant, by the edge or mirrored."""
    pads = call.numbers("pads", 1) or []
    axes = call.numbers("axes", 3) or list(range(len(pads) // 2))
    mode = call.attribute("mode", "constant")
    begins, ends = [0] * call.x.ndim, [0] * call.x.ndim
    for number, axis in enumerate(axes):
        begins[axis], ends[axis] = pads[number], pads[number + len(axes)]
    if mode == "constant":
        return padded(call.x, begins, ends, call.number("value", 2) or 0.0)
    if any(begins[:2]) or any(ends[:2]) or mode not in ("reflect", "edge"):
        raise Unsupported(f"with mode '{mode}' on the first two axes")
    pairs = [n for pair in zip(reversed(begins[2:]), reversed(ends[2:]), strict=True) for n in pair]
    return F.pad(call.x, pairs, mode="reflect" if mode == "reflect" else "replicate")


@operator("Gather")
def gather(call: Call) -> Tensor:
    """Slices along ``axis`` by their numbers."""
    axis = call.attribute("axis", 0) % call.x.ndim
    index = call.tensor(1).long()
    size = call.x.shape[axis]
    flat = call.x.index_select(axis, torch.where(index < 0, index + size, index).reshape(-1).to(call.x.device))
    return torch.reshape(flat, (*call.x.shape[:axis], *index.shape, *call.x.shape[axis + 1 :]))


@operator("Expand")
def expand(call: Call) -> Tensor:
    """Broadcast to a shape."""
    return call.x * torch.ones(call.numbers("shape", 1) or [], dtype=call.x.dtype, device=call.x.device)


@operator("Tile")
def tile(call: Call) -> Tensor:
    """Repeated along each axis."""
    return call.x.repeat(call.numbers("repeats", 1) or [])


@operator("Shape")
def shape(call: Call) -> Tensor:
    """Sizes of the axes."""
    return torch.tensor(call.x.shape[call.attribute("start", 0) : call.attribute("end")], dtype=torch.int64)


@operator("Cast")
def cast(call: Call) -> Tensor:
    """To another element type."""
    return call.x.to(torch_type(call.attribute("to")))


@operator("Constant")
def constant(call: Call) -> Tensor:
    """A value that stands in the node."""
    for name, value in call.attributes.items():
        if name == "value":
            return torch.from_numpy(np.array(to_array(value, _NOWHERE)))
        if name in ("value_int", "value_ints"):
            return torch.tensor(value, dtype=torch.int64)
        if name in ("value_float", "value_floats"):
            return torch.tensor(value, dtype=torch.float32)
    raise Unsupported(f"with {', '.join(call.attributes)}")


@operator("ConstantOfShape")
def constant_of_shape(call: Call) -> Tensor:
    """One value everywhere."""
    sizes = [int(size) for size in call.x.tolist()]
    value = call.attribute("value")
    if value is None:
        return torch.zeros(sizes)
    number = torch.from_numpy(np.array(to_array(value, _NOWHERE)))
    return number.reshape(-1)[0].expand(sizes).clone()


def torch_type(elem_type: int) -> torch.dtype:
    """The PyTorch type of an ONNX element type."""
    if elem_type not in _TORCH_TYPES:
        raise Unsupported(f"to {helper.tensor_dtype_to_string(elem_type)}")
    return _TORCH_TYPES[elem_type]
