"""What is known of a compressed model and its layers; kept inside the model as JSON (docs/format.md, Metadata)."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from onnx import ModelProto

from vqonnx.graph import Skipped
from vqonnx.modelfile import remove_entries
from vqonnx.names import short_names

KEY = "vqonnx"
RECORD_VERSION = 1
PACKED_VERSION = 2
_PACKED = "z"  # what a packed record begins with; no JSON object does
# What deflate may refer to before it has seen anything. Part of the format: it never changes.
_DICTIONARY = (
    b'"too small:  bytes as it is,  with codes, codebook and node"depthwise convolution ( groups of one channel)"'
    b'"is not among the operators asked for""not included""excluded"],"distilled":{"images":"order":"hwi","along":'
    b'"inputs","books":"one","group","width":"stages":"float32","scales":"row"pqresidualbinarysvdtransformdqcbgdbest'
    b'["MatMul","ConvTranspose","Gemm","Gemm","Conv","Conv","Conv"],[0,0,0,0,0],[null,null,null,null,null],"tensors":[['
    b'0,"a"]],"pairs":[],"skipped":[[],[]]}{"version":2,"bytes_before":1,"methods":[{"id":"kmeans","order":"ihw","bits":2,'
    b'"codebook":"float16"}],"layers":[["'
)


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
        fused: Fused ops that run it: one, or one for each of two layers; those left as ``Decode`` are left out.
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
    fused: tuple[str, ...] = ()

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
            "fused": list(self.fused),
        }


@dataclass(frozen=True)
class Row:
    """What the metadata say of one layer; the names mean the same as in `LayerRecord`.

    Attributes:
        name: Name of the weight; layers in different subgraphs may share one, and then follow in their order.
        method: Index into the record's ``methods``.
        tensor: Name of the weight in the file, where that is another (`vqonnx.compact`); empty otherwise.
    """

    name: str
    method: int
    op_type: str
    weight_snr_db: float | None
    output_snr_db: float | None
    factors: tuple[str, ...] = ()
    tensor: str = ""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names that the tensors of the layer have in the file: one, or two where it is run as two."""
        return self.factors or (self.tensor or self.name,)


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
    methods: list[tuple[str, dict[str, Any]]] = []
    rows = []
    for layer in layers:
        method = layer.method, layer.options
        if method not in methods:
            methods.append(method)
        errors = layer.weight_snr_db, layer.output_snr_db
        rows.append(Row(layer.name, methods.index(method), layer.op_type, *errors, layer.factors))
    store_record(model, Record(bytes_before, tuple(methods), tuple(rows), skipped, distilled, permuted))


def store_record(model: ModelProto, record: Record, *, packed: bool = False) -> None:
    """Keep a record in the model's metadata; ``packed`` takes fewer bytes, and is the only way to keep `Row.tensor`."""
    content: dict[str, Any] = {
        "version": PACKED_VERSION if packed else RECORD_VERSION,
        "bytes_before": record.bytes_before,
        "methods": [{"id": name, **options} for name, options in record.methods],
    }
    heads = [[row.name, row.method, row.op_type, row.weight_snr_db, row.output_snr_db] for row in record.layers]
    skipped = [[entry.name, entry.reason] for entry in record.skipped]
    if packed:
        content["layers"] = _turned(heads, 5)
        content["tensors"] = list(_starts([name for row in record.layers for name in row.tensors]))
        content["pairs"] = [number for number, row in enumerate(record.layers) if row.factors]
        content["skipped"] = _turned(skipped, 2)
    else:
        content["layers"] = [[*head, *row.factors] for head, row in zip(heads, record.layers, strict=True)]
        content["skipped"] = skipped
    if record.distilled is not None:
        content["distilled"] = record.distilled
    if record.permuted:
        content["permuted"] = record.permuted
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    erase_record(model)
    model.metadata_props.add(key=KEY, value=_pack(text) if packed else text)


def read_record(model: ModelProto) -> Record | None:
    """The record in the model's metadata; None if there is none that this version understands."""
    for entry in model.metadata_props:
        if entry.key != KEY:
            continue
        try:
            content = json.loads(_unpack(entry.value) if entry.value[:1] == _PACKED else entry.value)
            readers = {RECORD_VERSION: _rows, PACKED_VERSION: _packed_rows}
            if content["version"] not in readers:
                return None
            methods = tuple((method.pop("id"), method) for method in content["methods"])
            skipped = content["skipped"]
            if content["version"] == PACKED_VERSION:
                skipped = zip(*skipped, strict=True)
            return Record(
                int(content["bytes_before"]),
                methods,
                tuple(readers[content["version"]](content, len(methods))),
                tuple(Skipped(*each) for each in skipped),
                content.get("distilled"),
                int(content.get("permuted", 0)),
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, zlib.error):
            return None
    return None


def is_packed(model: ModelProto) -> bool:
    """Whether the record is kept in the way that takes fewer bytes, as `vqonnx.compact` writes it."""
    return any(entry.key == KEY and entry.value[:1] == _PACKED for entry in model.metadata_props)


def _rows(content: dict[str, Any], methods: int) -> Iterator[Row]:
    for name, number, op_type, weight_snr_db, output_snr_db, *factors in content["layers"]:
        if len(factors) not in (0, 2):
            raise ValueError(f"{len(factors)} factors")
        yield Row(name, range(methods)[number], op_type, weight_snr_db, output_snr_db, tuple(factors))


def _packed_rows(content: dict[str, Any], methods: int) -> Iterator[Row]:
    columns = list(zip(*content["layers"], strict=True))
    pairs = set(content["pairs"])
    tensors = _names(content["tensors"], len(columns) + len(pairs))
    for place, (name, number, op_type, weight_snr_db, output_snr_db) in enumerate(columns):
        own = tuple(islice(tensors, 2 if place in pairs else 1))
        row = Row(name, range(methods)[number], op_type, weight_snr_db, output_snr_db)
        yield replace(row, factors=own) if place in pairs else replace(row, tensor="" if own == (name,) else own[0])


def _turned(rows: list[list[Any]], width: int) -> list[list[Any]]:
    """Columns of rows, which deflate to fewer bytes."""
    return [[row[column] for row in rows] for column in range(width)]


def _starts(names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Names, without those that are just the next short name after the one before: places and names."""
    for place, name in enumerate(names):
        if not place or name != next(_after(names[place - 1]), None):
            yield place, name


def _names(starts: list[list[Any]], count: int) -> Iterator[str]:
    """All the names that `_starts` gives some of."""
    ends = [place for place, _ in starts[1:]] + [count]
    for (place, name), end in zip(starts, ends, strict=True):
        yield name
        yield from islice(_after(name), end - place - 1)


def _after(name: str) -> Iterator[str]:
    """The short names that follow one; none if it is no short name."""
    return short_names(set(), after=name)


def _pack(text: str) -> str:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=_DICTIONARY)
    return _PACKED + base64.b85encode(packer.compress(text.encode()) + packer.flush()).decode()


def _unpack(value: str) -> str:
    data = base64.b85decode(value[len(_PACKED) :])
    return zlib.decompressobj(-zlib.MAX_WBITS, zdict=_DICTIONARY).decompress(data).decode()


def erase_record(model: ModelProto) -> None:
    """Remove the record, so that the metadata are those of the original."""
    remove_entries(model.metadata_props, lambda entry: entry.key == KEY)
