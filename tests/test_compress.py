"""The pass: same codes in every target, same bytes from the same seed, and every layer accounted for."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import CONV, MIXED, MIXED_SKIPPED, MLP
from numpy.typing import NDArray
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader

import vqonnx
from vqonnx.errors import DataError, ModelError, OptionError
from vqonnx.graph import find
from vqonnx.method import Method
from vqonnx.methods import BGD, PQ, Best, KMeans, Residual
from vqonnx.place import Target
from vqonnx.record import KEY, LayerRecord
from vqonnx.result import Result

TARGETS: tuple[Target, ...] = ("hybrid", "portable", "custom")
# Few bits, so that encoding is quick; the first keep codes that cross bytes and columns that the width does not divide.
METHODS: dict[str, Method] = {
    "kmeans": KMeans(bits=2),
    "pq": PQ(width=5, bits=3),
    "residual": Residual(width=5, bits=2, along="outputs"),
    "bgd": BGD(bits=5, first=True),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str, Target], tuple[Result, Path]]:
    """Compress a model of the digits once for each method and target."""

    @cache
    def made(model: Path, method: str, target: Target) -> tuple[Result, Path]:
        path = tmp_path_factory.mktemp("made") / f"{model.stem}-{method}-{target}.onnx"
        result = vqonnx.compress(model, METHODS[method], calibration=[{"image": nets.images(16)}], target=target)
        saved = result.save(path)
        assert saved.bytes == path.stat().st_size
        return result, path

    return made


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return nets.write(nets.mixed(), tmp_path / "mixed.onnx")


def names_of(result: Result) -> list[str]:
    return [layer.name for layer in result.layers]


def saved_bytes(result: Result, path: Path) -> bytes:
    result.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [CONV, MLP], ids=["conv", "mlp"])
def test_the_targets_are_the_same_codes(model: Path, method: str, make: Any) -> None:
    results, paths = zip(*(make(model, method, target) for target in TARGETS), strict=True)
    hybrid, portable, custom = paths
    stored = [_stored_arrays(path, results[0].layers) for path in paths]
    assert stored[0] == stored[1] == stored[2], f"{model.stem}, {method}: other codes or codebooks in another target"
    layers = [[replace(layer, fused=()) for layer in result.layers] for result in results]
    assert layers[0] == layers[1] == layers[2]
    with np.load(nets.TEST) as test:
        feed = {"image": test["image"][:64]}
    plain = nets.outputs(hybrid, feed)[0]
    np.testing.assert_array_equal(nets.outputs(portable, feed)[0], plain)
    np.testing.assert_array_equal(nets.outputs(portable, feed, library=True)[0], plain)
    fused = nets.outputs(hybrid, feed, library=True)[0]
    np.testing.assert_array_equal(nets.outputs(custom, feed, library=True)[0], fused)
    np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-4 * float(np.abs(plain).max()))
    assert not np.array_equal(plain, nets.outputs(model, feed)[0]), "the outputs are the original's: nothing was coded"
    with pytest.raises(ModelError, match="open it with the vqonnx library"):
        nets.outputs(custom, feed)


def _stored_arrays(path: Path, layers: tuple[LayerRecord, ...]) -> list[tuple[int, str]]:
    """Codes and codebooks, without names and shapes: a portable file keeps a codebook as a plain table."""
    codes_and_words = (TensorProto.UINT8, TensorProto.FLOAT16)
    arrays = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type in codes_and_words]
    assert len(arrays) == 2 * len(layers), f"{path.name}: {len(arrays)} codes and codebooks for {len(layers)} layers"
    return sorted((tensor.data_type, sha256(tensor.raw_data).hexdigest()) for tensor in arrays)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [CONV, MLP], ids=["conv", "mlp"])
def test_what_compress_says_is_what_report_reads(model: Path, method: str, target: Target, make: Any) -> None:
    result, path = make(model, method, target)
    report = vqonnx.report(path)
    assert report.layers == result.layers
    assert report.skipped == result.skipped
    assert (report.bytes_before, report.bytes_after) == (model.stat().st_size, path.stat().st_size)
    assert report.ratio == model.stat().st_size / path.stat().st_size
    # Codes and codebooks are most of the file; the rest is what was left alone, nodes, and the record.
    assert sum(layer.bytes for layer in report.layers) < path.stat().st_size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [CONV, MLP], ids=["conv", "mlp"])
def test_every_layer_is_compressed_or_listed(model: Path, method: str, make: Any) -> None:
    result, _ = make(model, method, "hybrid")
    weights = {tensor.name for tensor in onnx.load(model).graph.initializer if len(tensor.dims) > 1}
    listed = names_of(result) + [entry.name for entry in result.skipped]
    assert sorted(listed) == sorted(weights)
    assert all(entry.reason for entry in result.skipped)
    for layer in result.layers:
        assert layer.weight_snr_db is not None
        assert 0.5 < layer.weight_snr_db < 80, f"{layer.name} {layer.shape}: {layer.weight_snr_db} dB"
        assert layer.output_snr_db is not None
        assert 0 < layer.output_snr_db < 80, f"{layer.name} {layer.shape}: {layer.output_snr_db} dB"


@pytest.mark.parametrize(
    "method",
    [
        KMeans(bits=3),
        PQ(width=5, bits=2, books="group"),
        PQ(width=5, bits=2, books="group", along="outputs"),
        BGD(width=3, bits=4, order="hwi", first=True),
    ],
    ids=["kmeans", "pq", "pq-outputs", "bgd"],
)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", nets.SMALL)
def test_small_models(name: str, target: Target, method: Method, tmp_path: Path) -> None:
    source, path = nets.write(nets.SMALL[name](), tmp_path / f"{name}.onnx"), tmp_path / "out.onnx"
    feeds = nets.feeds_of(name)
    calibration = feeds if isinstance(method, BGD) else None
    result = vqonnx.compress(source, method, calibration=calibration, target=target)
    result.save(path)
    assert vqonnx.report(path).layers == result.layers
    for feed in feeds:
        fused = nets.outputs(path, feed, library=True)
        plain = fused if target == "custom" else nets.outputs(path, feed)
        for a, b in zip(plain, fused, strict=True):
            tolerance = 1e-2 if name == "half" else 1e-5
            np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=tolerance, atol=tolerance)


def test_a_codebook_of_the_word_one_is_counted(tmp_path: Path) -> None:
    model = nets.dense(1, 64)
    model.graph.initializer[0].raw_data = np.ones((64, 64), np.float32).tobytes()
    source = nets.write(model, tmp_path / "ones.onnx")
    for target in TARGETS:
        result = vqonnx.compress(source, KMeans(bits=1), target=target)
        result.save(tmp_path / "out.onnx")
        assert vqonnx.report(tmp_path / "out.onnx").layers == result.layers, target
        assert result.layers[0].weight_snr_db is None  # no error at all


@pytest.mark.parametrize(
    "method",
    [PQ(width=3, bits=3), PQ(width=5, bits=2, books="group"), Residual(width=4, bits=2), Residual(width=None, bits=3)],
    ids=["pq", "pq-group", "residual", "residual-rows"],
)
def test_along_outputs_is_along_inputs_of_the_transposed_weight(method: Any, tmp_path: Path) -> None:
    """The two axes along which Gong et al. 2014 cut a matrix; neither depends on calibration data."""
    weight = nets.draw((60, 48), 0)
    stored, records = [], []
    for name, array, turned, along in (
        ("outputs", weight, 1, "outputs"),
        ("outputs-observed", weight, 1, "outputs"),
        ("matmul", np.ascontiguousarray(weight.T), 0, "outputs"),
        ("inputs", np.ascontiguousarray(weight.T), 1, "inputs"),
    ):
        rows, inputs = array.shape if turned else array.shape[::-1]
        model = onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["": 17]>
            one (float[N, {inputs}] x) => (float[N, {rows}] y) {{ y = Gemm <transB = {turned}> (x, w) }}"""
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
        source, path = nets.write(model, tmp_path / f"{name}.onnx"), tmp_path / f"{name}-small.onnx"
        data = [{"x": nets.draw((9, inputs), 1)}] if name == "outputs-observed" else None
        result = vqonnx.compress(source, replace(method, along=along), calibration=data)
        result.save(path)
        stored.append(_stored_arrays(path, result.layers))
        records.append(result.layers[0])
    assert stored[0] == stored[1] == stored[2] == stored[3]
    assert len({(record.bytes, record.weight_snr_db) for record in records}) == 1
    assert records[0].output_snr_db is None
    assert records[1].output_snr_db is not None


# Seeds


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_the_bytes(method: str, mixed: Path, tmp_path: Path) -> None:
    def once(seed: int) -> bytes:
        feeds = nets.feeds_of("mixed")
        return saved_bytes(vqonnx.compress(mixed, METHODS[method], calibration=feeds, seed=seed), tmp_path / "o.onnx")

    assert once(3) == once(3)
    assert once(3) != once(4)
    assert once(2**31 - 1)


_OTHER_PROCESS = """
import logging, sys
sys.path[:] = {path!r}
import nets, vqonnx
logging.disable(logging.WARNING)  # so few images are warned of
from test_compress import METHODS
for name, method in METHODS.items():
    for model in (nets.MLP, "{mixed}"):
        feeds = [{{"image": nets.images(32)}}] if model == nets.MLP else nets.feeds_of("mixed")
        vqonnx.compress(model, method, calibration=feeds).save(f"{folder}/{{name}}-{{model == nets.MLP}}.onnx")
"""


def test_another_process_writes_the_same_bytes(mixed: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    children = []
    for number, folder in enumerate(folders):
        folder.mkdir()
        code = _OTHER_PROCESS.format(path=sys.path, mixed=mixed, folder=folder)
        environment = os.environ | {"PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": str(1 + number)}
        children.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE))
    for child in children:
        assert child.communicate()[1] == b""
    files = sorted(path.name for path in folders[0].iterdir())
    assert len(files) == 2 * len(METHODS)
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


@pytest.mark.parametrize(
    ("options", "says"), [({"seed": -1}, "seed is -1"), ({"seed": 2**31}, "seed"), ({"batch": 0}, "batch is 0")]
)
def test_numbers_that_cannot_be_used(options: dict[str, Any], says: str, mixed: Path) -> None:
    with pytest.raises(OptionError, match=says):
        vqonnx.compress(mixed, **options)


# The input, and what the file keeps of it


def test_the_input_is_not_touched(mixed: Path, tmp_path: Path) -> None:
    before = mixed.read_bytes(), mixed.stat().st_mtime_ns, mixed.stat().st_ino
    vqonnx.compress(mixed, KMeans(bits=1)).save(tmp_path / "out.onnx")
    assert (mixed.read_bytes(), mixed.stat().st_mtime_ns, mixed.stat().st_ino) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed.onnx", "out.onnx"]


def test_old_metadata_are_kept(mixed: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        vqonnx.compress(mixed, KMeans(bits=1), target=target).save(tmp_path / "out.onnx")
        props = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
        assert set(props) == {"author", "task", KEY}
        assert (props["author"], props["task"]) == ("somebody", "tests")


@pytest.mark.parametrize("target", TARGETS)
def test_a_compressed_model_is_refused(target: Target, mixed: Path, tmp_path: Path) -> None:
    vqonnx.compress(mixed, KMeans(bits=1), exclude=["head"], target=target).save(tmp_path / "out.onnx")
    with pytest.raises(ModelError, match=r"out\.onnx: is already compressed by vqonnx; 'vqonnx expand'"):
        vqonnx.compress(tmp_path / "out.onnx", KMeans(bits=1))


# Which layers


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(MIXED)),
        ({"include": ["fc_w"]}, ["fc_w"]),
        ({"include": ["fc"]}, ["fc_w"]),
        ({"include": ["?p_w", "he*"]}, ["up_w", "head_w"]),
        ({"exclude": ["conv*", "up"]}, ["fc_w", "head_w"]),
        ({"include": ["*_w"], "exclude": ["fc"]}, ["conv_w", "up_w", "head_w"]),
        ({"op_types": ["Gemm", "Conv"]}, ["conv_w", "fc_w"]),
        ({"op_types": ["MatMul"], "include": ["head*"]}, ["head_w"]),
    ],
)
def test_patterns_choose_layers(options: dict[str, Any], expected: list[str], mixed: Path) -> None:
    result = vqonnx.compress(mixed, KMeans(bits=2), **{"exclude": [], **options})
    assert [name for name in names_of(result) if name in MIXED] == expected
    left = {entry.name: entry.reason for entry in result.skipped}
    assert sorted([*left, *names_of(result)]) == sorted([*MIXED, *MIXED_SKIPPED])
    assert left["depth_w"] == "depthwise convolution (16 groups of one channel)"
    for name in set(MIXED) - set(expected):
        assert left[name] in ("excluded", "not included") or "is not among the operators" in left[name]


parts = st.lists(st.sampled_from(["*", "conv*", "u?_w", "fc", "head_w", "*_w", "*e*", "tiny"]), max_size=3)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    include=parts, exclude=parts, first=st.sampled_from([None, KMeans(bits=1)]), pattern=st.sampled_from(["*c*", "up"])
)
def test_every_choice_accounts_for_every_layer(
    include: list[str], exclude: list[str], first: Method | None, pattern: str, mixed: Path
) -> None:
    nodes = MIXED | {"tiny_w": "tiny"}

    def match(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(text, one) for one in patterns for text in (name, nodes[name]))

    overrides = [vqonnx.Override(pattern, first), vqonnx.Override("*", KMeans(bits=2))]
    result = vqonnx.compress(
        mixed, KMeans(bits=3), include=include, exclude=exclude, overrides=overrides, allow_unchanged=True
    )
    expected = {
        name: 1 if match(name, [pattern]) else 2
        for name in nodes
        if (not include or match(name, include))
        and not match(name, exclude)
        and not (first is None and match(name, [pattern]))
    }
    assert {layer.name: layer.options["bits"] for layer in result.layers} == expected
    assert {entry.name for entry in result.skipped} == {*nodes, "depth_w"} - set(expected)


@pytest.mark.parametrize("where", ["include", "exclude", "overrides"])
def test_a_pattern_that_matches_nothing_is_named(where: str, mixed: Path) -> None:
    pattern = "layer[0-9].*"
    value = [vqonnx.Override(pattern, None)] if where == "overrides" else ["conv", pattern]
    with pytest.raises(OptionError, match=r"pattern 'layer\[0-9\]\.\*' matches none of the 6 layers \(conv_w, depth_w"):
        vqonnx.compress(mixed, KMeans(bits=1), **{where: value})


def test_unknown_operators_are_refused(mixed: Path) -> None:
    with pytest.raises(OptionError, match="'LSTM' is not compressed; choose from Conv, ConvTranspose, Gemm, MatMul"):
        vqonnx.compress(mixed, KMeans(bits=1), op_types=["Conv", "LSTM"])


def test_a_model_with_nothing_to_compress(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no layer can be compressed \(.*conv_w.*: excluded.*--allow-unchanged"):
        vqonnx.compress(mixed, KMeans(bits=1), exclude=["*"])
    result = vqonnx.compress(mixed, KMeans(bits=1), exclude=["*"], allow_unchanged=True)
    saved = result.save(tmp_path / "out.onnx")
    assert onnx.load(saved.path) == onnx.load(mixed)
    assert saved.comparison is not None
    assert saved.comparison.identical
    assert not result.layers


# Calibration data


class OneWay:
    """A data reader with `get_next` only, as onnxruntime's examples write them."""

    def __init__(self, feeds: list[dict[str, NDArray[Any]]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._feeds, None)


class Reader(OneWay, CalibrationDataReader):
    """The same on onnxruntime's own base class."""


def test_every_source_of_calibration_data_gives_the_same_file(tmp_path: Path) -> None:
    images = nets.images(48)
    batches = [{"image": images[start : start + 16]} for start in range(0, 48, 16)]
    np.savez(tmp_path / "all.npz", image=images)
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "folder" / "a.npz", image=images[:16])
    np.savez(tmp_path / "folder" / "b.npz", image=images[16:])

    def generator() -> Iterator[dict[str, NDArray[Any]]]:
        yield from batches

    sources = {
        "list": batches,
        "generator": generator(),
        "npz": tmp_path / "all.npz",
        "text": str(tmp_path / "all.npz"),
        "folder": tmp_path / "folder",
        "reader": OneWay(batches),
        "onnxruntime's reader": Reader(batches),
        "array": images,
        "dict": {"image": images},
    }
    for method in (BGD(bits=3), KMeans(bits=1)):  # the second does not need the data, but reports by them
        files = {}
        for name, source in sources.items():
            if isinstance(source, (OneWay, Iterator)):
                source = type(source)(batches) if isinstance(source, OneWay) else generator()
            result = vqonnx.compress(MLP, method, calibration=source, op_types=["Gemm"], include=["fc3*", "fc2*"])
            assert all(layer.output_snr_db is not None for layer in result.layers), name
            files[name] = saved_bytes(result, tmp_path / "out.onnx")
        assert len(set(files.values())) == 1, f"{method.id}: not the same: {sorted(files)}"


def test_calibration_data_pick_the_method() -> None:
    chosen = vqonnx.compress(MLP, calibration=[{"image": nets.images(16)}], include=["fc3*", "fc2*"])
    assert {layer.method for layer in chosen.layers} <= {"refined", "settled"}
    assert {layer.method for layer in vqonnx.compress(MLP, include=["fc3*"]).layers} == {"pq"}
    with pytest.raises(OptionError, match=r"'bgd' needs calibration data; give --calibration, or choose method pq"):
        vqonnx.compress(MLP, BGD())


def test_the_written_file_is_checked_on_each_of_the_first_batches_once() -> None:
    batches = [{"image": image[None]} for image in nets.images(12)]
    for method in (Best(bits=5, beam=1), BGD(bits=2, first=True)):  # reads the data several times, or once
        result = vqonnx.compress(MLP, method, calibration=batches, include=["fc3*"])
        np.testing.assert_array_equal(
            np.concatenate([feed["image"] for feed in result.check_feeds]), nets.images(8), strict=True
        )


def test_data_that_do_not_fit(mixed: Path) -> None:
    for feeds in (
        [],
        [{"x": np.zeros((0, 4, 8, 8), np.float32)}],
        [{"z": np.zeros(3)}],
        [{"x": np.zeros((1, 4, 8, 9), np.float32)}],
    ):
        with pytest.raises(DataError):
            vqonnx.compress(mixed, calibration=feeds)


def test_layers_that_cannot_be_observed_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = nets.write(nets.branches(), tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING):
        result = vqonnx.compress(source, BGD(first=True, bits=4), calibration=nets.feeds_of("branches"))
    assert caplog.text.count("own: in a subgraph or function") == 2
    assert [layer.output_snr_db is None for layer in result.layers] == [False, True, True]


def test_layers_of_which_little_is_left_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    feeds = [{"image": nets.images(64)}]
    with caplog.at_level(logging.WARNING):
        layers = vqonnx.compress(MLP, PQ(width=16, bits=1), calibration=feeds).layers
    ruined = {layer.name: snr for layer in layers if (snr := layer.output_snr_db) is not None and snr < 3}
    worst = min(ruined, key=lambda name: ruined[name])
    more = f" and {len(ruined) - 1} more layer" if len(ruined) > 1 else ""
    [said] = [record.message for record in caplog.records if "above its error" in record.message]
    assert said.startswith(f"{worst}{more}")
    assert f"only {ruined[worst]:.1f} dB above its error (less than 3); give it more bits, or exclude it" in said
    caplog.clear()
    vqonnx.compress(MLP, PQ(width=2, bits=6), calibration=feeds)
    assert "above its error" not in caplog.text


def test_progress_counts_the_layers(mixed: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    vqonnx.compress(mixed, KMeans(bits=1), progress=lambda *call: calls.append(call))
    names = [site.name for site in find(onnx.load(mixed), mixed.parent).sites if not site.depthwise]
    assert calls == [*((number, 5, name) for number, name in enumerate(names)), (5, 5, "")]
