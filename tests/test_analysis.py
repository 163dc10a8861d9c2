"""Layers are ranked by what the model makes of their errors; the table that is written is one that compress reads."""

from __future__ import annotations

import json
from pathlib import Path

import nets
import numpy as np
import pytest
from cases import parse

import vqonnx
from vqonnx.analysis import analyze, override_table, plot
from vqonnx.cli import main
from vqonnx.config import read_config
from vqonnx.errors import OptionError
from vqonnx.methods import PQ, Best, Entropy

CALIBRATION = [{"image": nets.images(64)}]


@pytest.fixture(scope="module")
def found() -> tuple[vqonnx.LayerAnalysis, ...]:
    return analyze(nets.MLP, Best(bits=3), calibration=CALIBRATION)


def test_shares_add_up_and_sharing_does_less_harm(found: tuple[vqonnx.LayerAnalysis, ...]) -> None:
    assert [layer.name for layer in found] == [layer.name for layer in compressed().layers]
    assert sum(layer.even for layer in found) == pytest.approx(1)
    assert sum(layer.harm for layer in found) == pytest.approx(1)
    weights = [np.prod(layer.shape) for layer in found]
    mean = sum(layer.bits * weight for layer, weight in zip(found, weights, strict=True)) / sum(weights)
    assert 2 < mean <= 3
    assert all(layer.sensitivity > 0 and layer.snr_db > 0 for layer in found)


def compressed() -> vqonnx.Result:
    return vqonnx.compress(nets.MLP, Best(bits=3), calibration=CALIBRATION)


def test_a_layer_whose_output_is_scaled_up_matters_more(tmp_path: Path) -> None:
    """Errors of the last layer go straight to the output; those of one that is hardly used do not."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    source = nets.write(
        parse(
            "(float[N, 64] x) => (float[N, 64] y) "
            "{ a = MatMul (x, w)  b = MatMul (x, v)  c = Mul (a, s)  y = Add (b, c) }",
            w=first,
            v=second,
            s=np.array(0.01, np.float32),
        ),
        tmp_path / "two.onnx",
    )
    layers = {layer.name: layer for layer in analyze(source, calibration=[{"x": first[:32]}])}
    assert layers["v"].sensitivity > 100 * layers["w"].sensitivity
    assert layers["v"].bits > layers["w"].bits


def test_the_table_is_a_configuration(found: tuple[vqonnx.LayerAnalysis, ...], tmp_path: Path) -> None:
    table = tmp_path / "layers.toml"
    table.write_text(override_table(found), encoding="utf-8")
    overrides = read_config(table).overrides
    by_harm = sorted(found, key=lambda layer: -layer.even)
    assert [override.method for override in overrides] == [layer.method for layer in by_harm]
    result = vqonnx.compress(nets.MLP, Entropy(), calibration=CALIBRATION, overrides=overrides)
    assert {layer.name: layer.method for layer in result.layers} == {layer.name: layer.method.id for layer in found}


def test_the_command_writes_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, table = tmp_path / "data.npz", tmp_path / "layers.toml"
    np.savez(data, image=nets.images(64))
    arguments = ["analyze", str(nets.MLP), "--calibration", str(data), "--bits", "3", "--jobs", "1", "--quiet"]
    assert main([*arguments, "--output", str(table), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {layer["name"] for layer in content["layers"]} == {layer.name for layer in compressed().layers}
    assert len(read_config(table).overrides) == len(content["layers"])
    assert main([*arguments, "--method", "pq"]) == 2
    assert "method 'pq' has no bits to share" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what older versions of matplotlib call
def test_a_plot_is_drawn(found: tuple[vqonnx.LayerAnalysis, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing is an extra")
    plot(found, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_methods_without_bits_to_share_are_refused() -> None:
    with pytest.raises(OptionError, match="method 'pq' has no bits to share; choose best, entropy or transform"):
        analyze(nets.MLP, PQ(), calibration=CALIBRATION)  # type: ignore[arg-type]
