"""A compressed model in memory, and how it becomes a file: written, loaded, run, and only then named."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from vqonnx import modelfile
from vqonnx.errors import OptionError, VerifyError, VqonnxError
from vqonnx.graph import Skipped
from vqonnx.moments import snr_db
from vqonnx.place import Target
from vqonnx.record import LayerRecord
from vqonnx.runtime import get_library_path, open_session
from vqonnx.verify import Comparison, compare

# With and without the library the same weights are multiplied, only in another order.
_LIBRARY_SNR_DB = 40.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Result:
    """A compressed model.

    Attributes:
        model: The ONNX model.
        layers: How each layer was compressed.
        skipped: Layers that were left alone, and why.
        target: What it was written for.
        source: Path of the original.
        bytes_before: Bytes on disk of the original.
        check_feeds: Inputs on which the written file is run: the first calibration batches, or generated ones.
    """

    model: ModelProto
    layers: tuple[LayerRecord, ...]
    skipped: tuple[Skipped, ...]
    target: Target
    source: Path
    bytes_before: int
    check_feeds: Sequence[Mapping[str, Any]] = field(repr=False)

    def save(
        self,
        path: str | Path,
        *,
        verify: bool = True,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> Saved:
        """Write the model, load and run it with and without the library, and only then give it its name.

        Args:
            path: Where to.
            verify: False leaves out loading and running.
            rtol: Refuse the file if an output differs from the original's by more than ``atol + rtol * |original|``.
            atol: The same.

        Raises:
            InputError: The path is the original's, or cannot be written.
            OptionError: ``rtol`` or ``atol`` is not finite.
            VerifyError: The written model does not load, does not run or differs too much. No file is left.
        """
        path = Path(path)
        modelfile.check_output(path, self.source)
        with modelfile.whole_or_nothing(path) as draft:
            modelfile.save(self.model, draft, self.source.parent)
            comparison = self._verify(draft, rtol, atol) if verify else None
            size = modelfile.file_bytes(draft)
        return Saved(path, size, comparison)

    def _verify(self, draft: Path, rtol: float | None, atol: float | None) -> Comparison:
        comparison: Comparison | None = None
        if self.target != "custom":
            comparison = self._compare(self.source, draft, "without the library", False, rtol, atol)
        if self.target == "portable":
            assert comparison is not None
            return comparison
        try:
            get_library_path()
        except VqonnxError as error:
            if comparison is None:
                raise
            _log.warning("not checked with the custom-op library: %s", error)
            return comparison
        with_library = self._compare(self.source, draft, "with the library", True, rtol, atol)
        if comparison is not None:
            apart = self._apart(draft)
            if apart is not None and apart < _LIBRARY_SNR_DB:
                raise VerifyError(
                    f"{draft.name}: with and without the library the outputs differ by {apart:.1f} dB "
                    f"(at least {_LIBRARY_SNR_DB:.0f} expected); please report this"
                )
        return comparison or with_library

    def _compare(
        self, original: Path, draft: Path, how: str, library: bool, rtol: float | None, atol: float | None
    ) -> Comparison:
        try:
            comparison = compare(original, draft, self.check_feeds, library=library, rtol=rtol, atol=atol)
        except OptionError:  # a bound that is not a number says nothing about the model
            raise
        except VqonnxError as error:
            raise VerifyError(f"the compressed model failed {how}, so it was not written: {error}") from error
        if not comparison.passed:
            failed = "; ".join(f"{c.name}: {c.value:g} (limit {c.limit:g})" for c in comparison.checks if not c.passed)
            raise VerifyError(f"the compressed model failed {how}, so it was not written: {failed}")
        return comparison

    def _apart(self, draft: Path) -> float | None:
        """SNR in dB of the model with the library against itself without, on the first batch."""
        plain, fused = open_session(draft), open_session(draft, library=True)
        feed = dict(self.check_feeds[0])
        signal = noise = 0.0
        for a, b in zip(plain.run(None, feed), fused.run(None, feed), strict=True):
            if isinstance(a, np.ndarray) and a.dtype.kind == "f":
                signal += float(np.nansum(a.astype(np.float64) ** 2))
                noise += float(np.nansum((a.astype(np.float64) - b.astype(np.float64)) ** 2))
        return snr_db(signal, noise)


@dataclass(frozen=True)
class Saved:
    """A file that was written.

    Attributes:
        path: Where.
        bytes: Its size on disk, external data included.
        comparison: How it compares with the original on the calibration data or generated inputs; None if not verified.
    """

    path: Path
    bytes: int
    comparison: Comparison | None
