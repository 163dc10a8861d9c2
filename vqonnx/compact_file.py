"""Make a compressed file compact, and prove that it computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqonnx import modelfile
from vqonnx.breakdown import breakdown
from vqonnx.compact import compact, restore
from vqonnx.errors import DataError, ModelError, VerifyError, VqonnxError
from vqonnx.generate import generate_feeds
from vqonnx.moments import ROUNDING, snr_db
from vqonnx.ops import DOMAIN
from vqonnx.record import read_record
from vqonnx.runtime import get_library_path, open_session, run
from vqonnx.stored import find_stored
from vqonnx.unfusion import split_layers

# With the library onnxruntime knows shapes of values only where the file says them, and compact files do not: it may
# fuse other operators, which compute the same in another order.
_LIBRARY_DB = 80.0
_FUSED_DB = 40.0  # layers of fused ops are computed by other kernels


@dataclass(frozen=True)
class Compacted:
    """A file that was made compact.

    Attributes:
        path: Where it is.
        bytes_before: Bytes on disk of the file that it was made from.
        bytes: Its own.
        parts_before: Bytes of each kind of content before (`vqonnx.breakdown`).
        parts: The same after.
    """

    path: Path
    bytes_before: int
    bytes: int
    parts_before: dict[str, int]
    parts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The keys that other tools may rely on."""
        return {
            "bytes": {"before": self.bytes_before, "after": self.bytes},
            "parts": {"before": self.parts_before, "after": self.parts},
        }


def compact_file(
    source: str | Path,
    path: str | Path,
    *,
    verify: bool = True,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Compacted:
    """Write a compressed model with everything but its weights as small as it gets.

    Args:
        source: Path of a model that `compress` wrote.
        path: Where to; the file appears whole or not at all.
        verify: Run both on generated inputs. Outputs must be the same bit for bit without the library, and to the last
            bits of float32 with it.
        input_shapes: Shapes for those inputs.

    Raises:
        ModelError: The model cannot be read, or vqonnx did not compress it.
        InputError: The output path is the input's, or cannot be written.
        VerifyError: The new file does not compute the same. No file is left.
    """
    source, path = Path(source), Path(path)
    modelfile.check_output(path, source)
    model = modelfile.load(source)
    if read_record(model) is None and not find_stored(model, source.parent, None):
        raise ModelError(f"{source}: holds no weight that vqonnx compressed; give a file that 'vqonnx compress' wrote")
    before = breakdown(model)
    restore(model)
    fused = bool(split_layers(model, source.parent))
    compact(model, source.parent)
    after = breakdown(model)
    with modelfile.whole_or_nothing(path) as draft:
        modelfile.save(model, draft, source.parent)
        if verify:
            called = any(entry.domain == DOMAIN for entry in model.opset_import)
            alone = not called or any(function.domain == DOMAIN for function in model.functions)
            _check_same(source, draft, input_shapes, alone=alone, least=_FUSED_DB if fused else _LIBRARY_DB)
        size = modelfile.file_bytes(draft)
    return Compacted(path, modelfile.file_bytes(source), size, before, after)


def _check_same(
    source: Path, draft: Path, shapes: Mapping[str, Sequence[int]] | None, *, alone: bool, least: float
) -> None:
    """Run both; ``alone``: they run without the library; ``least``: how close they must be with it, in dB."""
    feeds = generate_feeds(source, shapes=shapes, library=not alone)
    ways = [False] if alone else []
    try:
        get_library_path()
        ways.append(True)
    except VqonnxError:
        if not alone:
            raise
    for library in ways:
        how = "with the library" if library else "without the library"
        try:
            before, after = (open_session(model, library=library, threads=1) for model in (source, draft))
            results = [(run(before, feed), run(after, feed)) for feed in feeds]
        except (ModelError, DataError) as error:
            raise VerifyError(f"the compact model failed {how}, so it was not written: {error}") from error
        for one, other in results:
            for name, value in one.items():
                apart = _apart(value, other.get(name))
                if apart is not None and (not library or apart < least):
                    raise VerifyError(
                        f"{draft.name}: output '{name}' differs {how} ({apart:.1f} dB), so it was not written"
                    )


def _apart(one: Any, other: Any) -> float | None:
    """SNR in dB of two values of an output; None if they are equal to the bit."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.dtype.kind != "f" or one.dtype != other.dtype or one.shape != other.shape:
            return None if np.array_equal(one, other) else -np.inf
        if one.tobytes() == other.tobytes():
            return None
        a, b = one.astype(np.float64), other.astype(np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return -np.inf
        if np.abs(np.nan_to_num(a - b)).max(initial=0) <= ROUNDING:
            return np.inf
        return -np.inf if not np.any(a) else snr_db(float(np.nansum(a**2)), float(np.nansum((a - b) ** 2)))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = [apart for apart in map(_apart, one, other) if apart is not None]
        return min(found, default=None)
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return _apart(list(one.values()), list(other.values()))
    return None if type(one) is type(other) and one == other else -np.inf
