"""Weights as functions of their codebooks: decoded as the format says, with the gradients of the paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cases import CASES, numbers, parse
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import branches, mixed, write
from onnx import ModelProto, helper, numpy_helper
from test_ops import forms
from test_place import FORMS

import vqonnx
from vqonnx.errors import ModelError, VqonnxError
from vqonnx.form import Coded
from vqonnx.graph import find
from vqonnx.methods import PQ, SVD, KMeans
from vqonnx.place import Placement, Target, place
from vqonnx.record import LayerRecord, write_record
from vqonnx.training.coded import CodedModel, FixedCodes
from vqonnx.uniform import coded as coded_rows
from vqonnx.uniform import search_steps

NOWHERE = Path("model.onnx")
TARGETS: tuple[Target, ...] = ("hybrid", "portable", "custom")


def placed(model: ModelProto, forms: list[Coded], target: Target = "hybrid") -> ModelProto:
    """The model with forms in the place of its weights, and a record, by which portable weights are found."""
    sites = find(model, Path()).sites
    place(model, [Placement(site, form, site.view("ihw")) for site, form in zip(sites, forms, strict=True)], target)
    layers = tuple(LayerRecord(site.name, site.op_type, site.shape, "test", {}, 1, None, None) for site in sites)
    write_record(model, 1, layers, ())
    return model


def gemm(form: Coded, *, layers: int = 1) -> ModelProto:
    """Layers one after the other that all have the form's shape, which must be square for several."""
    rows, cols = form.shape
    steps = "".join(f"h{i + 1} = Gemm <transB = 1> (h{i}, w{i}) " for i in range(layers))
    weights = {f"w{i}": numbers((rows, cols), seed=i) for i in range(layers)}
    return parse(f"(float[N, {cols}] h0) => (float[N, {rows}] h{layers}) {{ {steps} }}", **weights)


# Decoding


@given(forms())
def test_decoding_has_the_same_bits_as_the_form(form: Coded) -> None:
    decoded = FixedCodes.of(form).decode(torch.from_numpy(form.codebooks.astype(np.float32))).numpy()
    np.testing.assert_array_equal(decoded.view(np.uint32), form.decode().view(np.uint32))


MAIN_GRAPH = sorted(name for name, case in CASES.items() if not any(s.scope.path for s in find(case.model, "").sites))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("exact", FORMS)
def test_every_form_in_a_model(exact: str, target: Target) -> None:
    for name in ("conv2d", "transposed2d_grouped", "gemm", "matmul_half", "long_chain"):
        case = CASES[name]
        sites = find(case.model, "").sites
        before = {site.name: site.read() for site in sites}
        forms = [FORMS[exact](site.view("ihw").matrix(site.read())) for site in sites]
        if not any(books_of(form) for form in forms):
            continue
        coded = CodedModel(placed(case.copy(), forms, target), NOWHERE)
        assert coded.target == target
        books = coded.parameters("mean")
        for weight in coded.weights:
            made = weight.compute(books)
            np.testing.assert_array_equal(made.detach().float().numpy(), before[weight.name], err_msg=name)


def books_of(form: object) -> bool:
    parts = [getattr(form, "left", None), getattr(form, "right", None), *getattr(form, "parts", ())]
    return isinstance(form, Coded) or any(books_of(part) for part in parts if part is not None)


@pytest.mark.parametrize("name", MAIN_GRAPH)
def test_every_place_a_weight_can_come_from(name: str) -> None:
    case = CASES[name]
    sites = find(case.model, "").sites
    before = {site.name: site.read() for site in sites}
    forms = [FORMS["pairs"](site.view("ihw").matrix(site.read())) for site in sites]
    coded = CodedModel(placed(case.copy(), forms), NOWHERE)
    books = coded.parameters("mean")
    assert {weight.name for weight in coded.weights} == set(before)
    for weight in coded.weights:
        np.testing.assert_array_equal(weight.compute(books).detach().float().numpy(), before[weight.name])


# Gradients


@settings(max_examples=30)
@given(form=forms(), target=st.sampled_from(TARGETS), seed=st.integers(0, 2**16))
def test_a_word_gets_the_mean_of_the_gradients_of_its_blocks(form: Coded, target: Target, seed: int) -> None:
    coded = CodedModel(placed(gemm(form), [form], target), NOWHERE)
    slope = np.random.default_rng(seed).standard_normal(form.shape).astype(np.float32)
    found = {}
    for gradient in ("mean", "sum"):
        books = coded.parameters(gradient)
        coded.weights[0].compute(books).backward(torch.from_numpy(slope))
        (book,) = books.values()
        assert book.grad is not None
        found[gradient] = book.grad.double().numpy().reshape(form.codebooks.shape)

    # METHODS: g_k is the mean of dL/dV_r over the blocks r with code k; here by loops, in float64.
    stages, rows, groups = form.codes.shape
    scaled = slope.astype(np.float64) * (1 if form.scales is None else form.scales.astype(np.float64))
    blocks = np.pad(scaled, ((0, 0), (0, groups * form.width - form.cols))).reshape(rows, groups, form.width)
    total, uses = np.zeros(form.codebooks.shape), np.zeros(form.codebooks.shape[:3])
    for stage in range(stages):
        for group in range(groups):
            for row in range(rows):
                place = stage, group % form.books, form.codes[stage, row, group]
                total[place] += blocks[row, group]
                uses[place] += 1
    magnitude = np.abs(scaled).max(initial=1e-30)
    np.testing.assert_allclose(found["sum"], total, rtol=1e-4, atol=1e-4 * magnitude)
    mean = total / np.maximum(uses, 1)[..., None]
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-4 * magnitude)


def test_a_shared_codebook_is_one_parameter_with_the_blocks_of_all_layers() -> None:
    words = np.array([[1, 0], [0, 1], [2, 2]], np.float32)
    codes = [np.array([[0, 1], [1, 1], [0, 0], [1, 0]]), np.array([[0, 2], [0, 0], [0, 0], [0, 0]])]
    first, second = (Coded.one_stage(numbers, words) for numbers in codes)
    coded = CodedModel(placed(gemm(first, layers=2), [first, second]), NOWHERE)
    books = coded.parameters("mean")
    assert len(books) == 1
    sum((weight.compute(books) * (1 + 9 * number)).sum() for number, weight in enumerate(coded.weights)).backward()
    (book,) = books.values()
    # Word 0: 4 blocks of the first layer (slope 1) and 7 of the second (slope 10); word 1: 4 of the first; word 2: 1.
    expected = torch.tensor([[74 / 11] * 2, [1, 1], [10, 10]])
    torch.testing.assert_close(book.grad[0, 0], expected)


# And back


def test_stored_values_are_rounded_and_hold_no_negative_zero() -> None:
    form = Coded.one_stage(np.array([[0, 1]]), np.array([[1.0], [2.0]], np.float16))
    coded = CodedModel(placed(gemm(form), [form]), NOWHERE)
    (name,) = coded.parameters("mean")
    values = torch.tensor([1 + 2**-13, -1e-9]).reshape(1, 1, 2, 1)
    stored = coded.stored({name: values})[name]
    assert stored.dtype == np.float32
    assert stored.ravel().tolist() == [1.0, 0.0]
    assert not np.signbit(stored).any()
    with pytest.raises(VqonnxError, match=rf"codebook '{name}' has grown to 7e\+04, beyond float16; .*smaller rate"):
        coded.stored({name: values * 0 + 7e4})


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx: holds no codebooks; give a file that 'vqonnx compress' wrote"):
        CodedModel(mixed(), NOWHERE)
    inner = vqonnx.compress(write(branches(), tmp_path / "branches.onnx"), KMeans(bits=2)).model
    with pytest.raises(ModelError, match="own: is in a subgraph or function, which cannot be trained"):
        CodedModel(inner, NOWHERE)
    dense = vqonnx.compress(write(mixed(), tmp_path / "mixed.onnx"), SVD(share=0.4)).model
    with pytest.raises(ModelError, match="holds no codebooks"):
        CodedModel(dense, NOWHERE)


def test_a_codebook_that_is_no_initializer_is_refused(tmp_path: Path) -> None:
    model = vqonnx.compress(write(mixed(), tmp_path / "mixed.onnx"), PQ(width=4, bits=2), fuse=False).model
    decode = next(node for node in model.graph.node if node.op_type == "Decode")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == decode.input[1])
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    model.graph.initializer.remove(tensor)
    onnx.checker.check_model(model)
    with pytest.raises(ModelError, match=f"conv_w: its codebook '{decode.input[1]}' is no initializer"):
        CodedModel(model, NOWHERE)


def test_codes_from_constant_nodes_are_read(tmp_path: Path) -> None:
    """Other tools may turn initializers that are not codebooks into nodes."""
    overrides = [vqonnx.Override("fc_w", SVD(share=0.6)), vqonnx.Override("*", KMeans(bits=3))]
    path = write(mixed(), tmp_path / "mixed.onnx")
    model = vqonnx.compress(path, KMeans(bits=3), overrides=overrides, fuse=False).model
    plain = CodedModel(model, NOWHERE)
    books = set(plain.parameters("mean"))
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in books]:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        model.graph.initializer.remove(tensor)
    coded = CodedModel(model, NOWHERE)
    values = coded.parameters("mean")
    for one, other in zip(coded.weights, plain.weights, strict=True):
        assert one.name == other.name
        assert torch.equal(one.compute(values), other.compute(values))
    assert numpy_helper.to_array(model.graph.initializer[0]).dtype == np.float16


# Whole numbers


def test_of_multiples_of_a_step_the_steps_move() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 10))
    form = coded_rows(rows, search_steps(rows, 4, np.ones((1, 1))), 4)
    model = CodedModel(placed(gemm(form), [form]), NOWHERE)
    ((name, steps),) = model.parameters("mean").items()
    assert form.scales is not None
    assert steps.shape == form.scales.shape
    made = model.weights[0].compute({name: steps * 2})
    np.testing.assert_array_equal(made.detach().numpy(), 2 * model.weights[0].compute({name: steps}).detach().numpy())


def test_words_of_whole_numbers_stay_whole() -> None:
    book = np.array([[[[-127, 3], [5, 127]]]], np.int8)
    form = Coded(np.array([[[0, 1], [1, 1]]], np.uint8), book, 4, np.full((1, 1), 0.5, np.float32))
    model = CodedModel(placed(gemm(form), [form]), NOWHERE)
    ((name, words),) = model.parameters("sum").items()
    assert words.shape == book.shape
    moved = model.stored({name: words + torch.tensor([[0.4, 0.6], [-0.6, 9.0]])})[name]
    assert moved.tolist() == [[[[-127, 4], [4, 127]]]]
