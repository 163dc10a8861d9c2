"""Operators with weights, pooling, normalisation and resizing, as ONNX defines them, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vqonnx.training.call import Call, Unsupported, flags, operator, padded

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@operator("Conv")
def conv(call: Call) -> Tensor:
    """Convolution; padding that differs at the two ends is added first."""
    weight = call.tensor(1)
    dims = weight.ndim - 2
    strides = call.attribute("strides", [1] * dims)
    dilations = call.attribute("dilations", [1] * dims)
    begins, ends = _pads(call, call.x.shape[2:], weight.shape[2:], strides, dilations)
    x = call.x
    if begins != ends:
        x, begins = padded(x, begins, ends), [0] * dims
    return _CONVS[dims](x, weight, call.get(2), strides, begins, dilations, call.attribute("group", 1))


@operator("ConvTranspose")
def conv_transpose(call: Call) -> Tensor:
    """Transposed convolution; the padding is cut off the full result."""
    weight = call.tensor(1)
    dims = weight.ndim - 2
    strides = call.attribute("strides", [1] * dims)
    dilations = call.attribute("dilations", [1] * dims)
    extra = call.attribute("output_padding", [0] * dims)
    full = _TRANSPOSED[dims](call.x, weight, None, strides, 0, 0, call.attribute("group", 1), dilations)
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    sizes = [(n - 1) * s + r + e for n, s, r, e in zip(call.x.shape[2:], strides, reach, extra, strict=True)]
    shape, auto = call.attribute("output_shape"), call.attribute("auto_pad", "NOTSET")
    if shape is None and auto.startswith("SAME"):
        shape = [n * s for n, s in zip(call.x.shape[2:], strides, strict=True)]
    if shape is not None:
        total = [size - want for size, want in zip(sizes, shape[-dims:], strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        begins, ends = (small, large) if auto == "SAME_UPPER" else (large, small)
        if auto == "NOTSET":
            begins, ends = large, small
    elif auto == "VALID":
        begins = ends = [0] * dims
    else:
        pads = call.attribute("pads", [0] * 2 * dims)
        begins, ends = list(pads[:dims]), list(pads[dims:])
    # The full result lacks what output_padding adds at the end; a negative end then pads instead of cutting.
    y = padded(full, [-b for b in begins], [e - cut for e, cut in zip(extra, ends, strict=True)])
    bias = call.get(2)
    return y if bias is None else y + bias.reshape(-1, *[1] * dims)


@operator("Gemm")
def gemm(call: Call) -> Tensor:
    """``alpha A B + beta C``."""
    a, b, c = call.x, call.tensor(1), call.get(2)
    left = a.T if flags(call, "transA", 0) else a
    right = b.T if flags(call, "transB", 0) else b
    y: Tensor = call.attribute("alpha", 1.0) * (left @ right)
    return y if c is None else y + call.attribute("beta", 1.0) * c


@operator("MatMul")
def matmul(call: Call) -> Tensor:
    """Product over the last two axes."""
    return torch.matmul(call.x, call.tensor(1))


@operator("MaxPool")
def max_pool(call: Call) -> Tensor:
    """Largest value in each window; what is padded never wins."""
    if call.outputs > 1:
        raise Unsupported("with the positions as second output")
    kernel = call.attribute("kernel_shape")
    dims = len(kernel)
    strides = call.attribute("strides", [1] * dims)
    dilations = call.attribute("dilations", [1] * dims)
    begins, ends = _pads(call, call.x.shape[2:], kernel, strides, dilations)
    ends = _ceiled(call, call.x.shape[2:], kernel, strides, dilations, begins, ends)
    return _MAX_POOLS[dims](padded(call.x, begins, ends, -torch.inf), kernel, strides, 0, dilations)


@operator("AveragePool")
def average_pool(call: Call) -> Tensor:
    """Mean of each window, without the padding unless ``count_include_pad``."""
    kernel = call.attribute("kernel_shape")
    dims = len(kernel)
    strides = call.attribute("strides", [1] * dims)
    dilations = call.attribute("dilations", [1] * dims)
    before, after = _pads(call, call.x.shape[2:], kernel, strides, dilations)
    ends = _ceiled(call, call.x.shape[2:], kernel, strides, dilations, before, after)
    channels = call.x.shape[1]
    ones = call.x.new_ones(channels, 1, *kernel)
    counted = call.x.new_ones(1, channels, *call.x.shape[2:])
    if flags(call, "count_include_pad", 0):
        counted = padded(counted, before, after, 1.0)
        ends_of_ones = [e - a for e, a in zip(ends, after, strict=True)]
        counted = padded(counted, [0] * dims, ends_of_ones)
    else:
        counted = padded(counted, before, ends)
    sums = _CONVS[dims](padded(call.x, before, ends), ones, None, strides, 0, dilations, channels)
    return sums / _CONVS[dims](counted, ones, None, strides, 0, dilations, channels)


@operator("GlobalAveragePool")
def global_average_pool(call: Call) -> Tensor:
    """Mean over all positions."""
    return call.x.mean(dim=tuple(range(2, call.x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(call: Call) -> Tensor:
    """Largest value of all positions."""
    return call.x.amax(dim=tuple(range(2, call.x.ndim)), keepdim=True)


@operator("BatchNormalization")
def batch_normalization(call: Call) -> Tensor:
    """With the stored statistics, or with those of the batch, which then move the stored ones."""
    if call.outputs > 1:
        raise Unsupported("with statistics as outputs")
    if call.opset < 9 and not flags(call, "spatial", 1):
        raise Unsupported("with spatial=0")
    scale, bias, mean, variance = (call.tensor(index) for index in range(1, 5))
    epsilon = call.attribute("epsilon", 1e-5)
    momentum = 1 - call.attribute("momentum", 0.9)
    return F.batch_norm(call.x, mean, variance, scale, bias, call.batch_statistics, momentum, epsilon)


@operator("InstanceNormalization")
def instance_normalization(call: Call) -> Tensor:
    """Each channel of each image by its own mean and variance."""
    return F.instance_norm(
        call.x, None, None, call.tensor(1), call.tensor(2), True, 0.0, call.attribute("epsilon", 1e-5)
    )


@operator("LayerNormalization")
def layer_normalization(call: Call) -> Tensor:
    """Over the axes from ``axis`` on."""
    if call.outputs > 1:
        raise Unsupported("with statistics as outputs")
    axis = call.attribute("axis", -1) % call.x.ndim
    shape = list(call.x.shape[axis:])
    y = F.layer_norm(call.x, shape, None, None, call.attribute("epsilon", 1e-5)) * call.tensor(1)
    bias = call.get(2)
    return y if bias is None else y + bias


@operator("LRN")
def local_response_normalization(call: Call) -> Tensor:
    """Division by the energy of neighbouring channels."""
    size = call.attribute("size")
    alpha, beta, k = call.attribute("alpha", 1e-4), call.attribute("beta", 0.75), call.attribute("bias", 1.0)
    squares = F.pad((call.x**2).movedim(1, -1), ((size - 1) // 2, size // 2))
    energy = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    y: Tensor = call.x / (k + alpha / size * energy) ** beta
    return y


@operator("Upsample", "Resize")
def resize(call: Call) -> Tensor:
    """Nearest or linear interpolation of the last two axes, as the attributes say."""
    old = call.op_type == "Upsample" or call.opset < 11
    mode = call.attribute("mode", "nearest")
    where = "asymmetric" if old else call.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else call.attribute("nearest_mode", "round_prefer_floor")
    if call.attribute("axes") is not None or call.attribute("antialias") or mode not in ("nearest", "linear"):
        raise Unsupported(f"with mode '{mode}', axes or antialias")
    scales = call.attribute("scales") or _floats(call.get(1 if old else 2))
    sizes = None if old else call.numbers("sizes", 3)
    if sizes:
        scales = [size / have for size, have in zip(sizes, call.x.shape, strict=True)]
    elif scales:
        sizes = [int(have * scale) for have, scale in zip(call.x.shape, scales, strict=True)]
    else:
        raise Unsupported("without scales and sizes")
    y = call.x
    for axis, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
        if size != y.shape[axis] or scale != 1:
            y = _resize_axis(y, axis, size, scale, mode, where, rounding)
    return y


def _resize_axis(x: Tensor, axis: int, size: int, scale: float, mode: str, where: str, rounding: str) -> Tensor:
    have = x.shape[axis]
    to = torch.arange(size, dtype=torch.float64)
    if where == "asymmetric":
        at = to / scale
    elif where == "align_corners":
        at = to * (have - 1) / max(size - 1, 1)
    elif where in ("half_pixel", "pytorch_half_pixel"):
        at = (to + 0.5) / scale - 0.5
        if where == "pytorch_half_pixel" and size == 1:
            at = torch.zeros_like(at)
    else:
        raise Unsupported(f"with coordinate_transformation_mode '{where}'")
    if mode == "nearest":
        rounded = _ROUNDINGS[rounding](at)
        return x.index_select(axis, rounded.long().clamp(0, have - 1))
    low = at.floor()
    part = (at - low).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis))
    below = x.index_select(axis, low.long().clamp(0, have - 1))
    above = x.index_select(axis, (low.long() + 1).clamp(0, have - 1))
    return below * (1 - part) + above * part


def _floats(value: Tensor | None) -> list[float] | None:
    return None if value is None or not value.numel() else [float(number) for number in value.tolist()]


def _pads(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding before and after each axis, ``auto_pad`` worked out."""
    auto = call.attribute("auto_pad", "NOTSET")
    dims = len(kernel)
    if auto in ("NOTSET", ""):
        pads = call.attribute("pads", [0] * 2 * dims)
        return list(pads[:dims]), list(pads[dims:])
    if auto == "VALID":
        return [0] * dims, [0] * dims
    begins, ends = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return begins, ends


def _ceiled(
    call: Call,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    begins: list[int],
    ends: list[int],
) -> list[int]:
    """``ends`` with what ``ceil_mode`` adds, so that the last window is whole."""
    if not flags(call, "ceil_mode", 0):
        return ends
    more = []
    for size, k, stride, dilation, begin, end in zip(sizes, kernel, strides, dilations, begins, ends, strict=True):
        reach = (k - 1) * dilation + 1
        windows = -(-(size + begin + end - reach) // stride) + 1
        if (windows - 1) * stride >= size + begin:  # a window that starts in the padding at the end does not count
            windows -= 1
        more.append(max(end, (windows - 1) * stride + reach - size - begin))
    return more
