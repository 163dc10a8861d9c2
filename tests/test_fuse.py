"""`vqonnx fuse`, and every command on fused files: real models, and what cannot be fused."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import nets
import numpy as np
import onnx
import pytest
from test_zoo import RATIOS, SLOW, model_of

import vqonnx
import vqonnx.fusion
from vqonnx.bench import bench
from vqonnx.cli import main
from vqonnx.errors import InputError, ModelError, OptionError, VerifyError
from vqonnx.form import Product
from vqonnx.fused import FUSED
from vqonnx.generate import generate_feeds
from vqonnx.method import Layer, Method
from vqonnx.methods import PQ, KMeans
from vqonnx.place import Target
from vqonnx.runtime import open_session, run

METHOD = KMeans(bits=6)
# Whether the library has kernels of the fused ops; without them it runs the bodies, and no file of target custom.
KERNELS = b"ConvAddRelu" in Path(vqonnx.get_library_path()).read_bytes()


def written(source: Path, path: Path, **options: Any) -> Path:
    vqonnx.compress(source, METHOD, **{"fuse": False, **options}).save(path, verify=False)
    return path


def mixed(folder: Path, **options: Any) -> Path:
    return written(nets.write(nets.mixed(), folder / "mixed.onnx"), folder / "small.onnx", **options)


def assert_same_outputs(one: Path, other: Path, feed: dict[str, Any], *, library: bool = False) -> None:
    wanted, found = (run(open_session(path, library=library, threads=1), feed) for path in (one, other))
    assert list(wanted) == list(found)
    for name, value in wanted.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            continue
        scale = float(np.abs(value.astype(np.float64)).max(initial=0))
        np.testing.assert_allclose(
            found[name].astype(np.float64), value.astype(np.float64), rtol=1e-3, atol=1e-3 * scale + 1e-6, err_msg=name
        )


# Real models


@pytest.mark.parametrize("name", ["resnet20", "resnet20_bn", "resnet56", "mobilenetv2", "squeezenet"])
def test_real_networks(name: str, data_dir: Path, tmp_path: Path) -> None:
    check(data_dir / "models" / f"{name}.onnx", tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(RATIOS)]
)
def test_zoo(name: str, data_dir: Path, tmp_path: Path) -> None:
    check(model_of(name, data_dir), tmp_path)


NOTHING_TO_FUSE = {"silero_vad_op18_ifless", "silero_vad_v4_old", "squeezenet1.1_fp16_op7"}


def check(source: Path, folder: Path) -> None:
    small, fused, apart = (folder / f"{name}.onnx" for name in ("small", "fused", "apart"))
    written(source, small)
    if source.parent.name in NOTHING_TO_FUSE:
        with pytest.raises(ModelError, match=r"has no layer that can be fused \(Conv of 1 or 2 axes, Gemm, MatMul"):
            vqonnx.fuse(small, fused)
        return
    made = vqonnx.fuse(small, fused)  # runs both, with and without the library
    assert made.layers
    assert made.bytes == fused.stat().st_size
    onnx.checker.check_model(fused, full_check=True)
    feed = generate_feeds(source, count=1)[0]
    for library in (False, True):
        assert_same_outputs(small, fused, feed, library=library)
    before, after = vqonnx.report(small), vqonnx.report(fused)
    assert [layer.fused for layer in before.layers] == [()] * len(before.layers)
    assert {layer.name: layer.fused for layer in after.layers if layer.fused} == {
        name: (op,) for name, op in made.layers.items() if FUSED[op].coded
    }
    strip = [layer.to_json() | {"fused": None} for layer in after.layers]
    assert strip == [layer.to_json() | {"fused": None} for layer in before.layers]
    assert vqonnx.fuse(fused, apart, undo=True, verify=False).layers == made.layers
    for path in (small, fused, apart):
        vqonnx.expand(path, folder / f"plain-{path.name}")
    same_file(small, apart)
    same_file(folder / "plain-small.onnx", folder / "plain-fused.onnx")


def same_file(one: Path, other: Path) -> None:
    """The same models but for fields that are there and empty, which some exporters write."""
    models = [onnx.load(path, load_external_data=False) for path in (one, other)]
    for model in models:
        for node in model.graph.node:
            for name in ("name", "doc_string", "domain"):
                if not getattr(node, name):
                    node.ClearField(name)
    assert models[0] == models[1], one.name


# Options


@pytest.mark.parametrize("target", ["hybrid", "custom"])
def test_compress_fuses_if_asked(target: Target, tmp_path: Path) -> None:
    small = mixed(tmp_path, target=target, fuse=True)
    fused = {layer.name: layer.fused for layer in vqonnx.report(small).layers}
    assert fused == {
        "conv_w": ("ConvRelu",),
        "up_w": (),
        "fc_w": ("Gemm",),
        "head_w": ("MatMul",),
        "tiny_w": ("MatMul",),
    }
    result = vqonnx.compress(tmp_path / "mixed.onnx", METHOD, target=target, fuse=True)
    assert {layer.name: layer.fused for layer in result.layers} == fused
    if target == "hybrid" or KERNELS:
        result.save(tmp_path / "verified.onnx")
    bodies = {function.name for function in onnx.load(small).functions}
    assert bodies == ({"Decode", "ConvRelu", "DepthwiseConv", "Gemm", "MatMul"} if target == "hybrid" else set())


def test_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = nets.write(nets.mixed(), tmp_path / "mixed.onnx")
    for by_default in (False, True):
        monkeypatch.setattr(vqonnx.fusion, "BY_DEFAULT", by_default)
        for target, fuses in (("hybrid", by_default), ("custom", by_default), ("portable", False)):
            result = vqonnx.compress(source, METHOD, target=target)
            assert any(layer.fused for layer in result.layers) == fuses, target
        assert not any(layer.fused for layer in vqonnx.compress(source, METHOD, fuse=False).layers)


@dataclass(frozen=True)
class Factors(Method):
    """Two factors in codes, run one after the other."""

    id: ClassVar[str] = "factors"

    def encode(self, layer: Layer) -> Product:
        left, values, right = np.linalg.svd(layer.weight, full_matrices=False)
        parts = (left[:, :2] * values[:2], right[:2])
        left, right = (KMeans(bits=4).encode(replace(layer, weight=part)) for part in parts)
        return Product(left, right, "activations")


def test_products_of_two_layers(tmp_path: Path) -> None:
    source = nets.write(nets.mixed(), tmp_path / "mixed.onnx")
    result = vqonnx.compress(source, Factors(), fuse=True)
    result.save(tmp_path / "small.onnx")
    fused = {layer.name: layer.fused for layer in result.layers}
    assert fused["conv_w"] == ("Conv", "ConvRelu")
    assert fused["up_w"] == ("Conv",), "the other factor is read by a ConvTranspose"
    assert [layer.fused for layer in vqonnx.report(tmp_path / "small.onnx").layers] == list(fused.values())
    vqonnx.expand(tmp_path / "small.onnx", tmp_path / "plain.onnx")
    assert [n.name for n in onnx.load(tmp_path / "plain.onnx").graph.node] == [n.name for n in nets.mixed().graph.node]
    assert_same_outputs(tmp_path / "small.onnx", tmp_path / "plain.onnx", nets.small_feed("mixed"))


@pytest.mark.parametrize("name", nets.SMALL)
def test_small_models_expand_to_the_same(name: str, tmp_path: Path) -> None:
    source = nets.write(nets.SMALL[name](), tmp_path / "source.onnx")
    for fuse in (False, True):
        vqonnx.compress(source, PQ(width=5, bits=3), fuse=fuse).save(tmp_path / f"{fuse}.onnx")
        vqonnx.expand(tmp_path / f"{fuse}.onnx", tmp_path / f"plain-{fuse}.onnx")
    same_file(tmp_path / "plain-True.onnx", tmp_path / "plain-False.onnx")


def test_a_file_without_bodies(tmp_path: Path) -> None:
    small = mixed(tmp_path, target="custom")
    made = vqonnx.fuse(small, tmp_path / "fused.onnx", verify=KERNELS)
    assert not onnx.load(tmp_path / "fused.onnx").functions
    assert (
        vqonnx.fuse(tmp_path / "fused.onnx", tmp_path / "apart.onnx", undo=True, verify=KERNELS).layers == made.layers
    )
    same_file(tmp_path / "apart.onnx", small)
    vqonnx.expand(small, tmp_path / "plain.onnx")
    vqonnx.expand(tmp_path / "fused.onnx", tmp_path / "plain-fused.onnx")
    same_file(tmp_path / "plain.onnx", tmp_path / "plain-fused.onnx")


def test_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = mixed(tmp_path)
    monkeypatch.setattr(vqonnx.modelfile, "SINGLE_FILE_LIMIT", 1000)
    monkeypatch.setattr(vqonnx.modelfile, "_INLINE_LIMIT", 0)
    vqonnx.fuse(small, tmp_path / "fused.onnx")
    assert (tmp_path / "fused.onnx.data").exists()
    vqonnx.fuse(tmp_path / "fused.onnx", tmp_path / "apart.onnx", undo=True)
    vqonnx.expand(tmp_path / "fused.onnx", tmp_path / "plain.onnx")
    assert_same_outputs(small, tmp_path / "apart.onnx", nets.small_feed("mixed"))
    assert_same_outputs(small, tmp_path / "plain.onnx", nets.small_feed("mixed"))


# Commands


def test_every_command_on_a_fused_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: Any) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capfd.readouterr().out

    source = nets.write(nets.mixed(), tmp_path / "mixed.onnx")
    small, fused, apart, plain = (tmp_path / f"{name}.onnx" for name in ("small", "fused", "apart", "plain"))
    text = command("compress", source, small, "--method", "kmeans", "--bits", 4, "--no-fuse")
    assert "ConvRelu" not in text
    text = command("fuse", small, fused)
    assert (
        text
        == f"{fused}: 5 layers fused (1 ConvRelu, 1 DepthwiseConv, 1 Gemm, 2 MatMul), {fused.stat().st_size:,} bytes\n"
    )
    assert "ConvRelu" in command("report", fused)
    layers = json.loads(command("report", fused, "--json"))["layers"]
    assert [layer["fused"] for layer in layers] == [["ConvRelu"], [], ["Gemm"], ["MatMul"], ["MatMul"]]
    command("verify", source, fused, "--library", "--min-snr", 5)
    command("bench", source, fused, "--rounds", 2, "--threads", 1)
    assert json.loads(command("fuse", fused, apart, "--undo", "--json")) == {
        "layers": {
            "conv_w": "ConvRelu",
            "depth_w": "DepthwiseConv",
            "fc_w": "Gemm",
            "head_w": "MatMul",
            "tiny_w": "MatMul",
        },
        "bytes": apart.stat().st_size,
    }
    same_file(apart, small)
    assert command("fuse", apart, fused, "--quiet", "--no-verify") == ""
    command("expand", fused, plain)
    text = command("compress", source, small, "--method", "kmeans", "--bits", 4, "--fuse")
    assert Counter(text.split())["ConvRelu"] == 1
    same_file(small, fused)


def test_memory_and_latency_of_a_fused_file(tmp_path: Path) -> None:
    small = mixed(tmp_path, fuse=True)
    found = bench(tmp_path / "mixed.onnx", small, rounds=2)
    assert found.latency_ms.compressed is not None
    assert found.latency_ms.compressed_library is not None


# What is refused


def refused(capfd: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) in (1, 2)
    _, text = capfd.readouterr()
    assert len(text.splitlines()) == 1, text
    return text


def test_what_cannot_be_fused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = nets.write(nets.mixed(), tmp_path / "mixed.onnx")
    out = tmp_path / "out.onnx"
    assert "mixed.onnx: holds no weight that vqonnx compressed; there is nothing to fuse" in refused(
        capfd, "fuse", source, out
    )
    portable = written(source, tmp_path / "portable.onnx", target="portable")
    assert "(target portable), which cannot be fused" in refused(capfd, "fuse", portable, out)
    small = written(source, tmp_path / "small.onnx")
    assert "small.onnx: has no fused layer; there is nothing to undo" in refused(capfd, "fuse", small, out, "--undo")
    assert "is the input itself" in refused(capfd, "fuse", small, small)
    assert "does not exist" in refused(capfd, "fuse", small, tmp_path / "no" / "out.onnx")
    assert "cannot be read" in refused(capfd, "fuse", tmp_path / "absent.onnx", out)
    assert "input shape for 'q'" in refused(capfd, "fuse", small, out, "--input-shapes", "q:1x4")
    text = refused(capfd, "compress", source, out, "--method", "kmeans", "--target", "portable", "--fuse")
    assert text == "vqonnx: fuse: target portable has standard operators only; choose hybrid or custom\n"
    with pytest.raises(OptionError, match="target portable has standard operators only"):
        vqonnx.compress(source, METHOD, target="portable", fuse=True)
    assert not out.exists()
    half = written(nets.write(nets.half(), tmp_path / "half.onnx"), tmp_path / "small_half.onnx")
    with pytest.raises(ModelError, match="has no layer that can be fused"):
        vqonnx.fuse(half, out)
    assert not out.exists()


def test_a_new_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, out = mixed(tmp_path), tmp_path / "out.onnx"
    monkeypatch.setattr(sys.modules["vqonnx.fuse"], "_apart", lambda *_: 30.0)
    with pytest.raises(VerifyError, match=r"differs without the library by 30\.0 dB \(at least 80 expected\)"):
        vqonnx.fuse(small, out)
    assert not out.exists()
    vqonnx.fuse(small, out, verify=False)
    with pytest.raises(InputError):
        vqonnx.fuse(out, out, undo=True)


def note_of(node: onnx.NodeProto) -> str:
    return "".join(entry.value for entry in node.metadata_props)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    fused = mixed(tmp_path, fuse=True)
    whole = onnx.load(fused)
    for name in ("conv_w", "fc_w"):
        model = onnx.ModelProto.FromString(whole.SerializeToString())
        node = next(n for n in model.graph.node if n.domain == "vqonnx" and name in note_of(n))
        del node.input[-1]
        onnx.save(model, fused)
        for action in (vqonnx.report, lambda path: vqonnx.expand(path, tmp_path / "out.onnx")):
            with pytest.raises(ModelError, match="inputs instead of") as caught:
                action(fused)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


def test_outputs_that_are_nearly_zero_may_differ_by_rounding() -> None:
    apart = sys.modules["vqonnx.fuse"]._apart
    small = np.full((2, 3), 7e-7, np.float32)
    assert apart({"y": small}, {"y": small + np.float32(5e-8)}) is None
    assert apart({"y": small}, {"y": small + np.float32(5e-7)}) < 10
    assert apart({"y": small + 1}, {"y": small + np.float32(1.001)}) == pytest.approx(60, abs=0.1)
