"""ResNet-56 on CIFAR-10: weighted PQ (width 9, 256 words) without any training.

    python benchmarks/resnet56.py

Calibrates on the first 1,024 training images, evaluates on all 10,000 test images. Prints bytes on disk and top-1
before and after, for the method of Stock et al. with each column order and for plain PQ and scalar k-means beside it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import cifar_feeds, cifar_labels, data_dir, setting

import vqonnx


def main() -> None:
    model = data_dir() / "models" / "resnet56.onnx"
    calibration = cifar_feeds("train_0", 1024, batch=64)
    test, labels = cifar_feeds("test", 10_000), cifar_labels()
    methods = {
        "bgd, ihw, width 9, K below a quarter of the vectors": vqonnx.BGD(width=9),
        "bgd, ihw, width 9, K = 256": vqonnx.BGD(width=9, clamp="vectors"),
        "bgd, hwi, width 8, K = 256": vqonnx.BGD(width=8, order="hwi", clamp="vectors"),
        "bgd, ihw, width 4": vqonnx.BGD(width=4),
        "pq, ihw, width 9, K = 256": vqonnx.PQ(width=9),
        "kmeans, 4 bits": vqonnx.KMeans(bits=4),
        "kmeans, 3 bits": vqonnx.KMeans(bits=3),
    }
    print("| method | bytes | ratio | top-1 | drop | agreement | SNR dB | mean layer output SNR dB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, method in methods.items():
            result = vqonnx.compress(model, method, calibration=calibration)
            saved = result.save(Path(folder) / "small.onnx")
            found = vqonnx.compare(model, saved.path, test, labels=labels)
            before, after = 100 * found.top1_before, 100 * found.top1_after
            outputs = [layer.output_snr_db for layer in result.layers if layer.output_snr_db is not None]
            print(
                f"| {name} | {result.bytes_before:,} -> {saved.bytes:,} | {result.bytes_before / saved.bytes:.2f} "
                f"| {before:.2f} -> {after:.2f} | {before - after:+.2f} | {100 * found.top1_agreement:.2f} % "
                f"| {found.snr_db:.1f} | {sum(outputs) / len(outputs):.2f} |",
                flush=True,
            )
    print(f"\n{setting()}")


if __name__ == "__main__":
    main()
