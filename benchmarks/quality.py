"""Accuracy at a given size of the file, without labels: the table of the README, and its plot.

    python benchmarks/quality.py                       # every point that is not there yet
    python benchmarks/quality.py resnet20              # those of a network
    python benchmarks/quality.py resnet20 --only 70KB  # one point
    python benchmarks/quality.py table                 # table and plot from benchmarks/results/quality/

Calibrates on training images: the first 1,024 of CIFAR-10, 1,000 of ImageNet. Evaluates on all 10,000 CIFAR-10 test
images and on the 650 ImageNet validation images. Sizes are bytes of the file on disk, graph included. Every point is
made in a process of its own, from nothing: its seconds include what layers can do at which size, and its memory is the
largest that the process held.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Feed,
    cifar_feeds,
    cifar_labels,
    data_dir,
    imagenet_feeds,
    imagenet_val_labels,
    setting,
    squeezenet_feeds,
)

import vqonnx
from vqonnx.fit import Limits, parse_size
from vqonnx.method import Method

RESULTS = Path(__file__).resolve().parent / "results" / "quality"
PLOT = Path(__file__).resolve().parent.parent / "docs" / "plots" / "quality.png"
# Network -> size of the file -> what is asked for: drop in points at most, or agreement in percent at least.
FLOORS: dict[str, dict[str, float]] = {
    "resnet20": {"92KB": 0.5, "75KB": 1.0, "64KB": 1.7},
    "resnet56": {"250KB": 0.4, "205KB": 1.0, "180KB": 1.5},
    "squeezenet": {"640KB": 90, "520KB": 86},
    "mobilenetv2": {"1.75MB": 92},
    "mobilenetv1": {"2.1MB": 92},
}
AIMS: dict[str, dict[str, float]] = {
    "resnet20": {"70KB": 0.5, "55KB": 1.0},
    "resnet56": {"190KB": 0.5, "155KB": 1.0},
    "squeezenet": {"560KB": 95, "470KB": 91},
    "mobilenetv2": {"1.45MB": 94},
    "mobilenetv1": {"1.7MB": 93},
}
BASELINES = ("int8", "rtn4", "pq", "bgd")
_FP32 = {"resnet20": 91.73, "resnet56": 93.39}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="*", choices=[*FLOORS, "table", []])
    parser.add_argument("--only", metavar="POINT", help="a size, or one of the baselines")
    parser.add_argument("--codes", choices=("fixed", "prefix"), default="fixed")
    parser.add_argument("--inside", action="store_true", help="make the point in this process (used by this program)")
    chosen = parser.parse_args()
    if chosen.network == ["table"]:
        print_table()
        return
    for network in chosen.network or FLOORS:
        points = [chosen.only] if chosen.only else [*FLOORS[network], *AIMS[network], *BASELINES]
        for point in points:
            path = RESULTS / f"{network}_{point}{'' if chosen.codes == 'fixed' else '_prefix'}.json"
            if chosen.inside:
                make(network, point, chosen.codes, path)
            elif not path.exists():
                arguments = [network, "--only", point, "--codes", chosen.codes, "--inside"]
                subprocess.run([sys.executable, __file__, *arguments], check=True)


def make(network: str, point: str, codes: str, path: Path) -> None:
    """One file, and how good it is."""
    model = data_dir() / "models" / f"{network}.onnx"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "small.onnx"
        if point == "int8":
            static_int8(model, out, calibration(network, 128))
        else:
            compressed(network, model, point, codes).save(out)
        seconds = time.monotonic() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        data, labels = evaluation(network)
        found = vqonnx.compare(model, out, data, labels=labels)
        size = out.stat().st_size
    entry = {
        "network": network,
        "point": point,
        "codes": codes,
        "bytes": size,
        "bytes_before": model.stat().st_size,
        "fp32": round(100 * (found.top1_before or 0), 2),
        "top1": round(100 * (found.top1_after or 0), 2),
        "agreement": round(100 * (found.top1_agreement or 0), 2),
        "snr_db": None if found.snr_db is None else round(found.snr_db, 2),
        "seconds": round(seconds, 1),
        "peak_gb": round(memory, 2),
        "setting": setting(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    accuracy = f"{entry['fp32']} -> {entry['top1']} %, agreement {entry['agreement']} %"
    print(f"{path.stem}: {size:,} bytes, {accuracy}, {seconds:.0f} s, {memory:.2f} GB", flush=True)


def compressed(network: str, model: Path, point: str, codes: str) -> vqonnx.Result:
    """A file of a size, or of a baseline."""
    images = calibration(network, 1024)
    if point not in BASELINES:
        limits = Limits(size=parse_size(point))
        best = vqonnx.Best(codes=codes)  # type: ignore[arg-type]
        return vqonnx.compress(model, best, calibration=images, limits=limits, jobs=os.cpu_count() or 1)
    baselines: dict[str, Method] = {
        "rtn4": vqonnx.RTN(bits=4),
        "pq": vqonnx.PQ(width=4, bits=8),
        "bgd": vqonnx.BGD(clamp="vectors", first=True),
    }
    return vqonnx.compress(model, baselines[point], calibration=images if point == "bgd" else None, compact=True)


def calibration(network: str, count: int) -> list[Feed]:
    """Training images."""
    if network in _FP32:
        return cifar_feeds("train_0", count, batch=64)
    return list(_imagenet(network, "calib", count))


def evaluation(network: str) -> tuple[list[Feed], np.ndarray]:
    """Images that nothing else sees, and their classes."""
    if network in _FP32:
        return cifar_feeds("test", 10_000), cifar_labels()
    labels = imagenet_val_labels()
    return list(_imagenet(network, "val", 650)), labels if network == "squeezenet" else labels + 1


def _imagenet(network: str, split: str, count: int) -> Iterable[Feed]:
    return squeezenet_feeds(split, count) if network == "squeezenet" else imagenet_feeds(split, count)


def static_int8(model: Path, out: Path, images: list[Feed]) -> None:
    """onnxruntime's own static quantisation: QDQ, weights and activations of 8 bits, per channel."""
    import onnx
    from onnx import version_converter
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> Any:
            return next(self._left, None)

    proto = onnx.load(model)
    if proto.opset_import[0].version < 13:  # per channel needs axis, which came with 13
        proto = version_converter.convert_version(proto, 13)
    raised = out.with_name("raised.onnx")
    onnx.save(proto, raised)
    quantize_static(
        raised,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _asked(network: str, point: str) -> tuple[str, str]:
    """What is asked for, and whether as a floor or an aim."""
    for kind, table in (("at least", FLOORS), ("aim", AIMS)):
        if point in table[network]:
            value = table[network][point]
            text = f"drop <= {value:g}" if network in _FP32 else f"agreement >= {value:g} %"
            return kind, text
    return "", ""


def print_table() -> None:
    print("| network | file | bytes | asked | top-1 | drop | agreement | SNR dB | seconds | peak GB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    settings = set()
    for network in FLOORS:
        entries = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob(f"{network}_*.json")]
        for e in sorted(entries, key=lambda e: -e["bytes"]):
            settings.add(e["setting"])
            kind, asked = _asked(network, e["point"])
            names = {"int8": "onnxruntime int8 QDQ", "rtn4": "round to nearest, 4 bits", "pq": "k-means PQ, 4 x 8 bits"}
            label = names.get(e["point"], "bgd criterion" if e["point"] == "bgd" else f"best, {e['point']}")
            label += ", prefix codes" if e["codes"] == "prefix" and e["point"] not in BASELINES else ""
            met = ""
            if asked:
                value = (FLOORS[network] | AIMS[network])[e["point"]]
                good = e["fp32"] - e["top1"] <= value + 1e-9 if network in _FP32 else e["agreement"] >= value
                met = ": yes" if good else ": **no**"
            print(
                f"| {network} | {label} | {e['bytes']:,} | {kind} {asked}{met} | {e['fp32']:.2f} -> {e['top1']:.2f} "
                f"| {e['fp32'] - e['top1']:+.2f} | {e['agreement']:.2f} % | {e['snr_db']} | {e['seconds']:.0f} "
                f"| {e['peak_gb']} |"
            )
    for text in sorted(settings):
        print(f"\n{text}")
    _plot()


def _plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = [network for network in FLOORS if any(RESULTS.glob(f"{network}_*.json"))]
    figure, axes = plt.subplots(1, len(networks), figsize=(4 * len(networks), 3.6), squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        entries = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob(f"{network}_*.json")]
        for codes, label, marker in (("fixed", "best", "o"), ("prefix", "best, prefix codes", ".")):
            ours = [e for e in entries if e["point"] not in BASELINES and e["codes"] == codes]
            if ours:
                line = sorted((e["bytes"] / 1000, e["top1"]) for e in ours)
                axis.plot(*zip(*line, strict=True), marker=marker, label=label)
        for e in entries:
            if e["point"] in BASELINES:
                axis.plot(e["bytes"] / 1000, e["top1"], marker="x", linestyle="", label=e["point"])
        if entries:
            axis.axhline(entries[0]["fp32"], color="grey", linestyle=":", label="fp32")
            axis.set_ylim(entries[0]["fp32"] - 12, entries[0]["fp32"] + 1)
        axis.set(xlabel="file in KB", ylabel="top-1 in %", title=network, xscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()
