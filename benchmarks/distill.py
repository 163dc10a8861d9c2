"""Distilled codebooks (Stock et al. 2020) on ResNet-56: the same codes before and after, and what each part brings.

    python benchmarks/distill.py                       # every run that is not there yet
    python benchmarks/distill.py bn-vectors            # one run
    python benchmarks/distill.py --validate bn-vectors --set rate=0.1    # choose a rate; nothing is kept
    python benchmarks/distill.py table                 # the table, from benchmarks/results/distill/

Codes are made as in ``benchmarks/resnet56.py``, with the first 1,024 training images; the images for distillation are
20,000 others, without labels. Rates were chosen with ``--validate``, on 1,000 training images that nothing else sees.
The test images only give the figures. A run keeps its state under ``--work`` and goes on from there. On a machine with
an accelerator ``--device cuda --train-only`` ends with the state; the same command without the two evaluates it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Feed, cifar_feeds, cifar_labels, data_dir, setting

import vqonnx
from vqonnx.methods import BGD
from vqonnx.runtime import open_session
from vqonnx.training.distill import distill
from vqonnx.training.recipe import Recipe
from vqonnx.training.tuner import Tuner

RESULTS = Path(__file__).resolve().parent / "results" / "distill"
ALL = Recipe(layer_steps=0)  # nine passes over the images, published rates
LAYERS = Recipe(steps=0)  # a quarter of a pass for each layer
ADAM = Recipe(layer_steps=0, optimiser="adam", weight_decay=0.0, gradient="sum")
SHORT = replace(ADAM, steps=150, batch=64, biases=True)  # on a processor
# Name -> model, clamp of the codebooks, recipe, what is special.
RUNS: dict[str, tuple[str, str, Recipe, str]] = {
    "bn-quarter-statistics": ("resnet56_bn", "quarter", replace(ALL, steps=150, rate=1e-9), "statistics alone"),
    "bn-quarter": ("resnet56_bn", "quarter", ALL, ""),
    "bn-quarter-both": ("resnet56_bn", "quarter", Recipe(), "layers, then all"),
    "bn-quarter-biases": ("resnet56_bn", "quarter", replace(ALL, biases=True), "biases too"),
    "bn-quarter-adam": ("resnet56_bn", "quarter", replace(ADAM, biases=True), "biases too, Adam"),
    "bn-quarter-tuned": (
        "resnet56_bn",
        "quarter",
        replace(LAYERS, layer_steps=3, batch=64),
        "layer by layer while compressing, alone",
    ),
    "bn-vectors-both": ("resnet56_bn", "vectors", Recipe(), "layers, then all"),
    "bn-vectors-adam": ("resnet56_bn", "vectors", replace(ADAM, biases=True), "biases too, Adam"),
    "folded-quarter-biases": ("resnet56", "quarter", SHORT, "biases too, Adam"),
    "folded-vectors-biases": ("resnet56", "vectors", SHORT, "biases too, Adam"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", choices=[*RUNS, "table", []])
    parser.add_argument("--work", type=Path, default=Path("build/distill"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trained-on", metavar="TEXT", help="where the state comes from, for the table")
    parser.add_argument("--train-only", action="store_true", help="leave the trained state under --work, and stop")
    parser.add_argument("--validate", action="store_true", help="judge on held-out training images, and keep nothing")
    parser.add_argument("--set", metavar="OPTION=VALUE", action="append", default=[], help="change the recipe")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.run == ["table"]:
        print_table()
        return
    chosen.work.mkdir(parents=True, exist_ok=True)
    for name in chosen.run or RUNS:
        if chosen.validate or not (RESULTS / f"{name}.json").exists():
            run(name, chosen)


def run(name: str, chosen: argparse.Namespace) -> None:
    network, clamp, recipe, _ = RUNS[name]
    recipe = replace(recipe, **{key: json.loads(value) for key, value in (text.split("=", 1) for text in chosen.set)})
    model = data_dir() / "models" / f"{network}.onnx"
    plain, before = compressed(network, clamp, chosen)
    data = {
        "input": np.concatenate([feed["input"] for part in (1, 2) for feed in cifar_feeds(f"train_{part}", 10_000)])
    }
    start = time.process_time()
    out = chosen.work / f"{name}.onnx"
    entry: dict[str, Any] = {"network": network, "clamp": clamp}
    if name == "bn-quarter-tuned":
        calibration = cifar_feeds("train_0", 1024, batch=64)
        tuner = Tuner(model, data, recipe)
        saved = vqonnx.compress(model, BGD(clamp=clamp), calibration=calibration, tune=tuner, progress=log).save(out)
        entry["losses"] = {layer: history.losses for layer, history in tuner.histories.items()}
    else:
        checkpoint = None if chosen.validate else chosen.work / f"{name}.state"
        made = distill(model, plain, data, recipe, checkpoint=checkpoint, device=chosen.device, progress=log)
        if chosen.train_only:
            return
        saved = made.save(out)
        entry["losses"] = [history.losses for history in made.histories]
        entry["diverged"] = made.diverged
        entry["loss"] = [made.loss_before, made.loss_after]
    entry |= {
        "recipe": asdict(recipe),
        "images": len(data["input"]),
        "bytes_plain": plain.stat().st_size,
        "bytes": saved.bytes,
        "bytes_before": model.stat().st_size,
        "top1_fp32": top1(model, chosen),
        "top1_plain": before,
        "top1": measure(out, chosen),
        "seconds": round(time.process_time() - start),
        "trained_on": chosen.trained_on or "processor, one thread",
        "setting": f"{setting()}, torch {torch.__version__}",
    }
    print(f"{name}: {entry['top1_plain']:.2f} -> {entry['top1']:.2f} % ({entry['seconds']} s)", flush=True)
    if not chosen.validate:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def compressed(network: str, clamp: str, chosen: argparse.Namespace) -> tuple[Path, float]:
    """The model with undistilled codebooks, and its accuracy; made once."""
    path = chosen.work / f"{network}-{clamp}.onnx"
    if not path.exists():
        model = data_dir() / "models" / f"{network}.onnx"
        calibration = cifar_feeds("train_0", 1024, batch=64)
        vqonnx.compress(model, BGD(clamp=clamp), calibration=calibration).save(path)  # type: ignore[arg-type]
    return path, top1(path, chosen)


def top1(path: Path, chosen: argparse.Namespace) -> float:
    """`measure`, once for each file."""
    kept = chosen.work / f"{path.stem}.{'validate' if chosen.validate else 'test'}"
    if not kept.exists():
        kept.write_text(str(measure(path, chosen)), encoding="utf-8")
    return float(kept.read_text(encoding="utf-8"))


def measure(path: Path, chosen: argparse.Namespace) -> float:
    """Percent of the test images, or of the held-out training images, that the model gets right."""
    feeds, labels = held_out() if chosen.validate else (cifar_feeds("test", 10_000), cifar_labels())
    session = open_session(path, threads=1)
    classes = np.concatenate([session.run(None, feed)[0].argmax(1) for feed in feeds])
    return round(100 * float((classes == labels).mean()), 2)


def held_out() -> tuple[list[Feed], np.ndarray]:
    with np.load(data_dir() / "cifar10" / "labels.npz") as arrays:
        labels = arrays["train"][9_000:10_000].astype(np.int64)
    return cifar_feeds("train_0", 10_000)[90:], labels


def log(done: int, total: int, text: str) -> None:
    print(f"  {done}/{total} {text}", flush=True)


def print_table() -> None:
    print("| model | words | what moves | steps x images | bytes | top-1 before | after | change |")
    print("|---|---|---|---|---|---|---|---|")
    entry: dict[str, Any] = {}
    settings = set()
    for name, (network, clamp, _, what) in RUNS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        entry = json.loads(path.read_text(encoding="utf-8"))
        recipe = asdict(Recipe(**entry["recipe"]).scaled(entry["images"]))
        steps = f"{recipe['steps']} x {recipe['batch']}"
        if recipe["layer_steps"]:
            steps = f"55 x {recipe['layer_steps']} x {recipe['batch']}" + (f" + {steps}" if recipe["steps"] else "")
        words = "below a quarter of the vectors" if clamp == "quarter" else "256"
        settings.add(f"trained on: {entry['trained_on']}; evaluated on: {entry['setting']}")
        kept = "BatchNormalization" if network.endswith("_bn") else "folded"
        print(
            f"| {kept} | {words} | {what or 'codebooks, statistics'} | {steps} | {entry['bytes']:,} "
            f"| {entry['top1_plain']:.2f} | {entry['top1']:.2f} | {entry['top1'] - entry['top1_plain']:+.2f} |"
        )
    if entry:
        print(f"\nfp32: {entry['top1_fp32']:.2f}. {'; '.join(sorted(settings))}")


if __name__ == "__main__":
    main()
