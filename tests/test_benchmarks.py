"""The pieces of the benchmarks: networks are what they say, data what they should be, and rates those of a file."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import vqonnx

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(name) for name in ("common", "lenet", "gong", "speed")}


@pytest.fixture
def lenet(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["lenet"]


@pytest.fixture
def gong(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["gong"]


def test_mnist_is_read_in_batches(modules: dict[str, ModuleType], data_dir: Path) -> None:
    common = modules["common"]
    feeds = common.mnist_feeds("train", 250, batch=100)
    assert [feed["input"].shape for feed in feeds] == [(100, 1, 28, 28), (100, 1, 28, 28), (50, 1, 28, 28)]
    assert feeds[0]["input"].dtype == np.float32
    assert (feeds[0]["input"].min(), feeds[0]["input"].max()) == (0, 1)
    assert common.mnist_labels()[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9], "the official order"
    assert np.bincount(common.mnist_labels()).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    few, all_of_them = (common.mnist_labels("train", count) for count in (600, 60_000))
    np.testing.assert_allclose(np.bincount(few) / 600, np.bincount(all_of_them) / 60_000, atol=0.03)


@pytest.mark.parametrize(("name", "parameters"), [("lenet300", 266_610), ("lenet5", 431_080)])
def test_the_file_is_the_network(name: str, parameters: int, lenet: ModuleType, tmp_path: Path) -> None:
    network = next(network for network in lenet.NETWORKS if network.name == name)
    net = lenet.Net(network).eval()
    lenet.export(net, network.path(tmp_path))
    arrays = onnx.load(network.path(tmp_path)).graph.initializer
    assert sum(math.prod(array.dims) for array in arrays) == parameters
    assert {array.name for array in arrays} > set(network.dense)
    images = np.random.default_rng(0).random((5, 1, 28, 28), np.float32)
    session = onnxruntime.InferenceSession(network.path(tmp_path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(["output"], {"input": images})[0], expected, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_and_repeats(lenet: ModuleType) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 300)
    images = (rng.random((300, 1, 28, 28)) / 4).astype(np.float32)
    images[np.arange(300), 0, 2 * labels] += 0.75  # a bright row tells the class
    nets = [lenet.fit(lenet.LENET_300_100, images, labels, epochs=8) for _ in range(2)]
    for first, second in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert torch.equal(first, second)
    with torch.no_grad():
        assert float((nets[0](torch.from_numpy(images)).argmax(1).numpy() == labels).mean()) > 0.9


def test_settings_reach_from_four_to_thirty_times(gong: ModuleType) -> None:
    found = list(gong.settings())
    assert len(found) == len(set(found)), "one is measured twice"
    for family in ("KM", "PQ", "PQ outputs", "SVD"):
        reached = [setting.paper_rate((4096, 4096)) for setting in found if setting.family == family]
        assert min(reached) < 8.5 < 30 < max(reached), f"{family}: {sorted(reached)}"
    paper = [setting for setting in found if setting.family == "PQ" and setting.words == 8]
    assert [round(setting.paper_rate((4096, 4096)), 1) for setting in paper] == [10.4, 20.5, 30.1, 39.4]


@pytest.mark.parametrize(
    "options",
    [
        {"family": "KM", "words": 4},
        {"family": "PQ", "words": 4, "width": 28},
        {"family": "PQ outputs", "words": 4, "width": 10},
        {"family": "PQ one", "words": 16, "width": 2},
        {"family": "RQ", "words": 4, "stages": 2},
        {"family": "SVD", "rate": 4},
        {"family": "Binary", "scale": "row"},
    ],
    ids=lambda options: options["family"],
)
def test_a_setting_is_measured(
    options: dict, lenet: ModuleType, gong: ModuleType, tmp_path: Path, data_dir: Path
) -> None:
    """`measure` itself compares the bytes of the file with the formula."""
    torch.manual_seed(0)
    lenet.export(lenet.Net(lenet.LENET_300_100), tmp_path / "lenet300.onnx")
    bench = gong.Bench(lenet.LENET_300_100, tmp_path, tmp_path, count=200)
    assert bench.dense == {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)}
    whole, *alone = bench.measure(gong.Setting(**options), seeds=(0,))
    assert [point.layers for point in (whole, *alone)] == ["all", "hidden", *bench.dense]
    for point in (whole, *alone):
        assert (point.network, point.left_alone, len(point.errors)) == ("lenet300", (), 1)
        assert 1 < point.paper_rate < 100
        assert point.paper_rate / 1.2 < point.file_rate < 2.2 * point.paper_rate, "float16 at most halves it"
        assert 0 < point.error < 100
    reached = [point.paper_rate for point in alone]
    assert min(reached) <= whole.paper_rate <= max(reached)


def test_a_layer_alone_is_as_if_the_others_were_not_asked_for(
    lenet: ModuleType, gong: ModuleType, tmp_path: Path, data_dir: Path
) -> None:
    torch.manual_seed(0)
    lenet.export(lenet.Net(lenet.LENET_300_100), tmp_path / "lenet300.onnx")
    bench = gong.Bench(lenet.LENET_300_100, tmp_path, tmp_path, count=500)
    setting = gong.Setting("PQ outputs", words=4, width=10)
    alone = next(point for point in bench.measure(setting, seeds=(3,)) if point.layers == "fc2.weight")
    method = setting.method(bench.dense["fc2.weight"])
    vqonnx.compress(bench.path, method, include=["fc2.weight"], seed=3).save(tmp_path / "one.onnx")
    found = vqonnx.compare(bench.path, tmp_path / "one.onnx", bench._test, labels=bench._labels)
    assert found.top1_before == pytest.approx(1 - bench.error / 100)
    assert found.top1_after == pytest.approx(1 - alone.error / 100, abs=0.003), "but for ties"
    assert found.top1_agreement < 0.99


def test_what_would_grow_is_left_alone(lenet: ModuleType, gong: ModuleType, tmp_path: Path, data_dir: Path) -> None:
    lenet.export(lenet.Net(lenet.LENET_300_100), tmp_path / "lenet300.onnx")
    bench = gong.Bench(lenet.LENET_300_100, tmp_path, tmp_path, count=10)
    setting = gong.Setting("RQ", 16)
    whole, hidden, *alone = bench.measure(setting, seeds=(0,))
    assert (hidden.layers, hidden.left_alone, hidden.error) == ("hidden", (), whole.error)
    assert [point.layers for point in alone] == ["fc1.weight", "fc2.weight"], "16 words for the 10 rows of fc3"
    assert whole.left_alone == ("fc3.weight",)
    made_smaller = 4 * (300 * 784 / alone[0].paper_rate + 100 * 300 / alone[1].paper_rate)
    assert whole.paper_rate == pytest.approx(4 * 266_200 / (made_smaller + 4 * 1000), abs=0.01), "what is left counts"
    assert bench.measure(gong.Setting("RQ", 256, stages=4)) == []


# Speed


@pytest.fixture
def speed(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["speed"]


def errors(speed: ModuleType, ways: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = speed._errors({name: speed.open_way(way, 1) for name, way in ways.items()})
    return found


def test_gemms_of_all_formats_compute_the_same(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("speed_models"), "_COLD", 3 * 64 * 96)
    ways = speed.gemm_ways(64, 96, 2, cold=True)
    assert {name: way.layers for name, way in ways.items()} == {"vqonnx": 24, "fp32": 1, "int8": 3, "int4": 6}
    assert [node.op_type for node in onnx.load_from_string(ways["vqonnx"].model).graph.node] == ["Gemm"] * 24
    found = errors(speed, ways)
    assert found["vqonnx"] < 3e-4
    assert 1e-4 < found["int8"] < 0.05
    assert 0.01 < found["int4"] < 0.2


@pytest.mark.parametrize(("order", "width", "precision"), [("hwi", 8, None), ("ihw", 9, "exact")])
def test_convolutions_of_all_formats_compute_the_same(
    order: str, width: int, precision: str | None, speed: ModuleType
) -> None:
    ways = speed.conv_ways(16, 8, 3, 6, width=width, order=order, precision=precision)
    (node,) = onnx.load_from_string(ways["vqonnx"].model).graph.node
    assert (node.op_type, node.domain) == ("Conv", "vqonnx")
    assert [a.s.decode() for a in node.attribute if a.name == "precision"] == ([precision] if precision else [])
    found = errors(speed, ways)
    assert found["vqonnx"] < (1e-5 if precision else 3e-4)
    assert 1e-4 < found["static int8"] < 0.1


def test_times_are_of_one_layer(speed: ModuleType) -> None:
    ways = speed.gemm_ways(256, 256, 4, cold=False)
    sessions = {name: speed.open_way(way, 1) for name, way in ways.items()}
    timing = speed.time_in_turn(sessions, dict.fromkeys(ways, 1), speed._feed, threads=1, rounds=3)
    halves = speed.time_in_turn(sessions, dict.fromkeys(ways, 2), speed._feed, threads=1, rounds=3)
    assert set(timing.microseconds) == set(ways)
    assert set(timing.ratios) == {"fp32", "int8", "int4"}
    assert all(0.1 < value < 1e5 for value in timing.microseconds.values())
    assert halves.microseconds["fp32"] < timing.microseconds["fp32"]


def test_rounds_are_told_apart_by_the_distance_of_processors(speed: ModuleType) -> None:
    ways = speed.gemm_ways(64, 64, 1, cold=False)
    sessions = {name: speed.open_way(way, 1) for name, way in ways.items()}
    trips = iter([100.0] * 7 + [240.0] + [400.0] * 7)
    timing = speed.time_in_turn(
        sessions, dict.fromkeys(ways, 1), speed._feed, threads=1, rounds=14, round_trip=lambda: next(trips)
    )
    assert next(trips, None) is None  # before the first round and after each
    assert (timing.near.rounds, timing.near.nanoseconds) == (6, (100.0, 100.0))
    assert (timing.far.rounds, timing.far.nanoseconds) == (6, (400.0, 400.0))
    assert set(timing.far.ratios) == set(timing.ratios)
    unasked = speed.time_in_turn(sessions, dict.fromkeys(ways, 1), speed._feed, threads=1, rounds=2)
    assert unasked.near is None
    assert unasked.far is None


def test_the_table_of_speeds(speed: ModuleType, tmp_path: Path) -> None:
    assert len({case.name for case in speed.CASES}) == len(speed.CASES)
    times = {"vqonnx": 10.0, "fp32": 100.0, "int4": 21.0}
    content = {"microseconds": times, "ratios": {"fp32": 10.0, "int4": 2.1}, "setting": "somewhere"}
    (tmp_path / "gemm-1000x2048-batch1-hot.json").write_text(json.dumps(content))
    memory = {"megabytes": {"vqonnx": 7.5, "fp32": 110.0}, "file": 4.0, "setting": "somewhere"}
    (tmp_path / "resnet50-hwi8-memory.json").write_text(json.dumps(memory))
    memory["megabytes"] = {"vqonnx": 15.5, "fp32": 110.0}  # more than 1.3 times the file and 10 MB
    (tmp_path / "mlp-8x4096-memory.json").write_text(json.dumps(memory))
    rows = speed.table(tmp_path).splitlines()
    assert rows[2:] == [
        "| gemm-1000x2048-batch1-hot | 1 | fp32 | 8x | 12x | 10.00x | 10.0 | 100.0 |  |",
        "| gemm-1000x2048-batch1-hot | 1 | int4 | 2.2x | 3x | **below** 2.10x | 10.0 | 21.0 |  |",
        "| resnet50-hwi8-memory | 1 | fp32: 110.0 MB | at most 20 MB | 8 MB | 7.5 MB | | | |",
        "| mlp-8x4096-memory | 1 | fp32: 110.0 MB | at most 15.2 MB |  | **above** 15.5 MB | | | |",
        "",
        "somewhere",
    ]
