"""Layers tuned while a model is compressed: each with the layers before it tuned and those behind it original."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import CALIBRATION, MLP, TEST, images, mixed, small_feed, weights_of, write

import vqonnx
from vqonnx.form import Coded, Form
from vqonnx.graph import Site
from vqonnx.methods import BGD, SVD, KMeans
from vqonnx.runtime import open_session, run
from vqonnx.training.recipe import Recipe
from vqonnx.training.tuner import Tuner
from vqonnx.view import View

RECIPE = Recipe(layer_steps=8, layer_rate=0.01, gradient="sum", batch=32)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def divergence(path: Path) -> float:
    """From the original, on the digits that nothing was tuned on."""
    with np.load(TEST) as arrays:
        feed = {"image": arrays["image"]}
    logits = [next(iter(run(open_session(model, threads=1), feed).values())) for model in (MLP, path)]
    p, q = (torch.log_softmax(torch.from_numpy(values).double(), 1) for values in logits)
    return float((p.exp() * (p - q)).sum(1).mean())


def test_outputs_come_closer_at_the_same_size(tmp_path: Path) -> None:
    method = BGD(bits=4, first=True)
    plain = vqonnx.compress(MLP, method, calibration=CALIBRATION)
    tuner = Tuner(MLP, CALIBRATION, RECIPE)
    tuned = vqonnx.compress(MLP, method, calibration=CALIBRATION, tune=tuner)
    assert [layer.bytes for layer in plain.layers] == [layer.bytes for layer in tuned.layers]
    assert list(tuner.histories) == [layer.name for layer in tuned.layers]
    assert all(history.steps == 8 for history in tuner.histories.values())
    losses = []
    for result in (plain, tuned):
        result.save(tmp_path / "m.onnx")
        losses.append(divergence(tmp_path / "m.onnx"))
    assert losses[1] < 0.8 * losses[0]
    again = vqonnx.compress(MLP, method, calibration=CALIBRATION, tune=Tuner(MLP, CALIBRATION, RECIPE))
    assert again.model.SerializeToString() == tuned.model.SerializeToString()


def test_the_layers_behind_are_encoded_for_what_was_tuned() -> None:
    """The codes of the first layer stay, as it is encoded before it is tuned; the errors of the others change."""
    method = BGD(bits=3, first=True)
    plain = vqonnx.compress(MLP, method, calibration=images(64), fuse=False)
    tuned = vqonnx.compress(MLP, method, calibration=images(64), fuse=False, tune=Tuner(MLP, images(64), RECIPE))
    one, other = (weights_of(result.model.graph) for result in (plain, tuned))
    codes = [node.input[0] for node in plain.model.graph.node if node.op_type == "Decode"]
    assert [np.array_equal(one[name], other[name]) for name in codes][:2] == [True, False]


def test_forms_without_codes_are_left_and_seen_by_the_layers_behind(tmp_path: Path) -> None:
    path = write(mixed(), tmp_path / "mixed.onnx")
    data = small_feed("mixed", 16)
    tuner = Tuner(path, data, replace(RECIPE, loss="mse", layer_steps=2, layer_rate=1e-3))
    seen: dict[str, tuple[Form, Form]] = {}

    def spy(site: Site, view: View, form: Form) -> Form:
        seen[site.name] = form, tuner(site, view, form)
        return seen[site.name][1]

    overrides = [vqonnx.Override("fc_w", SVD(share=0.6))]
    vqonnx.compress(path, KMeans(bits=2), overrides=overrides, tune=spy).save(tmp_path / "out.onnx")
    assert set(tuner.histories) == set(seen) - {"fc_w"}
    for name, (before, after) in seen.items():
        assert (before is after) == (name == "fc_w"), name
        if isinstance(before, Coded) and isinstance(after, Coded):
            assert np.array_equal(before.codes, after.codes), name
            assert before.codebooks.dtype == after.codebooks.dtype, name
            assert not np.array_equal(before.codebooks, after.codebooks), name
    assert not [
        tensor for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer if tensor.name in tuner.histories
    ]


def test_no_steps_tune_nothing() -> None:
    tuner = Tuner(MLP, images(32), replace(RECIPE, layer_steps=0))
    plain = vqonnx.compress(MLP, KMeans(bits=2))
    assert vqonnx.compress(MLP, KMeans(bits=2), tune=tuner).model.SerializeToString() == plain.model.SerializeToString()
    assert tuner.histories == {}
