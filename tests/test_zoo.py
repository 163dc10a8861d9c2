"""Real models of all makers: each is compressed, runs with and without the library, and expands again."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

import vqonnx
from vqonnx.errors import ModelError
from vqonnx.generate import generate_feeds
from vqonnx.methods import PQ
from vqonnx.runtime import open_session, run

REFUSED = {
    "bert_tokenizer_customop": r"operators of domain ai\.onnx\.contrib \(BertTokenizer\), which onnxruntime does not",
    "mobilenetv2_cifar10_int8": r"no layer can be compressed \(.*already quantised \(ConvInteger\).*--allow-unchanged",
}
# How many times smaller the file becomes with the defaults of `pq`. Little is gained where most weights are in layers
# that are left alone (dtln: LSTM; silero 16k: LSTM), and iris, of 4 KB, grows by the decoder that travels in the file.
RATIOS = {
    "candy_style_winml": 11.77,
    "digits_extdata": 19.28,
    "dtln_1": 1.09,
    "fastestdet": 2.68,
    "iris_mlp_torch": 0.71,
    "magika_standard_v3_3": 21.08,
    "mnist_cntk": 1.24,
    "oww_embedding": 9.34,
    "oww_hey_jarvis": 18.56,
    "oww_melspectrogram": 22.67,
    "ppocr_mobile_v2_cls": 2.08,
    "ppocr_mobile_v2_det_prune": 3.68,
    "silero_vad_16k_op15": 2.06,
    "silero_vad_op18_ifless": 3.53,
    "silero_vad_v4_old": 1.50,
    "squeezenet1.1_fp16_op7": 8.96,
    "ultraface_rfb320": 3.16,
    "ultraface_slim320_simplified": 4.94,
    "yolox_nano": 6.66,
    "yunet_n_320": 2.08,
}
SLOW = {"candy_style_winml"}  # 20 seconds, most of them runs on images of 224 x 224 and larger


def model_of(name: str, data_dir: Path) -> Path:
    (path,) = (data_dir / "zoo" / name).glob("*.onnx")
    return path


def test_every_model_of_the_zoo_is_listed(data_dir: Path) -> None:
    assert {folder.name for folder in (data_dir / "zoo").iterdir() if folder.is_dir()} == {*RATIOS, *REFUSED}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(RATIOS)]
)
def test_model(name: str, data_dir: Path, tmp_path: Path) -> None:
    source, path, plain = model_of(name, data_dir), tmp_path / "small.onnx", tmp_path / "plain.onnx"
    result = vqonnx.compress(source, PQ())
    saved = result.save(path)  # loads and runs it with and without the library
    assert saved.comparison is not None
    for output in saved.comparison.outputs:
        assert output.identical or output.snr_db is None or math.isfinite(output.snr_db), output.name
    report = vqonnx.report(path)
    assert (report.layers, report.skipped) == (result.layers, result.skipped)
    assert report.ratio == pytest.approx(RATIOS[name], rel=0.08)
    for layer in report.layers:
        assert layer.weight_snr_db is None or 0 <= layer.weight_snr_db < 120, f"{layer.name} {layer.shape}"
    assert all(entry.reason for entry in report.skipped)

    assert vqonnx.expand(path, plain) == len(report.layers)
    onnx.checker.check_model(plain)
    feed = generate_feeds(source, count=1)[0]
    compressed, library, expanded = (
        run(open_session(model, library=fused, threads=1), feed)
        for model, fused in ((path, False), (path, True), (plain, False))
    )
    for key, value in compressed.items():
        if not isinstance(value, np.ndarray):
            continue
        np.testing.assert_array_equal(value, expanded[key], err_msg=f"{name}: {key}, expanded")
        assert value.shape == library[key].shape, f"{name}: {key}, with the library"
        if value.dtype.kind == "f":
            close = 3e-2 if value.dtype == np.float16 else 1e-3
            scale = float(np.abs(value.astype(np.float64)).max(initial=0))
            atol = close * scale + 2**-22  # a sigmoid near 0 is only as exact as float32 is near 1
            np.testing.assert_allclose(
                library[key].astype(np.float64), value.astype(np.float64), rtol=close, atol=atol, err_msg=key
            )


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_compressed_is_refused(name: str, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=REFUSED[name]) as caught:
        vqonnx.compress(model_of(name, data_dir), PQ()).save(tmp_path / "small.onnx")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_int8_models_can_be_copied(data_dir: Path, tmp_path: Path) -> None:
    source = model_of("mobilenetv2_cifar10_int8", data_dir)
    result = vqonnx.compress(source, PQ(), allow_unchanged=True)
    result.save(tmp_path / "copy.onnx")
    assert not result.layers
    assert onnx.load(tmp_path / "copy.onnx") == onnx.load(source)
