"""Free permutations: what real networks leave open, and what an order of channels gains in coding error.

    python benchmarks/permute.py squeezenet          # the settings of a network that are not there yet
    python benchmarks/permute.py table               # the table from benchmarks/results/permute/

Compresses with `best` (METHODS 6) with and without `permute`, calibrated on 32 ImageNet or 64 CIFAR-10 training images,
and compares the error of each layer's output on them, and that of the network's on 128 ImageNet or 1,000 CIFAR-10 test
images. Clustering starts at random, so that layers whose inputs keep their order move a little as well; `--seeds 3`
takes means over three.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import Feed, cifar_feeds, data_dir, imagenet_feeds, setting, squeezenet_feeds

import vqonnx
from vqonnx.graph import find
from vqonnx.methods import Best
from vqonnx.modelfile import load
from vqonnx.permute import Blocks, find_groups, readers_of

RESULTS = Path(__file__).resolve().parent / "results" / "permute"
SEEDS = (0, 1, 2)
_CODES: list[dict[str, Any]] = [{"width": 4, "bits": 6}, {"width": 8, "bits": 8}]
# Network -> settings of `best`. The ResNets have 3x3 kernels: blocks hold several channels only in the order hwi.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    **{name: [*_CODES, {"width": 2, "bits": 6}] for name in ("squeezenet", "mobilenetv1", "mobilenetv2")},
    **{name: [{**codes, "order": "hwi"} for codes in _CODES] for name in ("resnet20", "resnet56")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=[*SETTINGS, "table"])
    parser.add_argument("--seeds", type=int, default=1, choices=range(1, len(SEEDS) + 1))
    options = parser.parse_args()
    if options.network == "table":
        print_table()
        return
    for values in SETTINGS[options.network]:
        measure(options.network, values, SEEDS[: options.seeds])


def measure(network: str, options: dict[str, Any], seeds: Iterable[int]) -> None:
    name = "_".join([network, *(f"{key}-{value}" for key, value in options.items())])
    path = RESULTS / f"{name}.json"
    if path.exists():
        print(f"{name}: done already")
        return
    model = data_dir() / "models" / f"{network}.onnx"
    calibration, test = _data(network)
    entry: dict[str, Any] = {"network": network, "options": options, **_groups(model, options), "runs": []}
    for seed in seeds:
        run = {kind: _compress(model, options, calibration, test, seed, kind == "permuted") for kind in _KINDS}
        entry["runs"].append({"seed": seed, **run})
        print(f"{name} seed {seed}: {_summary(entry)}", flush=True)
    entry["setting"] = setting()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n")


_KINDS = ("plain", "permuted")


def _groups(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    proto = load(model)
    found = find_groups(proto, model.parent)
    sites = {site.name: site for site in find(proto, model.parent).sites}
    blocks = {name: Blocks(**options) for name in sites}
    readers = [readers_of(group, sites, blocks) for group in found.groups]
    pinned: Counter[str] = Counter()
    for each in found.pinned:
        pinned[each.reason] += each.size
    return {
        "groups": len(found.groups),
        "channels": sum(group.size for group in found.groups),
        "pinned": dict(pinned),
        "useful_groups": sum(bool(names) for names in readers),
        "layers": sorted({name for names in readers for name in names}),
    }


def _compress(
    model: Path, options: dict[str, Any], calibration: list[Feed], test: list[Feed], seed: int, permute: bool
) -> dict[str, Any]:
    start = time.monotonic()
    result = vqonnx.compress(model, Best(**options), calibration=calibration, permute=permute, seed=seed)
    seconds = time.monotonic() - start
    with tempfile.TemporaryDirectory() as folder:
        saved = result.save(Path(folder) / "small.onnx")
        compared = vqonnx.compare(model, saved.path, test)
    return {
        "bytes": saved.bytes,
        "seconds": round(seconds, 1),
        "snr_db": compared.snr_db,
        "agreement": compared.top1_agreement,
        "layers_db": {layer.name: layer.output_snr_db for layer in result.layers},
        "weights": {layer.name: layer.weights for layer in result.layers},
    }


def _data(network: str) -> tuple[list[Feed], list[Feed]]:
    if network.startswith("resnet"):
        return cifar_feeds("train_0", 64, batch=32), cifar_feeds("test", 1000)
    if network == "squeezenet":
        return list(squeezenet_feeds("calib", 32)), list(squeezenet_feeds("val", 128))
    return list(imagenet_feeds("calib", 32)), list(imagenet_feeds("val", 128))


def _summary(entry: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds; those over layers count each weight once."""
    affected = set(entry["layers"])
    gains: dict[bool, list[float]] = {True: [], False: []}
    snr: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    agreement: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for run in entry["runs"]:
        plain, permuted = (run[kind] for kind in _KINDS)
        for kind in _KINDS:
            snr[kind].append(run[kind]["snr_db"])
            agreement[kind].append(run[kind]["agreement"])
        for inside, found in gains.items():
            names = [n for n, db in plain["layers_db"].items() if (n in affected) == inside and db is not None]
            names = [n for n in names if permuted["layers_db"].get(n) is not None]
            weights = [plain["weights"][n] for n in names]
            if names:
                differences = [permuted["layers_db"][n] - plain["layers_db"][n] for n in names]
                found.append(float(np.average(differences, weights=weights)))
    coded = entry["runs"][0]["plain"]["weights"]
    total = sum(coded.values())
    return {
        "share": sum(size for name, size in coded.items() if name in affected) / total,
        "gain": float(np.mean(gains[True])) if gains[True] else 0.0,
        "others": float(np.mean(gains[False])) if gains[False] else 0.0,
        **{f"snr_{kind}": float(np.mean(values)) for kind, values in snr.items()},
        **{f"agreement_{kind}": 100 * float(np.mean(values)) for kind, values in agreement.items()},
        "seconds": [round(float(np.mean([run[kind]["seconds"] for run in entry["runs"]]))) for kind in _KINDS],
    }


def print_table() -> None:
    print(
        "| network | `best` | groups (channels) | pinned | layers that gain may reach (weights) | their output "
        "| other layers | network's output | agreement | seconds |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    settings = set()
    for network, options in ((network, options) for network, each in SETTINGS.items() for options in each):
        name = "_".join([network, *(f"{key}-{value}" for key, value in options.items())])
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        entry = json.loads(path.read_text())
        found = _summary(entry)
        settings.add(entry["setting"])
        print(
            f"| {network} | {', '.join(f'{key} {value}' for key, value in options.items())} "
            f"| {entry['groups']} ({entry['channels']:,}) | {sum(entry['pinned'].values()):,} "
            f"| {len(entry['layers'])} ({100 * found['share']:.0f} %) "
            f"| {found['gain']:+.2f} dB | {found['others']:+.2f} dB "
            f"| {found['snr_plain']:.2f} -> {found['snr_permuted']:.2f} dB "
            f"| {found['agreement_plain']:.1f} -> {found['agreement_permuted']:.1f} % "
            f"| {found['seconds'][0]} -> {found['seconds'][1]} |"
        )
    for text in sorted(settings):
        print(f"\n{text}")


if __name__ == "__main__":
    main()
