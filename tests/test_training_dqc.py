"""Power-of-two weights in training: the quantiser of `dqc`, two gradient rules, and a model that comes out coded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nets import CALIBRATION, CONV, TEST, mixed, small_feed, write
from numpy.typing import NDArray
from onnx import numpy_helper

import vqonnx
from vqonnx.cli import main
from vqonnx.errors import ModelError, OptionError
from vqonnx.method import Layer, LeftAlone
from vqonnx.methods import DQC
from vqonnx.training.dqc import Recipe, train_dqc
from vqonnx.training.loop import Schedule
from vqonnx.training.power import quantise
from vqonnx.training.values import batch_norm_names, bias_names, statistic_names, with_values

WEIGHTS = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 7)),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False),
)


@given(weight=WEIGHTS, bits=st.sampled_from([3, 4, 5]), zero=st.booleans())
def test_the_step_of_pytorch_is_the_codebook_of_the_paper(weight: NDArray[np.float32], bits: int, zero: bool) -> None:
    found = quantise(torch.from_numpy(weight), bits, zero=zero, rule="identity").numpy()
    try:
        expected = DQC(bits=bits, zero=zero, fit="paper").encode(Layer("w", "Gemm", weight)).decode()
    except LeftAlone:
        return  # all zero, or too small for the codebook
    np.testing.assert_array_equal(found, expected)


@given(weight=WEIGHTS, zero=st.booleans())
def test_gradients_pass_as_they_are_or_times_the_magnitude(weight: NDArray[np.float32], zero: bool) -> None:
    for rule in ("identity", "magnitude"):
        w = torch.from_numpy(weight.copy()).requires_grad_()
        q = quantise(w, 3, zero=zero, rule=rule)
        (3 * q).sum().backward()
        assert w.grad is not None
        expected = 3 * torch.ones_like(w) if rule == "identity" else 3 * q.detach().abs()
        assert torch.equal(w.grad, expected)


def digits(count: int = 256):  # type: ignore[no-untyped-def]
    """Batches of the digits, labelled by the model itself: there are no labels of the calibration images."""
    with np.load(CALIBRATION) as images:
        x = images["image"][:count]
    session = vqonnx.runtime.open_session(CONV, threads=1)
    labels = next(iter(vqonnx.runtime.run(session, {"image": x}).values())).argmax(1).astype(np.int64)

    def batch(step: int):  # type: ignore[no-untyped-def]
        chosen = np.random.default_rng(step).integers(0, len(x), 32)
        return {"image": x[chosen]}, labels[chosen]

    return batch


def test_training_makes_a_model_that_is_better_than_the_untrained_codes(tmp_path: Path) -> None:
    method = DQC(bits=3, zero=True, fit="paper")
    recipe = Recipe(Schedule(steps=40, rate=0.02, drops=(30,)), l2=1e-4)
    original = CONV.read_bytes()
    trained = train_dqc(CONV, digits(), method, recipe)
    saved = trained.result.save(tmp_path / "small.onnx")
    plain = vqonnx.compress(CONV, method).save(tmp_path / "plain.onnx")
    with np.load(TEST) as test:
        feeds, labels = [{"image": test["image"]}], test["labels"]
    for library in (False, True):
        after = vqonnx.compare(CONV, saved.path, feeds, labels=labels, library=library).top1_after
        before = vqonnx.compare(CONV, plain.path, feeds, labels=labels, library=library).top1_after
        assert after is not None
        assert before is not None
        assert after > before + 0.01
    assert saved.bytes <= plain.bytes + 200  # the same codes and codebooks
    assert CONV.read_bytes() == original
    for layer in trained.result.layers:
        assert layer.method == "dqc"
        assert layer.weight_snr_db is None  # the trained weights are the codes, without an error


def turned(path: Path, cut: int = 10) -> Path:
    """The network of the digits with its classes one further, or fewer of them."""
    model = onnx.load(CONV)
    last = next(node for node in reversed(model.graph.node) if node.op_type == "Gemm")
    for tensor in model.graph.initializer:
        if tensor.name in last.input[1:]:
            values = numpy_helper.to_array(tensor)
            axis = 0 if tensor.name == last.input[2] or any(a.name == "transB" and a.i for a in last.attribute) else 1
            moved = np.roll(values, 1, axis=axis).take(range(cut), axis=axis)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    model.graph.output[0].type.tensor_type.shape.dim[1].Clear()
    return write(model, path)


def test_another_model_may_teach(tmp_path: Path) -> None:
    """One whose classes are others: what is trained follows it and not the original."""
    teacher = turned(tmp_path / "teacher.onnx")
    recipe = Recipe(Schedule(steps=120, rate=0.005, drops=(80,)), teacher=1.0)
    trained = train_dqc(CONV, digits(), DQC(bits=5, fit="paper"), recipe, teacher=teacher)
    saved = trained.result.save(tmp_path / "small.onnx", verify=False)
    with np.load(TEST) as test:
        feeds = [{"image": test["image"]}]
    untrained = vqonnx.compare(teacher, CONV, feeds).top1_agreement
    assert untrained is not None
    assert untrained < 0.05
    followed = vqonnx.compare(teacher, saved.path, feeds).top1_agreement
    assert followed is not None
    assert followed > 0.8
    assert trained.result.source == CONV


def test_a_teacher_that_cannot_teach_is_refused(tmp_path: Path) -> None:
    teacher = turned(tmp_path / "teacher.onnx", cut=7)
    with pytest.raises(OptionError, match="share of 0 of the loss; set teacher above 0"):
        train_dqc(CONV, digits(), teacher=teacher)
    with pytest.raises(ModelError, match=r"outputs of \[32, 10\] and \[32, 7\]; choose one of the same classes"):
        train_dqc(CONV, digits(), recipe=Recipe(teacher=0.5), teacher=teacher)


def test_the_same_run_gives_the_same_bytes_also_when_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    method, recipe = DQC(bits=4, fit="paper"), Recipe(Schedule(steps=4, rate=0.01))
    torch.set_num_threads(1)
    first = train_dqc(CONV, digits(64), method, recipe).result.model.SerializeToString()
    train_dqc(CONV, digits(64), method, recipe, checkpoint=tmp_path / "state.pt")
    again = train_dqc(CONV, digits(64), method, recipe, checkpoint=tmp_path / "state.pt")
    assert again.result.model.SerializeToString() == first


def test_a_run_that_diverges_keeps_what_it_had(tmp_path: Path) -> None:
    trained = train_dqc(CONV, digits(64), DQC(bits=4, fit="paper"), Recipe(Schedule(steps=50, rate=1e12)))
    assert trained.history.diverged is not None
    untrained = vqonnx.compress(CONV, DQC(bits=4, fit="paper"))
    decoded = [layer.name for layer in untrained.layers]
    assert [layer.name for layer in trained.result.layers] == decoded
    saved = trained.result.save(tmp_path / "kept.onnx")
    assert vqonnx.compare(CONV, saved.path, [{"image": np.zeros((1, 1, 8, 8), np.float32)}]).snr_db is not None


@pytest.mark.parametrize("options", [{"fit": "search"}, {"fit": "paper", "scale": "row"}])
def test_a_codebook_that_is_not_the_papers_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=r"choose paper.*choose none"):
        train_dqc(CONV, digits(), DQC(**options))


@pytest.mark.parametrize("options", [{"l1": -1.0}, {"l2": float("nan")}])
def test_a_penalty_below_zero_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="choose 0 or more"):
        Recipe(**options)


def test_a_model_with_several_outputs_is_refused(tmp_path: Path) -> None:
    model = mixed()
    model.graph.output.append(onnx.helper.make_tensor_value_info("g", 1, ["N", 40]))
    path = write(model, tmp_path / "two.onnx")
    with pytest.raises(ModelError, match="2 outputs; training needs one output"):
        train_dqc(path, digits())


def test_names_of_what_moves() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 3, 4, 4] x) => (float[N, 2] y)
        <float[2, 3, 1, 1] w = {1,2,3,4,5,6}, float[2] b = {1,2}, float[2] s = {1,1}, float[2] o = {0,0},
         float[2] m = {0,0}, float[2] v = {1,1}, float[2, 2] k = {1,2,3,4}, float[2] added = {1,2},
         float[2] other = {1,2}>
        {
          c = Conv (x, w, b)
          n = BatchNormalization (c, s, o, m, v)
          p = GlobalAveragePool (n)
          f = Flatten (p)
          h = MatMul (f, k)
          z = Add (h, added)
          y = Mul (z, other)
        }"""
    )
    assert bias_names(model) == ("b", "added")
    assert batch_norm_names(model) == ("s", "o")
    assert statistic_names(model) == ("m", "v")


def test_values_are_put_back_under_the_names_that_layers_read(tmp_path: Path) -> None:
    path = write(mixed(), tmp_path / "mixed.onnx")
    model = onnx.load(path)
    # one weight behind a Transpose, which the layer reads under another name
    node = next(node for node in model.graph.node if node.name == "head")
    node.input[1] = "turned"
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == "head_w")
    turned = numpy_helper.to_array(stored).T.copy()
    stored.CopyFrom(numpy_helper.from_array(turned, "head_w"))
    model.graph.node.insert(0, onnx.helper.make_node("Transpose", ["head_w"], ["turned"], perm=[1, 0]))
    new = {"turned": 2 * turned.T, "conv_w": np.zeros((16, 4, 3, 3), np.float32)}
    changed = with_values(model, tmp_path, new)
    x = small_feed("mixed")
    expected = onnx.load(path)
    for tensor in expected.graph.initializer:
        if tensor.name in ("head_w", "conv_w"):
            value = 2 * turned.T if tensor.name == "head_w" else new["conv_w"]
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    found = vqonnx.runtime.run(vqonnx.runtime.open_session(changed.SerializeToString()), x)
    wanted = vqonnx.runtime.run(vqonnx.runtime.open_session(expected.SerializeToString()), x)
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no constant is named nothing"):
        with_values(model, tmp_path, {"nothing": turned})


def command(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, Path]:
    """Test images of the digits with their labels, as files."""
    with np.load(TEST) as test:
        np.savez(tmp_path / "images.npz", image=test["image"][:64])
        np.save(tmp_path / "labels.npy", test["labels"][:64])
    return tmp_path / "images.npz", tmp_path / "labels.npy"


def test_the_command_writes_a_model(
    labelled: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, labels = labelled
    out = tmp_path / "small.onnx"
    options = ("--data", data, "--labels", labels, "--bits", 5, "--steps", 2, "--batch", 16, "--checkpoint")
    code, text, errors = command(capfd, "train-dqc", CONV, out, *options, tmp_path / "state.pt", "--json")
    assert code == 0, errors
    assert "train: 2/2 loss" in errors
    content = json.loads(text)
    assert content["diverged"] is None
    assert [step for step, _ in content["losses"]] == [2]
    assert out.exists()
    assert vqonnx.report(out).layers
    code, text, _ = command(capfd, "train-dqc", CONV, out, *options, tmp_path / "state.pt")
    assert code == 0
    assert "fc" in text


def test_a_run_that_diverges_is_exit_code_1(
    labelled: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, labels = labelled
    out = tmp_path / "small.onnx"
    rest = ("--data", data, "--labels", labels, "--steps", 20, "--rate", 1e12, "--batch", 16)
    code, _, errors = command(capfd, "train-dqc", CONV, out, *rest)
    assert code == 1
    assert "stopped" in errors
    assert out.exists()  # the last good state


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", "6"), "bits='6' is not one of 3, 4, 5"),
        (("--rule", "no"), "rule 'no' is unknown; choose one of magnitude, identity"),
        (("--teacher", "2"), "teacher is 2; choose 0 to 1"),
        (("--taught-by", "large.onnx"), "large.onnx teaches with a share of 0 of the loss; set teacher above 0"),
        (("--rate", "0"), "rate is 0; choose a number above 0"),
        (("--batch", "0"), "batch is 0; choose 1 or more"),
    ],
)
def test_options_that_cannot_be(
    options: tuple[str, ...], says: str, labelled: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, labels = labelled
    out = tmp_path / "small.onnx"
    code, _, errors = command(capfd, "train-dqc", CONV, out, "--data", data, "--labels", labels, *options)
    assert code == 2
    assert says in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_without_torch_one_line_says_what_to_install(labelled: tuple[Path, Path], tmp_path: Path) -> None:
    data, labels = labelled
    code = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Without())
from vqonnx.cli import main
sys.exit(main(sys.argv[1:]))
"""
    command = ["train-dqc", CONV, tmp_path / "x.onnx", "--data", data, "--labels", labels]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "vqonnx: train-dqc needs PyTorch; install it with: pip install 'vqonnx[distill]'\n"
