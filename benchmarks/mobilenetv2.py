"""MobileNetV2: how long weighted PQ takes on 64 calibration images, what it saves and what it costs.

    python benchmarks/mobilenetv2.py

Calibrates on 64 images of imagenet/calib, evaluates on the 650 images of imagenet/val (fp32 is 8-14 points above
published figures there, so read the drop).
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from common import data_dir, imagenet_feeds, imagenet_val_labels, setting

import vqonnx


def main() -> None:
    model = data_dir() / "models" / "mobilenetv2.onnx"
    calibration = list(imagenet_feeds("calib", 64))
    test, labels = list(imagenet_feeds("val", 650)), imagenet_val_labels() + 1  # class 0 is background
    print("| method | seconds | bytes | ratio | top-1 | agreement | SNR dB |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for method in (vqonnx.BGD(), vqonnx.KMeans(bits=6)):
            start = time.perf_counter()
            result = vqonnx.compress(model, method, calibration=calibration)
            saved = result.save(Path(folder) / "small.onnx")
            seconds = time.perf_counter() - start
            found = vqonnx.compare(model, saved.path, test, labels=labels)
            print(
                f"| {method.id} | {seconds:.0f} | {result.bytes_before:,} -> {saved.bytes:,} "
                f"| {result.bytes_before / saved.bytes:.2f} "
                f"| {100 * found.top1_before:.2f} -> {100 * found.top1_after:.2f} "
                f"| {100 * found.top1_agreement:.1f} % | {found.snr_db:.1f} |",
                flush=True,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"\npeak memory of the whole process, evaluation included: {peak:.0f} MB; {setting()}")


if __name__ == "__main__":
    main()
