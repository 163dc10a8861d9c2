"""Low-rank factors through the whole tool: compress, report and expand, in every target."""

from __future__ import annotations

from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
from nets import CONV, MLP

import vqonnx
from vqonnx.form import Product
from vqonnx.graph import find
from vqonnx.method import Layer
from vqonnx.methods import SVD, KMeans
from vqonnx.place import Target

TARGETS: tuple[Target, ...] = ("hybrid", "portable", "custom")


def source(name: str, folder: Path) -> Path:
    return {"conv": CONV, "mlp": MLP}.get(name) or nets.write(nets.SMALL[name](), folder / f"{name}.onnx")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["conv", "mlp", "mixed", "half", "branches", "function"])
def test_low_rank_factors_take_the_place_of_weights(name: str, target: Target, tmp_path: Path) -> None:
    model, path, plain = source(name, tmp_path), tmp_path / "out.onnx", tmp_path / "plain.onnx"
    result = vqonnx.compress(model, SVD(share=0.4), target=target)
    result.save(path)
    assert result.layers
    report = vqonnx.report(path)
    assert report.layers == result.layers
    assert report.bytes_after == path.stat().st_size < report.bytes_before
    assert vqonnx.expand(path, plain) == len(result.layers)

    proto = onnx.load(path)
    assert "vqonnx" not in {entry.domain for entry in proto.opset_import}, "standard operators need no library"
    assert not [function for function in proto.functions if function.domain == "vqonnx"]
    before = {site.name: site for site in find(onnx.load(model), model.parent).sites}
    after = {site.name: site for site in find(onnx.load(plain), plain.parent).sites}
    for layer in result.layers:
        view = before[layer.name].view("ihw")
        form = SVD(share=0.4).encode(Layer(layer.name, layer.op_type, view.matrix(before[layer.name].read())))
        assert isinstance(form, Product)
        assert form.nbytes == layer.bytes
        decoded = view.matrix(after[layer.name].read())
        step = 1e-5 if name != "half" else 1e-3
        np.testing.assert_allclose(decoded, form.decode(), rtol=step, atol=step, err_msg=layer.name)


@pytest.mark.parametrize("target", TARGETS)
def test_factors_and_codes_in_one_model(target: Target, tmp_path: Path) -> None:
    model, path = source("mixed", tmp_path), tmp_path / "out.onnx"
    overrides = [vqonnx.Override("fc_w", SVD(share=0.6)), vqonnx.Override("*", KMeans(bits=3))]
    result = vqonnx.compress(model, KMeans(bits=3), overrides=overrides, target=target)
    result.save(path)
    assert vqonnx.report(path).layers == result.layers
    assert {layer.method for layer in result.layers} == {"svd", "kmeans"}
