"""What a compressed model says of itself: bytes, method and error of each layer. Reads one file and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqonnx import modelfile
from vqonnx.breakdown import breakdown
from vqonnx.compact import restore
from vqonnx.errors import ModelError
from vqonnx.graph import Skipped
from vqonnx.record import LayerRecord, read_record
from vqonnx.stored import find_stored
from vqonnx.unfusion import split_layers


@dataclass(frozen=True)
class Report:
    """Sizes and layers.

    Attributes:
        bytes_before: Bytes on disk of the original; None if the model does not say.
        bytes_after: Bytes on disk of the compressed model.
        layers: Each compressed layer.
        skipped: Layers that were left alone, and why.
        parts: Bytes of each kind of content (`vqonnx.breakdown`).
        distilled: How the codebooks were distilled after compression; None if they were not.
    """

    bytes_before: int | None
    bytes_after: int
    layers: tuple[LayerRecord, ...]
    skipped: tuple[Skipped, ...]
    parts: dict[str, int]
    distilled: dict[str, Any] | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.bytes_before is None else self.bytes_before / self.bytes_after

    def to_json(self) -> dict[str, Any]:
        """The keys that other tools may rely on."""
        content = sizes_json(self.bytes_before, self.bytes_after, self.layers, self.skipped)
        content["parts"] = self.parts
        return content if self.distilled is None else {**content, "distilled": self.distilled}


def sizes_json(
    before: int | None, after: int, layers: Iterable[LayerRecord], skipped: Iterable[Skipped]
) -> dict[str, Any]:
    """What ``compress --json`` and ``report --json`` have in common."""
    return {
        "bytes": {"before": before, "after": after},
        "ratio": None if before is None else round(before / after, 4),
        "layers": [layer.to_json() for layer in layers],
        "skipped": [{"name": entry.name, "reason": entry.reason} for entry in skipped],
    }


def report(path: str | Path) -> Report:
    """Read a compressed model.

    Raises:
        ModelError: The file is not a model, or vqonnx did not compress it.
    """
    path = Path(path)
    model = modelfile.load(path)
    parts = breakdown(model)
    restore(model)
    record = read_record(model)
    fused = split_layers(model, path.parent)
    weights = find_stored(model, path.parent, record)
    if not weights:
        raise ModelError(f"{path}: holds no weight that vqonnx compressed; give a file that 'vqonnx compress' wrote")
    layers = []
    counted: set[str] = set()  # a codebook that several layers share counts with the first
    for weight in weights:
        method, op_type, weight_snr, output_snr = "unknown", "", None, None
        options: dict[str, Any] = {}
        if record is not None and weight.row is not None:
            method, options = record.methods[weight.row.method]
            op_type, weight_snr, output_snr = weight.row.op_type, weight.row.weight_snr_db, weight.row.output_snr_db
        layers.append(
            LayerRecord(
                name=weight.name,
                op_type=op_type,
                shape=weight.shape,
                method=method,
                options=options,
                bytes=weight.stored_bytes(counted),
                weight_snr_db=weight_snr,
                output_snr_db=output_snr,
                multiplications=weight.multiplications,
                factors=() if weight.row is None else weight.row.factors,
                fused=tuple(fused[name] for name in weight.tensors if name in fused),
            )
        )
    return Report(
        None if record is None else record.bytes_before,
        modelfile.file_bytes(path),
        tuple(layers),
        () if record is None else record.skipped,
        parts,
        None if record is None else record.distilled,
    )
