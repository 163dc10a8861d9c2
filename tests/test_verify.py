"""Comparisons of two small models whose distance is known."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqonnx.errors import DataError, ModelError, OptionError, VerifyError
from vqonnx.labels import read_labels
from vqonnx.verify import Comparison, compare, junit

KEYS = ["snr_db", "max_abs", "cosine", "top1_agreement", "top1", "passed", "identical", "outputs", "checks"]


def model(body: str, outputs: str = "float[N, C] y", inputs: str = "float[N, C] x") -> bytes:
    text = f'<ir_version: 8, opset_import: ["": 13]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return onnx.parser.parse_model(text).SerializeToString()


def scaled(factor: float) -> bytes:
    return model(f"f = Constant<value = float {{{factor!r}}}>() y = Mul(x, f)")


def shifted(amount: float) -> bytes:
    return model(f"f = Constant<value = float {{{amount!r}}}>() y = Add(x, f)")


SAME = model("y = Identity(x)")
NEGATIVE = model("y = Neg(x)")
RNG = np.random.default_rng(5)
SCORES = RNG.normal(size=(40, 7)).astype(np.float32)


def strict_json(comparison: Comparison) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    return found


def check_of(comparison: Comparison, name: str) -> tuple[float | None, float, bool]:
    (check,) = (check for check in comparison.checks if name in check.name)
    return check.value, check.limit, check.passed


def test_a_model_is_identical_to_itself() -> None:
    found = compare(SAME, SAME, SCORES, min_snr=100, min_agreement=1, rtol=0)
    assert found.identical
    assert found.passed
    assert (found.snr_db, found.max_abs, found.cosine, found.top1_agreement, found.images) == (None, 0, 1, 1, 40)
    assert list(strict_json(found)) == KEYS


@given(factor=st.integers(-400, 400).filter(lambda percent: percent != 100).map(lambda percent: percent / 100))
def test_scaling_has_a_known_snr(factor: float) -> None:
    found = compare(SAME, scaled(factor), SCORES)
    assert found.snr_db == pytest.approx(-20 * math.log10(abs(factor - 1)), abs=1e-2)
    assert found.max_abs == pytest.approx(abs(factor - 1) * np.abs(SCORES).max(), rel=1e-3)
    assert found.cosine == pytest.approx(np.sign(factor), abs=1e-6)
    assert not found.identical
    strict_json(found)


@given(cuts=st.lists(st.integers(1, 39), max_size=5))
def test_batches_do_not_change_the_result(cuts: list[int]) -> None:
    whole = compare(SAME, shifted(0.125), [{"x": SCORES}], labels=np.arange(40) % 7)
    parts = [{"x": part} for part in np.split(SCORES, sorted(set(cuts)))]
    found = compare(SAME, shifted(0.125), parts, labels=np.arange(40) % 7)
    assert found.snr_db == pytest.approx(whole.snr_db, abs=1e-9)
    assert found.cosine == pytest.approx(whole.cosine, abs=1e-12)
    assert (found.max_abs, found.images) == (whole.max_abs, whole.images)
    assert (found.top1_before, found.top1_after) == (whole.top1_before, whole.top1_after)


@pytest.mark.parametrize("tail", ["", ", 1, 1"])
def test_top1_is_counted(tail: str) -> None:
    shape = f"float[N, C{tail}]"
    same, negative = (model(f"y = {op}(x)", f"{shape} y", f"{shape} x") for op in ("Identity", "Neg"))
    data = SCORES.reshape(40, 7, *[1] * tail.count("1"))
    labels = SCORES.argmax(axis=1)
    labels[:10] = (labels[:10] + 1) % 7
    worst = (SCORES.argmin(axis=1) == labels).mean()
    found = compare(same, negative, data, labels=labels, max_drop=1.0, min_agreement=0.5)
    assert (found.top1_before, found.top1_after, found.top1_agreement) == (0.75, worst, 0)
    assert check_of(found, "max_drop") == (pytest.approx(100 * (0.75 - worst)), 1.0, False)
    assert check_of(found, "min_agreement") == (0, 0.5, False)
    assert not found.passed
    assert strict_json(found)["top1"] == {"before": 0.75, "after": worst}


def test_limits_are_met_or_not() -> None:
    near = scaled(1.01)  # 40 dB
    assert compare(SAME, near, SCORES, min_snr=39.9).passed
    assert not compare(SAME, near, SCORES, min_snr=40.1).passed
    assert compare(SAME, near, SCORES, rtol=0.0101).passed
    assert not compare(SAME, near, SCORES, rtol=0.0099).passed
    assert compare(SAME, shifted(0.5), SCORES, atol=0.501).passed
    assert check_of(compare(SAME, shifted(0.5), SCORES, atol=0.1), "atol 0.1") == (SCORES.size, 0, False)
    assert compare(SAME, near, SCORES, labels=SCORES.argmax(axis=1), max_drop=0).passed


@pytest.mark.parametrize(
    "limits",
    [{"min_agreement": 0.9}, {"max_drop": 1.0, "labels": [0] * 4}, {"max_drop": 1.0}, {"min_agreement": 90}],
)
def test_limits_that_cannot_be_measured_are_refused(limits: dict[str, Any]) -> None:
    one = model("y = ReduceSum(x)", "float[1, 1] y")
    with pytest.raises(OptionError, match=r"min_agreement|max_drop"):
        compare(one, one, [{"x": SCORES[:2]}] * 4, **limits)


def test_limits_must_be_finite_numbers() -> None:
    with pytest.raises(OptionError, match="min_snr is inf"):
        compare(SAME, SAME, SCORES, min_snr=math.inf)


def test_min_snr_needs_a_float_output() -> None:
    best = model("y = ArgMax<axis = 1>(x)", "int64[N, 1] y")
    with pytest.raises(OptionError, match="float output"):
        compare(best, best, SCORES, min_snr=10)


def test_integers_are_compared_by_value() -> None:
    best = model("y = ArgMax<axis = 1>(x)", "int64[N, 1] y")
    worst = model("y = ArgMin<axis = 1>(x)", "int64[N, 1] y")
    found = compare(best, worst, SCORES)
    assert (found.snr_db, found.cosine, found.identical) == (None, None, False)
    assert found.max_abs == np.abs(SCORES.argmax(axis=1) - SCORES.argmin(axis=1)).max()


def test_nan_in_both_is_equal_and_in_one_a_failure() -> None:
    root = model("y = Sqrt(x)")
    flipped = model("z = Neg(x) y = Sqrt(z)")
    assert compare(root, root, SCORES).identical
    found = compare(root, flipped, SCORES)
    assert check_of(found, "NaN") == (SCORES.size, 0, False)
    assert not found.passed
    strict_json(found)


@pytest.mark.parametrize(("one", "other"), [(SAME, scaled(0.0)), (scaled(0.0), SAME), (scaled(1e38), scaled(-3e38))])
def test_json_is_finite_at_the_extremes(one: bytes, other: bytes) -> None:
    found = strict_json(compare(one, other, SCORES * 100))
    assert found["snr_db"] is not None
    assert found["outputs"][0]["max_abs"] >= 0


def test_huge_doubles_do_not_overflow() -> None:
    kinds = {"inputs": "double[N] x", "outputs": "double[N] y"}
    found = compare(model("y = Identity(x)", **kinds), model("y = Neg(x)", **kinds), np.array([1e300, -1.7e308]))
    assert strict_json(found)["snr_db"] == -300


def test_each_output_has_its_record() -> None:
    body, outputs = "y = Identity(x) z = {}(x)", "float[N, C] y, float[N, C] z"
    found = compare(model(body.format("Identity"), outputs), model(body.format("Neg"), outputs), SCORES)
    assert [(o.name, o.identical, o.snr_db) for o in found.outputs] == [
        ("y", True, None),
        ("z", False, pytest.approx(-20 * math.log10(2))),
    ]
    assert (found.snr_db, found.identical) == (found.outputs[1].snr_db, False)


def test_sequences_and_strings_are_compared() -> None:
    split = model("y = SplitToSequence<axis = 0>(x)", "seq(float[N, C]) y")
    found = compare(split, split, SCORES)
    assert [(o.name, o.identical) for o in found.outputs] == [("y", True)]
    kinds = {"inputs": "string[N] x", "outputs": "string[N] y"}
    words = model("y = Identity(x)", **kinds)
    turned = model("i = Constant<value = int64[2] {1, 0}>() y = Gather(x, i)", **kinds)
    data = np.array(["a", "b"])
    assert compare(words, words, data).identical
    found = compare(words, turned, data)
    assert (found.identical, found.max_abs, found.snr_db) == (False, None, None)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (model("z = Identity(x)", "float[N, C] z"), "original has y, the other z"),
        (model("y = Transpose(x)"), r"'y' differs.*\[16, 7\].*\[7, 16\]"),
        (model("y = Cast<to = 11>(x)", "double[N, C] y"), "float32.*float64"),
    ],
)
def test_different_outputs_are_refused(other: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        compare(SAME, other, SCORES)


def test_a_compressed_model_that_does_not_run_is_named() -> None:
    with pytest.raises(VerifyError, match=r"batch 0: the compressed model does not run.*z"):
        compare(SAME, model("y = Add(x, z)", inputs="float[N, C] x, float[N, C] z"), SCORES)
    with pytest.raises(ModelError):
        compare(SAME, b"nothing", SCORES)


def test_labels_must_match_the_images() -> None:
    with pytest.raises(DataError, match="39 labels for 40 images"):
        compare(SAME, SAME, SCORES, labels=np.zeros(39, int))
    with pytest.raises(DataError, match="41 labels for 40 images"):
        compare(SAME, SAME, SCORES, labels=np.zeros(41, int))
    with pytest.raises(DataError, match="labels 7 to 7 for 7 classes"):
        compare(SAME, SAME, SCORES, labels=np.full(40, 7))


def test_an_output_may_have_no_rows() -> None:
    found = compare(SAME, SAME, [{"x": np.zeros((0, 7), np.float32)}, {"x": SCORES}])
    assert (found.top1_agreement, found.top1_before) == (1.0, None)


def test_the_library_gives_the_same() -> None:
    assert compare(SAME, SAME, SCORES, library=True).identical


def test_junit_has_a_case_for_each_check() -> None:
    found = compare(SAME, scaled(1.01), SCORES, min_snr=50, min_agreement=0.9)
    root = ET.fromstring(junit(found, 'a "b" & <c>'))
    (suite,) = root
    assert suite.attrib == {"name": 'a "b" & <c>', "tests": "3", "failures": "1", "errors": "0"}
    assert [case.attrib["name"] for case in suite.iter("testcase")] == [check.name for check in found.checks]
    (failure,) = suite.iter("failure")
    assert failure.attrib["message"].startswith("min_snr: 40.0")


# Labels


@given(values=st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_labels_are_read_from_every_kind_of_file(values: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("labels")
    np.save(folder / "a.npy", np.array(values, np.uint16))
    np.savez(folder / "b.npz", labels=np.array(values), other=np.zeros(3))
    np.savez(folder / "c.npz", y=np.array(values)[:, None])
    (folder / "d.csv").write_text("file,label\n" + "".join(f"{n}.jpg,{v}\n" for n, v in enumerate(values)))
    (folder / "e.txt").write_text("".join(f"{v}\n" for v in values))
    (folder / "f.txt").write_text("".join(f"some file.jpg {v}\n" for v in values) + "\n")
    (folder / "g.csv").write_text("\ufeff" + "".join(f"{v}.0\r\n" for v in values), encoding="utf-8")
    for path in sorted(folder.iterdir()):
        np.testing.assert_array_equal(read_labels(path), values, err_msg=path.name)
        assert read_labels(path).dtype == np.int64


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "label\n"),
        ("a.csv", "1\nx\n"),
        ("a.csv", "1.5\n"),
        ("a.csv", "1\nnan\n"),
        ("a.json", "[1]"),
        ("a.npy", "no"),
    ],
)
def test_bad_labels_are_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="labels"):
        read_labels(tmp_path / name)


def test_damaged_labels_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", labels=np.zeros(1000, int))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:500])
    damaged = bytearray((tmp_path / "whole.npz").read_bytes())
    damaged[2000] ^= 1
    (tmp_path / "bits.npz").write_bytes(damaged)
    (tmp_path / "long.csv").write_text("1" * 200_000)
    for name in ("cut.npz", "bits.npz", "long.csv"):
        with pytest.raises(DataError, match="labels cannot be read"):
            read_labels(tmp_path / name)


def test_ambiguous_labels_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=np.zeros(3), two=np.zeros(3))
    np.save(tmp_path / "b.npy", np.zeros((3, 10)))
    with pytest.raises(DataError, match="one, two"):
        read_labels(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"\[3, 10\]"):
        read_labels(tmp_path / "b.npy")
    with pytest.raises(DataError, match="labels"):
        read_labels(tmp_path / "missing.npy")


def test_real_labels_are_read(data_dir: Path) -> None:
    assert read_labels(data_dir / "imagenet" / "val_labels.csv").shape == (650,)


def test_folding_batch_norm_is_nearly_exact(data_dir: Path) -> None:
    images = np.random.default_rng(1).normal(size=(32, 3, 32, 32)).astype(np.float32)
    folded, kept = (data_dir / "models" / name for name in ("resnet20.onnx", "resnet20_bn.onnx"))
    found = compare(kept, folded, images, min_snr=90, min_agreement=1)
    assert found.passed
    assert not found.identical
