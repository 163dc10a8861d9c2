"""What is known of a compressed model and its layers; kept inside the model as JSON (docs/format.md, Metadata)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto

from vqonnx.graph import Skipped
from vqonnx.modelfile import remove_entries

KEY = "vqonnx"
RECORD_VERSION = 1


@dataclass(frozen=True)
class LayerRecord:
    """How one layer was compressed.

    Attributes:
        name: Name of the weight.
        op_type: Operator of the first layer that reads it.
        shape: Shape of the weight.
        method: Id of the method.
        options: Its options.
        bytes: Codes, codebooks and scales as stored; those that a layer before has too count there.
        weight_snr_db: Energy of the weight over that of its error; None if there is no error, or it was imported.
        output_snr_db: The same for the layer's output on the calibration data; None if it was not observed.
        multiplications: Part of the layer's multiplications that is left; 1 unless it is run as two.
        factors: Names of the weights of the two layers that it is run as; none if it is run as one.
    """

    name: str
    op_type: str
    shape: tuple[int, ...]
    method: str
    options: dict[str, Any]
    bytes: int
    weight_snr_db: float | None
    output_snr_db: float | None
    multiplications: float = 1.0
    factors: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, codebooks and scales included."""
        return 8 * self.bytes / self.weights

    def to_json(self) -> dict[str, Any]:
        """The keys that other tools may rely on."""
        return {
            "name": self.name,
            "op_type": self.op_type,
            "shape": list(self.shape),
            "method": self.method,
            "options": self.options,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "bytes": self.bytes,
            "weight_snr_db": self.weight_snr_db,
            "output_snr_db": self.output_snr_db,
            "multiplications": round(self.multiplications, 4),
        }


@dataclass(frozen=True)
class Row:
    """What the metadata say of one layer; the names mean the same as in `LayerRecord`.

    Attributes:
        name: Name of the weight; layers in different subgraphs may share one, and then follow in their order.
        method: Index into the record's ``methods``.
    """

    name: str
    method: int
    op_type: str
    weight_snr_db: float | None
    output_snr_db: float | None
    factors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """What the metadata of a compressed model say.

    Attributes:
        bytes_before: Bytes on disk of the original.
        methods: Distinct (id, options) in use.
        layers: Compressed layers, in order.
        skipped: Layers that were left alone.
        distilled: How the codebooks were distilled afterwards; None if they were not.
        permuted: Groups of channels whose order is not the original's.
    """

    bytes_before: int
    methods: tuple[tuple[str, dict[str, Any]], ...]
    layers: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    distilled: dict[str, Any] | None = None
    permuted: int = 0


def write_record(
    model: ModelProto,
    bytes_before: int,
    layers: tuple[LayerRecord, ...],
    skipped: tuple[Skipped, ...],
    *,
    distilled: dict[str, Any] | None = None,
    permuted: int = 0,
) -> None:
    """Keep the record in the model's metadata, in few bytes."""
    methods: list[dict[str, Any]] = []
    rows = []
    for layer in layers:
        method = {"id": layer.method, **layer.options}
        if method not in methods:
            methods.append(method)
        number = methods.index(method)
        rows.append([layer.name, number, layer.op_type, layer.weight_snr_db, layer.output_snr_db, *layer.factors])
    content: dict[str, Any] = {
        "version": RECORD_VERSION,
        "bytes_before": bytes_before,
        "methods": methods,
        "layers": rows,
        "skipped": [[entry.name, entry.reason] for entry in skipped],
    }
    if distilled is not None:
        content["distilled"] = distilled
    if permuted:
        content["permuted"] = permuted
    erase_record(model)
    model.metadata_props.add(key=KEY, value=json.dumps(content, separators=(",", ":"), ensure_ascii=False))


def read_record(model: ModelProto) -> Record | None:
    """The record in the model's metadata; None if there is none that this version understands."""
    for entry in model.metadata_props:
        if entry.key != KEY:
            continue
        try:
            content = json.loads(entry.value)
            if content["version"] != RECORD_VERSION:
                return None
            methods = tuple((method.pop("id"), method) for method in content["methods"])
            return Record(
                int(content["bytes_before"]),
                methods,
                tuple(_row(entry, len(methods)) for entry in content["layers"]),
                tuple(Skipped(*entry) for entry in content["skipped"]),
                content.get("distilled"),
                int(content.get("permuted", 0)),
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None
    return None


def _row(entry: list[Any], methods: int) -> Row:
    name, number, op_type, weight_snr_db, output_snr_db, *factors = entry
    if len(factors) not in (0, 2):
        raise ValueError(f"{len(factors)} factors")
    return Row(name, range(methods)[number], op_type, weight_snr_db, output_snr_db, tuple(factors))


def erase_record(model: ModelProto) -> None:
    """Remove the record, so that the metadata are those of the original."""
    remove_entries(model.metadata_props, lambda entry: entry.key == KEY)
