"""A size of the whole file is kept, never exceeded and hardly undershot; what cannot be is refused with what can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest

import vqonnx
from vqonnx import modelfile
from vqonnx.errors import OptionError
from vqonnx.fit import Limits, parse_size
from vqonnx.graph import find
from vqonnx.method import Method
from vqonnx.methods import PQ, Best, Entropy, Transform

MLP = nets.MLP


def images(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    whole = nets.images(count + seed)[seed:]
    return [{"image": whole[start : start + 64]} for start in range(0, count, 64)]


CALIBRATION = images(128)


def compressed(limits: Limits, method: Method | None = None, **options: Any) -> vqonnx.Result:
    return vqonnx.compress(MLP, method, calibration=CALIBRATION, limits=limits, **options)


@pytest.mark.parametrize("method", [Best(), Entropy()], ids=["best", "entropy"])
def test_the_file_is_never_larger_and_hardly_smaller(method: Method, tmp_path: Path) -> None:
    whole = MLP.stat().st_size
    for size in (whole // 14, whole // 8):
        result = compressed(Limits(size=size), method)
        saved = result.save(tmp_path / "small.onnx")
        assert 0.97 * size <= saved.bytes <= size, f"{method}: {saved.bytes} for {size}"
        assert saved.bytes == result.model.ByteSize()


def test_a_ratio_is_a_size(tmp_path: Path) -> None:
    saved = compressed(Limits(ratio=10)).save(tmp_path / "small.onnx")
    assert 10 <= MLP.stat().st_size / saved.bytes < 10.3


def test_the_smallest_file_that_loses_no_more() -> None:
    judged = images(128, seed=128)
    strict = compressed(Limits(drop=1.0, data=judged))
    loose = compressed(Limits(drop=20.0, data=judged))
    assert loose.model.ByteSize() < strict.model.ByteSize() < MLP.stat().st_size / 4


def test_more_bytes_are_better(tmp_path: Path) -> None:
    found = []
    for ratio in (16, 8):
        path = compressed(Limits(ratio=ratio)).save(tmp_path / f"{ratio}.onnx").path
        found.append(vqonnx.compare(MLP, path, images(128, seed=128)).snr_db)
    assert found[0] + 3 < found[1]


def test_the_cache_gives_the_same_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fresh = compressed(Limits(ratio=12), cache=cache).model.SerializeToString()
    kept = sorted(cache.iterdir())
    assert kept
    assert all(path.suffix == ".json" for path in kept)
    again = compressed(Limits(ratio=12), cache=cache).model.SerializeToString()
    parallel = compressed(Limits(ratio=12), jobs=2).model.SerializeToString()
    assert fresh == again == parallel
    assert sorted(cache.iterdir()) == kept


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing given; choose one of size, ratio and drop"),
        ({"size": 1000, "ratio": 2.0}, "size and ratio given; choose one"),
        ({"size": 0}, "size is 0; choose 1 or more"),
        ({"ratio": 0.5}, "ratio is 0.5; choose more than 1"),
        ({"drop": 0.0}, "drop is 0; choose more than 0"),
        ({"drop": 1.0}, "drop needs data"),
    ],
)
def test_bad_limits(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Limits(**values)


def test_a_size_that_is_not_possible_names_the_smallest() -> None:
    with pytest.raises(
        OptionError, match=r"a file of 1,000 bytes is not possible, the smallest has [\d,]+; choose"
    ) as e:
        compressed(Limits(size=1000))
    assert "\n" not in str(e.value)


def test_methods_without_a_choice_are_refused() -> None:
    with pytest.raises(OptionError, match="limits need calibration data and a method whose bits are shared"):
        vqonnx.compress(MLP, PQ(), limits=Limits(ratio=8))
    mixed = [vqonnx.Override("fc3*", Transform())]
    with pytest.raises(OptionError, match="one method whose bits are shared, not entropy, transform"):
        compressed(Limits(ratio=8), Entropy(), overrides=mixed)


@pytest.mark.parametrize(
    ("text", "size"), [("300KB", 300_000), ("1 KiB", 1024), ("0.5MiB", 524_288), ("12345", 12_345), ("2mb", 2_000_000)]
)
def test_sizes_as_users_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KB", "12XB", "1.2.3MB", "many", "infKB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="is not understood; write it like 300KB"):
        parse_size(text)


def test_few_calibration_rows_are_said_and_damped(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    few = images(64)
    for options in ({"limits": Limits(ratio=10)}, {}):
        caplog.clear()
        method = Best() if options else PQ()
        vqonnx.compress(MLP, method, calibration=few, **options).save(tmp_path / "small.onnx")
        said = [record.message for record in caplog.records if "calibration rows" in record.message]
        wide = [site.name for site in find(modelfile.load(MLP), MLP.parent).sites if site.view("ihw").cols > 64]
        assert said == [
            f"{name}: 64 calibration rows for {cols} columns, "
            "so its inputs are known in part and damped; more data help"
            for name, cols in zip(wide, (512, 256), strict=True)
        ]
