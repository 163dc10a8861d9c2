"""The power-of-two quantiser of dynamic quantisation coding as a step of PyTorch, with the two gradient rules.

Rao et al. 2019, Acta Automatica Sinica 45(10), 1960-1968; formulas in `vqonnx.methods.dqc`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Rule = Literal["magnitude", "identity"]
_LOWEST = -126


def quantise(weight: Tensor, bits: int, *, zero: bool, rule: Rule) -> Tensor:
    """Every weight as plus or minus a power of two; the codebook follows the largest weight of the moment.

    Args:
        weight: float32, any shape.
        bits: Bits of a code.
        zero: Zero is one of the codes.
        rule: Gradient: times the magnitude of the code (``magnitude``, the authors' rule, with which a weight at zero
            stays there until the codebook moves), or as it is (``identity``).
    """
    quantised: Tensor = _Power.apply(weight, bits, zero, rule)  # type: ignore[no-untyped-call]
    return quantised


class _Power(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, zero: bool, rule: Rule) -> Tensor:
        count = 2 ** (bits - 1) - zero
        size = weight.abs()
        top = torch.frexp(size.max())[1] - 1
        lowest = torch.clamp(top - count + 1, min=_LOWEST)
        # 4|w|/3 is exact enough in float64 that the bounds 3/4 * 2**k fall on the right side, as in numpy.
        exponents = torch.frexp(4 * size.double() / 3)[1] - 1
        magnitude = torch.ldexp(torch.ones_like(size), torch.minimum(torch.maximum(exponents, lowest), top))
        below = size == 0 if not zero else (exponents < lowest) | (size == 0)
        if zero:
            magnitude = torch.where(below, torch.zeros_like(magnitude), magnitude)
        else:
            magnitude = torch.where(below, torch.ldexp(torch.ones_like(size), lowest), magnitude)
        ctx.rule = rule
        if rule == "magnitude":
            ctx.save_for_backward(magnitude)
        return torch.where(weight < 0, -magnitude, magnitude)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.rule == "magnitude":
            (magnitude,) = ctx.saved_tensors
            return gradients[0] * magnitude, None, None, None
        return gradients[0], None, None, None
