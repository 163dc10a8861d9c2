"""Expand: any target becomes a plain model with the very weights that the codes mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import vqonnx
from vqonnx.errors import InputError, ModelError
from vqonnx.form import Coded, unpack
from vqonnx.graph import find
from vqonnx.method import Method
from vqonnx.methods import PQ, KMeans
from vqonnx.place import Target
from vqonnx.record import KEY, erase_record, read_record
from vqonnx.stored import find_stored

TARGETS: tuple[Target, ...] = ("hybrid", "portable", "custom")
METHODS: dict[str, Method] = {
    "kmeans": KMeans(bits=3, order="hwi"),
    "pq": PQ(width=5, bits=3),
    "books": PQ(width=5, bits=2, books="group", codebook="float32"),
}


def compress(model: ModelProto, target: Target, folder: Path, method: Method | None = None) -> Path:
    source = nets.write(model, folder / "source.onnx")
    vqonnx.compress(source, method or PQ(width=5, bits=3), target=target).save(folder / f"{target}.onnx")
    return folder / f"{target}.onnx"


def decoded_weights(path: Path) -> list[np.ndarray]:
    """The weights of a hybrid or custom file, read by docs/format.md and nothing else, in float32."""
    model = onnx.load(path)
    weights = []

    def read(nodes: Any, arrays: dict[str, np.ndarray]) -> None:
        arrays = arrays | {
            n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in nodes if n.op_type == "Constant"
        }
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    read(attribute.g.node, arrays | nets.weights_of(attribute.g))
            if node.domain == "vqonnx" and not node.op_type.startswith("Depthwise"):  # these have a dense weight
                first = 0 if node.op_type == "Decode" else 1  # a fused op has X in front
                weights.append(_decode(node, *(arrays[name] for name in node.input[first : first + 4])))

    read(model.graph.node, nets.weights_of(model.graph))
    for function in model.functions:
        if function.domain != "vqonnx":
            read(function.node, {})
    return weights


def _decode(node: NodeProto, codes: Any, codebooks: Any, scales: Any, layout: Any) -> np.ndarray:
    bits, cols, *split = (int(number) for number in layout)
    groups = -(-cols // codebooks.shape[3])
    form = Coded(unpack(codes, bits, groups), codebooks, cols, scales)
    perm = next(attribute.ints for attribute in node.attribute if attribute.name == "perm")
    return form.decode().reshape(split).transpose(perm)


def plain_weights(path: Path) -> list[np.ndarray]:
    """The weights of the layers of a plain model, in order."""
    return [site.read() for site in find(onnx.load(path), path.parent).sites]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", nets.SMALL)
def test_every_target_expands_to_the_weights_that_the_codes_mean(name: str, method: str, tmp_path: Path) -> None:
    written = {}
    for target in TARGETS:
        path = compress(nets.SMALL[name](), target, tmp_path, METHODS[method])
        plain = tmp_path / f"plain-{target}.onnx"
        assert vqonnx.expand(path, plain) == len(vqonnx.report(path).layers)
        written[target] = plain.read_bytes()
        model = onnx.load(plain)
        onnx.checker.check_model(model, full_check=True)
        assert b"vqonnx" not in written[target]
        assert all(entry.domain != "vqonnx" for entry in (*model.opset_import, *model.functions))
        assert all(entry.key != KEY for entry in model.metadata_props)
        for feed in nets.feeds_of(name):
            if target != "custom":
                for a, b in zip(nets.outputs(plain, feed), nets.outputs(path, feed), strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{name}, {method}, {target}")
        if target != "portable":
            expected = [weight.astype(np.float16 if name == "half" else np.float32) for weight in decoded_weights(path)]
            found = plain_weights(plain)
            found = [weight for weight in found if any(np.array_equal(weight, other) for other in expected)]
            assert len(found) == len(expected), f"{name}, {method}, {target}: a weight is not the decoded one"
    plain = tmp_path / "plain-hybrid.onnx"
    for target in TARGETS[1:]:
        for a, b in zip(plain_weights(plain), plain_weights(tmp_path / f"plain-{target}.onnx"), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{name}, {method}, {target}")


@pytest.mark.parametrize("target", TARGETS)
def test_codes_of_eleven_bits(target: Target, tmp_path: Path) -> None:
    """Every vector is a word, so the weight comes back but for the rounding of the words; report counts 11 bits."""
    model = nets.dense(2, 128)
    path = compress(model, target, tmp_path, PQ(width=8, bits=12))
    plain = tmp_path / "plain.onnx"
    assert vqonnx.expand(path, plain) == 2
    weights = plain_weights(plain)
    for weight, original in zip(weights, nets.weights_of(model.graph).values(), strict=True):
        np.testing.assert_array_equal(weight, original.astype(np.float16))
    if target != "portable":
        for weight, decoded in zip(weights, decoded_weights(path), strict=True):
            np.testing.assert_array_equal(weight, decoded)
    assert [layer.bytes for layer in vqonnx.report(path).layers] == [128 * 22 + 2048 * 8 * 2] * 2  # 16 codes a row
    feed = {"h0": nets.draw((3, 128), 7)}
    for library in (False, True)[target == "custom" :]:
        (wanted,), (got,) = nets.outputs(plain, feed), nets.outputs(path, feed, library=library)
        if library:  # its kernels add in another order
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(), err_msg=target)
        else:
            np.testing.assert_array_equal(got, wanted, err_msg=target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", nets.SMALL)
def test_the_graph_is_that_of_the_original(name: str, target: Target, tmp_path: Path) -> None:
    source = nets.SMALL[name]()
    vqonnx.expand(compress(source, target, tmp_path), tmp_path / "plain.onnx")
    plain = onnx.load(tmp_path / "plain.onnx")
    gone = {"Cast"} if name == "bfloat" else set()
    assert [n.op_type for n in source.graph.node if n.op_type not in gone] == [n.op_type for n in plain.graph.node]
    assert source.graph.input == plain.graph.input
    assert source.graph.output == plain.graph.output
    assert source.metadata_props == plain.metadata_props
    assert {entry.domain: entry.version for entry in source.opset_import} == {
        entry.domain: entry.version for entry in plain.opset_import
    }
    assert [function.name for function in source.functions] == [function.name for function in plain.functions]
    if name != "bfloat":
        kinds = [
            [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in model.graph.initializer]
            for model in (source, plain)
        ]
        assert sorted(kinds[0]) == sorted(kinds[1])


@pytest.mark.parametrize("target", ["hybrid", "custom"])
@pytest.mark.parametrize("name", nets.SMALL)
def test_without_the_record(name: str, target: Target, tmp_path: Path) -> None:
    path = compress(nets.SMALL[name](), target, tmp_path)
    vqonnx.expand(path, tmp_path / "known.onnx")
    model = onnx.load(path)
    erase_record(model)
    onnx.save(model, path)
    vqonnx.expand(path, tmp_path / "unknown.onnx")
    for feed in nets.feeds_of(name):
        known, unknown = (nets.outputs(tmp_path / f"{which}.onnx", feed) for which in ("known", "unknown"))
        for a, b in zip(known, unknown, strict=True):
            np.testing.assert_array_equal(a, b)


def test_expanded_models_can_be_compressed_again(tmp_path: Path) -> None:
    path = compress(nets.mixed(), "hybrid", tmp_path, KMeans(bits=2))
    vqonnx.expand(path, tmp_path / "plain.onnx")
    again = vqonnx.compress(tmp_path / "plain.onnx", KMeans(bits=2))
    assert all(layer.weight_snr_db is None for layer in again.layers), "four values fit four words without error"
    again.save(tmp_path / "again.onnx")
    feed = nets.small_feed("mixed")
    np.testing.assert_array_equal(nets.outputs(path, feed)[0], nets.outputs(tmp_path / "again.onnx", feed)[0])


def test_a_codebook_that_two_layers_share_stays_for_the_other(tmp_path: Path) -> None:
    """Equal codebooks are stored once; expanding must not take one away too early, or leave it behind."""
    model = nets.dense(2, 64)
    weight = np.random.default_rng(0).integers(0, 4, (2, 64, 64)).astype(np.float32)
    for tensor, values in zip(model.graph.initializer, weight, strict=True):
        tensor.raw_data = values.tobytes()
    path = compress(model, "hybrid", tmp_path, KMeans(bits=2))
    constants = nets.weights_of(onnx.load(path).graph)
    assert sum(values.dtype == np.float16 for values in constants.values()) == 1
    vqonnx.expand(path, tmp_path / "plain.onnx")
    found = nets.weights_of(onnx.load(tmp_path / "plain.onnx").graph)
    assert sorted(found) == ["w0", "w1"]
    np.testing.assert_array_equal(np.stack([found["w0"], found["w1"]]), weight)


def test_weights_keep_their_type(tmp_path: Path) -> None:
    for target in TARGETS:
        path = compress(nets.half(), target, tmp_path, KMeans(bits=2))
        model = onnx.load(path)
        conv, proj = find_stored(model, tmp_path, read_record(model))
        assert (conv.shape, proj.shape) == ((64, 8, 1, 1), (4, 240))
        vqonnx.expand(path, tmp_path / "plain.onnx")
        assert {t.data_type for t in onnx.load(tmp_path / "plain.onnx").graph.initializer} == {TensorProto.FLOAT16}


def test_what_cannot_be_expanded(tmp_path: Path) -> None:
    source = nets.write(nets.mixed(), tmp_path / "mixed.onnx")
    before = source.read_bytes()
    with pytest.raises(ModelError, match=r"mixed\.onnx: holds no weight that vqonnx compressed; there is nothing"):
        vqonnx.expand(source, tmp_path / "out.onnx")
    path = compress(nets.mixed(), "hybrid", tmp_path)
    with pytest.raises(InputError, match=r"hybrid\.onnx: is the input itself"):
        vqonnx.expand(path, path)
    with pytest.raises(InputError, match="does not exist"):
        vqonnx.expand(path, tmp_path / "no" / "out.onnx")
    assert source.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hybrid.onnx", "mixed.onnx", "source.onnx"]


def test_damaged_codes_are_refused(tmp_path: Path) -> None:
    path = compress(nets.dense(1, 64), "hybrid", tmp_path, KMeans(bits=2))
    model = onnx.load(path)
    layout = next(t for t in model.graph.initializer if t.data_type == TensorProto.INT64)
    layout.CopyFrom(helper.make_tensor(layout.name, TensorProto.INT64, layout.dims, [2, 64, 64, 63]))
    onnx.save(model, path)
    with pytest.raises(vqonnx.VqonnxError, match="w0") as caught:
        vqonnx.expand(path, tmp_path / "out.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()
