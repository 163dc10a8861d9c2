"""A size of the whole file is kept, never exceeded and hardly undershot; what cannot be is refused with what can."""

from __future__ import annotations

import tempfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cases
import nets
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vqonnx
from vqonnx import menu, modelfile
from vqonnx.allocate import Sharing
from vqonnx.errors import DataError, OptionError, VqonnxError
from vqonnx.fit import Limits, fit, parse_size
from vqonnx.graph import find
from vqonnx.method import Method
from vqonnx.methods import BGD, PQ, Best, Entropy, Transform

MLP = nets.MLP


def images(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    whole = nets.images(count + seed)[seed:]
    return [{"image": whole[start : start + 64]} for start in range(0, count, 64)]


CALIBRATION = images(128)


KEPT = tempfile.TemporaryDirectory()  # what layers can do at which size, for all tests of this file


def compressed(limits: Limits, method: Method | None = None, **options: Any) -> vqonnx.Result:
    return vqonnx.compress(MLP, method, calibration=CALIBRATION, limits=limits, **{"cache": KEPT.name, **options})


@pytest.mark.parametrize("method", [Best(), Entropy()], ids=["best", "entropy"])
def test_the_file_is_never_larger_and_hardly_smaller(method: Method, tmp_path: Path) -> None:
    whole = MLP.stat().st_size
    for size in (whole // 14, whole // 8):
        result = compressed(Limits(size=size), method)
        saved = result.save(tmp_path / "small.onnx")
        least = 0.97 if isinstance(method, Entropy) else 0.92  # of three layers, with codes of whole bits
        assert least * size <= saved.bytes <= size, f"{method}: {saved.bytes} for {size}"
        assert saved.bytes == result.model.ByteSize()


def test_a_ratio_is_a_size(tmp_path: Path) -> None:
    saved = compressed(Limits(ratio=10)).save(tmp_path / "small.onnx")
    assert 10 <= MLP.stat().st_size / saved.bytes < 10.8


def test_the_smallest_file_that_loses_no_more() -> None:
    judged = images(128, seed=128)
    strict = compressed(Limits(drop=1.0, data=judged))
    loose = compressed(Limits(drop=20.0, data=judged))
    assert loose.model.ByteSize() < strict.model.ByteSize() < MLP.stat().st_size / 4


def test_a_drop_is_judged_with_the_library_where_the_file_needs_it() -> None:
    result = compressed(Limits(drop=20.0, data=images(128, seed=128)), target="custom")
    assert result.model.ByteSize() < MLP.stat().st_size / 4


def test_labels_of_what_is_no_classifier_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"v": rng.normal(size=(32, 64)), "w": rng.normal(size=(64, 1))}
    model = cases.parse(
        "(float[N, 32] x) => (float[N, 1] y) { h = MatMul (x, v)  r = Relu (h)  l = MatMul (r, w)  y = Sigmoid (l) }",
        **{name: values.astype(np.float32) for name, values in weights.items()},
    )
    path = nets.write(model, tmp_path / "binary.onnx")
    data = [{"x": rng.normal(size=(64, 32)).astype(np.float32)}]
    with pytest.raises(OptionError, match="labels are for a classifier"):
        vqonnx.compress(path, calibration=data, limits=Limits(drop=5.0, data=data, labels=np.zeros(64, int)))


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


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fresh = compressed(Limits(ratio=12), cache=cache).model.SerializeToString()
    kept = {path: path.read_bytes() for path in sorted(cache.iterdir())}
    damages = [b"", b"[[", b"\xff", b"[1]", b'[["nobody", {}, 1, 1]]', b'[["entropy", 3, 1, 1]]', b"{}3"]
    damages += [b"{}", b'[["entropy", {}, NaN, 1]]', b'[["entropy", {}, 1, Infinity]]', b"[" * 100_000]
    for path, damage in zip(kept, damages, strict=False):
        path.write_bytes(damage)
    assert compressed(Limits(ratio=12), cache=cache).model.SerializeToString() == fresh
    assert {path: path.read_bytes() for path in sorted(cache.iterdir())} == kept
    file = tmp_path / "file.json"
    for damage in damages:
        file.write_bytes(damage)
        assert menu._load(file) is None, damage
    with pytest.raises(OptionError, match=r"file\.json: cannot be the folder of a cache \(File exists\); choose"):
        compressed(Limits(ratio=12), cache=file)


def test_a_process_that_was_killed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise BrokenProcessPool("a worker process was terminated")

    monkeypatch.setattr(menu, "Parallel", lambda **_: killed)
    with pytest.raises(VqonnxError, match=r"a process that tried layers was killed, .*; choose fewer jobs"):
        compressed(Limits(ratio=12))


def test_external_data_of_what_is_left_alone_count(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(onnx.load(MLP), source, save_as_external_data=True, location="weights.bin", size_threshold=64)
    options: dict[str, Any] = {"calibration": CALIBRATION, "exclude": ["fc1.weight"]}
    result = vqonnx.compress(source, limits=Limits(size=200_000), **options)
    saved = result.save(tmp_path / "small.onnx")
    assert 190_000 <= saved.bytes == result.model.ByteSize() <= 200_000
    with pytest.raises(OptionError, match="a file of 130,000 bytes is not possible"):  # that weight has 131,072
        vqonnx.compress(source, limits=Limits(size=130_000), **options)


def test_data_for_the_drop_are_looked_at_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(menu, "Parallel", None)
    with pytest.raises(DataError, match=r"nowhere\.npz: there is no such file or folder"):
        compressed(Limits(drop=1.0, data="nowhere.npz"))
    with pytest.raises(OptionError, match="the data for drop are read many times; give a path, a list or arrays"):
        compressed(Limits(drop=1.0, data=iter(images(64))))


def test_what_is_not_possible_was_tried() -> None:
    """Files that stay too large although the layers get less and less, until they get the least there is."""
    sharing = cast(Sharing, SimpleNamespace(least=1000.0, most=1e6))
    small, large = vqonnx.compress(MLP, PQ(bits=4)), vqonnx.compress(MLP, PQ(bits=8))
    wanted = large.model.ByteSize() - 1000
    tried: list[float | None] = []

    def attempt(limit: float | None) -> vqonnx.Result:
        tried.append(limit)
        return small if limit == sharing.least else large

    assert fit(attempt, Limits(size=wanted), large.bytes_before, sharing) is small
    assert len(tried) == 10
    with pytest.raises(OptionError, match=f"not possible, the smallest has {small.model.ByteSize():,}; choose"):
        fit(attempt, Limits(size=small.model.ByteSize() - 1), large.bytes_before, sharing)


@given(
    slope=st.floats(0.6, 6.0),
    bent=st.floats(0.0, 0.12),
    step=st.floats(0.0001, 0.012),
    unsteady=st.floats(0.0, 0.004),
    share=st.floats(0.1, 0.9),
)
@settings(max_examples=200, deadline=None)
def test_a_size_is_met_where_layers_have_one(
    slope: float, bent: float, step: float, unsteady: float, share: float
) -> None:
    """Whatever a file takes for a byte of its layers, if it grows in small steps and is not quite steady."""
    sharing = cast(Sharing, SimpleNamespace(least=1e4, most=1e5))
    whole = 2000 + slope * 1e5 * (1 + bent)

    def file_of(budget: float | None) -> int:
        assert budget is not None
        assert sharing.least <= budget <= sharing.most
        smooth = 2000 + slope * budget * (1 + bent * np.sin(budget / 1.6e4))
        stairs = np.exp(step * np.floor(np.log(smooth) / step))
        return int(stairs * (1 + unsteady * np.sin(budget)))

    wanted = int(share * whole + (1 - share) * file_of(sharing.least) * 1.05)
    made = cast(Any, lambda budget: SimpleNamespace(size=file_of(budget)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqonnx.fit, "_bytes", lambda result: result.size)
        found = cast(Any, fit(made, Limits(size=wanted), 10**6, sharing))
    assert found.size <= wanted
    assert found.size >= 0.98 * wanted or found.size == file_of(sharing.most)


def test_bytes_that_layers_have_no_use_for_are_not_tried_one_by_one() -> None:
    """One large layer whose offers lie far apart: many budgets make the same file."""
    sharing = cast(Sharing, SimpleNamespace(least=12_000.0, most=132_000.0))
    offers = np.array([12_000, 20_000, 35_000, 58_000, 66_000, 132_000])
    tried: list[float] = []

    def attempt(budget: float | None) -> Any:
        assert budget is not None
        tried.append(budget)
        return SimpleNamespace(size=130_000 + int(offers[offers <= budget][-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqonnx.fit, "_bytes", lambda result: result.size)
        found = cast(Any, fit(attempt, Limits(size=195_500), 10**6, sharing, 80_000))
    assert found.size == 188_000
    assert len(tried) <= 9, tried


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
        method = Best() if options else BGD()
        vqonnx.compress(MLP, method, calibration=few, **options).save(tmp_path / "small.onnx")
        said = [record.message for record in caplog.records if "calibration rows" in record.message]
        wide = [site.name for site in find(modelfile.load(MLP), MLP.parent).sites if site.view("ihw").cols > 64]
        assert said == [
            f"{wide[0]} and 1 more layer: at worst 64 calibration rows for 512 columns, "
            "so inputs are known in part and damped; more data help"
        ]
    caplog.clear()
    vqonnx.compress(MLP, PQ(), calibration=few)  # does not look at them
    assert not caplog.records


def test_by_default_small_models_get_the_bits_that_they_need(tmp_path: Path) -> None:
    source = nets.write(nets.mixed(), tmp_path / "mixed.onnx")
    feeds = [{"x": np.random.default_rng(0).random((20, 4, 8, 8), np.float32)}]
    assert vqonnx.compress(source, calibration=feeds).layers
    with pytest.raises(OptionError, match=r"method 'best': bits is 2\.5, but these \d layers take at least"):
        vqonnx.compress(source, Best(), calibration=feeds)
