"""``vqonnx distill``: what it prints and leaves, its exit codes, and what it says without PyTorch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nets import CALIBRATION, MLP
from test_cli import run  # noqa: F401 (a fixture)

import vqonnx
from vqonnx.methods import PQ

Run = Callable[..., tuple[int, str, str]]
_WITHOUT_TORCH = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Missing())
from vqonnx.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.onnx"
    vqonnx.compress(MLP, PQ(width=8, bits=4)).save(path)
    return path


def arguments(small: Path, out: Path, *more: Any) -> list[Any]:
    short = ("--steps", 8, "--layer-steps", 2, "--batch", 32, "--rate", "1e-3", "--layer-rate", "1e-3")
    return ["distill", MLP, small, out, "--calibration", CALIBRATION, *short, *more]


def test_distill_shows_layers_sizes_and_losses(run: Run, small: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out.onnx"
    code, text, err = run(*arguments(small, out, "--gradient", "sum", "--seed", 3))
    assert code == 0
    before, after = map(float, re.search(r"^loss (\S+) -> (\S+)$", text, re.MULTILINE).groups())  # type: ignore[union-attr]
    assert after < before
    assert f"{out}: {MLP.stat().st_size:,} -> {out.stat().st_size:,} bytes" in text
    assert re.search(r"on the calibration data: outputs at -?\d+\.\d dB SNR", text)
    lines = [re.sub(r"loss \S+", "loss", line) for line in err.splitlines()]
    assert lines == [*(f"distill: {done}/6 loss" for done in (2, 4, 6)), "distill: 8/8 loss"]
    code, text, _ = run("report", out)
    assert code == 0
    assert "distilled: images=256, steps=8, rate=0.001, layer_steps=2, " in text
    assert "seed=3" in text


def test_distill_json(run: Run, small: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out.onnx"
    code, text, err = run(*arguments(small, out, "--json", "--quiet", "--biases"))
    assert (code, err) == (0, "")
    content = json.loads(text)
    assert list(content) == ["bytes", "ratio", "layers", "skipped", "loss", "verify"]
    assert content["loss"]["after"] < content["loss"]["before"]
    assert content["verify"]["passed"] is True
    code, text, _ = run("report", out, "--json")
    found = json.loads(text)
    assert found["layers"] == content["layers"]
    assert found["distilled"]["biases"] is True
    assert found["distilled"]["gradient"] == "mean"


def test_a_fused_file_stays_fused(run: Run, small: Path, tmp_path: Path) -> None:  # noqa: F811
    fused = tmp_path / "fused.onnx"
    vqonnx.fuse(small, fused)
    written = []
    for source in (small, fused):
        out = tmp_path / f"out-{source.name}"
        assert run(*arguments(source, out, "--quiet", "--biases"))[0] == 0
        written.append(out)
    ops = [layer.fused for layer in vqonnx.report(written[1]).layers]
    assert ops == [layer.fused for layer in vqonnx.report(fused).layers]
    assert all(ops)
    plain, from_fused = tmp_path / "plain.onnx", tmp_path / "plain-fused.onnx"
    vqonnx.expand(written[0], plain)
    vqonnx.expand(written[1], from_fused)
    assert plain.read_bytes() == from_fused.read_bytes()


def test_a_run_that_diverged_is_written_and_exits_with_1(run: Run, small: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out.onnx"
    code, _, err = run(*arguments(small, out, "--quiet", "--rate", "1e20", "--layer-steps", 0))
    assert code == 1
    assert out.exists()
    assert err == ""
    code, _, err = run(*arguments(small, out, "--rate", "1e20", "--layer-steps", 0))
    assert code == 1
    assert re.search(r"WARNING: step \d: the loss is \S+; stopped, the state of step 0 is kept", err)


def test_checkpoints(run: Run, small: Path, tmp_path: Path) -> None:  # noqa: F811
    out, state = tmp_path / "out.onnx", tmp_path / "state"
    assert run(*arguments(small, out, "--quiet", "--checkpoint", state))[0] == 0
    assert state.exists()
    assert (tmp_path / "state.layers").exists()
    code, _, err = run(*arguments(small, out, "--quiet", "--checkpoint", state, "--seed", 1))
    assert code == 2
    assert re.fullmatch(rf"vqonnx: {state}.layers: belongs to a run with other settings; .*\n", err)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch", 0), "batch is 0; choose 1 or more"),
        (("--loss", "l1"), "loss 'l1' is unknown; choose kl or mse"),
        (("--calibration", "nowhere.npz"), r"nowhere\.npz: there is no such file or folder"),
        (("--device", "abacus"), "device 'abacus': .*; choose cpu"),
    ],
)
def test_bad_input_gives_one_line_and_no_file(
    run: Run,  # noqa: F811
    small: Path,
    tmp_path: Path,
    more: tuple[Any, ...],
    message: str,
) -> None:
    out = tmp_path / "out.onnx"
    code, text, err = run(*arguments(small, out, *more))
    assert (code, text) == (2, "")
    assert re.fullmatch(f"vqonnx: {message}\n", err)
    assert not out.exists()


def test_inputs_are_never_written_over(run: Run, small: Path) -> None:  # noqa: F811
    code, _, err = run(*arguments(small, small))
    assert code == 2
    assert "is the input itself, which is never changed" in err


def test_without_pytorch_there_is_one_line(small: Path, tmp_path: Path) -> None:
    words = [str(word) for word in arguments(small, tmp_path / "out.onnx")]
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "vqonnx: distill needs PyTorch; install it with: pip install 'vqonnx[distill]'\n"


def test_compress_says_so_before_the_work(tmp_path: Path) -> None:
    words = ["compress", str(MLP), str(tmp_path / "out.onnx"), "--calibration", "nowhere.npz", "--distill"]
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vqonnx: --distill needs PyTorch; install it with: pip install 'vqonnx[distill]'\n"
