"""Attributes of Conv and MaxPool as the fused ops want them: all given, and ``auto_pad`` turned into ``pads``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vqonnx.shapes import Shape

_AXES = (1, 2)  # of kernels that the fused ops know


def conv_attributes(
    given: Mapping[str, Any], weight: tuple[int, ...], read_input_shape: Callable[[], Shape | None]
) -> dict[str, Any] | None:
    """``strides``, ``pads``, ``dilations`` and ``group``; None where the fused op cannot be had.

    Args:
        given: Attributes of the Conv node.
        weight: Shape of its weight.
        read_input_shape: Gives the shape of its input; called only where ``auto_pad`` depends on it.
    """
    kernel = weight[2:]
    axes = len(kernel)
    if axes not in _AXES:
        return None
    strides = list(given.get("strides", [1] * axes))
    dilations = list(given.get("dilations", [1] * axes))
    group = int(given.get("group", 1))
    if not len(strides) == len(dilations) == axes or min(*strides, *dilations, group) < 1 or weight[0] % group:
        return None
    if tuple(given.get("kernel_shape", kernel)) != kernel:
        return None
    mode = given.get("auto_pad", b"NOTSET").decode()
    pads = given.get("pads")
    if mode == "NOTSET":
        pads = list(pads or [0] * 2 * axes)
    elif pads is not None and any(pads):
        return None
    elif mode == "VALID":
        pads = [0] * 2 * axes
    else:
        pads = _same(mode, kernel, strides, dilations, read_input_shape)
    if pads is None or len(pads) != 2 * axes or min(pads) < 0:
        return None
    return {"strides": strides, "pads": pads, "dilations": dilations, "group": group}


def pool_attributes(given: Mapping[str, Any], read_input_shape: Callable[[], Shape | None]) -> dict[str, Any] | None:
    """``kernel_shape``, ``strides`` and ``pads`` of a MaxPool; None where the fused op cannot be had.

    With ``ceil_mode`` it cannot: how many outputs there are depends on the version of onnxruntime.
    """
    kernel = list(given.get("kernel_shape", []))
    found = conv_attributes(given, (1, 1, *kernel), read_input_shape)
    if found is None or min(kernel) < 1 or max(found["dilations"]) > 1 or given.get("ceil_mode"):
        return None
    if any(pad >= size for pad, size in zip(found["pads"], kernel * 2, strict=True)):
        return None
    return {"kernel_shape": kernel, "strides": found["strides"], "pads": found["pads"]}


def _same(
    mode: str,
    kernel: tuple[int, ...],
    strides: list[int],
    dilations: list[int],
    read_input_shape: Callable[[], Shape | None],
) -> list[int] | None:
    """Pads with which an output has ``ceil(input / stride)`` positions."""
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        return None
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    if all(stride == 1 for stride in strides):
        totals = [size - 1 for size in reach]  # whatever the input's size
    else:
        shape = read_input_shape()
        if shape is None or len(shape) != len(kernel) + 2:
            return None
        totals = []
        for size, stride, span in zip(shape[2:], strides, reach, strict=True):
            if not isinstance(size, int):
                return None
            totals.append(max(0, (-(-size // stride) - 1) * stride + span - size))
    smaller = [total // 2 for total in totals]
    larger = [total - half for total, half in zip(totals, smaller, strict=True)]
    return [*smaller, *larger] if mode == "SAME_UPPER" else [*larger, *smaller]
