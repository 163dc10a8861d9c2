"""Latency and memory of compressed models without and with the library, against the original.

    python benchmarks/latency.py [--rounds N]

ResNet-56 and MobileNetV2, weighted PQ, batch 1, hot, interleaved in one process; medians over rounds and the median of
per-round ratios, with 1 and 2 threads. Memory is the growth of the resident set by loading, in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import Feed, cifar_feeds, data_dir, imagenet_feeds, setting

import vqonnx
from vqonnx.bench import bench


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    cases: dict[str, list[Feed]] = {
        "resnet56": cifar_feeds("train_0", 64, batch=16),
        "mobilenetv2": list(imagenet_feeds("calib", 16)),
    }
    print("| model | threads | original ms | compressed | + library | original MB | compressed MB | + library MB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, feeds in cases.items():
            model, small = data_dir() / "models" / f"{name}.onnx", Path(folder) / f"{name}.onnx"
            vqonnx.compress(model, vqonnx.BGD(), calibration=feeds).save(small)
            one = [{"input": feeds[0]["input"][:1]}]
            for threads in (1, 2):
                found = bench(model, small, feeds=one, threads=threads, rounds=rounds, warmup=20)
                ms, ratio, mb = found.latency_ms, found.ratio, found.memory_mb
                print(
                    f"| {name} | {threads} | {ms.original:.3f} | {ratio.compressed:.3f}x "
                    f"| {ratio.compressed_library:.3f}x "
                    f"| {mb.original:.1f} | {mb.compressed:.1f} | {mb.compressed_library:.1f} |",
                    flush=True,
                )
    print(f"\nrounds {rounds}; {setting()}")


if __name__ == "__main__":
    main()
