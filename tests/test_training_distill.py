"""Distillation: the loss falls, the codes stay, the file keeps its size; resumed, stopped and refused runs."""

from __future__ import annotations

import itertools
import logging
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cases import parse
from hypothesis import given
from hypothesis import strategies as st
from nets import CALIBRATION, CONV, MLP, TEST, draw, images, mixed, small_feed, weights_of, write
from numpy.typing import NDArray

import vqonnx
from vqonnx import modelfile
from vqonnx.errors import InputError, ModelError, OptionError
from vqonnx.methods import PQ, SVD, KMeans, Residual
from vqonnx.place import Target
from vqonnx.record import read_record
from vqonnx.runtime import open_session, run
from vqonnx.training.distill import Distilled, distill
from vqonnx.training.recipe import Recipe

SHORT = Recipe(steps=12, layer_steps=0, batch=32, gradient="sum", rate=0.01)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "mlp.onnx"
    vqonnx.compress(MLP, PQ(width=8, bits=4)).save(path)
    return path


def norm() -> onnx.ModelProto:
    """Two convolutions with BatchNormalization and a classifier of five classes."""
    model = parse(
        """(float[N, 4, 8, 8] x) => (float[N, 5] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w1)
          b = BatchNormalization (a, s1, b1, m1, v1)
          c = Relu (b)
          d = Conv <pads = [1, 1, 1, 1]> (c, w2)
          e = BatchNormalization (d, s2, b2, m2, v2)
          f = Relu (e)
          g = GlobalAveragePool (f)
          h = Flatten (g)
          y = Gemm <transB = 1> (h, w3, b3)
        }""",
        w1=draw((16, 4, 3, 3), 0),
        w2=draw((24, 16, 3, 3), 1),
        w3=8 * draw((5, 24), 2),
        b3=draw((5,), 3),
        **{
            f"{name}{layer}": np.full(n, value, np.float32)
            for layer, n in ((1, 16), (2, 24))
            for name, value in (("s", 1), ("b", 0.1), ("m", 0), ("v", 0.3))
        },
    )
    return model


NORM_DATA = np.random.default_rng(0).random((120, 4, 8, 8)).astype(np.float32)


@pytest.fixture
def normed(tmp_path: Path) -> tuple[Path, Path]:
    original, compressed = write(norm(), tmp_path / "norm.onnx"), tmp_path / "normed.onnx"
    vqonnx.compress(original, KMeans(bits=2)).save(compressed)
    return original, compressed


def initializers(path: Path) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(value) for name, value in weights_of(onnx.load(path).graph).items()}


def codebook_names(path: Path) -> set[str]:
    nodes = [node for node in onnx.load(path).graph.node if node.domain == "vqonnx"]
    return {node.input[1 if node.op_type == "Decode" else 2] for node in nodes}


# What it does


def test_the_outputs_come_closer_and_only_codebooks_change(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    made = distill(MLP, small, CALIBRATION, replace(SHORT, steps=60))
    assert made.loss_after < 0.7 * made.loss_before
    made.save(out)
    with np.load(TEST) as test:
        held_out, labels = {"image": test["image"]}, test["labels"]
    before = vqonnx.compare(MLP, small, held_out, labels=labels)
    after = vqonnx.compare(MLP, out, held_out, labels=labels)
    assert after.snr_db > before.snr_db + 0.5
    assert after.top1_after >= before.top1_after

    old, new = initializers(small), initializers(out)
    assert old.keys() == new.keys()
    books = codebook_names(small)
    assert books
    for name, value in old.items():
        assert (value.dtype, value.shape) == (new[name].dtype, new[name].shape), name
        assert (value.tobytes() != new[name].tobytes()) == (name in books), name
    nodes = [[node.SerializeToString() for node in onnx.load(path).graph.node] for path in (small, out)]
    assert nodes[0] == nodes[1]
    record = len(next(entry.value for entry in onnx.load(out).metadata_props if entry.key == "vqonnx"))
    assert abs(out.stat().st_size - small.stat().st_size) < record, "weights take the same bytes; the note is new"


def test_layers_in_turn_and_then_all(tmp_path: Path) -> None:
    compressed = tmp_path / "conv.onnx"
    vqonnx.compress(CONV, PQ(width=4, bits=4)).save(compressed)
    recipe = replace(SHORT, batch=16, steps=0, layer_steps=2, layer_rate=0.003)
    layers = distill(CONV, compressed, CALIBRATION, recipe)
    both = distill(CONV, compressed, CALIBRATION, replace(recipe, steps=15, rate=0.003))
    assert [len(made.histories) for made in (layers, both)] == [1, 2]
    assert layers.histories[0].steps == 2 * len(layers.result.layers)
    assert both.histories[0].losses == layers.histories[0].losses
    assert both.loss_after < layers.loss_after < layers.loss_before


def test_a_layer_is_tuned_with_original_layers_behind_it(tmp_path: Path) -> None:
    """With one step of no size, the loss of a layer's step is that of a model with the layers up to it compressed."""
    compressed = tmp_path / "mlp.onnx"
    vqonnx.compress(MLP, KMeans(bits=2)).save(compressed)
    recipe = Recipe(steps=0, layer_steps=1, layer_rate=1e-12, batch=256, weight_decay=0)
    found = [loss for _, loss in distill(MLP, compressed, CALIBRATION, recipe).histories[0].losses]
    names = [layer.name for layer in vqonnx.report(compressed).layers]
    assert len(found) == len(names) == 3
    session = open_session(MLP, threads=1)
    with np.load(CALIBRATION) as arrays:
        feed = {"image": arrays["image"]}
    (wanted,) = run(session, feed).values()
    for number, loss in enumerate(found, start=1):
        partly = tmp_path / f"{number}.onnx"
        vqonnx.compress(MLP, KMeans(bits=2), include=names[:number]).save(partly)
        (made,) = run(open_session(partly, threads=1), feed).values()
        p, q = (torch.log_softmax(torch.from_numpy(logits).double(), 1) for logits in (wanted, made))
        assert loss == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3), names[number - 1]


def test_statistics_follow_or_stay(normed: tuple[Path, Path], tmp_path: Path) -> None:
    old = initializers(normed[1])
    for statistics, biases in itertools.product((True, False), repeat=2):
        out = tmp_path / "out.onnx"
        distill(*normed, NORM_DATA, replace(SHORT, statistics=statistics, biases=biases)).save(out)
        new = initializers(out)
        moved = {name for name in new if new[name].tobytes() != old[name].tobytes()}
        expected = codebook_names(out) | ({"m1", "v1", "m2", "v2"} if statistics else set())
        assert moved == expected | ({"b1", "b2", "b3"} if biases else set())


def test_statistics_are_those_of_the_batches(normed: tuple[Path, Path]) -> None:
    """With one batch of everything and codebooks that do not move, the mean goes to that of the data."""
    recipe = Recipe(steps=80, layer_steps=0, batch=len(NORM_DATA), rate=1e-12, weight_decay=0)
    made = distill(*normed, NORM_DATA, recipe)
    means = weights_of(made.result.model.graph)["m1"]
    model = onnx.load(normed[1])
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name="a"))
    (a,) = run(open_session(model.SerializeToString()), {"x": NORM_DATA}).values()
    np.testing.assert_allclose(means, a.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)


def test_any_target_and_any_method(tmp_path: Path) -> None:
    original = write(mixed(), tmp_path / "mixed.onnx")
    overrides = [vqonnx.Override("fc_w", SVD(share=0.6)), vqonnx.Override("conv_w", Residual(bits=3, width=3))]
    data = small_feed("mixed", 24)
    distilled: dict[str, list[NDArray[Any]]] = {}
    targets: tuple[Target, ...] = ("hybrid", "portable", "custom")
    for target in targets:
        compressed, out = tmp_path / f"{target}.onnx", tmp_path / f"{target}-out.onnx"
        vqonnx.compress(original, KMeans(bits=2), overrides=overrides, target=target).save(compressed)
        recipe = replace(SHORT, loss="mse", steps=30, rate=1e-3, layer_steps=2, layer_rate=1e-3, batch=8)
        made = distill(original, compressed, data, recipe)
        assert made.loss_after < made.loss_before
        made.save(out)
        assert vqonnx.expand(out, tmp_path / "plain.onnx") == len(made.result.layers)
        distilled[target] = list(run(open_session(tmp_path / "plain.onnx", threads=1), data).values())
    for target in targets:
        np.testing.assert_allclose(distilled[target][0], distilled["hybrid"][0], rtol=1e-3, atol=1e-4)


def test_a_compact_file_stays_compact(tmp_path: Path) -> None:
    path, out, plain = tmp_path / "compact.onnx", tmp_path / "out.onnx", tmp_path / "plain.onnx"
    before = vqonnx.compress(CONV, PQ(width=8, bits=4), compact=True, half_biases=True).save(path)
    made = distill(CONV, path, CALIBRATION, replace(SHORT, biases=True))
    assert made.loss_after < made.loss_before
    saved = made.save(out)
    assert before.bytes < saved.bytes < before.bytes + 2600, "biases are no longer float16, and there is a note"
    assert [layer.name for layer in vqonnx.report(out).layers] == [layer.name for layer in vqonnx.report(path).layers]
    assert all(len(name) <= 2 for node in onnx.load(out).graph.node for name in node.output if name != "logits")
    assert vqonnx.expand(out, plain) == len(made.result.layers)


def test_any_outputs_by_squared_error(tmp_path: Path) -> None:
    model = parse(
        """(float[N, 5, 6] x) => (float[N, 5, 40] y, float[N, 5, 40] z) {
          y = MatMul (x, w)  a = Relu (y)  z = MatMul (a, v) }""",
        w=draw((6, 40), 0),
        v=draw((40, 40), 1),
    )
    original, compressed = write(model, tmp_path / "two.onnx"), tmp_path / "small.onnx"
    vqonnx.compress(original, KMeans(bits=2), op_types=["MatMul"]).save(compressed)
    data = {"x": draw((64, 5, 6), 9)}
    with pytest.raises(OptionError, match=r"output 'y' is \[.*\], not one row of classes for each image; .* mse"):
        distill(original, compressed, data, SHORT)
    made = distill(original, compressed, data, replace(SHORT, loss="mse", steps=40, rate=1e-3))
    assert made.loss_after < 0.995 * made.loss_before


@pytest.mark.parametrize("name", ["resnet20_bn", "squeezenet"])
def test_the_student_is_what_onnxruntime_makes_of_the_file(name: str, data_dir: Path, tmp_path: Path) -> None:
    """On real networks; the second ends in a Softmax."""
    model, compressed = data_dir / "models" / f"{name}.onnx", tmp_path / "small.onnx"
    vqonnx.compress(model, PQ(width=4, bits=5)).save(compressed, verify=False)
    key, shape = ("input", (6, 3, 32, 32)) if name == "resnet20_bn" else ("data_0", (2, 3, 224, 224))
    scale = 1 if name == "resnet20_bn" else 60
    data = {key: scale * np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    recipe = Recipe(steps=1, layer_steps=0, batch=6, rate=1e-12, weight_decay=0, statistics=False)
    made = distill(model, compressed, data, recipe)
    outputs = [next(iter(run(open_session(path, threads=1), data).values())) for path in (model, compressed)]
    p, q = (values.reshape(len(values), -1).astype(np.float64) for values in outputs)
    if name == "resnet20_bn":
        p, q = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) for logits in (p, q))
    expected = (p * np.log(p / q)).sum() / len(p)
    assert expected > 0.01
    assert made.loss_before == pytest.approx(expected, rel=2e-3)
    assert made.loss_after == pytest.approx(expected, rel=2e-3)


# What is kept of it


def test_the_record_tells_the_new_errors_and_what_was_done(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    made = distill(MLP, small, images(64), SHORT)
    made.save(out)
    before, after = vqonnx.report(small), vqonnx.report(out)
    assert after.distilled == {"images": 64, **asdict(SHORT.scaled(64))}
    assert before.distilled is None
    assert "distilled" not in before.to_json()
    assert after.to_json()["distilled"] == after.distilled
    assert after.layers == made.result.layers
    assert after.bytes_before == before.bytes_before == MLP.stat().st_size
    plain = tmp_path / "plain.onnx"
    vqonnx.expand(out, plain)
    original, decoded = initializers(MLP), initializers(plain)
    for old, new in zip(before.layers, after.layers, strict=True):
        assert replace(old, weight_snr_db=0, output_snr_db=None) == replace(new, weight_snr_db=0)
        weight = original[new.name].astype(np.float64)
        noise = ((weight - decoded[new.name]) ** 2).sum()
        assert new.weight_snr_db == pytest.approx(10 * np.log10((weight**2).sum() / noise), abs=0.006)
        assert new.weight_snr_db < old.weight_snr_db, "codebooks of least error of the weights are left behind"
    assert read_record(onnx.load(plain)) is None


def test_external_data_beside_either_model(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    model = onnx.load(MLP)
    onnx.save(model, folder / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    compressed = tmp_path / "small.onnx"
    vqonnx.compress(folder / "big.onnx", PQ(width=8, bits=4)).save(compressed)
    apart = tmp_path / "apart"
    apart.mkdir()
    onnx.save(onnx.load(compressed), apart / "s.onnx", save_as_external_data=True, location="s.data", size_threshold=0)
    one = distill(folder / "big.onnx", compressed, images(32), SHORT)
    other = distill(folder / "big.onnx", apart / "s.onnx", images(32), SHORT)
    one.save(tmp_path / "one.onnx")
    other.save(tmp_path / "other.onnx")
    a, b = initializers(tmp_path / "one.onnx"), initializers(tmp_path / "other.onnx")
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_inputs_are_never_written_over(small: Path, tmp_path: Path) -> None:
    kept = small.read_bytes(), MLP.read_bytes()
    made = distill(MLP, small, images(32), SHORT)
    for path in (MLP, small):
        with pytest.raises(InputError, match="is the input itself, which is never changed"):
            made.save(path)
    assert kept == (small.read_bytes(), MLP.read_bytes())


# Runs


def bytes_of(made: Distilled, path: Path) -> bytes:
    made.save(path, verify=False)
    return path.read_bytes()


def test_the_same_seed_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    recipe = replace(SHORT, layer_steps=2)
    files = [bytes_of(distill(MLP, small, images(64), recipe), tmp_path / "a.onnx") for _ in range(2)]
    assert files[0] == files[1]
    other = distill(MLP, small, images(64), replace(recipe, seed=1))
    assert bytes_of(other, tmp_path / "a.onnx") != files[0]


@pytest.mark.parametrize("stop", [(40, 60), (120, 120)], ids=["in the layers", "in the steps for all"])
def test_a_resumed_run_ends_like_one_that_was_never_interrupted(
    normed: tuple[Path, Path], tmp_path: Path, stop: tuple[int, int]
) -> None:
    recipe = Recipe(steps=120, layer_steps=20, batch=4, biases=True, gradient="sum", rate=1e-3, layer_rate=1e-3)
    whole = bytes_of(distill(*normed, NORM_DATA[:16], recipe), tmp_path / "whole.onnx")

    class Stop(Exception):
        pass

    def interrupt(done: int, total: int, text: str) -> None:
        assert text.startswith("loss ")
        if (done, total) == stop:
            raise Stop

    checkpoint = tmp_path / "state"
    with pytest.raises(Stop):
        distill(*normed, NORM_DATA[:16], recipe, checkpoint=checkpoint, progress=interrupt)
    for name in ("resumed", "finished before"):
        made = distill(*normed, NORM_DATA[:16], recipe, checkpoint=checkpoint)
        assert bytes_of(made, tmp_path / "resumed.onnx") == whole, name


def test_a_checkpoint_of_another_run_is_refused(small: Path, tmp_path: Path) -> None:
    checkpoint, other = tmp_path / "state", tmp_path / "other.onnx"
    distill(MLP, small, images(32), SHORT, checkpoint=checkpoint)
    vqonnx.compress(MLP, PQ(width=8, bits=4), seed=1).save(other)
    for compressed, data, recipe in (
        (small, images(32), replace(SHORT, rate=0.02)),
        (small, images(31), SHORT),
        (small, images(32)[::-1], SHORT),
        (other, images(32), SHORT),
    ):
        with pytest.raises(OptionError, match="belongs to a run with other settings"):
            distill(MLP, compressed, data, recipe, checkpoint=checkpoint)


@pytest.mark.parametrize("phase", ["layers", "all"])
def test_a_rate_that_is_too_large_keeps_the_last_good_state(
    phase: str, small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rates = {"layer_rate": 1e20, "layer_steps": 4} if phase == "layers" else {"rate": 1e20}
    with caplog.at_level(logging.WARNING):
        made = distill(MLP, small, images(64), replace(SHORT, steps=8, **rates))
    assert made.diverged
    assert len(made.histories) == 1, "what would follow is left out"
    (message,) = [record.getMessage() for record in caplog.records]
    assert "stopped, the state of step 0 is kept; choose a rate below 1e+20" in message
    assert made.loss_after == made.loss_before
    made.save(tmp_path / "out.onnx")
    old, new = initializers(small), initializers(tmp_path / "out.onnx")
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)


def test_a_loss_that_rose_is_said(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = distill(MLP, small, images(64), replace(SHORT, steps=2, rate=3.0))
    assert made.loss_after > made.loss_before
    (message,) = [record.getMessage() for record in caplog.records]
    assert "the loss rose from" in message
    assert "choose smaller rates" in message


# Recipes


@given(images=st.integers(1, 10**7), batch=st.integers(1, 512))
def test_the_default_schedule_is_the_published_one_scaled(images: int, batch: int) -> None:
    recipe = Recipe(batch=batch).scaled(images)
    assert recipe.steps == max(1, round(9 * images / batch))
    assert recipe.layer_steps == max(1, round(images / 4 / batch))
    assert (recipe.rate, recipe.layer_rate) == (0.01, 0.05)
    given_already = Recipe(batch=batch, steps=5, layer_steps=0, rate=0.2, layer_rate=0.3)
    assert given_already.scaled(images) == given_already


def test_imagenet_gives_the_published_numbers() -> None:
    recipe = Recipe().scaled(1_280_000)
    assert (recipe.layer_steps, recipe.steps) == (2500, 90_000)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps is -1; choose 0 or more"),
        ({"layer_steps": -3}, "layer_steps is -3; choose 0 or more"),
        ({"batch": 0}, "batch is 0; choose 1 or more"),
        ({"seed": -1}, "seed is -1; choose 0 or more"),
        ({"rate": 0.0}, "rate is 0; choose a number above 0"),
        ({"layer_rate": float("nan")}, "layer_rate is nan; choose a number above 0"),
        ({"loss": "l1"}, "loss 'l1' is unknown; choose kl or mse"),
        ({"gradient": "max"}, "gradient 'max' is unknown; choose mean or sum"),
        ({"steps": 0, "layer_steps": 0}, "steps and layer_steps are both 0"),
    ],
)
def test_bad_recipes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**values)


def test_every_option_of_a_recipe_is_json(small: Path) -> None:
    assert all(
        isinstance(getattr(Recipe(), field.name), (int, float, str, bool, type(None))) for field in fields(Recipe)
    )


def test_models_that_do_not_belong_together_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"digits_mlp\.onnx: holds no codebooks; give a file that 'vqonnx compress'"):
        distill(MLP, MLP, CALIBRATION, SHORT)
    with pytest.raises(ModelError, match=r"digits_conv\.onnx: has no weight 'fc1.weight', so mlp\.onnx was not made"):
        distill(CONV, small, CALIBRATION, SHORT)
    wider = onnx.load(MLP)
    del wider.graph.output[0].type.tensor_type.shape.dim[:]
    wider.graph.output[0].type.tensor_type.ClearField("shape")
    for tensor in wider.graph.initializer:
        if tensor.name.startswith("fc3"):
            shape = [12 if size == 10 else size for size in tensor.dims]
            tensor.CopyFrom(modelfile.make_tensor(np.ones(shape, np.float32), 1, tensor.name))
    onnx.save(wider, tmp_path / "wider.onnx")
    with pytest.raises(ModelError, match=r"'fc3.weight' is \[12, 256\], in mlp\.onnx \[10, 256\], which was not made"):
        distill(tmp_path / "wider.onnx", small, CALIBRATION, SHORT)


def test_a_device_that_is_not_there_is_refused(small: Path) -> None:
    with pytest.raises(OptionError, match=r"device 'abacus': .*; choose cpu"):
        distill(MLP, small, CALIBRATION, SHORT, device="abacus")
