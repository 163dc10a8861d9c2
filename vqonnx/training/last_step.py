"""Distillation as the last step of a compression, kept only where it helps on images that it has not seen."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqonnx.errors import OptionError
from vqonnx.feeds import read_feeds
from vqonnx.fit import Limits, lost_by
from vqonnx.result import Result
from vqonnx.runtime import read_inputs
from vqonnx.training.distill import distill
from vqonnx.training.loop import Progress
from vqonnx.training.recipe import Recipe

# With rates relative to the size of each codebook, any network; biases would no longer be float16 in a compact file.
RECIPE = Recipe(layer_steps=0, optimiser="adam")
_HELD_OUT = 4  # one batch of so many is not trained on


@dataclass(frozen=True, eq=False)
class LastStep:
    """What distillation made of a compressed model.

    Attributes:
        result: The distilled model where it was kept, else the one before.
        loss_before: Loss on the batches held out.
        loss_after: The same, distilled.
        bytes_after: Size of the distilled file.
        kept: Whether it is the result.
    """

    result: Result
    loss_before: float
    loss_after: float
    bytes_after: int
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "bytes": self.bytes_after,
            "kept": self.kept,
        }

    def __str__(self) -> str:
        end = "kept" if self.kept else "not kept"
        losses = f"{self.loss_before:.4g} -> {self.loss_after:.4g}"
        return f"distilled: loss on inputs held out {losses}, {self.bytes_after:,} bytes; {end}"


def last_step(
    result: Result,
    data: Any,
    *,
    recipe: Recipe = RECIPE,
    batch: int = 16,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> LastStep:
    """Distil a result, and keep that if the loss falls on a quarter of the data, which is held out.

    Args:
        result: Of `vqonnx.compress`.
        data: Its calibration data; of an iterator nothing may be left, so give a path or a sequence.
        recipe: How.
        batch: Images that are run at once where the model leaves the number open.
        limits: What the file must keep to.
        progress: Called with (steps done, steps in all, "loss ...").

    Raises:
        OptionError: There are too few data to hold any out.
        VqonnxError: As `distill`.
    """
    feeds: Sequence[dict[str, Any]] = list(read_feeds(data, read_inputs(result.source), batch=batch))
    held = feeds[_HELD_OUT - 1 :: _HELD_OUT]
    if not held:
        raise OptionError(
            f"distillation holds out one of {_HELD_OUT} batches of calibration data, but there are {len(feeds)}; "
            "give more data, or a smaller batch"
        )
    trained = [feed for number, feed in enumerate(feeds) if number % _HELD_OUT != _HELD_OUT - 1]
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        result.save(before, verify=False)
        made = distill(result.source, before, trained, recipe, held_out=held, progress=progress)
        size = made.save(after, verify=False).bytes
        kept = made.loss_after < made.loss_before and not made.diverged and _keeps(result, after, size, limits)
    return LastStep(made.result if kept else result, made.loss_before, made.loss_after, size, kept)


def _keeps(result: Result, after: Path, size: int, limits: Limits | None) -> bool:
    """Whether the distilled file is within the limits, too."""
    if limits is None:
        return True
    if limits.drop is not None:
        return lost_by(result, after, limits) <= limits.drop
    largest = limits.bytes_of(result.bytes_before)
    return largest is None or size <= largest
