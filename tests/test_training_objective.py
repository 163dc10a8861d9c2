"""How far a student is from its teacher: the divergence of the paper, and the squared error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import parse
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import ModelProto

from vqonnx.errors import OptionError
from vqonnx.training.executor import TorchGraph
from vqonnx.training.objective import Objective

LOGITS = parse("(float[N, C] x) => (float[N, C] y) { y = Relu (x) }")


def rows(low: float = -20, high: float = 20) -> st.SearchStrategy[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    shapes = st.tuples(st.integers(1, 4), st.integers(2, 6))
    values = st.floats(low, high, width=32)
    return shapes.flatmap(lambda shape: st.tuples(*[arrays(np.float32, shape, elements=values)] * 2))


def softmax(values: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(values.astype(np.float64) - values.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@given(rows())
def test_the_divergence_is_that_of_the_paper(case: tuple[NDArray[np.float32], NDArray[np.float32]]) -> None:
    teacher, student = case
    objective = Objective.of(LOGITS, "kl")
    found = objective({"y": torch.from_numpy(student)}, {"y": torch.from_numpy(teacher)}).item()
    p, q = softmax(teacher), softmax(student)
    assert found == pytest.approx((p * np.log(p / q)).sum() / len(p), rel=1e-4, abs=1e-5)
    assert objective({"y": torch.from_numpy(teacher)}, {"y": torch.from_numpy(teacher)}).item() == pytest.approx(0)


SOFTMAX = {
    "at the end": (13, "y = Softmax (x)"),
    "in another shape": (13, "f = Flatten (x) p = Softmax (f) z = Unsqueeze (p, two) y = Identity (z)"),
    "before opset 13": (11, "a = Relu (x) y = Softmax <axis = 1> (a)"),
}


def with_softmax(name: str) -> tuple[ModelProto, str]:
    opset, steps = SOFTMAX[name]
    constants = {"two": np.array([2])} if "two" in steps else {}
    model = parse(f"(float[N, C] x) => (float[N, C] y) {{ {steps} }}", opset=opset, **constants)
    return model, {"at the end": "x", "in another shape": "f", "before opset 13": "a"}[name]


@pytest.mark.parametrize("name", SOFTMAX)
def test_a_last_softmax_is_left_out_of_the_student(name: str) -> None:
    model, logits = with_softmax(name)
    objective = Objective.of(model, "kl")
    assert objective.names == {"y": logits}
    # Probabilities of 1e-60 are zero in float32; the gradient must not be lost with them.
    x = torch.tensor([[1.0, 140.0], [1.0, 2.0]], requires_grad=True)
    student = TorchGraph(objective.student(model)).run({"x": x})
    teacher = TorchGraph(model).run({"x": torch.tensor([[140.0, 1.0], [1.0, 2.0]])})
    loss = objective(student, teacher)
    assert loss.item() == pytest.approx(139 / 2, rel=1e-5)
    loss.backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), [[-0.5, 0.5], [0, 0]], atol=1e-6)


def test_the_squared_error_does_not_look_behind_a_softmax() -> None:
    model, _ = with_softmax("at the end")
    assert Objective.of(model, "mse").names == {"y": "y"}


@given(rows(), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_squared_error_is_over_the_energy(
    case: tuple[NDArray[np.float32], NDArray[np.float32]], unit: float
) -> None:
    teacher, student = (values + np.float32(30) for values in case)
    objective = Objective.of(LOGITS, "mse")
    found = objective({"y": torch.from_numpy(unit * student)}, {"y": torch.from_numpy(unit * teacher)}).item()
    expected = ((student.astype(np.float64) - teacher) ** 2).sum() / (teacher.astype(np.float64) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_outputs_are_summed_and_an_output_of_zeros_is_no_trouble() -> None:
    model = parse("(float[N, 2] x) => (float[N, 2] y, float[N, 2] z) { y = Relu (x) z = Neg (x) }")
    one, zero = torch.ones(1, 2), torch.zeros(1, 2)
    objective = Objective.of(model, "mse")
    assert objective({"y": 2 * one, "z": 3 * one}, {"y": one, "z": one}).item() == pytest.approx(1 + 4)
    assert objective({"y": one, "z": zero}, {"y": one, "z": zero}).item() == 0


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 5, 2), (2, 4, 1, 7)])
def test_divergence_wants_one_row_of_classes(shape: tuple[int, ...]) -> None:
    values = {"y": torch.ones(shape)}
    with pytest.raises(OptionError, match=r"output 'y' is \[.*\], not one row of classes .*; choose loss mse"):
        Objective.of(LOGITS, "kl")(values, values)
    assert Objective.of(LOGITS, "mse")(values, values).item() == 0


def test_axes_of_size_one_may_follow_the_classes() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0]]).reshape(1, 3, 1, 1)
    assert Objective.of(LOGITS, "kl")({"y": values.flip(1)}, {"y": values}).item() > 0
