"""What is measured, not how fast: times of a busy machine prove nothing."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from vqonnx import bench as bench_module
from vqonnx.bench import BenchResult, Figures, bench
from vqonnx.errors import DataError, ModelError, OptionError, VqonnxError
from vqonnx.runtime import open_session

WAYS = ["original", "compressed", "compressed_library"]
MEGABYTES = 40


def parse(graph: str) -> bytes:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 13]> {graph}').SerializeToString()


ONCE = parse("g (float[N, 64] x) => (float[N, 64] y) { y = Relu(x) }")
# Decides at run time how often it repeats: `work` rounds of a MatMul.
MATMUL = "g (float[64, 64] x) => (float[64, 64] y) {{ {steps} y = Relu(x{last}) }}"


def repeated(times: int) -> bytes:
    steps = " ".join(f"x{n + 1} = MatMul(x{n or ''}, x)" for n in range(times))
    return parse(MATMUL.format(steps=steps, last=times or ""))


def heavy() -> bytes:
    """A weight of `MEGABYTES` that cannot be shared with the file."""
    model = onnx.load_model_from_string(parse("g (float[1] x) => (float[N] y) { y = Mul(x, w) }"))
    weight = np.arange(MEGABYTES * 250_000, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model.SerializeToString()


def test_bench_measures_all_three() -> None:
    result = bench(ONCE, ONCE, rounds=3, warmup=1)
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(found) == ["latency_ms", "memory_mb", "peak_mb", "ratio", "threads", "rounds", "versions", "machine"]
    for figures in (found["latency_ms"], found["memory_mb"], found["ratio"]):
        assert list(figures) == WAYS
    assert all(value > 0 for value in found["latency_ms"].values())
    assert found["ratio"]["original"] == 1
    assert (found["threads"], found["rounds"]) == (1, 3)
    assert {"onnxruntime", "numpy", "python"} <= set(found["versions"])
    assert {"system", "processor", "cores"} == set(found["machine"])


def test_bench_takes_data() -> None:
    result = bench(ONCE, ONCE, feeds={"x": np.ones((20, 64))}, rounds=1, warmup=0, threads=2)
    assert result.latency_ms.compressed_library is not None
    with pytest.raises(DataError, match="'x'"):
        bench(ONCE, ONCE, feeds={"x": np.ones((20, 63))})


@pytest.mark.parametrize("option", ["rounds", "threads", "warmup"])
def test_senseless_counts_are_refused(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option} is -1"):
        bench(ONCE, ONCE, **{option: -1})  # type: ignore[arg-type]


def test_shapes_and_models_are_checked() -> None:
    with pytest.raises(OptionError, match="'z'"):
        bench(ONCE, ONCE, shapes={"z": [1]})
    with pytest.raises(ModelError, match="onnx"):
        bench("missing.onnx", ONCE)


def test_more_work_takes_longer() -> None:
    sessions = {"original": open_session(repeated(1), threads=1), "compressed": open_session(repeated(60), threads=1)}
    feed = {"x": np.full((64, 64), 1 / 64, np.float32)}
    latencies, ratios = bench_module._time(sessions, [feed, feed], rounds=9, warmup=2)
    assert latencies["original"] < latencies["compressed"]  # type: ignore[operator]
    assert ratios["original"] == 1
    assert ratios["compressed"] > 2  # type: ignore[operator]


def test_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "heavy.onnx"
    path.write_bytes(heavy())
    feed = {"x": np.ones(1, np.float32)}
    loaded, peak = bench_module.measure_memory(path, False, 1, feed)
    assert loaded is not None
    assert peak is not None
    assert MEGABYTES * 0.9 < loaded < MEGABYTES * 6, loaded
    assert peak >= loaded
    light, _ = bench_module.measure_memory(ONCE, False, 1, {"x": np.ones((1, 64), np.float32)})
    assert light is not None
    assert light < MEGABYTES / 4


def test_a_failure_in_the_other_process_is_told(tmp_path: Path) -> None:
    with pytest.raises(VqonnxError, match=r"gone\.onnx: memory was not measured: .*gone\.onnx"):
        bench_module.measure_memory(tmp_path / "gone.onnx", False, 1, {})


def test_memory_is_known_without_proc_or_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import, missing = builtins.__import__, {"psutil"}

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in missing:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    now, peak = bench_module._resident()
    assert now is not None
    assert peak is not None
    assert 1 < now <= peak
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    other, _ = bench_module._resident()
    assert other == pytest.approx(peak, rel=0.5)
    missing.add("resource")
    assert bench_module._resident() == (None, None)


def test_what_was_not_measured_is_null() -> None:
    nothing = Figures(1.0, None, None)
    result = BenchResult(nothing, nothing, nothing, nothing, 1, 1, {}, {})
    assert result.to_json()["latency_ms"] == {"original": 1.0, "compressed": None, "compressed_library": None}
