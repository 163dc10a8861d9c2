"""``compress --distill``: kept only where it helps, and never beyond the size that was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nets import CALIBRATION, MLP, weights_of
from test_cli import run  # noqa: F401 (a fixture)

import vqonnx
from vqonnx.errors import OptionError
from vqonnx.fit import Limits
from vqonnx.methods import PQ, Entropy
from vqonnx.training.distill import distill
from vqonnx.training.last_step import last_step
from vqonnx.training.recipe import Recipe

Run = Callable[..., tuple[int, str, str]]
QUICK = Recipe(steps=12, layer_steps=0, optimiser="adam", batch=32)


@pytest.fixture(scope="module")
def result() -> vqonnx.Result:
    return vqonnx.compress(MLP, PQ(width=8, bits=3))


def test_what_helps_is_kept(result: vqonnx.Result, tmp_path: Path) -> None:
    step = last_step(result, CALIBRATION, recipe=QUICK)
    assert step.kept
    assert step.loss_after < step.loss_before
    assert step.result.save(tmp_path / "out.onnx").bytes == step.bytes_after
    assert str(step).endswith("kept")


def test_what_harms_is_not_kept(result: vqonnx.Result) -> None:
    step = last_step(result, CALIBRATION, recipe=Recipe(steps=3, layer_steps=0, optimiser="adam", rate=10.0))
    assert not step.kept
    assert step.result is result
    assert str(step).endswith("not kept")


def test_what_is_too_large_is_not_kept(result: vqonnx.Result) -> None:
    step = last_step(result, CALIBRATION, recipe=QUICK, limits=Limits(size=1000))
    assert step.loss_after < step.loss_before
    assert not step.kept


def test_what_loses_more_than_is_allowed_is_not_kept(result: vqonnx.Result) -> None:
    step = last_step(result, CALIBRATION, recipe=QUICK, limits=Limits(drop=1e-3, data=CALIBRATION))
    assert step.loss_after < step.loss_before
    assert not step.kept
    assert last_step(result, CALIBRATION, recipe=QUICK, limits=Limits(drop=99.0, data=CALIBRATION)).kept


def test_the_compressed_model_is_not_lost_where_distillation_fails(run: Run, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out.onnx"
    with np.load(CALIBRATION) as arrays:
        np.savez(tmp_path / "few.npz", **{name: array[:8] for name, array in arrays.items()})
    words = ["compress", MLP, out, "--method", "pq", "--calibration", tmp_path / "few.npz", "--distill"]
    code, _, errors = run(*map(str, words))
    assert code == 1
    assert "not distilled: distillation holds out one of 4 batches" in errors
    assert out.stat().st_size < MLP.stat().st_size


def test_distillation_and_another_order_of_channels_exclude_each_other(run: Run, tmp_path: Path) -> None:  # noqa: F811
    words = ["compress", MLP, tmp_path / "out.onnx", "--calibration", CALIBRATION, "--distill", "--permute"]
    code, _, errors = run(*map(str, words))
    assert code == 2
    assert "give it or --permute, not both" in errors


def test_some_data_are_held_out(result: vqonnx.Result) -> None:
    with np.load(CALIBRATION) as arrays:
        few = {name: array[:4] for name, array in arrays.items()}
    with pytest.raises(OptionError, match="one of 4 batches of calibration data, but there are 1;"):
        last_step(result, few)


def test_the_option_keeps_to_the_size(run: Run, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out.onnx"
    arguments: list[Any] = ["compress", MLP, out, "--calibration", CALIBRATION, "--target-ratio", 12, "--distill"]
    code, text, _ = run(*arguments, "--json")
    assert code == 0
    content = json.loads(text)
    assert out.stat().st_size <= MLP.stat().st_size / 12
    assert content["distill"]["kept"] == (out.stat().st_size == content["distill"]["bytes"])
    code, _, err = run("compress", MLP, out, "--distill")
    assert code == 2
    assert err == "vqonnx: --distill needs calibration data; give --calibration\n"


def test_steps_of_prefix_codes_move(tmp_path: Path) -> None:
    """Layers share a codebook of whole numbers, which must stay."""
    small, out = tmp_path / "small.onnx", tmp_path / "out.onnx"
    vqonnx.compress(MLP, Entropy(bits=0.55), calibration=CALIBRATION, fuse=False).save(small)
    made = distill(MLP, small, CALIBRATION, QUICK)
    made.save(out)
    assert made.loss_after < made.loss_before
    before, after = (weights_of(onnx.load(path).graph) for path in (small, out))
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert moved
    assert all(before[name].shape == (1, 1) for name in moved)
