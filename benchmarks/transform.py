"""Transform quantisation (Young et al. 2021) without retraining: bits a weight against top-1.

    python benchmarks/transform.py resnet56           # the points of a network that are not there yet
    python benchmarks/transform.py squeezenet
    python benchmarks/transform.py mobilenetv2
    python benchmarks/transform.py table              # tables and plots from benchmarks/results/transform/

Bits a weight are 8 times the stored bytes of the compressed layers (codes, steps, codebooks, bases) over their weights.
Calibrates on training images (256 of CIFAR-10, 64 of ImageNet); evaluates on all 10,000 CIFAR-10 test images and on the
650 ImageNet validation images.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
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
from vqonnx.bases import coding_gain_db, damped, elt
from vqonnx.calibrate import Walk
from vqonnx.graph import find
from vqonnx.modelfile import load

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "transform"
PLOTS = ROOT.parent / "docs" / "plots"
# Network -> points: options of the method.
POINTS: dict[str, list[dict[str, Any]]] = {
    "resnet56": [
        *({"bits": bits} for bits in (3, 4, 2, 5)),
        *({"bits": bits, "basis": "klt"} for bits in (3, 4)),
        *({"bits": bits, "basis": "none"} for bits in (3, 4)),
        *({"bits": bits, "axis": "columns"} for bits in (3, 4)),
        {"bits": 3, "basis_bits": 5, "apply": "activations"},
    ],
    "squeezenet": [{"bits": 4}, {"bits": 6}, {"bits": 4, "basis": "none"}],
    "mobilenetv2": [{"bits": 5, "axis": "columns"}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=[*POINTS, "table", "gain"])
    network: str = parser.parse_args().network
    if network == "table":
        print_tables()
    elif network == "gain":
        write_gains()
    else:
        for options in POINTS[network]:
            run(network, options)


def run(network: str, options: dict[str, Any]) -> None:
    name = "_".join([network, *(f"{key}-{value}" for key, value in options.items())])
    path = RESULTS / f"{name}.json"
    if path.exists():
        print(f"{name}: done already")
        return
    model = data_dir() / "models" / f"{network}.onnx"
    calibration, test, labels = _data(network)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = vqonnx.compress(model, vqonnx.Transform(**options), calibration=calibration)
        saved = result.save(Path(folder) / "small.onnx")
        seconds = time.monotonic() - start
        found = vqonnx.compare(model, saved.path, test, labels=labels)
    weights = [math.prod(layer.shape) for layer in result.layers]
    counts = [layer.multiplications * weight for layer, weight in zip(result.layers, weights, strict=True)]
    entry = {
        "network": network,
        "options": options,
        "bits_per_weight": round(8 * sum(layer.bytes for layer in result.layers) / sum(weights), 3),
        "layers": len(result.layers),
        "left_alone": [(entry.name, entry.reason) for entry in result.skipped],
        "with_basis": sum(layer.options["basis_bits"] is not None for layer in result.layers),
        "bytes": saved.bytes,
        "bytes_before": result.bytes_before,
        "fp32": round(100 * (found.top1_before or 0), 2),
        "top1": round(100 * (found.top1_after or 0), 2),
        "agreement": round(100 * (found.top1_agreement or 0), 2),
        "snr_db": None if found.snr_db is None else round(found.snr_db, 2),
        "multiplications": round(sum(counts) / sum(weights), 4),
        "seconds": round(seconds),
        "setting": setting(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n")
    print(f"{name}: {entry['bits_per_weight']} bits, {entry['fp32']} -> {entry['top1']} %, {seconds:.0f} s", flush=True)


def _data(network: str) -> tuple[list[Feed], list[Feed], np.ndarray]:
    if network == "resnet56":
        return cifar_feeds("train_0", 256, batch=64), cifar_feeds("test", 10_000), cifar_labels()
    if network == "squeezenet":
        return list(squeezenet_feeds("calib", 64)), list(squeezenet_feeds("val", 650)), imagenet_val_labels()
    # 1001 logits, of which 0 is the background
    return list(imagenet_feeds("calib", 64)), list(imagenet_feeds("val", 650)), imagenet_val_labels() + 1


def write_gains() -> None:
    """Coding gain of the ELT of the input channels, layer by layer of ResNet-56, with the damping."""
    model = data_dir() / "models" / "resnet56.onnx"
    proto = load(model)
    sites = find(proto, model.parent).sites
    gains = {}
    with Walk(proto, model.parent, sites, cifar_feeds("train_0", 256, batch=64)) as walk:
        for site in sites:
            weight = site.view("ohw").matrix(site.read()).astype(np.float64)
            sensitivity = damped(walk.observe(site, "ihw").channel_gram(math.prod(site.kernel)))
            gains[site.name] = coding_gain_db(elt(weight, sensitivity), weight, sensitivity)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gain_resnet56.json").write_text(json.dumps({"gain_db": gains, "setting": setting()}, indent=1) + "\n")
    values = [gain for gain in gains.values() if gain is not None]
    print(f"coding gain: {min(values):.2f} to {max(values):.2f} dB, median {np.median(values):.2f} dB")


def print_tables() -> None:
    for network in POINTS:
        entries = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{network}_*.json"))]
        entries.sort(key=lambda entry: (str({**entry["options"], "bits": 0}), entry["bits_per_weight"]))
        print(f"\n{network}\n\n| options | bits a weight | bytes | top-1 | drop | agreement | multiplications |")
        print("|---|---|---|---|---|---|---|")
        for entry in entries:
            options = ", ".join(f"{key}={value}" for key, value in entry["options"].items())
            print(
                f"| {options} | {entry['bits_per_weight']:.2f} | {entry['bytes_before']:,} -> {entry['bytes']:,} "
                f"| {entry['fp32']:.2f} -> {entry['top1']:.2f} | {entry['fp32'] - entry['top1']:+.2f} "
                f"| {entry['agreement']:.2f} % | {100 * entry['multiplications']:.1f} % |"
            )
        for text in sorted({entry["setting"] for entry in entries}):
            print(f"\n{text}")
    _plot()


def _plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    PLOTS.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    series: dict[str, list[tuple[float, float]]] = {}
    for path in RESULTS.glob("resnet56_*.json"):
        entry = json.loads(path.read_text())
        rest = {key: value for key, value in entry["options"].items() if key != "bits"}
        label = ", ".join(map(str, rest.values())) or "elt, rows"
        series.setdefault(label, []).append((entry["bits_per_weight"], entry["top1"]))
    for label, points in sorted(series.items()):
        axes[0].plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes[0].axhline(93.39, color="grey", linestyle=":", label="fp32")
    axes[0].set(xlabel="bits a weight, basis included", ylabel="top-1 in %", title="ResNet-56, CIFAR-10, no retraining")
    axes[0].legend()
    gain = RESULTS / "gain_resnet56.json"
    if gain.exists():
        values = json.loads(gain.read_text())["gain_db"]
        axes[1].bar(range(len(values)), [gain or 0.0 for gain in values.values()])
        axes[1].set(xlabel="layer", ylabel="coding gain in dB", title="Coding gain of the ELT, ResNet-56")
    figure.tight_layout()
    figure.savefig(PLOTS / "transform_resnet56.png", dpi=110)


if __name__ == "__main__":
    main()
