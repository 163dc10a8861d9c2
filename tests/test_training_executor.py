"""The executor in PyTorch gives what onnxruntime gives: operator by operator, and on real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vqonnx.errors import DataError, ModelError
from vqonnx.generate import generate_feeds
from vqonnx.runtime import open_session, run
from vqonnx.training.executor import TorchGraph

MODELS = ("resnet20", "resnet56", "resnet20_bn", "resnet56_bn", "squeezenet", "mobilenetv1", "mobilenetv2")
# How far outputs may be apart, relative to the largest. Sigmoids near 0 are only as exact as float32 near 1 (yunet);
# a variance as a difference of means (magika), float16 (squeezenet) and long chains of exponentials (yolox) lose more.
ZOO = {
    "digits_extdata": 1e-5,
    "fastestdet": 1e-4,
    "iris_mlp_torch": 1e-5,
    "magika_standard_v3_3": 3e-2,
    "mnist_cntk": 1e-5,
    "oww_embedding": 1e-5,
    "oww_melspectrogram": 1e-5,
    "ppocr_mobile_v2_cls": 1e-4,
    "ppocr_mobile_v2_det_prune": 1e-4,
    "squeezenet1.1_fp16_op7": 1e-2,
    "ultraface_rfb320": 1e-5,
    "ultraface_slim320_simplified": 1e-5,
    "yolox_nano": 1e-3,
    "yunet_n_320": 3e-2,
}
UNSUPPORTED = {
    "bert_tokenizer_customop": "BertTokenizer",
    "candy_style_winml": "ImageScaler",
    "dtln_1": "LSTM",
    "mobilenetv2_cifar10_int8": "DynamicQuantizeLinear",
    "oww_hey_jarvis": "If",
    "silero_vad_16k_op15": "If",
    "silero_vad_op18_ifless": "If",
    "silero_vad_v4_old": "If",
}


def assert_same(model: ModelProto | Path, feed: dict[str, NDArray[Any]], bound: float, folder: Path = Path()) -> None:
    source = model if isinstance(model, Path) else model.SerializeToString()
    expected = run(open_session(source, threads=1, optimise=False), feed)
    with torch.no_grad():
        found = TorchGraph(model, folder=folder).run({name: torch.from_numpy(value) for name, value in feed.items()})
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        largest = max(1e-9, float(np.abs(value.astype(np.float64)).max(initial=0)))
        apart = np.abs(found[name].numpy().astype(np.float64) - value.astype(np.float64))
        assert apart.max(initial=0) <= bound * largest, name


@pytest.mark.parametrize("name", MODELS)
def test_equals_onnxruntime_on_the_real_models(name: str, data_dir: Path) -> None:
    path = data_dir / "models" / f"{name}.onnx"
    assert_same(path, dict(generate_feeds(path, seed=1)[0]), 1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_equals_onnxruntime_on_the_zoo(name: str, data_dir: Path) -> None:
    (path,) = (data_dir / "zoo" / name).glob("*.onnx")
    assert_same(path, dict(generate_feeds(path, seed=1)[0]), ZOO[name])


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_names_the_first_unsupported_operator(name: str, data_dir: Path) -> None:
    (path,) = (data_dir / "zoo" / name).glob("*.onnx")
    with pytest.raises(ModelError, match=rf"node '.*': operator {UNSUPPORTED[name]} is not supported"):
        TorchGraph(path)


def test_the_zoo_is_covered(data_dir: Path) -> None:
    assert {folder.name for folder in (data_dir / "zoo").iterdir() if folder.is_dir()} == {*ZOO, *UNSUPPORTED}


def one(
    op: str, inputs: dict[str, Any], opset: int = 17, outputs: int = 1, **attributes: Any
) -> tuple[ModelProto, Any]:
    """A model of one node whose first input is fed and whose others are constants."""
    names = list(inputs)
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attributes)
    x = inputs[names[0]]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(names[0], helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)],
        [numpy_helper.from_array(np.asarray(inputs[name]), name) for name in names[1:] if name],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), {names[0]: x}


def floats(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


WINDOW = {
    "kernel": st.integers(1, 3),
    "stride": st.integers(1, 3),
    "pads": st.lists(st.integers(0, 2), min_size=4, max_size=4),
    "auto": st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
}


def window(kernel: int, stride: int, pads: list[int], auto: str, dilation: int = 1) -> dict[str, Any]:
    # onnxruntime wants padding below the kernel, and its SAME_* is only right with dilation 1 and kernel >= stride
    pads = [min(pad, kernel - 1) for pad in pads]
    found: dict[str, Any] = {"strides": [min(stride, kernel)] * 2, "kernel_shape": [kernel, kernel]}
    if auto == "NOTSET":
        return found | {"pads": pads, "dilations": [dilation] * 2}
    return found | {"auto_pad": auto}


@given(**WINDOW, dilation=st.integers(1, 2), group=st.sampled_from([1, 2]))
def test_conv(kernel: int, stride: int, pads: list[int], auto: str, dilation: int, group: int) -> None:
    inputs = {"x": floats(2, 4, 9, 8), "w": floats(6, 4 // group, kernel, kernel), "b": floats(6)}
    assert_same(*one("Conv", inputs, group=group, **window(kernel, stride, pads, auto, dilation)), 1e-5)


@given(**WINDOW, extra=st.integers(0, 1), group=st.sampled_from([1, 2]))
def test_conv_transpose(kernel: int, stride: int, pads: list[int], auto: str, extra: int, group: int) -> None:
    inputs = {"x": floats(2, 4, 5, 4), "w": floats(4, 6 // group, kernel, kernel), "b": floats(6)}
    given_window = window(kernel, stride, pads, auto)
    if auto == "NOTSET" and given_window["strides"][0] > extra:
        given_window["output_padding"] = [extra, extra]
    assert_same(*one("ConvTranspose", inputs, group=group, **given_window), 1e-5)


@given(**WINDOW, ceil=st.booleans(), include=st.booleans(), op=st.sampled_from(["MaxPool", "AveragePool"]))
def test_pools(kernel: int, stride: int, pads: list[int], auto: str, ceil: bool, include: bool, op: str) -> None:
    attributes = window(kernel, stride, pads, auto)
    attributes.pop("dilations", None)
    if op == "AveragePool":
        attributes["count_include_pad"] = int(include)
    if auto == "NOTSET":
        attributes["ceil_mode"] = int(ceil)
    assert_same(*one(op, {"x": floats(2, 3, 9, 8)}, opset=19, **attributes), 1e-5)


@given(
    start=st.integers(-9, 9), end=st.integers(-9, 9), step=st.sampled_from([-2, -1, 1, 2, 3]), axis=st.integers(-2, 1)
)
def test_slice(start: int, end: int, step: int, axis: int) -> None:
    parts = {name: np.array([value]) for name, value in zip("seat", (start, end, axis, step), strict=True)}
    assert_same(*one("Slice", {"x": floats(7, 6), **parts}), 0)


@given(
    sizes=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    mode=st.sampled_from(["nearest", "linear"]),
    where=st.sampled_from(["asymmetric", "align_corners", "half_pixel", "pytorch_half_pixel"]),
    rounding=st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]),
)
def test_resize(sizes: tuple[int, int], mode: str, where: str, rounding: str) -> None:
    inputs = {"x": floats(1, 2, 5, 4), "": None, "s": np.array([1, 2, *sizes])}
    names = {"x": inputs["x"], "roi": np.zeros(0, np.float32), "scales": np.zeros(0, np.float32), "s": inputs["s"]}
    model = one("Resize", names, opset=13, mode=mode, coordinate_transformation_mode=where, nearest_mode=rounding)
    assert_same(*model, 1e-4)


SIMPLE: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    ("Gemm", {"a": floats(4, 3), "b": floats(5, 4), "c": floats(5)}, {"transA": 1, "transB": 1, "alpha": 0.5}, 13),
    ("Gemm", {"a": floats(3, 4), "b": floats(4, 5), "c": floats(3, 1)}, {"beta": 2.0}, 13),
    ("MatMul", {"a": floats(2, 3, 4), "b": floats(4, 5)}, {}, 13),
    ("BatchNormalization", {"x": floats(2, 3, 4), **{n: np.abs(floats(3)) + 0.1 for n in "sbmv"}}, {}, 15),
    ("InstanceNormalization", {"x": floats(2, 3, 4, 5), "s": floats(3), "b": floats(3)}, {"epsilon": 0.1}, 13),
    ("LayerNormalization", {"x": floats(2, 3, 4), "s": floats(4), "b": floats(4)}, {"axis": -1}, 17),
    ("LRN", {"x": floats(1, 7, 3, 3)}, {"size": 5, "alpha": 0.5}, 13),
    ("LRN", {"x": floats(1, 7, 3, 3)}, {"size": 3, "bias": 2.0}, 13),
    ("Clip", {"x": floats(3, 4)}, {"min": -0.5, "max": 0.5}, 7),
    ("Clip", {"x": floats(3, 4), "low": np.float32(-0.1)}, {}, 13),
    ("LeakyRelu", {"x": floats(3, 4)}, {"alpha": 0.3}, 13),
    ("Elu", {"x": floats(3, 4)}, {"alpha": 0.3}, 13),
    ("Selu", {"x": floats(3, 4)}, {}, 13),
    ("PRelu", {"x": floats(2, 3, 4), "slope": floats(3, 1)}, {}, 13),
    ("HardSigmoid", {"x": 5 * floats(3, 4)}, {"alpha": 0.3, "beta": 0.4}, 13),
    ("HardSwish", {"x": 5 * floats(3, 4)}, {}, 14),
    ("ThresholdedRelu", {"x": floats(3, 4)}, {"alpha": 0.5}, 13),
    ("Softplus", {"x": floats(3, 4)}, {}, 13),
    ("Erf", {"x": floats(3, 4)}, {}, 13),
    ("Softmax", {"x": floats(2, 3, 4)}, {}, 11),
    ("Softmax", {"x": floats(2, 3, 4)}, {"axis": 1}, 13),
    ("LogSoftmax", {"x": floats(2, 3, 4)}, {"axis": 1}, 11),
    ("Div", {"x": np.array([-7, 7, 9], np.int64), "y": np.array([2, -2, 4], np.int64)}, {}, 13),
    ("Max", {"x": floats(3, 4), "y": floats(4), "z": floats(1)}, {}, 13),
    ("Mean", {"x": floats(3, 4), "y": floats(4), "z": floats(1)}, {}, 13),
    ("ReduceMean", {"x": floats(2, 3, 4)}, {"axes": [1, -1], "keepdims": 0}, 13),
    ("ReduceSum", {"x": floats(2, 3, 4), "axes": np.array([0])}, {}, 13),
    ("ReduceSum", {"x": floats(2, 3, 4)}, {"noop_with_empty_axes": 1}, 13),
    ("ReduceProd", {"x": floats(2, 3, 4)}, {"axes": [0, 2], "keepdims": 0}, 13),
    ("ReduceL2", {"x": floats(2, 3, 4)}, {}, 13),
    ("ArgMax", {"x": floats(2, 3, 4)}, {"axis": 1}, 13),
    ("Flatten", {"x": floats(2, 3, 4)}, {"axis": -1}, 13),
    ("Reshape", {"x": floats(2, 3, 4), "shape": np.array([0, -1])}, {}, 13),
    ("Transpose", {"x": floats(2, 3, 4)}, {}, 13),
    ("Squeeze", {"x": floats(2, 1, 4, 1)}, {}, 13),
    ("Squeeze", {"x": floats(2, 1, 4, 1), "axes": np.array([-1])}, {}, 13),
    ("Unsqueeze", {"x": floats(2, 3)}, {"axes": [0, 3]}, 11),
    ("Pad", {"x": floats(2, 3, 4), "pads": np.array([0, 1, -1, 0, 0, 2]), "v": np.float32(3)}, {}, 13),
    ("Pad", {"x": floats(1, 2, 4, 5)}, {"mode": "reflect", "pads": [0, 0, 1, 2, 0, 0, 3, 1]}, 7),
    ("Pad", {"x": floats(1, 2, 4, 5)}, {"mode": "edge", "pads": [0, 0, 1, 2, 0, 0, 3, 1]}, 7),
    ("Gather", {"x": floats(4, 3), "i": np.array([[0, -1], [2, 2]])}, {"axis": 0}, 13),
    ("Expand", {"x": floats(3, 1), "shape": np.array([2, 1, 4])}, {}, 13),
    ("Tile", {"x": floats(2, 3), "repeats": np.array([2, 3])}, {}, 13),
    ("Shape", {"x": floats(2, 3, 4)}, {"start": 1}, 15),
    ("Cast", {"x": 3 * floats(2, 3)}, {"to": TensorProto.INT32}, 13),
    ("Upsample", {"x": floats(1, 2, 3, 4), "scales": np.array([1, 1, 2, 3], np.float32)}, {}, 9),
    ("Where", {"c": np.array([True, False]), "x": floats(3, 2), "y": floats(2)}, {}, 13),
]


@pytest.mark.parametrize(("op", "inputs", "attributes", "opset"), SIMPLE)
def test_operators(op: str, inputs: dict[str, Any], attributes: dict[str, Any], opset: int) -> None:
    assert_same(*one(op, inputs, opset=opset, **attributes), 1e-5)


@pytest.mark.parametrize(("parts", "opset"), [([2, 4], 13), (None, 13), (None, 11)])
def test_split(parts: list[int] | None, opset: int) -> None:
    inputs = {"x": floats(2, 6)} | ({} if parts is None else {"split": np.array(parts)})
    assert_same(*one("Split", inputs, opset=opset, outputs=2, axis=1), 0)


def test_supplied_values_take_the_place_of_what_the_graph_computes_and_carry_gradients() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 3] x) => (float[N, 2] y) { w = Transpose (stored)  h = MatMul (x, w)  y = Relu (h) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(floats(2, 3), "stored"))
    weight = torch.ones(3, 2, requires_grad=True)
    graph = TorchGraph(model, supplied=["w"])
    x = torch.tensor([[1.0, 2.0, 3.0]])
    (y,) = graph.run({"x": x}, {"w": weight}).values()
    assert y.tolist() == [[6.0, 6.0]]
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1], [2, 2], [3, 3]]


def test_batch_statistics_are_used_and_kept() -> None:
    inputs = {"x": 3 + floats(50, 2, 4), **{"s": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}}
    model, feed = one(
        "BatchNormalization", inputs | {"m": np.zeros(2, np.float32), "v": np.ones(2, np.float32)}, momentum=0.75
    )
    graph = TorchGraph(model)
    x = torch.from_numpy(feed["x"])
    (y,) = graph.run({"x": x}, batch_statistics=True).values()
    assert torch.allclose(y.mean((0, 2)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(graph.values["m"], 0.25 * x.mean((0, 2)), atol=1e-6)
    before = graph.values["m"].clone()
    graph.run({"x": x})
    assert torch.equal(graph.values["m"], before)


def test_a_missing_input_is_named() -> None:
    model, _ = one("Relu", {"x": floats(2, 2)})
    with pytest.raises(DataError, match="no values for input 'x'"):
        TorchGraph(model).run({})


def test_what_does_not_fit_is_said_in_one_line() -> None:
    model, _ = one("MatMul", {"x": floats(2, 2), "w": floats(2, 2)})
    with pytest.raises(ModelError, match=r"node 'y0': MatMul cannot be computed: .*") as caught:
        TorchGraph(model).run({"x": torch.zeros(2, 3)})
    assert "\n" not in str(caught.value)


def test_old_opsets_are_refused() -> None:
    model, _ = one("Relu", {"x": floats(2, 2)}, opset=6)
    with pytest.raises(ModelError, match="opset 6 is too old to train; opset 7 and newer"):
        TorchGraph(model)
