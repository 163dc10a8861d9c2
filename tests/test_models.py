"""The models of `models/` are what its README says: valid, accurate, of the stated size, tested on unseen images."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

MODELS = Path(__file__).parents[1] / "models"
CONV = MODELS / "digits_conv.onnx"
MLP = MODELS / "digits_mlp.onnx"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MODELS)
        return importlib.import_module("digits")


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(MODELS / name) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("path", [CONV, MLP], ids=lambda path: path.stem)
def test_is_valid_with_the_documented_inputs_and_outputs(path):
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (8, [("", 17)])
    assert shapes(model.graph.input) == {"image": ["N", 1, 8, 8]}
    assert shapes(model.graph.output) == {"logits": ["N", 10]}


# The upper bounds catch a test file that holds images of the training.
@pytest.mark.parametrize(("path", "least", "most"), [(CONV, 0.99, 0.9995), (MLP, 0.985, 0.999)])
def test_accuracy(path, least, most, digits):
    arrays = load("digits_test.npz")
    share = digits.accuracy(path, digits.Digits(arrays["image"], arrays["labels"]))
    assert least <= share <= most, f"{path.name}: accuracy {share:.4f}"


@pytest.mark.parametrize(("path", "least", "most"), [(CONV, 1_300_000, 1_450_000), (MLP, 600_000, 700_000)])
def test_size(path, least, most):
    assert least <= path.stat().st_size <= most


def test_models_hold_every_kind_of_layer():
    def attributes(path):
        return [(n.op_type, {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute}) for n in path.graph.node]

    conv = attributes(onnx.load(CONV))
    layers = {(a["kernel_shape"][0], a["strides"][0], a["group"]) for op, a in conv if op == "Conv"}
    assert layers == {(3, 1, 1), (3, 2, 1), (1, 1, 1), (3, 1, 2), (3, 1, 128)}
    assert {"Add", "GlobalAveragePool", "Gemm"} <= {op for op, _ in conv}
    mlp = attributes(onnx.load(MLP))
    assert [a["transB"] for op, a in mlp if op == "Gemm"] == [0, 1, 1]


def test_data_files_hold_the_documented_split(digits):
    train, test = digits.split()
    np.testing.assert_array_equal(load("digits_calibration.npz")["image"], train.image[: digits.CALIBRATION_COUNT])
    np.testing.assert_array_equal(load("digits_test.npz")["image"], test.image)
    np.testing.assert_array_equal(load("digits_test.npz")["labels"], test.labels)


def test_calibration_and_test_images_are_disjoint():
    calibration = load("digits_calibration.npz")["image"]
    test = load("digits_test.npz")["image"]
    assert (calibration.dtype, calibration.shape) == (np.float32, (256, 1, 8, 8))
    assert (test.dtype, test.shape) == (np.float32, (797, 1, 8, 8))
    assert len(np.unique(np.concatenate([calibration, test]), axis=0)) == 256 + 797
