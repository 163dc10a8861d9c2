"""Checkpoints of kill-the-bits: what is decoded is what the formula gives, and everything else is refused by name."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import NETWORK, Spec
from hypothesis import given
from hypothesis import strategies as st

from vqonnx.checkpoint import read_checkpoint
from vqonnx.errors import InputError, ModelError
from vqonnx.rates import PaperLayer, paper_size_mib

# Size by the rule of the paper, MiB; 3.19 was published for the last, where the paper clamps one codebook otherwise.
PUBLISHED = {"resnet18_small_blocks": 1.541, "resnet18_large_blocks": 1.029, "resnet50_large_blocks": 3.184}


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    outputs, groups = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    words = draw(st.one_of(st.integers(1, 256), st.sampled_from([257, 1024, 2048])))
    if draw(st.booleans()):  # fully connected
        width = draw(st.integers(1, 9))
        return Spec((outputs, groups * width), width, words)
    kernel, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Spec((outputs, groups * channels, kernel, kernel), channels * kernel**2, words, "bn")


@given(specs(), st.integers(0, 99))
def test_a_layer_decodes_to_the_formula(spec: Spec, seed: int) -> None:
    name = "conv" if spec.norm else "fc"
    made = checkpoints.entries({name: spec}, seed)
    with tempfile.TemporaryDirectory() as folder:
        (layer,) = read_checkpoint(checkpoints.save(made, Path(folder) / "net.pth")).layers
    weight, bias = checkpoints.formula(made, name, spec)
    assert (layer.name, layer.shape, layer.compressed) == (name, spec.shape, True)
    np.testing.assert_array_equal(layer.form.decode().reshape(layer.shape), weight)
    np.testing.assert_array_equal(layer.bias.astype(np.float32), bias)
    assert layer.bias.dtype == (np.float16 if spec.norm else np.float32)
    assert layer.form.codebooks.dtype == np.float16
    assert layer.form.codebooks.shape == (1, 1, spec.words, spec.width)


def test_layers_come_in_the_order_of_computation(tmp_path: Path) -> None:
    made = checkpoints.entries()
    assert next(iter(made)) == "layer1.0.conv1"  # compressed layers come first in the file
    found = read_checkpoint(checkpoints.save(made, tmp_path / "net.pth"))
    assert [layer.name for layer in found.layers] == list(NETWORK)


def test_a_layer_that_was_not_compressed_keeps_its_values(tmp_path: Path) -> None:
    made = checkpoints.entries()
    layer = read_checkpoint(checkpoints.save(made, tmp_path / "net.pth")).layers[0]
    assert not layer.compressed
    np.testing.assert_array_equal(layer.form.codebooks.reshape(layer.shape), made["conv1"]["weight"].numpy())
    np.testing.assert_array_equal(
        layer.form.decode().reshape(layer.shape), checkpoints.formula(made, "conv1", NETWORK["conv1"])[0]
    )


def test_the_size_is_that_of_the_paper(tmp_path: Path) -> None:
    found = read_checkpoint(checkpoints.save(checkpoints.entries(), tmp_path / "net.pth"))
    coded = [PaperLayer(576, 9, 13), PaperLayer(1152, 18, 16), PaperLayer(128, 4, 8), PaperLayer(160, 4, 30)]
    rest = 216 + 2 * (8 + 8 + 16 + 16) + 10  # the first layer, scales and shifts, the last bias
    assert found.paper_mib == paper_size_mib(coded, rest)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str, data_dir: Path) -> None:
    found = read_checkpoint(data_dir / "published_vq" / f"{name}.pth")
    assert found.paper_mib == pytest.approx(PUBLISHED[name], abs=0.0005)
    assert (found.layers[0].name, found.layers[1].name, found.layers[-1].name) == ("conv1", "layer1.0.conv1", "fc")
    assert len(found.layers) == (21 if "18" in name else 54)


def _without(entries: checkpoints.Entries, name: str, key: str | None = None) -> checkpoints.Entries:
    changed = {n: dict(entry) for n, entry in entries.items()}
    if key is None:
        del changed[name]
    else:
        del changed[name][key]
    return changed


def _with(entries: checkpoints.Entries, name: str, **values: Any) -> checkpoints.Entries:
    return {**entries, name: {**entries.get(name, {}), **values}}


BAD = {
    "a list": ([1, 2], "not a checkpoint of kill-the-bits, which is a dict of dicts by layer"),
    "a state dict": ({"conv1.weight": torch.ones(3)}, "which is a dict of dicts by layer"),
    "nested": ({"model": {"conv1.weight": torch.ones(3)}}, "no entry has centroids and assignments"),
    "no shift": (
        _without(checkpoints.entries(), "layer1.0.bn2"),
        r"layer1\.0\.conv2 has neither layer1\.0\.bn2 nor layer1\.0\.conv2_bias",
    ),
    "no codes": (
        _without(checkpoints.entries(), "layer1.0.conv2", "assignments"),
        r"layer1\.0\.conv2: has no assignments; the file is damaged",
    ),
    "code too large": (
        _with(checkpoints.entries(), "fc", centroids=torch.ones(3, 4)),
        r"fc: assignments \d+ to \d+ go beyond 3 centroids",
    ),
    "blocks": (
        _with(checkpoints.entries(), "fc", n_blocks=7),
        r"fc: 40 assignments, 7 blocks and centroids \[30, 4\] do not fit",
    ),
    "kernel": (
        _with(checkpoints.entries(), "layer1.0.downsample.0", k=3),
        r"downsample\.0: 2 blocks of 4 weights do not fill kernels of 9",
    ),
    "scale": (
        _with(checkpoints.entries(), "bn1", weight=torch.ones(9)),
        r"conv1: scale has shape \[9\], the layer 8 outputs",
    ),
    "infinite": (
        _with(checkpoints.entries(), "fc", centroids=torch.full((30, 4), torch.inf)),
        "fc: codebooks hold a value that is not finite",
    ),
    "left over": (
        _with(checkpoints.entries(), "layer9.bn1", weight=torch.ones(9), bias=torch.ones(9)),
        r"entry 'layer9\.bn1' \(weight, bias\) belongs to no layer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_checkpoint_is_refused(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = checkpoints.save(content, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello world, nobody wrote this with torch", bytes(range(256)) * 9, "half"])
def test_what_torch_cannot_read_is_refused(content: bytes | str, tmp_path: Path) -> None:
    path = checkpoints.save(checkpoints.entries(), tmp_path / "net.pth")
    path.write_bytes(path.read_bytes()[:3000] if isinstance(content, str) else content)
    with pytest.raises(ModelError, match="torch cannot read it; it is cut off, or not a checkpoint") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"net\.pth: cannot be read \(No such file or directory\)"):
        read_checkpoint(tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r"cannot be read \(Is a directory\)"):
        read_checkpoint(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = checkpoints.save({"conv1": {"weight": print}}, tmp_path / "net.pth")
    with pytest.raises(ModelError, match="not a checkpoint of weights only"):
        read_checkpoint(path)


def test_torch_is_asked_for_only_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.save(checkpoints.entries(), tmp_path / "net.pth")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"needs torch; pip install 'vqonnx\[distill\]'$"):
        read_checkpoint(path)
    code = "import sys, vqonnx, vqonnx.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
