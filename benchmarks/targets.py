"""Twenty sizes for each network: whether files keep to them, and how close they come.

    python benchmarks/targets.py [NETWORK ...]     # all five without a name; prints the table

Only sizes are judged here, so layers are encoded quickly (`beam=1`) and few images are read. Sizes lie evenly on a
logarithmic scale from a twenty-fourth to a sixth of the original.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Feed, cifar_feeds, data_dir, imagenet_feeds, setting, squeezenet_feeds

import vqonnx
from vqonnx.fit import Limits
from vqonnx.methods import Best

NETWORKS = ("resnet20", "resnet56", "squeezenet", "mobilenetv2", "mobilenetv1")


def main() -> None:
    print("| network | sizes, KB | kept | below the size: median, most | seconds |\n|---|---|---|---|---|")
    for network in sys.argv[1:] or NETWORKS:
        print(row(network), flush=True)
    print(f"\n{setting()}")


def row(network: str) -> str:
    """A line of the table."""
    model = data_dir() / "models" / f"{network}.onnx"
    whole = model.stat().st_size
    targets = [int(size) for size in np.geomspace(whole / 24, whole / 6, 20)]
    below, over, start = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            out = Path(folder) / "small.onnx"
            result = vqonnx.compress(
                model,
                Best(beam=1),
                calibration=images(network),
                limits=Limits(size=target),
                cache=Path(folder) / "cache",
                jobs=os.cpu_count() or 1,
            )
            size = result.save(out, verify=False).bytes
            assert size == out.stat().st_size
            over += size > target
            below.append(100 * (target - size) / target)
            print(f"{network}: {size:,} bytes for {target:,}, {below[-1]:.2f} % below", file=sys.stderr, flush=True)
    return (
        f"| {network} | {targets[0] / 1000:.0f} to {targets[-1] / 1000:.0f} | {20 - over} of 20 "
        f"| {np.median(below):.2f} %, {max(below):.2f} % | {time.monotonic() - start:.0f} |"
    )


def images(network: str) -> list[Feed]:
    """A few training images."""
    if network.startswith("resnet"):
        return cifar_feeds("train_0", 128, batch=64)
    return list(squeezenet_feeds("calib", 16) if network == "squeezenet" else imagenet_feeds("calib", 16))


if __name__ == "__main__":
    main()
