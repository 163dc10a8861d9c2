"""Free permutations: what real networks leave open, and what an order of channels gains in coding error.

    python benchmarks/permute.py squeezenet          # the settings of a network that are not there yet
    python benchmarks/permute.py table               # the table from benchmarks/results/permute/

Codes each layer alone with `best`, in the old and the new order, on 32 ImageNet or 64 CIFAR-10 training images; then
compresses with and without `permute`, and compares outputs on 128 ImageNet or 1,000 CIFAR-10 test images. Clustering
starts at random, so that both move with the seed: `--seeds 3` takes means over three.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import Feed, cifar_feeds, data_dir, imagenet_feeds, setting, squeezenet_feeds

import vqonnx
from vqonnx.calibrate import Walk
from vqonnx.graph import find
from vqonnx.method import Layer
from vqonnx.methods import Refined
from vqonnx.modelfile import load
from vqonnx.moments import Moments, snr_db
from vqonnx.permute import Blocks, find_groups, permute, readers_of

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
    parser.add_argument("--seeds", type=int, default=1, choices=range(len(SEEDS) + 1), help="0: layers alone")
    options = parser.parse_args()
    if options.network == "table":
        print_table()
        return
    for values in SETTINGS[options.network]:
        measure(options.network, values, SEEDS[: options.seeds])


def measure(network: str, options: dict[str, Any], seeds: Iterable[int]) -> None:
    name = "_".join([network, *(f"{key}-{value}" for key, value in options.items())])
    path = RESULTS / f"{name}.json"
    model = data_dir() / "models" / f"{network}.onnx"
    entry: dict[str, Any] = {"network": network, "options": options, **_groups(model, options), "runs": []}
    if path.exists():
        entry = json.loads(path.read_text())
    calibration, test = _data(network)
    if "layers_db" not in entry:
        entry["layers_db"] = _layers(model, options, calibration)
        _store(entry, path)
    for seed in seeds:
        if all(run["seed"] != seed for run in entry["runs"]):
            run = {kind: _compress(model, options, calibration, test, seed, kind == "permuted") for kind in _KINDS}
            entry["runs"].append({"seed": seed, **run})
            _store(entry, path)
    print(f"{name}: {_summary(entry)}", flush=True)


def _store(entry: dict[str, Any], path: Path) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**entry, "setting": setting()}, indent=1) + "\n")


_KINDS = ("plain", "permuted")
_MEASURED = ("snr_db", "agreement", "seconds")


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
        "weights": {name: math.prod(site.shape) for name, site in sites.items()},
    }


def _layers(model: Path, options: dict[str, Any], calibration: list[Feed]) -> dict[str, list[float | None]]:
    """SNR of the output of each layer that reads channels in blocks, in the old order and in the new one.

    Each layer alone, on the inputs of the original, the mean left out, which the bias makes good.
    """
    method = Refined(**options)
    found: dict[str, list[float | None]] = {}
    for permuted in (False, True):
        proto = load(model)
        sites = find(proto, model.parent).sites
        if permuted:
            permute(proto, model.parent, [(site, method) for site in sites], calibration)
        names = _groups(model, options)["layers"]
        wanted = [site for site in sites if site.name in names]
        with Walk(proto, model.parent, wanted, calibration) as walk:
            for site in wanted:
                moments = walk.observe(site, method.order)
                matrix = site.view(method.order).matrix(site.read())
                decoded = method.encode(Layer(site.name, site.op_type, matrix, site.kernel, moments=moments)).decode()
                energies = [_energy(values, moments) for values in (matrix, matrix - decoded)]
                found.setdefault(site.name, []).append(snr_db(*energies))
    return found


def _energy(matrix: np.ndarray, moments: Moments) -> float:
    wide = matrix.astype(np.float64)
    return float(np.einsum("ij,ij->", wide @ moments.covariances()[0], wide))


def _compress(
    model: Path, options: dict[str, Any], calibration: list[Feed], test: list[Feed], seed: int, permute: bool
) -> dict[str, Any]:
    start = time.monotonic()
    result = vqonnx.compress(model, Refined(**options), calibration=calibration, permute=permute, seed=seed)
    seconds = time.monotonic() - start
    with tempfile.TemporaryDirectory() as folder:
        saved = result.save(Path(folder) / "small.onnx")
        compared = vqonnx.compare(model, saved.path, test)
    return {
        "bytes": saved.bytes,
        "seconds": round(seconds, 1),
        "snr_db": compared.snr_db,
        "agreement": compared.top1_agreement,
    }


def _data(network: str) -> tuple[list[Feed], list[Feed]]:
    if network.startswith("resnet"):
        return cifar_feeds("train_0", 64, batch=32), cifar_feeds("test", 1000)
    if network == "squeezenet":
        return list(squeezenet_feeds("calib", 32)), list(squeezenet_feeds("val", 128))
    return list(imagenet_feeds("calib", 32)), list(imagenet_feeds("val", 128))


def _summary(entry: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds; the one over layers counts each weight once."""
    sizes = entry["weights"]
    pairs = {name: pair for name, pair in entry["layers_db"].items() if None not in pair}
    gains = [after - before for before, after in pairs.values()]
    runs = {kind: [run[kind] for run in entry["runs"]] for kind in _KINDS}
    return {
        "share": sum(sizes[name] for name in entry["layers"]) / sum(sizes.values()),
        "gain": float(np.average(gains, weights=[sizes[name] for name in pairs])) if gains else 0.0,
        "spread": [float(np.quantile(gains, share)) if gains else 0.0 for share in (0, 0.5, 1)],
        **{f"{key}_{kind}": _mean(run[key] for run in runs[kind]) for kind in _KINDS for key in _MEASURED},
    }


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None


def print_table() -> None:
    print(
        "| network | `best` | groups (channels) | pinned channels | layers that an order can help (of all weights) "
        "| their error falls by (least, median, most) | network's output in dB | agreement | seconds | seeds |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
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
            f"| {found['gain']:.2f} dB ({', '.join(f'{gain:.2f}' for gain in found['spread'])}) "
            f"| {_pair(found, 'snr_db', '.2f')} | {_pair(found, 'agreement', '.1%')} "
            f"| {_pair(found, 'seconds', '.0f')} | {len(entry['runs'])} |"
        )
    for text in sorted(settings):
        print(f"\n{text}")


def _pair(found: dict[str, Any], key: str, spec: str) -> str:
    values = [found[f"{key}_{kind}"] for kind in _KINDS]
    return "-" if None in values else " -> ".join(format(value, spec) for value in values)


if __name__ == "__main__":
    main()
