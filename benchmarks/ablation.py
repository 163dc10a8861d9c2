"""What each part of `best` is worth: the same network at the same size of the file, with one part changed.

    python benchmarks/ablation.py [SIZE]         # ResNet-20, 64KB without a size; prints the table
    python benchmarks/ablation.py 92KB fine=rtn  # only `best` and the parts with this in their names

Calibrates on the first 1,024 CIFAR-10 training images, evaluates on all 10,000 test images.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Feed, cifar_feeds, cifar_labels, data_dir, setting

import vqonnx
from vqonnx.fit import Limits, parse_size
from vqonnx.methods import Best, Entropy

_ATTEMPTS = 8  # to find the step with which a file has the size


def main() -> None:
    size = parse_size(sys.argv[1] if len(sys.argv) > 1 else "64KB")
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    model = data_dir() / "models" / "resnet20.onnx"
    images = cifar_feeds("train_0", 1024, batch=64)
    data, labels = cifar_feeds("test", 10_000), cifar_labels()

    def made(method: vqonnx.Method, feeds: list[Feed] = images, **options: Any) -> vqonnx.Result:
        jobs = os.cpu_count() or 1
        return vqonnx.compress(model, method, calibration=feeds, limits=Limits(size=size), jobs=jobs, **options)

    def one_step() -> vqonnx.Result:
        """Every layer with the same step, in units of its weights: nothing is shared out."""
        low, high = 0.1, 4.0
        best = None
        for _ in range(_ATTEMPTS):
            step = (low * high) ** 0.5
            method = Entropy(step=step)
            result = vqonnx.compress(model, method, calibration=images, compact=True, half_biases=True)
            if result.model.ByteSize() <= size:
                best, high = result, step
            else:
                low = step
        assert best is not None
        return best

    parts: dict[str, Callable[[], vqonnx.Result]] = {
        "`best`": lambda: made(Best()),
        "aims at the weights (`asymmetric=false`)": lambda: made(Best(asymmetric=False)),
        "layers with fine codes rounded to nearest (`fine=rtn`)": lambda: made(Best(fine="rtn")),
        "codebooks of float16 (`codebook=float16`)": lambda: made(Best(codebook="float16")),
        "no scales of rows (`scale=none`)": lambda: made(Best(scale="none")),
        "each block's best to begin with (`start=assign`)": lambda: made(Best(start="assign")),
        "biases of 32 bits (`--no-half-biases`)": lambda: made(Best(), half_biases=False),
        "graph as it was (`--no-compact`)": lambda: made(Best(), compact=False),
        "128 calibration images": lambda: made(Best(), images[:2]),
        "channels in another order (`--permute`)": lambda: made(Best(), permute=True),
        "prefix codes (`codes=prefix`)": lambda: made(Best(codes="prefix")),
        "prefix codes, one step for all layers, in units of their weights": one_step,
        "prefix codes, one choice a row (`beam=1`)": lambda: made(Best(codes="prefix", beam=1)),
        "prefix codes, one sweep (`entropy`, `sweeps=1`)": lambda: made(Entropy(sweeps=1)),
    }
    print("| changed | bytes | top-1 | drop | agreement | SNR dB |\n|---|---|---|---|---|---|")
    for name, make in parts.items():
        if only not in name and name != "`best`":
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "small.onnx"
            try:
                make().save(out, verify=False)
            except vqonnx.VqonnxError as error:
                print(f"| {name} | {error} | | | | |", flush=True)
                continue
            found = vqonnx.compare(model, out, data, labels=labels)
            before, after = 100 * (found.top1_before or 0), 100 * (found.top1_after or 0)
            print(
                f"| {name} | {out.stat().st_size:,} | {after:.2f} | {before - after:+.2f} "
                f"| {100 * (found.top1_agreement or 0):.2f} % | {found.snr_db:.2f} |",
                flush=True,
            )
    print(f"\nResNet-20 (fp32: 91.73), {size:,} bytes; {setting()}")


if __name__ == "__main__":
    main()
