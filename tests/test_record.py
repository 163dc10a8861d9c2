"""The record in a model's metadata: what is written is read, and nothing else is touched."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto

from vqonnx.graph import Skipped
from vqonnx.record import (
    KEY,
    LayerRecord,
    Record,
    Row,
    erase_record,
    is_packed,
    read_record,
    store_record,
    write_record,
)

texts = st.text(max_size=12)
decibels = st.none() | st.floats(-300, 300)
layers = st.builds(
    LayerRecord,
    name=texts,
    op_type=st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]),
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    method=st.sampled_from(["kmeans", "pq"]),
    options=st.dictionaries(texts.filter(lambda key: key != "id"), st.none() | st.integers() | texts, max_size=3),
    bytes=st.integers(1, 10**9),
    weight_snr_db=decibels,
    output_snr_db=decibels,
    factors=st.just(()) | st.tuples(texts, texts),
)


@given(before=st.integers(0, 10**12), made=st.lists(layers), left=st.lists(st.builds(Skipped, texts, texts)))
def test_what_is_written_is_read(before: int, made: list[LayerRecord], left: list[Skipped]) -> None:
    model = ModelProto()
    model.metadata_props.add(key="author", value="somebody")
    write_record(model, 1, (), ())
    write_record(model, before, tuple(made), tuple(left))
    record = read_record(ModelProto.FromString(model.SerializeToString()))
    assert record is not None
    assert (record.bytes_before, record.skipped) == (before, tuple(left))
    assert len(record.methods) == len({json.dumps(method, sort_keys=True) for method in record.methods})
    for layer, row in zip(made, record.layers, strict=True):
        errors = layer.weight_snr_db, layer.output_snr_db
        assert row == Row(layer.name, row.method, layer.op_type, *errors, layer.factors)
        assert record.methods[row.method] == (layer.method, layer.options)
    assert [(entry.key, entry.value) for entry in model.metadata_props if entry.key != KEY] == [("author", "somebody")]
    erase_record(model)
    assert read_record(model) is None
    assert [entry.key for entry in model.metadata_props] == ["author"]


GOOD = {
    "version": 1,
    "bytes_before": 5,
    "methods": [{"id": "pq", "bits": 4}],
    "layers": [["w", 0, "Gemm", 1.5, None], ["u", 0, "Conv", None, None, "vq0", "vq1"]],
    "skipped": [["v", "excluded"]],
}


def test_the_metadata_are_as_documented() -> None:
    model = ModelProto()
    model.metadata_props.add(key=KEY, value=json.dumps(GOOD))
    rows = Row("w", 0, "Gemm", 1.5, None), Row("u", 0, "Conv", None, None, ("vq0", "vq1"))
    assert read_record(model) == Record(5, (("pq", {"bits": 4}),), rows, (Skipped("v", "excluded"),))
    whole = LayerRecord("w", "Gemm", (2, 2), "pq", {"bits": 4}, 7, 1.5, None)
    split = LayerRecord("u", "Conv", (2, 2, 1), "pq", {"bits": 4}, 7, None, None, 0.5, ("vq0", "vq1"))
    write_record(model, 5, (whole, split), (Skipped("v", "excluded"),))
    assert [json.loads(entry.value) for entry in model.metadata_props] == [GOOD]


@pytest.mark.parametrize(
    "value",
    [
        "",
        "not JSON",
        "[]",
        "null",
        json.dumps(GOOD | {"version": 2}),
        json.dumps({key: value for key, value in GOOD.items() if key != "methods"}),
        json.dumps(GOOD | {"layers": {"w": [0, "Gemm", None, None]}}),
        json.dumps(GOOD | {"layers": [["w", 1, "Gemm", None, None]]}),
        json.dumps(GOOD | {"layers": [["w", "0", "Gemm", None, None]]}),
        json.dumps(GOOD | {"layers": [["w", 0, "Gemm", None, None, "left"]]}),
        json.dumps(GOOD | {"methods": [3]}),
        json.dumps(GOOD | {"bytes_before": None}),
        json.dumps(GOOD | {"skipped": [["v"]]}),
    ],
)
def test_a_record_that_is_not_understood_is_none(value: str) -> None:
    model = ModelProto()
    model.metadata_props.add(key=KEY, value=value)
    assert read_record(model) is None


def test_bits_per_weight_count_every_stored_byte() -> None:
    layer = LayerRecord("w", "Conv", (4, 3, 3, 3), "pq", {}, 54, None, None)
    assert (layer.weights, layer.bits_per_weight) == (108, 4.0)
    assert layer.to_json()["bits_per_weight"] == 4.0


rows = st.builds(
    Row,
    name=texts,
    method=st.integers(0, 1),
    op_type=st.sampled_from(["Conv", "Gemm"]),
    weight_snr_db=decibels,
    output_snr_db=decibels,
)
names = st.sampled_from(["a", "b", "c", "_", "aa", "ab", "Z", "0", "long name"])
packed_rows = st.one_of(
    rows,
    st.builds(lambda row, name: replace(row, tensor="" if name == row.name else name), rows, names),
    st.builds(lambda row, *pair: replace(row, factors=pair), rows, names, names),
)


@given(before=st.integers(0, 10**12), made=st.lists(packed_rows), left=st.lists(st.builds(Skipped, texts, texts)))
def test_a_packed_record_says_the_same(before: int, made: list[Row], left: list[Skipped]) -> None:
    methods = (("pq", {"bits": 4}), ("kmeans", {"bits": 2, "order": "ihw"}))
    record = Record(before, methods, tuple(made), tuple(left), {"images": 3})
    model = ModelProto()
    store_record(model, record, packed=True)
    assert is_packed(model)
    assert read_record(ModelProto.FromString(model.SerializeToString())) == record


def test_a_packed_record_is_as_documented_for_ever() -> None:
    """The dictionary of deflate is part of the format: what was written once must be read."""
    model = ModelProto()
    store_record(
        model, Record(5, (("pq", {"bits": 4}),), (Row("w", 0, "Gemm", 1.5, None, tensor="a"),), ()), packed=True
    )
    (entry,) = model.metadata_props
    assert entry.value == "z!)K!@78?r+;pUs58C4Dr7$AlO9gtzDX9^9USTX_w00"
    rows = (Row("w", 0, "Gemm", 1.5, None, tensor="a"),)
    assert read_record(model) == Record(5, (("pq", {"bits": 4}),), rows, ())


@pytest.mark.parametrize("value", ["z", "z!!", "z" + "0" * 40, "zé"])
def test_a_damaged_packed_record_is_none(value: str) -> None:
    model = ModelProto()
    model.metadata_props.add(key=KEY, value=value)
    assert read_record(model) is None
