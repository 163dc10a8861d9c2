"""Layers are ranked by what the model makes of their errors; the table that is written is one that compress reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
from cases import parse

import vqonnx
from vqonnx.analysis import analyze, override_table, plot
from vqonnx.cli import main
from vqonnx.config import read_config
from vqonnx.errors import OptionError
from vqonnx.methods import PQ, Best, Entropy, Transform

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


def test_a_plot_that_cannot_be_drawn(found: tuple[vqonnx.LayerAnalysis, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing is an extra")
    with pytest.raises(OptionError, match=r"layers\.abc: matplotlib does not write such files; give a name"):
        plot(found, tmp_path / "layers.abc")


def test_names_and_values_that_toml_writes_in_its_own_way(
    found: tuple[vqonnx.LayerAnalysis, ...], tmp_path: Path
) -> None:
    method = Transform(blocks=None)
    layer = replace(found[0], name='a "name"\n\x7f\\ü', method=method)
    table = tmp_path / "layers.toml"
    table.write_text(override_table([layer]), encoding="utf-8")
    (override,) = read_config(table).overrides
    assert (override.pattern, override.method) == (layer.name, method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1; choose 0 to 2147483647"),
        ({"batch": 0}, "batch is 0; choose 1 or more"),
        ({"jobs": 0}, "jobs is 0; choose 1 or more"),
        ({"method": Entropy(step=0.5)}, "method 'entropy' with these options has no bits to share; leave out"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        analyze(nets.MLP, calibration=CALIBRATION, **options)


def test_paths_that_cannot_be_written_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--output", "--plot"):
        arguments = ["analyze", str(nets.MLP), "--calibration", "nowhere.npz", option, str(tmp_path / "no" / "a.png")]
        assert main(arguments) == 2
        assert "does not exist; make it first" in capsys.readouterr().err


def test_methods_without_bits_to_share_are_refused() -> None:
    with pytest.raises(OptionError, match="method 'pq' has no bits to share; choose best, entropy or transform"):
        analyze(nets.MLP, PQ(), calibration=CALIBRATION)  # type: ignore[arg-type]
