"""The teacher: random batches of unlabelled inputs, and the outputs that the original gives for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cases import numbers, parse
from nets import CALIBRATION, CONV, images, write
from onnx import ModelProto

import vqonnx.training.teacher
from vqonnx.errors import DataError
from vqonnx.runtime import open_session, run
from vqonnx.training.teacher import Lesson, Teacher


def linear(batch: str) -> ModelProto:
    return parse(f"(float[{batch}, 4] x) => (float[{batch}, 3] y) {{ y = MatMul (x, w) }}", w=numbers((4, 3)))


def rows(lesson: Lesson) -> list[tuple[float, ...]]:
    return [tuple(row) for row in lesson.feeds["x"].tolist()]


def test_outputs_are_those_of_the_original() -> None:
    teacher = Teacher(CONV, CALIBRATION)
    assert teacher.count == 256
    session = open_session(CONV, threads=1)
    for step in (0, 1, 0):  # the third time from what is kept
        (lesson,) = teacher.lessons(step, 40, (0, 1))
        ((name, output),) = lesson.outputs.items()
        assert output.shape == (40, 10)
        feed = {"image": lesson.feeds["image"].numpy()}
        np.testing.assert_allclose(output.numpy(), run(session, feed)[name], rtol=1e-4, atol=1e-4)
        assert lesson.feeds["image"].is_contiguous(memory_format=torch.channels_last)


def test_a_step_always_means_the_same_choice_and_a_pass_sees_each_image_once(tmp_path: Path) -> None:
    path = write(linear("N"), tmp_path / "m.onnx")
    x = np.arange(400, dtype=np.float32).reshape(100, 4)
    one, other = Teacher(path, {"x": x}), Teacher(path, [{"x": x[:33]}, {"x": x[33:]}])
    passes: list[list[tuple[float, ...]]] = [[], []]
    for step in range(8):
        (a,), (b,) = one.lessons(step, 25, (7, 1)), other.lessons(step, 25, (7, 1))
        assert rows(a) == rows(b)
        passes[step // 4] += rows(a)
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(tuple(row) for row in x.tolist())
    assert passes[0] != passes[1]
    assert rows(one.lessons(0, 25, (7, 1))[0]) != rows(one.lessons(0, 25, (8, 1))[0])


def test_a_batch_is_at_most_all_images(tmp_path: Path) -> None:
    teacher = Teacher(write(linear("N"), tmp_path / "m.onnx"), numbers((5, 4)))
    (lesson,) = teacher.lessons(3, 128, (0,))
    assert lesson.outputs["y"].shape == (5, 3)


def test_a_sample_is_spread_over_all_images(tmp_path: Path) -> None:
    x = np.arange(400, dtype=np.float32).reshape(100, 4)
    teacher = Teacher(write(linear("N"), tmp_path / "m.onnx"), {"x": x})
    (lesson,) = teacher.sample(5)
    assert rows(lesson) == [tuple(x[number]) for number in (0, 24, 49, 74, 99)]


def test_where_the_model_fixes_the_rows_a_batch_is_several_feeds(tmp_path: Path) -> None:
    x = numbers((12, 4))
    teacher = Teacher(write(linear("2"), tmp_path / "m.onnx"), {"x": x})
    lessons = teacher.lessons(0, 5, (0,))
    assert [tuple(lesson.feeds["x"].shape) for lesson in lessons] == [(2, 4)] * 3
    assert len({tuple(rows(lesson)) for lesson in lessons}) == 3
    for lesson in lessons:
        np.testing.assert_allclose(lesson.outputs["y"].numpy(), lesson.feeds["x"].numpy() @ numbers((4, 3)))
    assert teacher.count == 12


def test_outputs_without_rows_are_taken_by_feeds(tmp_path: Path) -> None:
    model = parse("(float[N, 4] x) => (float[3] y) { z = MatMul (x, w) y = ReduceSum <keepdims = 0> (z, zero) }")
    model.graph.initializer.append(onnx.numpy_helper.from_array(numbers((4, 3)), "w"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "zero"))
    teacher = Teacher(write(model, tmp_path / "m.onnx"), [{"x": numbers((5, 4))}, {"x": numbers((7, 4), 1)}])
    for lesson in teacher.lessons(0, 12, (0,)):
        expected = (lesson.feeds["x"].numpy() @ numbers((4, 3))).sum(0)
        np.testing.assert_allclose(lesson.outputs["y"].numpy(), expected)


def test_outputs_that_are_too_large_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(linear("N"), tmp_path / "m.onnx")
    kept = Teacher(path, numbers((20, 4)))
    monkeypatch.setattr(vqonnx.training.teacher, "_CACHE_LIMIT", 20 * 3 * 4 - 1)
    anew = Teacher(path, numbers((20, 4)))
    for step in range(3):
        (a,), (b,) = kept.lessons(step, 8, (0,)), anew.lessons(step, 8, (0,))
        assert torch.equal(a.outputs["y"], b.outputs["y"])


def test_models_that_give_no_numbers_are_refused(tmp_path: Path) -> None:
    best = parse("(float[N, 4] x) => (int64[N, 1] y) { y = ArgMax <axis = 1> (x) }")
    with pytest.raises(DataError, match="output 'y' is not a tensor of floating point; there is nothing to distil"):
        Teacher(write(best, tmp_path / "best.onnx"), numbers((5, 4)))
    text = parse("(string[N] s, float[N] x) => (float[N] y) { y = Relu (x) t = Identity (s) }")
    with pytest.raises(DataError, match="input 's' is string; only tensors of numbers can be trained on"):
        Teacher(write(text, tmp_path / "text.onnx"), [{"s": np.array(["a"]), "x": np.ones(1, np.float32)}])


def test_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"input 'image' is float32\[4, 2, 8, 8\]; the model wants"):
        Teacher(CONV, np.repeat(images(4), 2, axis=1))
