"""Dynamic quantisation coding with training (Rao et al. 2019), cell by cell of the paper's tables.

    python benchmarks/dqc.py resnet20 --bits 3 --zero          # one cell
    python benchmarks/dqc.py resnet56                          # all cells of a network that are not there yet
    python benchmarks/dqc.py table                             # the tables, from benchmarks/results/

ResNets start from ``resnet20_bn.onnx`` and ``resnet56_bn.onnx`` and train on the 30,000 images at hand (pad-4 crops and
flips); LeNet-5 starts from the file that ``benchmarks/lenet.py`` writes. Every run keeps its state under ``--work`` and
goes on from there; each finished cell is one JSON file in ``benchmarks/results/dqc/`` with its schedule and losses.
The rates were chosen on the last 5,000 training images (``--validate``); the test images only give the final figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Feed, cifar_feeds, cifar_labels, data_dir, setting
from PIL import Image

import vqonnx
from vqonnx.training.dqc import Batches, Recipe, train_dqc
from vqonnx.training.loop import Schedule

RESULTS = Path(__file__).resolve().parent / "results" / "dqc"
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
_STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
_BATCH = 128
# Published: (bits, zero, penalty) -> accuracy in percent; METHODS 2.6.
PUBLISHED: dict[str, dict[tuple[int, bool, str], float]] = {
    "resnet20": {
        (3, False, "l2"): 90.07,
        (3, True, "l2"): 90.78,
        (4, False, "l2"): 91.71,
        (4, True, "l2"): 91.91,
        (5, False, "l2"): 92.63,
        (5, True, "l2"): 92.82,
    },
    "resnet56": {
        (3, False, "l2"): 92.72,
        (3, True, "l2"): 92.69,
        (4, False, "l2"): 93.54,
        (4, True, "l2"): 93.39,
        (5, False, "l2"): 93.21,
        (5, True, "l2"): 93.24,
    },
}
_LENET = {
    "ce": (99.29, 99.22, 99.30, 99.25, 99.35, 99.32),
    "l1": (98.69, 99.25, 99.09, 99.25, 99.14, 99.27),
    "l2": (99.26, 99.29, 99.29, 99.28, 99.36, 99.28),
}
PUBLISHED["lenet5"] = {
    (bits, zero, penalty): row[2 * (bits - 3) + zero]
    for penalty, row in _LENET.items()
    for bits, zero in itertools.product((3, 4, 5), (False, True))
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=[*PUBLISHED, "table"])
    parser.add_argument("--bits", type=int, choices=(3, 4, 5))
    parser.add_argument("--zero", action=argparse.BooleanOptionalAction)
    parser.add_argument("--penalty", choices=("ce", "l1", "l2"))
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--rule", choices=("magnitude", "identity"), default="identity")
    parser.add_argument("--l2", type=float, default=1e-4)
    parser.add_argument("--l1", type=float, default=1e-6)
    parser.add_argument("--teacher", type=float, default=0.0)
    parser.add_argument("--work", type=Path, default=Path("build/dqc"))
    parser.add_argument("--validate", action="store_true", help="hold out 5,000 training images and evaluate on them")
    chosen = parser.parse_args()
    if chosen.network == "table":
        print_tables()
        return
    torch.set_num_threads(1)  # several cells side by side are faster than one with several threads
    for bits, zero, penalty in PUBLISHED[chosen.network]:
        wanted = (chosen.bits in (None, bits), chosen.zero in (None, zero), chosen.penalty in (None, penalty))
        if all(wanted):
            run_cell(chosen, bits, zero, penalty)


def run_cell(chosen: argparse.Namespace, bits: int, zero: bool, penalty: str) -> None:
    network: str = chosen.network
    name = _name(network, bits, zero, penalty, chosen.teacher > 0)
    if (RESULTS / f"{name}.json").exists() and not chosen.validate:
        print(f"{name}: done already")
        return
    model = chosen.work / "lenet5.onnx" if network == "lenet5" else data_dir() / "models" / f"{network}_bn.onnx"
    images, labels = _mnist("train") if network == "lenet5" else _cifar()
    if chosen.validate:
        held, held_labels = images[-5000:], labels[-5000:]
        images, labels = images[:-5000], labels[:-5000]
    steps = max(2, round(chosen.epochs * len(images) / _BATCH))
    recipe = Recipe(
        Schedule(steps, chosen.rate, drops=(int(0.6 * steps), int(0.85 * steps))),
        rule=chosen.rule,
        l1=chosen.l1 if penalty == "l1" else 0.0,
        l2=chosen.l2 if penalty == "l2" else 0.0,
        teacher=chosen.teacher,
    )
    method = vqonnx.DQC(bits=bits, zero=zero, fit="paper")
    chosen.work.mkdir(parents=True, exist_ok=True)
    checkpoint = chosen.work / f"{name}{'_validate' if chosen.validate else ''}.pt"
    start = time.monotonic()

    def progress(step: int, total: int, text: str) -> None:
        print(f"{name}: step {step} of {total}, {text}, {time.monotonic() - start:.0f} s", flush=True)

    batches = mnist_batches(images, labels) if network == "lenet5" else cifar_batches(images, labels)
    trained = train_dqc(
        model, batches, method, recipe, checkpoint=checkpoint, data_name=f"{len(images)}", progress=progress
    )
    saved = trained.result.save(chosen.work / f"{name}.onnx")
    if chosen.validate:
        found = vqonnx.compare(model, saved.path, _feeds(network, held), labels=held_labels)
        print(
            f"{name}: held-out {100 * found.top1_before:.2f} -> {100 * found.top1_after:.2f} %, "
            f"agreement {100 * found.top1_agreement:.2f} %, SNR {found.snr_db:.2f} dB"
        )
        return
    if network == "lenet5":
        test, test_labels = _mnist("test")
        test_feeds = _feeds(network, test)
    else:
        test_feeds, test_labels = cifar_feeds("test", 10_000), cifar_labels()
    found = vqonnx.compare(model, saved.path, test_feeds, labels=test_labels)
    untrained = vqonnx.compress(model, method).save(chosen.work / f"{name}_untrained.onnx")
    plain = vqonnx.compare(model, untrained.path, test_feeds, labels=test_labels)
    entry = {
        "network": network,
        "bits": bits,
        "zero": zero,
        "penalty": penalty,
        "published": PUBLISHED[network][bits, zero, penalty],
        "fp32": round(100 * found.top1_before, 2),
        "untrained": round(100 * plain.top1_after, 2),
        "trained": round(100 * found.top1_after, 2),
        "bytes": saved.bytes,
        "bytes_before": trained.result.bytes_before,
        "epochs": chosen.epochs,
        "recipe": asdict(recipe),
        "diverged": trained.history.diverged,
        "losses": [(step, round(loss, 4)) for step, loss in trained.history.losses],
        "setting": setting() + f"; torch {torch.__version__}, one thread",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(entry, indent=1) + "\n")
    print(f"{name}: {entry['fp32']} untrained {entry['untrained']} trained {entry['trained']} %", flush=True)


def _name(network: str, bits: int, zero: bool, penalty: str, teacher: bool) -> str:
    return f"{network}_{bits}bit_{'zero' if zero else 'nozero'}_{penalty}{'_teacher' if teacher else ''}"


def cifar_batches(images: np.ndarray, labels: np.ndarray) -> Batches:
    """Crops of the images padded by 4, half of them mirrored; every epoch sees each image once."""

    def batch(step: int) -> tuple[Mapping[str, Any], np.ndarray]:
        chosen = _shuffled(step, len(images))
        rng = np.random.default_rng([1, step])
        padded = np.pad(images[chosen], ((0, 0), (0, 0), (4, 4), (4, 4)))
        rows, cols = rng.integers(0, 9, (2, len(chosen)))
        at = np.arange(32)
        number = np.arange(len(chosen))[:, None, None, None]
        channel = np.arange(3)[None, :, None, None]
        crops = padded[number, channel, (rows[:, None] + at)[:, None, :, None], (cols[:, None] + at)[:, None, None, :]]
        mirrored = rng.random(len(chosen)) < 0.5
        crops[mirrored] = crops[mirrored][..., ::-1]
        # Padding with black before normalising: what the fp32 networks were trained with.
        return {"input": (crops.astype(np.float32) / 255 - _MEAN) / _STD}, labels[chosen]

    return batch


def mnist_batches(images: np.ndarray, labels: np.ndarray) -> Batches:
    """Images as they are; every epoch sees each once."""

    def batch(step: int) -> tuple[Mapping[str, Any], np.ndarray]:
        chosen = _shuffled(step, len(images))
        return {"input": images[chosen].astype(np.float32) / 255}, labels[chosen]

    return batch


def _shuffled(step: int, count: int) -> np.ndarray:
    per_epoch = count // _BATCH
    order = np.random.default_rng([0, step // per_epoch]).permutation(count)
    return order[step % per_epoch * _BATCH :][:_BATCH]


def _feeds(network: str, images: np.ndarray) -> list[Feed]:
    ready = images.astype(np.float32) / 255
    if network != "lenet5":
        ready = (ready - _MEAN) / _STD
    return [{"input": ready[start : start + 100]} for start in range(0, len(ready), 100)]


def _cifar() -> tuple[np.ndarray, np.ndarray]:
    """The 30,000 training images, uint8 NCHW, and their labels."""
    sheets = []
    for number in range(3):
        with Image.open(data_dir() / "cifar10" / f"train_{number}.webp") as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        sheets.append(pixels.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32))
    with np.load(data_dir() / "cifar10" / "labels.npz") as arrays:
        return np.concatenate(sheets), arrays["train"].astype(np.int64)[:30_000]


def _mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(data_dir() / "mnist" / "mnist.npz") as arrays:
        return arrays[f"x_{split}"], arrays[f"y_{split}"].astype(np.int64)


def print_tables() -> None:
    for network, cells in PUBLISHED.items():
        print(f"\n{network}\n\n| bits | zero | loss | published | ours | teacher's share | fp32 | untrained ", end="")
        print("| epochs | rule | bytes |\n|---|---|---|---|---|---|---|---|---|---|---|")
        settings = set()
        for cell, teacher in itertools.product(cells, (False, True)):
            bits, zero, penalty = cell
            path = RESULTS / f"{_name(network, *cell, teacher)}.json"
            start = f"| {bits} | {'with' if zero else 'no'} | {penalty} | {cells[cell]:.2f} "
            if not path.exists():
                if not teacher:
                    print(f"{start}| not run |")
                continue
            e = json.loads(path.read_text())
            settings.add(e["setting"])
            stopped = "" if e["diverged"] is None else f" (stopped at step {e['diverged']})"
            print(
                f"{start}| {e['trained']:.2f}{stopped} | {e['recipe']['teacher']:g} | {e['fp32']:.2f} "
                f"| {e['untrained']:.2f} | {e['epochs']:g} | {e['recipe']['rule']} | {e['bytes']:,} |"
            )
        for text in sorted(settings):
            print(f"\n{text}")


if __name__ == "__main__":
    main()
