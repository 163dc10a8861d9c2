"""Low-rank factors through the whole tool: compress, report and expand, in every target, whole and as two layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
from nets import CONV, MLP
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image
from test_zoo import RATIOS, SLOW, model_of

import vqonnx
from vqonnx.errors import ModelError
from vqonnx.form import Apply, Coded, Matrix, Product
from vqonnx.generate import generate_feeds
from vqonnx.graph import LINEAR, find
from vqonnx.method import Layer, Method
from vqonnx.methods import SVD, KMeans
from vqonnx.methods.svd import factorise
from vqonnx.place import Target
from vqonnx.record import erase_record
from vqonnx.runtime import open_session, run
from vqonnx.scope import scopes
from vqonnx.view import ViewOrder

TARGETS: tuple[Target, ...] = ("hybrid", "portable", "custom")


def source(name: str, folder: Path) -> Path:
    return {"conv": CONV, "mlp": MLP}.get(name) or nets.write(nets.SMALL[name](), folder / f"{name}.onnx")


@pytest.mark.parametrize("apply", ["weights", "activations"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["conv", "mlp", *nets.SMALL])
def test_low_rank_factors_take_the_place_of_weights(name: str, target: Target, apply: Apply, tmp_path: Path) -> None:
    model, path, plain = source(name, tmp_path), tmp_path / "out.onnx", tmp_path / "plain.onnx"
    method = SVD(share=0.4, apply=apply)
    result = vqonnx.compress(model, method, target=target)
    result.save(path)
    assert result.layers
    assert all(len(layer.factors) == (2 if apply == "activations" else 0) for layer in result.layers)
    report = vqonnx.report(path)
    assert report.layers == result.layers
    assert report.bytes_after == path.stat().st_size
    assert report.bytes_after < report.bytes_before or name == "half", (
        "only two small layers, with names for each factor"
    )
    assert vqonnx.expand(path, plain) == len(result.layers)

    proto = onnx.load(path)
    assert "vqonnx" not in {entry.domain for entry in proto.opset_import}, "standard operators need no library"
    assert not [function for function in proto.functions if function.domain == "vqonnx"]
    before = {site.name: site for site in find(onnx.load(model), model.parent).sites}
    after = {site.name: site for site in find(onnx.load(plain), plain.parent).sites}
    for layer in result.layers:
        view = before[layer.name].view("ihw")
        form = method.encode(Layer(layer.name, layer.op_type, view.matrix(before[layer.name].read())))
        assert isinstance(form, Product)
        assert form.nbytes == layer.bytes
        site, inner = before[layer.name], form.left.shape[1]
        steps = 4 if layer.op_type == "ConvTranspose" else 1  # positions of its output for one of its input
        each = inner * (site.group * view.cols + steps * view.rows) / (view.rows * view.cols)
        assert layer.multiplications == pytest.approx(1 if apply == "weights" else each, rel=1e-12)
        decoded = view.matrix(after[layer.name].read())
        step = 1e-5 if name != "half" else 1e-3
        np.testing.assert_allclose(decoded, form.decode(), rtol=step, atol=step, err_msg=layer.name)


def layers_of(model: ModelProto) -> list[bytes]:
    """The linear layers of all scopes, with the order of their attributes made equal."""
    found = []
    for scope in scopes(model):
        for node in scope.proto.node:
            if node.op_type in LINEAR:
                node.attribute.sort(key=lambda attribute: attribute.name)
                found.append(node.SerializeToString())
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", nets.SMALL)
def test_expand_joins_the_two_layers_again(name: str, target: Target, tmp_path: Path) -> None:
    model, path, plain = source(name, tmp_path), tmp_path / "out.onnx", tmp_path / "plain.onnx"
    vqonnx.compress(model, SVD(share=0.4, apply="activations"), target=target).save(path)
    count = len(layers_of(onnx.load(model)))
    layers = vqonnx.report(path).layers
    assert count < len(layers_of(onnx.load(path))) <= count + 2 * len(layers)
    vqonnx.expand(path, plain)
    original, expanded = onnx.load(model), onnx.load(plain)
    assert layers_of(expanded) == layers_of(original)
    gone = {"Cast"} if name == "bfloat" else set()
    assert [n.op_type for n in original.graph.node if n.op_type not in gone] == [n.op_type for n in expanded.graph.node]
    if name != "bfloat":
        kinds = [
            sorted((tensor.name, tensor.data_type, list(tensor.dims)) for tensor in each.graph.initializer)
            for each in (original, expanded)
        ]
        assert kinds[0] == kinds[1]
    for feed in nets.feeds_of(name):
        for a, b in zip(nets.outputs(path, feed), nets.outputs(plain, feed), strict=True):
            step = 1e-5 if name != "half" else 1e-2
            np.testing.assert_allclose(a, b, rtol=step, atol=step)


@pytest.mark.parametrize("target", TARGETS)
def test_factors_and_codes_in_one_model(target: Target, tmp_path: Path) -> None:
    model, path = source("mixed", tmp_path), tmp_path / "out.onnx"
    overrides = [vqonnx.Override("fc_w", SVD(share=0.6)), vqonnx.Override("*", KMeans(bits=3))]
    result = vqonnx.compress(model, KMeans(bits=3), overrides=overrides, target=target)
    result.save(path)
    assert vqonnx.report(path).layers == result.layers
    assert {layer.method for layer in result.layers} == {"svd", "kmeans"}


def test_by_default_activations_are_multiplied_where_that_is_cheaper(tmp_path: Path) -> None:
    for share, applied in ((0.3, True), (0.5, False)):  # factors in float16 take 2 bytes for each multiplication
        path = tmp_path / "out.onnx"
        vqonnx.compress(source("mlp", tmp_path), SVD(share=share)).save(path)
        for layer in vqonnx.report(path).layers:
            assert bool(layer.factors) == applied
            assert layer.multiplications <= 0.6 if applied else layer.multiplications == 1
            rows, cols = layer.shape
            assert not applied or layer.multiplications == layer.bytes / 2 / (rows * cols)


def test_without_the_record_the_two_layers_stay(tmp_path: Path) -> None:
    """Nothing then says which nodes belong together; the expanded model has both, and the same outputs."""
    model, path, plain = source("mixed", tmp_path), tmp_path / "out.onnx", tmp_path / "plain.onnx"
    overrides = [vqonnx.Override("fc_w", SVD(share=0.4, apply="activations"))]
    vqonnx.compress(model, KMeans(bits=3), overrides=overrides).save(path)
    proto = onnx.load(path)
    erase_record(proto)
    onnx.save(proto, path)
    vqonnx.expand(path, plain)
    assert [node.op_type for node in onnx.load(plain).graph.node].count("Gemm") == 2
    feed = nets.small_feed("mixed")
    np.testing.assert_array_equal(nets.outputs(path, feed)[0], nets.outputs(plain, feed)[0])


def test_two_layers_that_another_tool_took_apart_are_refused(tmp_path: Path) -> None:
    model, path = source("mixed", tmp_path), tmp_path / "out.onnx"
    vqonnx.compress(model, SVD(share=0.4, apply="activations")).save(path)
    proto = onnx.load(path)
    second = next(node for node in proto.graph.node if node.name == "fc")
    between = second.input[0]
    proto.graph.node.insert(
        list(proto.graph.node).index(second), onnx.helper.make_node("Identity", [between], ["passed"])
    )
    second.input[0] = "passed"
    onnx.save(proto, path)
    for read in (vqonnx.report, lambda path: vqonnx.expand(path, tmp_path / "plain.onnx")):
        with pytest.raises(ModelError, match="weight 'fc_w': its two layers are no longer one after the other"):
            read(path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(RATIOS)]
)
def test_models_of_the_zoo_as_two_layers(name: str, data_dir: Path, tmp_path: Path) -> None:
    """Real graphs: every layer is run as two, and expands to the node that it was."""
    model, path, plain = model_of(name, data_dir), tmp_path / "small.onnx", tmp_path / "plain.onnx"
    result = vqonnx.compress(model, SVD(share=0.5, apply="activations"), allow_unchanged=True)
    if not result.layers:
        pytest.skip(f"{name}: no layer is large enough for two factors")
    result.save(path)  # loads and runs it with and without the library
    assert all(layer.factors for layer in result.layers)
    reported = vqonnx.report(path).layers  # bytes of factors that two layers share are those of the first
    assert [replace(layer, bytes=0) for layer in reported] == [replace(layer, bytes=0) for layer in result.layers]
    vqonnx.expand(path, plain)
    original, expanded = onnx.load(model), onnx.load(plain)
    onnx.checker.check_model(expanded)
    assert layers_of(expanded) == layers_of(original)
    feed = generate_feeds(model, count=1)[0]
    small, whole = (run(open_session(each, threads=1), feed) for each in (path, plain))
    for key, value in small.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            close = 3e-2 if value.dtype == np.float16 else 1e-3
            scale = float(np.abs(value.astype(np.float64)).max(initial=0))
            atol = close * scale + 2**-22  # a sigmoid near 0 is only as exact as float32 is near 1
            np.testing.assert_allclose(
                whole[key].astype(np.float64), value.astype(np.float64), rtol=close, atol=atol, err_msg=key
            )


@dataclass(frozen=True)
class _CodedFactors(Method):
    """Factors of half the multiplications, stored as codes; rows are inputs where ``by_input``."""

    id = "coded-factors"
    by_input: bool = False
    apply: Apply = "activations"

    @property
    def view_order(self) -> ViewOrder:
        return "ohw" if self.by_input else self.order

    def encode(self, layer: Layer) -> Product:
        rows, cols = layer.weight.shape
        factors = factorise(layer.weight, max(1, rows * cols // (2 * (rows + cols))))
        return Product(*map(_rounded, factors), self.apply)


def _rounded(matrix: Matrix) -> Coded:
    """The nearest of 256 evenly spaced values."""
    words = np.linspace(matrix.min(), matrix.max(), 256, dtype=np.float32)[:, None]
    codes = np.rint((matrix - matrix.min()) / max(float(np.ptp(matrix)), 1e-9) * 255)
    return Coded.one_stage(codes, words)


def cifar_images(data_dir: Path, count: int) -> NDArray[np.float32]:
    """The first test images, normalised as the models want them."""
    sheet = np.asarray(Image.open(data_dir / "cifar10" / "test.webp").convert("RGB"))
    images = sheet.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)[:count]
    mean, std = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])[..., None, None]
    return ((images / 255 - mean) / std).astype(np.float32)


def logits(model: Path, images: NDArray[np.float32], *, library: bool = False) -> list[NDArray[np.float32]]:
    session = open_session(model, library=library, threads=1)
    return list(run(session, {session.get_inputs()[0].name: images}).values())


@pytest.mark.parametrize("by_input", [False, True])
def test_resnet56_as_two_layers(by_input: bool, data_dir: Path, tmp_path: Path) -> None:
    """On real images: the outputs of the multiplied-out model, in half of the multiplications, with coded factors."""
    source, path, plain = data_dir / "models" / "resnet56.onnx", tmp_path / "small.onnx", tmp_path / "plain.onnx"
    images = cifar_images(data_dir, 16)
    outputs = {}
    for apply in ("weights", "activations"):
        result = vqonnx.compress(source, _CodedFactors(by_input=by_input, apply=apply))
        result.save(path, verify=False)  # run below
        for library in (False, True):
            (outputs[apply, library],) = logits(path, images, library=library)
    report = vqonnx.report(path)
    assert report.layers == result.layers
    assert len(report.layers) == 55
    assert all(len(layer.factors) == 2 for layer in report.layers)
    vqonnx.expand(path, plain)
    assert layers_of(onnx.load(plain)) == layers_of(onnx.load(source))
    (outputs["expanded", False],) = logits(plain, images)
    want = outputs["weights", False]
    assert want.std() > 1, "not the same logits for every image"
    for way, got in outputs.items():
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), err_msg=str(way))
    shares = [layer.multiplications for layer in report.layers]
    assert 0.3 < float(np.median(shares)) < 0.7
