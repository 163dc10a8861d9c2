"""Published checkpoints in ONNX graphs: the outputs of the decoded network, every bit of the codes, clear refusals."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import checkpoints
import nets
import numpy as np
import onnx
import pytest
from checkpoints import NETWORK
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

import vqonnx
from vqonnx.checkpoint import read_checkpoint
from vqonnx.cli import main
from vqonnx.errors import InputError, ModelError
from vqonnx.generate import generate_feeds
from vqonnx.modelfile import remove_entries
from vqonnx.place import Target
from vqonnx.published import import_kill_the_bits
from vqonnx.runtime import open_session, run

Change = Callable[[ModelProto], object]


@pytest.fixture
def made() -> checkpoints.Entries:
    return checkpoints.entries()


@pytest.fixture
def source(made: checkpoints.Entries, tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return checkpoints.save(made, tmp_path / "in" / "net.pth")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return nets.write(checkpoints.graph(), tmp_path / "model.onnx")


def expected(made: checkpoints.Entries) -> NDArray[np.generic]:
    """Logits of a plain model that has the weights of the formula."""
    plain = checkpoints.graph(checkpoints.weights(made))
    return run(open_session(plain.SerializeToString(), threads=1), checkpoints.feed())["logits"]


def logits(path: Path, *, library: bool = False) -> NDArray[np.generic]:
    return nets.outputs(path, checkpoints.feed(), library=library)[0]


def close(found: NDArray[np.generic], wanted: NDArray[np.generic]) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("target", get_args(Target))
def test_outputs_are_those_of_the_decoded_network(
    target: Target, made: checkpoints.Entries, source: Path, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "small.onnx"
    saved = import_kill_the_bits(source, model, target=target).save(path)
    assert saved.bytes == path.stat().st_size
    assert saved.comparison is not None
    for library in {"hybrid": (False, True), "portable": (False,), "custom": (True,)}[target]:
        close(logits(path, library=library), expected(made))


def test_codes_and_centroids_are_stored_as_they_are(made: checkpoints.Entries, source: Path, model: Path) -> None:
    result = import_kill_the_bits(source, model, fuse=False)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    decoders = {node.output[0]: node for node in result.model.graph.node if node.op_type == "Decode"}
    assert list(decoders) == [f"{name}.weight" for name in NETWORK]
    for name, spec in NETWORK.items():
        packed, words, scales, _ = (stored[entry] for entry in decoders[f"{name}.weight"].input)
        if not spec.words:
            np.testing.assert_array_equal(words[0, 0].reshape(spec.shape), made[name]["weight"].numpy())
            continue
        np.testing.assert_array_equal(words[0, 0], made[name]["centroids"].numpy())
        assert words.dtype == np.float16
        bits = max(1, (spec.words - 1).bit_length())
        codes = made[name]["assignments"].numpy().reshape(made[name]["n_blocks"], -1).T
        string = np.unpackbits(packed[0], axis=1, bitorder="little")[:, : codes.shape[1] * bits]
        np.testing.assert_array_equal(string.reshape(*codes.shape, bits) @ (1 << np.arange(bits)), codes)
        if spec.norm:
            np.testing.assert_array_equal(scales[:, 0], made[spec.norm]["weight"].detach().numpy())
            assert scales.dtype == np.float16


def test_biases_keep_their_precision_and_no_weight_of_the_model_is_left(
    made: checkpoints.Entries, source: Path, model: Path
) -> None:
    result = import_kill_the_bits(source, model, fuse=False)
    graph = result.model.graph
    onnx.checker.check_model(result.model)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    readers = {node.input[1]: node for node in graph.node if node.op_type in ("Conv", "Gemm")}
    for name, spec in NETWORK.items():
        bias = readers[f"{name}.weight"].input[2]
        if spec.norm:
            assert makers[bias].op_type == "Cast"
            np.testing.assert_array_equal(stored[makers[bias].input[0]], made[spec.norm]["bias"].numpy())
            assert stored[makers[bias].input[0]].dtype == np.float16
        else:
            np.testing.assert_array_equal(stored[bias], made[f"{name}_bias"]["bias"].numpy())
    assert not set(stored) & {tensor.name for tensor in onnx.load(model).graph.initializer}
    read = {name for node in graph.node for name in node.input}
    assert set(stored) <= read  # nothing is stored that nobody reads


def test_report_verify_expand_and_bench_work_on_it(
    made: checkpoints.Entries, source: Path, model: Path, tmp_path: Path
) -> None:
    path, plain, decoded = (tmp_path / f"{name}.onnx" for name in ("small", "plain", "decoded"))
    result = vqonnx.import_kill_the_bits(source, model)
    saved = result.save(path)
    report = vqonnx.report(path)
    assert report.layers == result.layers
    assert [layer.method for layer in report.layers] == ["float16", *["kill-the-bits"] * 4]
    assert report.layers[2].options == {"words": 16, "width": 18}
    assert (report.bytes_before, report.bytes_after) == (model.stat().st_size, saved.bytes)
    assert vqonnx.expand(path, plain) == len(NETWORK)
    np.testing.assert_array_equal(logits(plain), logits(path))
    nets.write(checkpoints.graph(checkpoints.weights(made)), decoded)
    np.savez(tmp_path / "data.npz", **checkpoints.feed())
    arguments = ["verify", decoded, path, "--data", tmp_path / "data.npz", "--min-snr", "90", "--min-agreement", "1"]
    assert main([*map(str, arguments), "--quiet"]) == 0
    assert main([*map(str, arguments), "--quiet", "--library"]) == 0
    assert main(["bench", str(decoded), str(path), "--rounds", "1", "--quiet"]) == 0


def test_the_same_inputs_give_the_same_bytes(source: Path, model: Path, tmp_path: Path) -> None:
    written = []
    for number in range(2):
        import_kill_the_bits(source, model).save(tmp_path / f"{number}.onnx")
        written.append((tmp_path / f"{number}.onnx").read_bytes())
    assert written[0] == written[1]


# How graphs name their layers


def _rename(model: ModelProto, names: dict[str, str]) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _as_torchscript_names_them(model: ModelProto) -> None:
    """Folded weights have numbers, nodes the path of their module, and equal biases are one constant."""
    paths = ["/conv1", "/layer1/layer1.0/conv1", "/layer1/layer1.0/conv2", "/layer1/layer1.0/downsample/downsample.0"]
    layers = [node for node in model.graph.node if node.op_type == "Conv"]
    for node, path in zip(layers, paths, strict=True):
        node.name = f"{path}/Conv"
    _rename(model, {f"{name}.weight": f"onnx::Conv_{i}" for i, name in enumerate(NETWORK) if name != "fc"})
    shared = helper.make_node("Identity", [layers[0].input[2]], ["shared"])
    layers[1].input[2] = "shared"
    model.graph.node.insert(0, shared)
    remove_entries(model.graph.initializer, lambda tensor: tensor.name == "layer1.0.conv1.bias")


def _without_names(model: ModelProto) -> None:
    for node in model.graph.node:
        node.name = ""
    _rename(model, {tensor.name: str(number) for number, tensor in enumerate(model.graph.initializer)})


def _with_one_name(model: ModelProto) -> None:
    """Only the classifier keeps its name, as in some optimised exports."""
    _without_names(model)
    node = next(node for node in model.graph.node if node.op_type == "Gemm")
    _rename(model, {node.input[1]: "fc.weight"})


def _without_a_bias(model: ModelProto) -> None:
    del model.graph.node[2].input[2:]
    remove_entries(model.graph.initializer, lambda tensor: tensor.name == "layer1.0.conv1.bias")


def _with_a_transposed_classifier(model: ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Gemm")
    node.ClearField("attribute")
    tensor = next(t for t in model.graph.initializer if t.name == "fc.weight")
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor).T), "fc.weight"))


@pytest.mark.parametrize(
    "change",
    [_as_torchscript_names_them, _without_names, _with_one_name, _without_a_bias, _with_a_transposed_classifier],
)
def test_layers_are_found_however_they_are_named(
    change: Change, made: checkpoints.Entries, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = checkpoints.graph()
    change(graph)
    path = tmp_path / "small.onnx"
    import_kill_the_bits(source, nets.write(graph, tmp_path / "model.onnx")).save(path)
    for library in (False, True):
        close(logits(path, library=library), expected(made))
    unnamed = {_without_names: 5, _with_one_name: 4}.get(change)
    assert (f"{unnamed} of 5 layers have no name of the checkpoint; matched by order" in caplog.text) == bool(unnamed)
    assert bool(caplog.text) == bool(unnamed)
    read = {name for node in onnx.load(path).graph.node for name in node.input}
    assert {tensor.name for tensor in onnx.load(path).graph.initializer} <= read


def test_a_float16_network_gets_its_biases_as_they_are(made: checkpoints.Entries, source: Path, tmp_path: Path) -> None:
    graph = checkpoints.graph()
    for tensor in graph.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    path = tmp_path / "small.onnx"
    import_kill_the_bits(source, nets.write(graph, tmp_path / "model.onnx")).save(path)
    feed = {"input": checkpoints.feed()["input"].astype(np.float16)}
    wanted = expected(made)
    found = nets.outputs(path, feed)[0].astype(np.float32)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.01 * float(np.abs(wanted).max()))


# What is refused


def _drop_layer(model: ModelProto) -> None:
    """Without layer1.0.conv1; the graph stays whole."""
    nodes = {node.name: node for node in model.graph.node}
    nodes["two"].input[0] = "b"
    kept = [node for node in model.graph.node if node.name != "one" and list(node.output) != ["d"]]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _add_layer(model: ModelProto) -> None:
    nodes = {node.name: node for node in model.graph.node}
    nodes["head"].input[0] = "extra_out"
    model.graph.initializer.append(numpy_helper.from_array(nets.draw((16, 16), 9), "extra.weight"))
    model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("MatMul", ["j", "extra.weight"], ["extra_out"]))


def _resize(name: str, shape: tuple[int, ...]) -> Change:
    def change(model: ModelProto) -> None:
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            tensor = next(t for t in model.graph.initializer if t.name == f"{name}.{kind}")
            tensor.CopyFrom(numpy_helper.from_array(nets.draw(size, 1), tensor.name))

    return change


def _classifier_of_seven(model: ModelProto) -> None:
    _resize("fc", (7, 16))(model)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7


def _matmul_classifier(model: ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Gemm")
    node.CopyFrom(helper.make_node("MatMul", [node.input[0], node.input[1]], list(node.output)))
    tensor = next(t for t in model.graph.initializer if t.name == "fc.weight")
    tensor.CopyFrom(numpy_helper.from_array(nets.draw((16, 10), 1), "fc.weight"))


def _norm_left(model: ModelProto) -> None:
    nodes = {node.name: node for node in model.graph.node}
    nodes["two"].output[0] = "before_norm"
    names = [f"norm{number}" for number in range(4)]
    for name in names:
        model.graph.initializer.append(numpy_helper.from_array(np.ones(16, np.float32), name))
    at = next(i for i, node in enumerate(model.graph.node) if node.name == "two") + 1
    model.graph.node.insert(at, helper.make_node("BatchNormalization", ["before_norm", *names], ["e"]))


def _computed(model: ModelProto) -> None:
    nodes = {node.name: node for node in model.graph.node}
    model.graph.node.insert(0, helper.make_node("Abs", ["fc.weight"], ["fc.abs"]))
    nodes["head"].input[1] = "fc.abs"


BAD: dict[str, tuple[Change, str]] = {
    "first layer that differs": (
        lambda model: (_resize("layer1.0.conv1", (8, 8, 1, 1))(model), _resize("fc", (10, 16))(model)),
        r"layer1\.0\.conv1 is \[8, 8, 3, 3\] in net\.pth and \[8, 8, 1, 1\] in \S+model\.onnx; give an ONNX model of",
    ),
    "classes": (_classifier_of_seven, r"fc is \[10, 16\] in net\.pth and \[7, 16\] in \S+model\.onnx"),
    "missing": (
        _drop_layer,
        r"layer1\.0\.conv1 is \[8, 8, 3, 3\] in net\.pth, and \S+model\.onnx has no such layer; give",
    ),
    "extra": (_add_layer, r"extra\.weight is \[16, 16\] in \S+model\.onnx, and net\.pth has no such layer$"),
    "operator": (
        _matmul_classifier,
        r"fc is \[10, 16\] in net\.pth and the \[10, 16\] weight of a MatMul in \S+model\.onnx",
    ),
    "norm": (_norm_left, r"a BatchNormalization follows layer1\.0\.conv2, where the checkpoint has it folded; export"),
    "computed": (_computed, r"fc\.abs: weight is computed at run time \(by Abs 'fc\.abs'\); export"),
    "other order": (
        lambda model: (_without_names(model), _swap_sides(model)),
        r"layer1\.0\.conv2 is \[16, 8, 3, 3\] in net\.pth and \[16, 8, 1, 1\] in \S+model\.onnx",
    ),
}


def _swap_sides(model: ModelProto) -> None:
    """The downsampling first, as an optimiser may leave it."""
    side = next(i for i, node in enumerate(model.graph.node) if list(node.output) == ["f"])
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[side])
    del model.graph.node[side]
    model.graph.node.insert(side - 1, node)


@pytest.mark.parametrize("case", BAD)
def test_another_network_is_refused_by_the_first_layer_that_differs(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BAD[case]
    graph = checkpoints.graph()
    change(graph)
    model = tmp_path / "model.onnx"
    onnx.save(graph, model)
    before = {path: path.read_bytes() for path in (source, model)}
    assert main(["import-kill-the-bits", str(source), str(model), str(tmp_path / "small.onnx"), "--quiet"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert sorted(os.listdir(tmp_path)) == ["in", "model.onnx"]
    assert {path: path.read_bytes() for path in before} == before


def test_a_network_of_other_size_is_named_by_its_first_layer(model: Path, tmp_path: Path) -> None:
    network = {**NETWORK, "layer1.0.conv1": checkpoints.Spec((8, 8, 1, 1), 4, 5, "layer1.0.bn1")}
    source = checkpoints.save(checkpoints.entries(network), tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"layer1\.0\.conv1 is \[8, 8, 1, 1\] in other\.pth and \[8, 8, 3, 3\] in"):
        import_kill_the_bits(source, model)


def test_what_is_already_imported_is_refused(source: Path, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    import_kill_the_bits(source, model).save(path)
    with pytest.raises(ModelError, match=r"computed at run time \(by Decode"):
        import_kill_the_bits(source, path)


def test_inputs_are_never_written_over(source: Path, model: Path) -> None:
    before = source.read_bytes(), model.read_bytes()
    result = import_kill_the_bits(source, model)
    for path in (source, model):
        with pytest.raises(InputError, match="is the input itself, which is never changed"):
            result.save(path)
    assert (source.read_bytes(), model.read_bytes()) == before


# The command


def test_the_command_shows_layers_and_both_sizes(
    source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.onnx"
    assert main(["import-kill-the-bits", str(source), str(model), str(path)]) == 0
    text = capsys.readouterr().out
    size = read_checkpoint(source).paper_mib
    assert f"{path}: {model.stat().st_size:,} -> {path.stat().st_size:,} bytes" in text
    assert f"by the paper's rule {size:.3f} MiB; the file has {path.stat().st_size / 2**20:.3f} MiB" in text
    assert re.search(r"^layer1\.0\.conv2\.weight +Conv +16x8x3x3 +kill-the-bits\(words=16, width=18\)", text, re.M)
    assert main(["import-kill-the-bits", str(source), str(model), str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["paper_mib"] == size
    assert content["bytes"] == {"before": model.stat().st_size, "after": path.stat().st_size}
    assert len(content["layers"]) == len(NETWORK)


def test_the_command_refuses_missing_files_and_unknown_targets(
    source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.onnx"
    for arguments, message in (
        ((tmp_path / "no.pth", model, out), r"no\.pth: cannot be read \(No such file or directory\)"),
        ((source, tmp_path / "no.onnx", out), r"no\.onnx: cannot be read \(No such file or directory\)"),
        ((model, source, out), r"net\.pth: not an ONNX model"),
        ((source, model, tmp_path / "no" / "small.onnx"), r"the folder '\S+no' does not exist"),
        ((source, model, out, "--target", "web"), r"target 'web' is unknown; choose one of hybrid, portable, custom"),
    ):
        assert main(["import-kill-the-bits", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line
    assert not out.exists()


# The real ones


def test_published_resnet18_runs_like_its_decoded_weights(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    common, resnet = (importlib.import_module(name) for name in ("common", "resnet"))
    benchmark = importlib.import_module("kill_the_bits")
    source = data_dir / "published_vq" / "resnet18_small_blocks.pth"
    model, plain, path = (tmp_path / f"{name}.onnx" for name in ("model", "plain", "small"))
    onnx.save(resnet.resnet_model(18, resnet.random_weights(18)), model)
    onnx.save(resnet.resnet_model(18, benchmark.decode(source)), plain)
    saved = import_kill_the_bits(source, model).save(path)
    assert saved.bytes < 1.541 * 2**20  # below the size that the paper counts, graph and decoder included
    feeds = [*common.torchvision_feeds("val", 8), *generate_feeds(model, count=1)]
    for feed in feeds:
        wanted = nets.outputs(plain, feed)[0]
        for library in (False, True):
            found = nets.outputs(path, feed, library=library)[0]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * float(np.abs(wanted).max()))
    labels = common.imagenet_val_labels()[:8]
    right = nets.outputs(path, feeds[0])[0].argmax(1) == labels
    assert right.sum() >= 4  # a network that recognises images, not only one that agrees with itself


def test_another_resnet_is_refused(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    resnet = importlib.import_module("resnet")
    onnx.save(resnet.resnet_model(18, resnet.random_weights(18)), tmp_path / "model.onnx")
    source = data_dir / "published_vq" / "resnet50_large_blocks.pth"
    with pytest.raises(ModelError, match=r"^layer1\.0\.conv1 is \[64, 64, 1, 1\] in \S+ and \[64, 64, 3, 3\] in \S+;"):
        import_kill_the_bits(source, tmp_path / "model.onnx")
