"""Dynamic quantisation coding with training (Rao et al. 2019), cell by cell of the paper's tables.

    python benchmarks/dqc.py resnet20 --bits 3 --zero          # one cell
    python benchmarks/dqc.py resnet56                          # all cells of a network that are not there yet
    python benchmarks/dqc.py table                             # the tables, from benchmarks/results/

ResNets start from ``resnet20_bn.onnx`` and ``resnet56_bn.onnx`` and train on the 30,000 images at hand (pad-4 crops and
flips), with ``--start codes`` from their post-training codes (calibrated on 1,024 of those images). LeNet-5 starts from
the file that ``benchmarks/lenet.py`` writes. Every run keeps its state under ``--work`` and goes on from there; each
finished cell is one JSON file in ``benchmarks/results/dqc/`` with its schedule and losses. The rates were chosen on the
last 5,000 training images (``--validate``); the test images only give the final figure. On a machine with an
accelerator ``--device cuda --train-only`` ends with the state; the same command without the two, on any machine that
has it, evaluates.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
from vqonnx.expand import expand
from vqonnx.runtime import open_session, run
from vqonnx.training.dqc import Batches, Recipe, train_dqc
from vqonnx.training.loop import Schedule

RESULTS = Path(__file__).resolve().parent / "results" / "dqc"
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
_STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
_BATCH = 128
# Published: (bits, zero, penalty) -> accuracy in percent; Rao et al. 2019, Tables 4 and 7.
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
    parser.add_argument("--l2", type=float, help="default 1e-4; with --start model the authors' coefficient")
    parser.add_argument("--l1", type=float, default=1e-6)
    parser.add_argument("--teacher", type=float, default=0.0)
    parser.add_argument("--taught-by", choices=("resnet20", "resnet56"), help="the network that teaches, if another")
    parser.add_argument("--start", choices=("model", "codes"), default="codes")
    parser.add_argument("--mixup", action="store_true", help="mix pairs of images until the last drop of the rate")
    parser.add_argument("--work", type=Path, default=Path("build/dqc"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trained-on", metavar="TEXT", help="where the state comes from, for the table")
    parser.add_argument("--train-only", action="store_true", help="leave the trained state under --work, and stop")
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
    name = _name(network, bits, zero, penalty, chosen)
    if (RESULTS / f"{name}.json").exists() and not chosen.validate:
        print(f"{name}: done already")
        return
    model = chosen.work / "lenet5.onnx" if network == "lenet5" else data_dir() / "models" / f"{network}_bn.onnx"
    images, labels = _mnist("train") if network == "lenet5" else _cifar()
    if chosen.validate:
        held, held_labels = images[-5000:], labels[-5000:]
        images, labels = images[:-5000], labels[:-5000]
    steps = max(2, round(chosen.epochs * len(images) / _BATCH))
    drops = int(0.6 * steps), int(0.85 * steps)
    recipe = Recipe(
        Schedule(steps, chosen.rate, drops=drops),
        rule=chosen.rule,
        l1=chosen.l1 if penalty == "l1" else 0.0,
        l2=_l2(chosen, bits, zero) if penalty == "l2" else 0.0,
        teacher=chosen.teacher,
    )
    method = vqonnx.DQC(bits=bits, zero=zero, fit="paper")
    chosen.work.mkdir(parents=True, exist_ok=True)
    checkpoint = chosen.work / f"{name}{'_validate' if chosen.validate else ''}.pt"
    start = time.monotonic()

    def progress(step: int, total: int, text: str) -> None:
        print(f"{name}: step {step} of {total}, {text}, {time.monotonic() - start:.0f} s", flush=True)

    batches = mnist_batches(images, labels) if network == "lenet5" else cifar_batches(images, labels)
    teacher = data_dir() / "models" / f"{chosen.taught_by}_bn.onnx" if chosen.taught_by else model
    if chosen.mixup:
        if chosen.teacher != 1:
            raise SystemExit("--mixup mixes images and not labels: it needs --teacher 1")
        batches = mixed(batches, until=drops[-1])
    start_model = model
    if chosen.start == "codes":
        start_model = coded_after_training(network, model, method, images[:1024], chosen.work)
    trained = train_dqc(
        start_model,
        batches,
        method,
        recipe,
        original=model,
        teacher=teacher if chosen.taught_by else None,
        checkpoint=checkpoint,
        data_name=f"{len(images)}{' mixed' if chosen.mixup else ''}",
        device=chosen.device,
        progress=progress,
    )
    if chosen.train_only:
        return
    saved = trained.result.save(chosen.work / f"{name}.onnx")
    if chosen.validate:
        found = vqonnx.compare(model, saved.path, _feeds(network, held), labels=held_labels)
        print(
            f"{name}: held-out {100 * found.top1_before:.2f} -> {100 * found.top1_after:.2f} %, "
            f"agreement {100 * found.top1_agreement:.2f} %, SNR {found.snr_db:.2f} dB, "
            f"divergence from the teacher on mixed images {mixed_divergence(teacher, saved.path, held):.4f}"
        )
        return
    if network == "lenet5":
        test, test_labels = _mnist("test")
        test_feeds = _feeds(network, test)
    else:
        test_feeds, test_labels = cifar_feeds("test", 10_000), cifar_labels()
    found = vqonnx.compare(model, saved.path, test_feeds, labels=test_labels)
    nearest = vqonnx.compress(model, method).save(chosen.work / f"{name}_nearest.onnx")
    untrained = {"nearest": vqonnx.compare(model, nearest.path, test_feeds, labels=test_labels)}
    if chosen.start == "codes":
        coded = chosen.work / f"{_code_name(network, method)}_coded.onnx"
        untrained["codes"] = vqonnx.compare(model, coded, test_feeds, labels=test_labels)
    entry = {
        "network": network,
        "bits": bits,
        "zero": zero,
        "penalty": penalty,
        "published": PUBLISHED[network][bits, zero, penalty],
        "fp32": round(100 * found.top1_before, 2),
        "start": chosen.start,
        "untrained": {kind: round(100 * (c.top1_after or 0), 2) for kind, c in untrained.items()},
        "trained": round(100 * found.top1_after, 2),
        "bytes": saved.bytes,
        "bytes_before": trained.result.bytes_before,
        "epochs": chosen.epochs,
        "mixup": chosen.mixup,
        "taught_by": chosen.taught_by,
        "recipe": asdict(recipe),
        "diverged": trained.history.diverged,
        "losses": [(step, round(loss, 4)) for step, loss in trained.history.losses],
        "trained_on": chosen.trained_on or "processor, one thread",
        "setting": setting() + f"; torch {torch.__version__}",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(entry, indent=1) + "\n")
    print(f"{name}: {entry['fp32']} untrained {entry['untrained']} trained {entry['trained']} %", flush=True)


def _name(network: str, bits: int, zero: bool, penalty: str, chosen: argparse.Namespace) -> str:
    teacher = f"_{chosen.taught_by or 'teacher'}"
    marks = {teacher: chosen.teacher, "_codes": chosen.start == "codes", "_mixup": chosen.mixup}
    more = "".join(mark for mark, there in marks.items() if there)
    return f"{network}_{bits}bit_{'zero' if zero else 'nozero'}_{penalty}{more}"


def _l2(chosen: argparse.Namespace, bits: int, zero: bool) -> float:
    """The authors' coefficient is for training from the float weights; codes that are there already need less."""
    if chosen.l2 is not None:
        return float(chosen.l2)
    if chosen.start == "codes":
        return 1e-4
    return 1e-3 if bits == 3 or zero else 5e-4


def coded_after_training(network: str, model: Path, method: vqonnx.DQC, images: np.ndarray, folder: Path) -> Path:
    """The network with its post-training codes, as a plain file to train from; made once."""
    coded, plain = (folder / f"{_code_name(network, method)}_{kind}.onnx" for kind in ("coded", "start"))
    if not coded.exists():
        start = dataclasses.replace(method, fit="search", feedback=True)
        vqonnx.compress(model, start, calibration=_feeds(network, images)).save(coded)
    if not plain.exists():
        expand(coded, plain)
    return plain


def _code_name(network: str, method: vqonnx.DQC) -> str:
    return f"{network}_{method.bits}bit_{'zero' if method.zero else 'nozero'}"


def cifar_batches(images: np.ndarray, labels: np.ndarray) -> Batches:
    """Crops of the images padded by 4, half of them mirrored; every epoch sees each image once."""

    def batch(step: int) -> tuple[Mapping[str, Any], np.ndarray]:
        chosen = _shuffled(step, len(images))
        rng = np.random.default_rng([1, step])
        # Padding with black before normalising: what the fp32 networks were trained with.
        padded = np.pad(images[chosen], ((0, 0), (0, 0), (4, 4), (4, 4)))
        rows, cols = rng.integers(0, 9, (2, len(chosen)))
        crops = np.stack(
            [image[:, row : row + 32, col : col + 32] for image, row, col in zip(padded, rows, cols, strict=True)]
        )
        mirrored = rng.random(len(chosen)) < 0.5
        crops[mirrored] = crops[mirrored][..., ::-1]
        return {"input": (crops.astype(np.float32) / 255 - _MEAN) / _STD}, labels[chosen]

    return batch


def mixed(batches: Batches, until: int) -> Batches:
    """Each image blended with the one before it, by a share of its own: inputs on which the teacher is less certain.

    From the step ``until`` on images are as they are, so that the statistics of BatchNormalization fit them in the end.
    """

    def batch(step: int) -> tuple[Mapping[str, Any], np.ndarray]:
        feeds, labels = batches(step)
        if step >= until:
            return feeds, labels
        (name, images), *_ = feeds.items()
        shares = np.random.default_rng([2, step]).random((len(images), 1, 1, 1), np.float32)
        return {name: shares * images + (1 - shares) * np.roll(images, 1, axis=0)}, labels

    return batch


def mixed_divergence(teacher: Path, small: Path, images: np.ndarray) -> float:
    """How far from the teacher's classes on blends of images that training has not seen, in nats.

    The float networks have seen the images themselves in their own training, but not these.
    """
    batches = mixed(lambda step: (_feeds("resnet", images[100 * step :][:100])[0], np.zeros(100)), len(images))
    feeds = [batches(step)[0] for step in range(len(images) // 100)]
    outputs = []
    for path in (teacher, small):
        session = open_session(path)
        logits = np.concatenate([next(iter(run(session, feed).values())) for feed in feeds])
        outputs.append(torch.log_softmax(torch.from_numpy(logits), 1))
    wanted, found = outputs
    return float(torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True))


def mnist_batches(images: np.ndarray, labels: np.ndarray) -> Batches:
    """Images as they are; every epoch sees each once."""

    def batch(step: int) -> tuple[Mapping[str, Any], np.ndarray]:
        chosen = _shuffled(step, len(images))
        return {"input": images[chosen].astype(np.float32) / 255}, labels[chosen]

    return batch


def _shuffled(step: int, count: int) -> np.ndarray:
    """Which images a step takes."""
    per_epoch = count // _BATCH
    return _order(step // per_epoch, count)[step % per_epoch * _BATCH :][:_BATCH]


@functools.lru_cache(maxsize=2)
def _order(epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([0, epoch]).permutation(count)


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
        print(f"\n{network}\n\n| bits | zero | loss | published | ours | teacher's share | fp32 | nearest ", end="")
        print("| feedback | start | epochs | rate | bytes |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|")
        settings = set()
        for bits, zero, penalty in cells:
            name = f"{network}_{bits}bit_{'zero' if zero else 'nozero'}_{penalty}"
            ours = sorted(RESULTS.glob(f"{name}*.json"))
            row = f"| {bits} | {'with' if zero else 'no'} | {penalty} | {cells[bits, zero, penalty]:.2f} "
            if not ours:
                print(f"{row}| not run |")
            for path in ours:
                e = json.loads(path.read_text())
                settings.add(f"trained on: {e['trained_on']}; evaluated on: {e['setting']}")
                stopped = "" if e["diverged"] is None else f" (stopped at step {e['diverged']})"
                untrained = e["untrained"]
                start = f"{e['start']}{', mixed images' if e.get('mixup') else ''}"
                start += f", taught by {e['taught_by']}" if e.get("taught_by") else ""
                print(
                    f"{row}| {e['trained']:.2f}{stopped} | {e['recipe']['teacher']:g} | {e['fp32']:.2f} "
                    f"| {untrained['nearest']:.2f} | {untrained.get('codes', '')} | {start} | {e['epochs']:g} "
                    f"| {e['recipe']['schedule']['rate']:g} | {e['bytes']:,} |"
                )
        for text in sorted(settings):
            print(f"\n{text}")


if __name__ == "__main__":
    main()
