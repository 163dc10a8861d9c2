"""Fuse the layers of a file that is already written, or take them apart; the file is proven before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from vqonnx import modelfile
from vqonnx.compact import restore
from vqonnx.errors import DataError, ModelError, VerifyError
from vqonnx.fusion import fuse_layers
from vqonnx.generate import generate_feeds
from vqonnx.moments import ROUNDING, snr_db
from vqonnx.ops import DOMAIN
from vqonnx.record import KEY
from vqonnx.runtime import open_session, run
from vqonnx.unfusion import split_layers

# Least SNR of the new file against the old one. Without the library onnxruntime runs the same graph; with it, other
# kernels multiply the same weights in another order.
_ALONE_DB, _LIBRARY_DB = 80.0, 40.0


@dataclass(frozen=True)
class FusedFile:
    """A file that was written.

    Attributes:
        path: Where.
        bytes: Its size on disk, external data included.
        layers: Name of the fused op by name of the weight (of the output, for a MaxPool); those that were taken apart,
            if that was asked for.
    """

    path: Path
    bytes: int
    layers: Mapping[str, str]


def fuse(
    compressed: str | Path,
    output: str | Path,
    *,
    undo: bool = False,
    verify: bool = True,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> FusedFile:
    """Write a compressed model with its layers fused: one op for the codes, the layer, and what follows it.

    Args:
        compressed: Path of a model that `vqonnx.compress` wrote.
        output: Where to.
        undo: Take fused layers apart instead.
        verify: Run old and new file, with and without the library; False leaves that out.
        input_shapes: Shapes for the generated inputs on which the two are run.

    Raises:
        ModelError: The model cannot be read, or has no layer that can be fused (or taken apart).
        InputError: The output path is the input's, or cannot be written.
        OptionError: ``input_shapes`` does not fit the model.
        VerifyError: The new file does not run, or its outputs are others. No file is left.
    """
    path, output = Path(compressed), Path(output)
    modelfile.check_output(output, path)
    model = modelfile.load(path)
    restore(model)
    layers = split_layers(model, path.parent) if undo else fuse_layers(model, path.parent)
    if not layers:
        raise ModelError(f"{path}: {_why(model, undo)}")
    with modelfile.whole_or_nothing(output) as draft:
        modelfile.save(model, draft, path.parent)
        if verify:
            _verify(path, draft, model, input_shapes)
        size = modelfile.file_bytes(draft)
    return FusedFile(output, size, layers)


def _why(model: ModelProto, undo: bool) -> str:
    """Why there is nothing to do."""
    if undo:
        return "has no fused layer; there is nothing to undo"
    if any(node.domain == DOMAIN for node in model.graph.node):
        return "has no layer that can be fused (Conv of 1 or 2 axes, Gemm, MatMul in the main graph, in float32)"
    if any(entry.key == KEY for entry in model.metadata_props):
        return "its codes are read by standard operators (target portable), which cannot be fused"
    return "holds no weight that vqonnx compressed; there is nothing to fuse"


def _verify(before: Path, after: Path, model: ModelProto, shapes: Mapping[str, Sequence[int]] | None) -> None:
    alone = any(function.domain == DOMAIN for function in model.functions)  # whether it runs without the library
    (feed,) = generate_feeds(before, shapes=shapes, count=1, library=not alone)
    wanted = run(open_session(before, library=not alone), feed)
    for library, least in [(False, _ALONE_DB)] * alone + [(True, _LIBRARY_DB)]:
        how = f"{'with' if library else 'without'} the library"
        try:
            found = run(open_session(after, library=library), feed)
        except (ModelError, DataError) as error:
            raise VerifyError(f"the new file failed {how}, so it was not written: {error}") from error
        apart = _apart(wanted, found)
        if apart is not None and apart < least:
            raise VerifyError(
                f"the new file differs {how} by {apart:.1f} dB (at least {least:.0f} expected), so it was not written"
            )


def _apart(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> float | None:
    """SNR in dB of the worst output that is floating point; None if all are the same but for `ROUNDING`."""
    worst: float | None = None
    for name, one in wanted.items():
        other = found.get(name)
        if not isinstance(one, np.ndarray) or one.dtype.kind != "f":
            continue
        if not isinstance(other, np.ndarray) or other.shape != one.shape:
            raise VerifyError(f"the new file's output '{name}' has another shape, so it was not written")
        if not np.array_equal(np.isfinite(one), np.isfinite(other)):
            return float("-inf")
        a, b = (np.where(np.isfinite(values), values, 0).astype(np.float64) for values in (one, other))
        if np.abs(a - b).max(initial=0) <= ROUNDING:
            continue
        apart = snr_db(float(np.sum(a**2)), float(np.sum((a - b) ** 2)))
        worst = apart if worst is None else min(worst, worst if apart is None else apart)
    return worst
