"""Where PyTorch computes, and how arrays get there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqonnx.errors import OptionError


def check_device(device: str) -> None:
    """Refuse a device that PyTorch does not have.

    Raises:
        OptionError: It does not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device '{device}': {str(error).splitlines()[0]}; choose cpu") from error


def as_tensor(value: NDArray[Any], device: str | torch.device = "cpu") -> Tensor:
    """An input as a tensor, images with their channels last."""
    tensor = torch.from_numpy(np.ascontiguousarray(value)).to(device)
    # So PyTorch's convolutions on a CPU are 1.3 to 2 times faster.
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
