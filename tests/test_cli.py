"""The command line: every command and its exit code; every bad input gives one line, and no file."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vqonnx
import vqonnx.result
from vqonnx.cli import main
from vqonnx.methods import METHODS

Run = Callable[..., tuple[int, str, str]]
_PROGRESS = re.compile(r"compress: \d+/\d+ \S+")
BENCH = ("--rounds", "2", "--threads", "1")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command; gives exit code, standard output and standard error, those of onnxruntime included."""

    def command(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return nets.write(nets.mixed(), tmp_path / "in" / "mixed.onnx")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "small.onnx"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Data for `mixed`, with labels."""
    path = tmp_path / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.random((20, 4, 8, 8), np.float32), labels=rng.integers(0, 5, 20))
    return path


@pytest.fixture
def small(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "made.onnx"
    vqonnx.compress(source, vqonnx.KMeans(bits=4)).save(path)
    return path


# Commands


def test_compress_shows_layers_sizes_and_how_far_outputs_moved(run: Run, source: Path, out: Path) -> None:
    code, text, err = run("compress", source, out, "--method", "kmeans", "--bits", "2")
    assert code == 0
    before, after = source.stat().st_size, out.stat().st_size
    assert f"{out}: {before:,} -> {after:,} bytes, {before / after:.2f}x smaller" in text
    for name in nets.MIXED:
        assert re.search(rf"^{name} .* kmeans ", text, re.MULTILINE), name
    assert "method: kmeans(order=ihw, bits=2, codebook=float16)" in text
    assert "left alone (1):\n  depth_w: depthwise convolution (16 groups of one channel)" in text
    assert re.search(r"on the generated inputs: outputs at -?\d+\.\d dB SNR", text)
    assert err.splitlines() == [f"compress: {i}/5 {name}" for i, name in enumerate([*nets.MIXED, "tiny_w"], start=1)]


def test_compress_json(run: Run, source: Path, out: Path, images: Path) -> None:
    code, text, err = run(
        "compress", source, out, "--calibration", images, "--method", "bgd", "--set", "first=true", "--json", "--quiet"
    )
    assert (code, err) == (0, "")
    content = json.loads(text)
    assert list(content) == ["bytes", "ratio", "layers", "skipped", "parts", "verify"]
    assert content["bytes"] == {"before": source.stat().st_size, "after": out.stat().st_size}
    assert {layer["method"] for layer in content["layers"]} == {"bgd"}
    assert all(layer["output_snr_db"] is not None for layer in content["layers"])
    assert content["verify"]["passed"] is True
    code, text, _ = run("report", out, "--json")
    assert code == 0
    assert json.loads(text) == {key: value for key, value in content.items() if key != "verify"}
    code, text, _ = run("compress", source, out, "--json", "--no-verify")
    assert code == 0
    assert json.loads(text)["verify"] is None


@pytest.mark.parametrize(
    ("arguments", "method", "options"),
    [
        ((), "pq", {"width": 8, "bits": 8}),
        (("--bits", "3"), "pq", {"width": 8, "bits": 3}),
        (("--width", "4", "--bits=2"), "pq", {"width": 4, "bits": 2}),
        (("--set", "bits=1", "--bits", "2"), "pq", {"bits": 2}),
        (("--method", "kmeans", "--set", "bits=5", "--set", "codebook=float32"), "kmeans", {"bits": 5}),
        (("--method", "pq", "--set", "books=group", "--bits", "1"), "pq", {"books": "group", "bits": 1}),
    ],
)
def test_compress_options(
    arguments: tuple[str, ...], method: str, options: dict[str, Any], run: Run, source: Path, out: Path
) -> None:
    code, text, _ = run(
        "compress", source, out, "--include", "fc", "--include", "head*", "--json", "--no-verify", *arguments
    )
    assert code == 0
    layers = json.loads(text)["layers"]
    assert layers
    for layer in layers:
        assert layer["method"] == method
        assert layer["options"] | options == layer["options"], layer["name"]


def test_speed_is_codes_of_one_length_in_fused_layers(run: Run, out: Path) -> None:
    arguments = (
        "compress",
        nets.MLP,
        out,
        "--calibration",
        nets.CALIBRATION,
        "--target-ratio",
        8,
        "--optimize",
        "speed",
    )
    code, text, _ = run(*arguments, "--json")
    assert code == 0
    layers = json.loads(text)["layers"]
    assert {layer["method"] for layer in layers} <= {"refined", "settled"}
    assert {layer["options"]["order"] for layer in layers} == {"hwi"}
    assert all(layer["fused"] for layer in layers)
    assert out.stat().st_size <= nets.MLP.stat().st_size / 8
    code, text, _ = run(*arguments, "--set", "codes=prefix", "--json")
    assert code == 0
    assert {layer["method"] for layer in json.loads(text)["layers"]} <= {"entropy", "settled"}


def test_compress_reads_the_configuration(run: Run, source: Path, out: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        """
        method = "kmeans"
        options = { bits = 2 }
        target = "portable"
        exclude = ["tiny*"]
        [[layer]]
        match = "fc*"
        method = "kmeans"
        options = { bits = 1 }
        """
    )
    code, text, _ = run("compress", source, out, "--config", config, "--json")
    assert code == 0
    bits = {layer["name"]: layer["options"]["bits"] for layer in json.loads(text)["layers"]}
    assert bits == {"conv_w": 2, "up_w": 2, "fc_w": 1, "head_w": 2}
    assert not onnx.load(out).functions
    # The command line wins.
    code, text, _ = run("compress", source, out, "--config", config, "--bits", "3", "--target", "custom", "--json")
    assert code == 0
    assert {layer["options"]["bits"] for layer in json.loads(text)["layers"]} == {1, 3}
    assert any(entry.domain == "vqonnx" for entry in onnx.load(out).opset_import)
    # Options of the file belong to its method: another one starts from its own defaults.
    code, text, _ = run("compress", source, out, "--config", config, "--method", "pq", "--width", "2", "--json")
    assert code == 0
    assert {layer["options"]["bits"] for layer in json.loads(text)["layers"]} == {1, 8}


def test_compress_says_which_methods_where_they_differ(run: Run, source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[[layer]]\nmatch = "fc*"\nmethod = "pq"\noptions = { width = 4, bits = 2 }')
    code, text, _ = run("compress", source, out, "--method", "kmeans", "--bits", "2", "--config", tmp_path / "c.toml")
    assert code == 0
    assert "pq(order=ihw, width=4, bits=2, books=one, " in text
    assert "\nmethod: " not in text


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_reaches_the_methods(seed: int, run: Run, source: Path, out: Path, tmp_path: Path) -> None:
    assert run("compress", source, out, "--method=kmeans", "--bits=2", "--seed", seed)[0] == 0
    vqonnx.compress(source, vqonnx.KMeans(bits=2), seed=seed).save(tmp_path / "same.onnx")
    assert out.read_bytes() == (tmp_path / "same.onnx").read_bytes()


def test_allow_unchanged(run: Run, source: Path, out: Path) -> None:
    code, text, _ = run("compress", source, out, "--exclude", "*", "--allow-unchanged", "--json")
    assert code == 0
    assert onnx.load(out) == onnx.load(source)
    content = json.loads(text)
    assert content["layers"] == []
    assert len(content["skipped"]) == 6
    assert content["verify"]["identical"] is True


def test_quiet_and_verbose(run: Run, source: Path, out: Path, small: Path, tmp_path: Path) -> None:
    for command in (
        ("compress", source, out, "--method", "kmeans"),
        ("verify", source, small),
        ("report", small),
        ("expand", small, tmp_path / "plain.onnx"),
        ("bench", source, small, *BENCH),
        ("methods",),
    ):
        assert run(*command, "--quiet") == (0, "", ""), command
        if command[0] != "bench":  # slow, and looked at elsewhere
            code, text, _ = run(*command)
            assert (code, bool(text)) == (0, True), command
    code, _, err = run("compress", source, out, "--method", "kmeans", "--verbose", "--verbose")
    assert code == 0
    assert "DEBUG: " in err


def test_verify(run: Run, source: Path, small: Path, images: Path, tmp_path: Path) -> None:
    code, text, err = run("verify", source, small, "--data", images)
    assert (code, err) == (0, "")
    assert re.search(r"^y +\d+\.\d ", text, re.MULTILINE)
    assert "top-1 agreement" in text
    code, text, _ = run("verify", source, source, "--data", images, "--labels", images, "--json", "--max-drop", "0")
    content = json.loads(text)
    assert (code, content["passed"], content["identical"]) == (0, True, True)
    assert 0 <= content["top1"]["before"] == content["top1"]["after"] <= 1
    code, text, _ = run(
        "verify", source, small, "--library", "--min-snr", "5", "--min-agreement", "0", "--threads", "1"
    )
    assert code == 0
    assert "passed: min_snr" in text


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        (("--min-snr", "99"), "min_snr"),
        (("--check-atol", "1e-9"), "values outside rtol 0, atol 1e-09"),
        (("--check-rtol", "1e-9", "--library"), "values outside rtol 1e-09, atol 0"),
        (("--max-drop", "-100"), "max_drop"),
    ],
)
def test_a_limit_that_is_not_kept_is_exit_code_1(
    limit: tuple[str, ...], name: str, run: Run, source: Path, small: Path, images: Path, tmp_path: Path
) -> None:
    arguments = ("verify", source, small, "--data", images, "--labels", images, *limit)
    code, text, err = run(*arguments)
    assert (code, err) == (1, "")
    assert f"FAILED: {name}" in text
    code, text, _ = run(*arguments, "--json", "--junit", tmp_path / "junit.xml")
    assert code == 1
    content = json.loads(text)
    assert content["passed"] is False
    assert [check["name"] for check in content["checks"] if not check["passed"]] == [name]
    suite = ET.parse(tmp_path / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert run(*arguments, "--quiet") == (1, "", "")


def test_a_compressed_model_beyond_the_bounds_is_exit_code_1(run: Run, source: Path, out: Path) -> None:
    code, text, err = run("compress", source, out, "--method", "kmeans", "--check-atol", "1e-9", "--quiet")
    assert (code, text) == (1, "")
    assert re.fullmatch(
        r"vqonnx: the compressed model failed without the library, so it was not written: "
        r"values outside rtol 0, atol 1e-09: \d+ \(limit 0\)\n",
        err,
    )
    assert list(out.parent.iterdir()) == []


def test_report(run: Run, small: Path) -> None:
    code, text, err = run("report", small)
    assert (code, err) == (0, "")
    assert all(name in text for name in (*nets.MIXED, "depth_w: depthwise"))
    assert "x smaller" in text


def test_expand(run: Run, small: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.onnx"
    assert run("expand", small, plain) == (0, f"{plain}: 5 weights decoded, {plain.stat().st_size:,} bytes\n", "")


def test_bench(run: Run, source: Path, small: Path) -> None:
    code, text, _ = run("bench", source, small, "--json", *BENCH)
    assert code == 0
    content = json.loads(text)
    for key in ("latency_ms", "memory_mb", "ratio"):
        assert list(content[key]) == ["original", "compressed", "compressed_library"]
    assert content["latency_ms"]["compressed_library"] > 0
    assert content["ratio"]["original"] == 1


def test_methods(run: Run) -> None:
    code, text, _ = run("methods")
    assert code == 0
    for kind in METHODS:
        assert re.search(rf"^{kind.id}: .* \(needs (weight|moments)\)$", text, re.MULTILINE)
        for option in fields(kind):
            assert re.search(rf"^    {option.name} = \S+  \(.+\)$", text, re.MULTILINE), (kind.id, option.name)
    assert "codebook = float16  (float16 or float32)" in text
    assert "width = auto  (auto or whole number)" in text
    assert "first = false  (true or false)" in text


@pytest.mark.parametrize("command", ["", "compress", "verify", "report", "expand", "bench", "methods"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: vqonnx {command}".rstrip() in capsys.readouterr().out


@pytest.mark.parametrize("name", ["conv[red]w", "[/b]", ":smile:", "layer[0]/weight", "a b", "ünïcode"])
def test_names_are_shown_as_they_are(name: str, run: Run, out: Path, tmp_path: Path) -> None:
    model = nets.dense(1, 64)
    model.graph.node[0].input[1] = model.graph.initializer[0].name = name
    model.graph.node[0].output[0] = model.graph.output[0].name = f"{name}.out"
    model.graph.initializer[0].name = name
    source = nets.write(model, tmp_path / "m.onnx")
    code, text, err = run("compress", source, out, "--method", "kmeans")
    assert code == 0
    assert f"\n{name} " in text
    assert f"1/1 {name}\n" in err
    assert f"\n{name} " in run("report", out)[1]
    assert f"\n{name}.out " in run("verify", source, out)[1]


def test_a_long_name_stays_in_one_piece(run: Run, out: Path, tmp_path: Path) -> None:
    model = nets.dense(1, 64)
    name = "/".join(["a_module_with_a_long_name"] * 8)
    model.graph.node[0].input[1] = model.graph.initializer[0].name = name
    code, text, _ = run("compress", nets.write(model, tmp_path / "m.onnx"), out, "--method", "kmeans")
    assert code == 0
    assert name in text


# What cannot be used


@pytest.fixture
def refuse(run: Run, source: Path, out: Path) -> Callable[..., None]:
    """Assert that a command fails with one line that matches, and changes nothing."""

    def refused(*arguments: Any, says: str, output: Path = out) -> None:
        before = source.read_bytes(), source.stat().st_mtime_ns
        folder = sorted(output.parent.iterdir()) if output.parent.is_dir() else None
        code, text, err = run(*arguments)
        lines = [line for line in err.splitlines() if not _PROGRESS.fullmatch(line)]
        assert (code, text) == (2, ""), err
        assert len(lines) == 1, err
        assert re.match(rf"vqonnx: .*{says}", lines[0]), lines[0]
        assert (sorted(output.parent.iterdir()) if output.parent.is_dir() else None) == folder
        assert (source.read_bytes(), source.stat().st_mtime_ns) == before

    return refused


def _truncated(model: bytes) -> bytes:
    return model[: len(model) // 2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda model: b"", r"bad\.onnx: the file is empty \(0 bytes\); export"),
        (_truncated, r"bad\.onnx: not an ONNX model, or cut off"),
        (lambda model: b"\x89PNG\r\n" + bytes(500), r"bad\.onnx: not an ONNX model"),
        (lambda model: b"This is a text.\n" * 20, r"bad\.onnx: not an ONNX model"),
        (None, r"bad\.onnx: cannot be read \(No such file or directory\); give the path"),
    ],
    ids=["empty", "truncated", "image", "text", "missing"],
)
@pytest.mark.parametrize("command", ["compress", "report", "expand", "verify", "bench"])
def test_files_that_are_no_models(
    command: str, content: Any, says: str, refuse: Any, source: Path, out: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.onnx"
    if content is not None:
        bad.write_bytes(content(source.read_bytes()))
    rest = {"compress": [out], "expand": [out], "verify": [source], "bench": [source]}.get(command, [])
    refuse(command, bad, *rest, says=says)
    if command in ("verify", "bench"):
        refuse(command, source, bad, says=says)


def test_a_folder_is_no_model(refuse: Any, tmp_path: Path, out: Path) -> None:
    refuse("compress", tmp_path, out, says=r"cannot be read \(Is a directory\)")


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_model_cut_anywhere(share: float, refuse: Any, source: Path, out: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    data = source.read_bytes()
    bad.write_bytes(data[: int(share * (len(data) - 60))])  # the last 60 bytes hold the metadata, which may be missing
    refuse("compress", bad, out, says=r"bad\.onnx: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "magic"), "method 'magic' is unknown; choose one of kmeans, rtn, pq, bgd"),
        (("--method", "kmeans", "--width", "4"), "method 'kmeans' has no option 'width'; it has order, bits"),
        (("--set", "bit=4"), "method 'pq' has no option 'bit'"),
        (("--set", "bits"), "--set bits: write it as option=value"),
        (("--bits", "0"), "bits is 0; choose 1 to 12"),
        (("--bits", "13"), "bits is 13; choose 1 to 12"),
        (("--method", "kmeans", "--bits", "9"), "bits is 9; choose 1 to 8"),
        (("--bits", "four"), "option bits='four' is not a whole number"),
        (("--bits", ""), "option bits='' is not a whole number"),
        (("--width", "0"), "width is 0; choose 1 to 64"),
        (("--set", "books=two"), "books='two' is not one of one, group"),
        (("--set", "order=whi"), "order='whi' is not one of ihw, hwi"),
        (("--method", "bgd"), "method 'bgd' needs calibration data; give --calibration, or choose method pq"),
        (("--target", "gpu"), "target 'gpu' is unknown; choose one of hybrid, portable, custom"),
        (("--op-types", "Relu"), "operator 'Relu' is not compressed; choose from"),
        (("--seed", "-1"), "seed is -1; choose 0 to"),
        (("--seed", "99999999999"), "seed is 99999999999; choose 0 to"),
        (("--seed", "x"), "argument --seed: invalid int value: 'x'; see 'vqonnx compress --help'"),
        (("--batch", "0"), "batch is 0; choose 1 or more"),
        (("--batch", "-4"), "batch is -4; choose 1 or more"),
        (("--check-rtol", "nan"), "rtol is nan; give a finite number"),
        (("--check-atol", "much"), "argument --check-atol: invalid float value: 'much'"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
        (("--input-shapes", "1x2"), "--input-shapes 1x2: write it as name:1x3x224x224"),
        (("--input-shapes", "x:1xax8"), "--input-shapes x:1xax8: write it as"),
        (("--input-shapes", "z:1x4x8x8"), "input shape for 'z': the model's inputs are x"),
        (("--input-shapes", "x:1x4x8x9"), r"input shape \[1, 4, 8, 9\] does not fit input 'x', which is float32"),
        (("--include", "nothing*"), r"pattern 'nothing\*' matches none of the 6 layers \(conv_w"),
        (("--exclude", "nothing*"), r"pattern 'nothing\*' matches none"),
        (("--exclude", "*"), r"no layer can be compressed \(conv_w.*: excluded; depth_w: depthwise.*--allow-unchanged"),
        (("--method", "svd", "--set", "rank=900"), r"conv_w: rank 900 is more than the \d+ of .*; choose 1 to \d+"),
        (("--optimize", "fun"), "--optimize fun: choose size or speed"),
        (("--optimize", "speed"), "--optimize speed is for method best, which needs calibration data"),
        (("--distill",), "--distill needs calibration data; give --calibration"),
        (("--config", "missing.toml"), r"missing\.toml: cannot be read \(No such file or directory\); give"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], says: str, refuse: Any, source: Path, out: Path) -> None:
    refuse("compress", source, out, *arguments, says=says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method = ", r"c\.toml: is not TOML"),
        ("colour = 3", r"c\.toml: key 'colour' is unknown"),
        ("target = 'gpu'", "target 'gpu' is unknown"),
        ("method = 'magic'", "method 'magic' is unknown"),
        ("options = { bits = 99 }", "bits is 99; choose 1 to 12"),
        ("seed = -5", "seed is -5"),
        ("[[layer]]\nmatch = 'nothing'\nmethod = 'pq'", "pattern 'nothing' matches none of the 6 layers"),
    ],
)
def test_bad_configurations(text: str, says: str, refuse: Any, source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    refuse("compress", source, out, "--config", tmp_path / "c.toml", says=says)


def test_no_command_and_missing_arguments(refuse: Any, source: Path) -> None:
    refuse(says="the following arguments are required: COMMAND; see 'vqonnx --help'")
    refuse("shrink", says="invalid choice: 'shrink'")
    refuse("compress", source, says="the following arguments are required: OUT; see 'vqonnx compress --help'")


_GOOD = np.zeros((4, 4, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": _GOOD}, r"data\.npz: the data has no 'x'; the model's inputs are x"),
        ({"x": _GOOD, "z": _GOOD}, r"data\.npz: the data has 'z'; the model's inputs are x"),
        (
            {"x": _GOOD[:, :3]},
            r"data\.npz: batch 0: input 'x' is float32\[\d, 3, 8, 8\]; the model wants float32\[N, 4",
        ),
        ({"x": _GOOD[0]}, r"input 'x' is float32\[4, 8, 8\]"),
        ({"x": _GOOD.astype(np.uint8)}, r"input 'x' is uint8\[\d, 4, 8, 8\]; the model wants float32.*convert"),
        ({"x": np.where(np.arange(8) == 3, np.float32(np.nan), _GOOD)}, "input 'x'.*holds NaN or infinite"),
        ({"x": _GOOD[:0]}, r"data\.npz.* not a single batch"),
        ({}, r"data\.npz: the data has no 'x'"),
        ({"x": np.array([{}], object)}, r"data\.npz: is not a readable \.npz"),
    ],
    ids=["missing", "unknown", "shape", "rank", "dtype", "nan", "no-rows", "no-arrays", "pickled"],
)
@pytest.mark.parametrize("command", ["compress", "verify", "bench"])
def test_data_that_do_not_fit(
    command: str, arrays: dict[str, Any], says: str, refuse: Any, source: Path, out: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, **arrays)
    if command == "compress":
        refuse("compress", source, out, "--calibration", data, says=says)
        refuse("compress", source, out, "--calibration", data, "--method", "kmeans", says=says)
    else:
        refuse(command, source, source, "--data", data, says=says)


def test_data_files_that_cannot_be_read(refuse: Any, source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "array.npy", _GOOD)
    np.savez(tmp_path / "cut.npz", x=_GOOD)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:300])
    for name, says in {
        "missing.npz": "there is no such file or folder",
        "empty": "the folder has no .npz files",
        "text.npz": "is not an .npz",
        "cut.npz": "is not an .npz",
        "array.npy": "data are read from .npz files, not from .npy",
    }.items():
        says = rf".*{re.escape(name)}: {says}"
        refuse("compress", source, out, "--calibration", tmp_path / name, says=says)
        refuse("verify", source, source, "--data", tmp_path / name, says=says)


def test_labels_that_do_not_fit(refuse: Any, source: Path, images: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.npy"
    for values, says in {
        (0,) * 19: "19 labels for 20 images; give as many",
        (0,) * 21: "21 labels for 20 images",
        (5,) * 20: "labels 5 to 5 for 5 classes; count classes from 0",
        (0.5,) * 20: "labels are empty or not whole numbers",
        (): "labels are empty or not whole numbers",
    }.items():
        np.save(labels, np.array(values))
        refuse("verify", source, source, "--data", images, "--labels", labels, says=f".*{says}")
    refuse("verify", source, source, "--data", images, "--labels", tmp_path / "no.csv", says="labels cannot be read")
    refuse("verify", source, source, "--max-drop", "1", says="max_drop 1.0 needs labels")
    refuse("verify", source, source, "--min-agreement", "2", says="min_agreement is 2.0; give a share from 0 to 1")


def test_output_paths(refuse: Any, source: Path, out: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to(source)
    os.link(source, tmp_path / "hard.onnx")
    here = source.parent / "." / source.name
    for path, says in {
        source: "is the input itself, which is never changed",
        here: "is the input itself",
        tmp_path / "link.onnx": "is the input itself",
        tmp_path / "hard.onnx": "is the input itself",
        out.parent: "is a folder; give the name of a file",
        tmp_path / "no" / "out.onnx": "the folder '.*no' does not exist; make it first",
        source / "out.onnx": "the folder '.*mixed.onnx' does not exist",
    }.items():
        refuse("compress", source, path, says=says, output=path)
    refuse("expand", small, small, says="is the input itself", output=small)
    refuse("expand", small, out.parent, says="is a folder")
    refuse("verify", source, small, "--junit", tmp_path / "no" / "j.xml", says=r"j\.xml: cannot be written")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(refuse: Any, source: Path, out: Path) -> None:
    out.parent.chmod(0o500)
    refuse("compress", source, out, says="the folder '.*' cannot be written; choose another one")


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("command", ["compress", "expand"])
def test_a_full_disk(
    command: str, place: str, refuse: Any, source: Path, small: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, place, full)
    refuse(
        command,
        source if command == "compress" else small,
        out,
        *("--bits", "2") * (command == "compress"),
        says=r"small\.onnx: cannot be written \(No space left on device\); (free space or )?choose another folder",
    )


_FULL = """
import sys
sys.path[:] = {path!r}
from vqonnx.cli import main
{limit}
sys.exit(main(["compress", {source!r}, {out!r}, "--method", "kmeans", "--quiet"]))
"""
_LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
# A tiny file system in memory, which only this child sees.
_TINY = """mount -t tmpfs -o size=4k none "$1" || exit 77; "$2" -c "$3"; code=$?; ls -A "$1"; exit $code"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits on Windows")
def test_a_real_limit_of_the_file_size(source: Path, out: Path) -> None:
    code = _FULL.format(path=sys.path, limit=_LIMIT, source=str(source), out=str(out))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 2
    says = r"vqonnx: .*small\.onnx: cannot be written \(File too large\); free space or choose another folder\n"
    assert re.fullmatch(says, child.stderr)
    assert list(out.parent.iterdir()) == []


def test_a_really_full_disk(source: Path, out: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs 'unshare' to mount a tiny file system")
    code = _FULL.format(path=sys.path, limit="", source=str(source), out=str(out))
    command = [unshare, "-rm", "sh", "-c", _TINY, "sh", str(out.parent), sys.executable, code]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 77 or child.stderr.startswith("unshare"):
        pytest.skip(f"no right to mount a file system: {child.stderr}")
    assert (child.returncode, child.stdout) == (2, "")
    says = (
        r"vqonnx: .*small\.onnx: cannot be written \(No space left on device\); free space or choose another folder\n"
    )
    assert re.fullmatch(says, child.stderr)


def test_an_interruption(run: Run, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("vqonnx.result.compare", "vqonnx.modelfile.save", "vqonnx.methods.kmeans.kmeans"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            code, text, err = run("compress", source, out, "--method", "kmeans", "--quiet")
        assert (code, text) == (2, ""), place
        assert err == "vqonnx: interrupted; nothing was written under the output's name\n", place
        assert list(out.parent.iterdir()) == [], place


def test_out_of_memory(run: Run, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(vqonnx.result, "compare", exhausted)
    code, text, err = run("compress", source, out, "--method", "kmeans", "--quiet")
    assert (code, text, list(out.parent.iterdir())) == (2, "", [])
    assert err.startswith("vqonnx: out of memory; use fewer")


def test_data_and_labels_without_a_drop(refuse: Any, source: Path, out: Path, images: Path) -> None:
    size = ("--calibration", images, "--target-size", "5KB")
    for option in ("--data", "--labels"):
        says = "--data and --labels are for --max-drop, which is not given; leave them out"
        refuse("compress", source, out, *size, option, images, says=says)
        refuse("compress", source, out, option, images, says="--data and --labels are for --max-drop; 'vqonnx verify'")


def test_compressed_models(refuse: Any, small: Path, source: Path, out: Path) -> None:
    refuse("compress", small, out, says=r"made\.onnx: is already compressed by vqonnx; 'vqonnx expand'")
    refuse("report", source, says=r"mixed\.onnx: holds no weight that vqonnx compressed; give a file")
    refuse(
        "expand", source, out, says=r"mixed\.onnx: holds no weight that vqonnx compressed; there is nothing to expand"
    )


def test_a_model_of_foreign_operators(refuse: Any, out: Path, tmp_path: Path) -> None:
    model = nets.dense(1, 64)
    model.graph.node[0].domain, model.graph.node[0].op_type = "com.acme", "Wobble"
    model.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    onnx.save(model, tmp_path / "odd.onnx")
    refuse("compress", tmp_path / "odd.onnx", out, says=r"odd\.onnx: .*operators of domain com\.acme \(Wobble\)")


def test_weights_that_are_not_finite(refuse: Any, out: Path, tmp_path: Path) -> None:
    model = nets.dense(1, 64)
    model.graph.initializer[0].raw_data = np.full((64, 64), np.inf, np.float32).tobytes()
    refuse("compress", nets.write(model, tmp_path / "m.onnx"), out, says=r"\(w0: weights hold NaN or Inf\)")


def test_models_with_other_outputs(refuse: Any, source: Path, tmp_path: Path) -> None:
    model = nets.mixed()
    model.graph.node[-1].output[0] = model.graph.output[0].name = "z"
    refuse(
        "verify", source, nets.write(model, tmp_path / "z.onnx"), says="outputs differ: the original has y, the other z"
    )


@pytest.mark.parametrize("arguments", [("--rounds", "0"), ("--threads", "-1")])
def test_bench_counts(arguments: tuple[str, ...], refuse: Any, source: Path, small: Path) -> None:
    refuse("bench", source, small, *arguments, says="(rounds|threads) is (0|-1); give 1 or more")


def test_a_signal_handler_is_given_back(run: Run) -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    assert run("methods")[0] == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_commands_run_outside_the_main_thread(source: Path, out: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        code = pool.submit(main, ["compress", str(source), str(out), "--method", "kmeans", "--quiet"]).result()
    assert code == 0
    assert out.is_file()
