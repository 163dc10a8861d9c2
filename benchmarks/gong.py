"""Gong et al. 2014 on LeNet-300-100 and LeNet-5: error against rate of their five methods, on dense layers only.

    python benchmarks/gong.py [--folder build/lenet]     writes benchmarks/results/gong.json
    python benchmarks/gong_report.py                     makes tables and plots of it

Compresses all dense layers at once, and looks at each one alone; no training afterwards. The error is 100 - top-1 on
the 10,000 test images. Rates are both the paper's, from `vqonnx.rates`, and from the bytes of the written file. Trains
the networks first (`benchmarks/lenet.py`) where the folder does not hold them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import lenet
import numpy as np
import onnx
import onnx.utils
import onnxruntime
from common import mnist_feeds, mnist_labels, setting
from gong_settings import Setting, Shape, settings
from onnx import numpy_helper

import vqonnx

RESULTS = Path(__file__).parent / "results" / "gong.json"


@dataclass(frozen=True)
class Point:
    """One setting on one network.

    Attributes:
        network: Its name.
        layers: ``all``, ``hidden`` (all but the classifier, the last one), or the name of the one weight that is
            compressed.
        family: See `Setting`.
        label: Options in words.
        paper_rate: Of the layers asked for, as the paper counts; a layer that would grow is left as it is, with 1.
        file_rate: The same from the bytes in the file.
        file_ratio: Bytes of the whole file before and after; None where only some are compressed.
        left_alone: Layers that would grow.
        error: Mean over the seeds of 100 - top-1, in percent.
        errors: For each seed.
    """

    network: str
    layers: str
    family: str
    label: str
    paper_rate: float
    file_rate: float
    file_ratio: float | None
    left_alone: tuple[str, ...]
    error: float
    errors: tuple[float, ...]


class Bench:
    """One network, its dense layers and the test images."""

    def __init__(self, network: lenet.Network, folder: Path, work: Path, count: int = 10_000) -> None:
        self.name = network.name
        self.path = network.path(folder)
        self._work = work
        self._test, self._labels = mnist_feeds("test", count), mnist_labels(count=count)
        self._weights = _weights(self.path)
        self.dense: dict[str, Shape] = {name: self._weights[name].shape for name in network.dense}  # transB: [out, in]
        self.error = self._wrong(self._run(self.path))
        onnx.utils.extract_model(self.path, work / "features.onnx", ["input"], ["flatten.out"])
        self._features = self._run(work / "features.onnx")  # what the first dense layer sees, in every variant

    def measure(self, choice: Setting, seeds: tuple[int, ...] | None = None) -> list[Point]:
        """All dense layers, the hidden ones, and each alone; what would grow by the paper's count is left alone."""
        rates_of = {name: choice.paper_rate(shape) for name, shape in self.dense.items()}
        methods = {name: choice.method(self.dense[name]) for name, rate in rates_of.items() if rate > 1}
        if not methods:
            return []
        groups = {name: (name,) for name in methods}
        hidden = tuple(self.dense)[:-1]
        if len(hidden) > 1 and set(hidden) & set(methods):
            groups = {"hidden": hidden, **groups}
        errors: dict[str, list[float]] = {name: [] for name in ("all", *groups)}
        overrides = [vqonnx.Override(name, method) for name, method in methods.items()]
        for seed in seeds or choice.seeds:
            result = vqonnx.compress(self.path, include=list(methods), overrides=overrides, seed=seed)
            saved = result.save(self._work / "small.onnx")
            errors["all"].append(self._wrong(self._run(saved.path)))
            vqonnx.expand(saved.path, self._work / "plain.onnx")
            decoded = _weights(self._work / "plain.onnx")
            for group, names in groups.items():  # without calibration no layer sees another: alone it has these codes
                replaced = {name: decoded[name] for name in names}
                errors[group].append(self._wrong(self._dense_part(replaced)))
        for layer in result.layers:  # less only where a layer before has the same codebook
            assert layer.bytes <= choice.stored_bytes(self.dense[layer.name]), (choice, layer)
        assert result.layers[0].bytes == choice.stored_bytes(self.dense[result.layers[0].name]), choice
        # As the file has them: a codebook that two layers have in common is stored once.
        stored = {layer.name: layer.bytes for layer in vqonnx.report(saved.path).layers}
        assert set(stored) == set(methods), (choice, result.skipped)
        plain = {name: 4 * rows * cols for name, (rows, cols) in self.dense.items()}
        by_paper = {name: size / max(1, rates_of[name]) for name, size in plain.items()}
        in_file = plain | stored

        def point(layers: str, names: Iterable[str]) -> Point:
            before = sum(plain[name] for name in names)
            return Point(
                network=self.name,
                layers=layers,
                family=choice.family,
                label=choice.label,
                paper_rate=round(before / sum(by_paper[name] for name in names), 3),
                file_rate=round(before / sum(in_file[name] for name in names), 3),
                file_ratio=round(result.bytes_before / saved.bytes, 3) if layers == "all" else None,
                left_alone=tuple(name for name in names if name not in methods),
                error=round(mean(errors[layers]), 3),
                errors=tuple(errors[layers]),
            )

        return [point("all", tuple(self.dense)), *(point(group, names) for group, names in groups.items())]

    def _run(self, path: Path) -> np.ndarray:
        """What onnxruntime makes of the test images with a model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, feed)[0] for feed in self._test])

    def _dense_part(self, replaced: dict[str, np.ndarray]) -> np.ndarray:
        """Logits with some weights replaced."""
        value = self._features
        for name in self.dense:
            bias = self._weights[name.replace("weight", "bias")]
            value = value @ replaced.get(name, self._weights[name]).T + bias
            value = value if name == list(self.dense)[-1] else np.maximum(value, 0)
        return value

    def _wrong(self, logits: np.ndarray) -> float:
        return round(100 - 100 * float(np.mean(logits.argmax(axis=1) == self._labels)), 3)


def _weights(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def measure_all(network: lenet.Network, folder: Path) -> tuple[dict[str, Any], list[Point]]:
    """What the network is, and every setting on it."""
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(network, folder, Path(work))
        points = []
        for choice in settings():
            measured = bench.measure(choice)
            points += measured
            print(*map(_line, measured), sep="\n", flush=True)
    return {"error": bench.error, "dense": bench.dense}, points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=lenet.FOLDER, help="where the two networks are, or go")
    folder = parser.parse_args().folder
    for network in lenet.NETWORKS:
        if not network.path(folder).exists():
            lenet.train(network, folder)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = list(pool.map(measure_all, lenet.NETWORKS, [folder] * len(lenet.NETWORKS)))
    networks = {network.name: about for network, (about, _) in zip(lenet.NETWORKS, found, strict=True)}
    points = [asdict(point) for _, points in found for point in points]
    RESULTS.parent.mkdir(exist_ok=True)
    content = {"setting": setting(), "networks": networks, "points": points}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(setting())


def _line(point: Point) -> str:
    spread = f" ({min(point.errors):.2f} to {max(point.errors):.2f})" if len(point.errors) > 1 else ""
    left = f" | left alone: {', '.join(point.left_alone)}" if point.left_alone else ""
    return (
        f"| {point.network} | {point.layers} | {point.family} {point.label} | {point.paper_rate:.1f} "
        f"| {point.file_rate:.1f} | {point.error:.2f}{spread}{left} |"
    )


if __name__ == "__main__":
    main()
