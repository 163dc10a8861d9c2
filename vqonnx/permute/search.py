"""Which of the orders that a model leaves open make its weights easier to code, and by how much they do."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import log, prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from vqonnx.graph import Site, find
from vqonnx.method import Layer
from vqonnx.methods import PQ, Refined
from vqonnx.moments import FULL_COLS, Moments
from vqonnx.permute.groups import Group, Part, find_groups
from vqonnx.permute.swaps import Consumer, Search, search
from vqonnx.view import Order

_LEAST_SWAPS = 10_000
_SWAPS_PER_CHANNEL = 512  # twice as many lower the proxy by a tenth more
_MEASURED_VECTORS = 2**14  # of a layer; more say no more of the difference between two orders
_FEW_VECTORS = 2**11  # then one clustering says little, and two are taken
_LEAST_GAIN_DB = 0.02

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Blocks:
    """How a layer will be coded.

    Attributes:
        width: Weights of a codeword.
        bits: Bits of a code.
        order: Column order of a convolution.
    """

    width: int
    bits: int = 6
    order: Order = "ihw"


@dataclass(frozen=True, eq=False)
class Permuted:
    """A group and an order that lowers the error of the layers that read it.

    Attributes:
        group: The channels.
        order: Channel ``i`` is what ``order[i]`` was.
        proxy_before: What the search made small, in dB of error for each weight of those layers, in the old order.
        proxy_after: The same in the new one.
        gains_db: For each of those layers (by weight) how far its error fell when it was coded.
    """

    group: Group
    order: NDArray[np.int64]
    proxy_before: float
    proxy_after: float
    gains_db: dict[str, float]


def best_permutations(
    model: ModelProto,
    folder: str | Path,
    moments_by_site: Mapping[str, Moments] | None,
    width: int,
    seed: int = 0,
    *,
    bits: int = 6,
    order: Order = "ihw",
) -> list[Permuted]:
    """Find the orders of channels that lower the coding error of the layers that read them, all coded alike.

    Args:
        model: The model; not changed.
        folder: Where it lies, for external data.
        moments_by_site: Second moments of the layers' inputs in ``order``, by name of the weight; None for the plain
            error of weights.
        width: Weights of a codeword.
        seed: Same seed, same orders.
        bits: Bits of a code.
        order: Column order of convolutions.
    """
    blocks = {site.name: Blocks(width, bits, order) for site in find(model, folder).sites if not site.scope.path}
    return permutations(model, folder, moments_by_site or {}, blocks, seed=seed)


def permutations(
    model: ModelProto,
    folder: str | Path,
    moments: Mapping[str, Moments],
    blocks: Mapping[str, Blocks],
    *,
    seed: int = 0,
) -> list[Permuted]:
    """As `best_permutations`, for layers that are coded in different ways; the others count nothing.

    Groups are taken one after the other: a layer that reads several sees the orders of those before.
    """
    sites = {site.name: site for site in find(model, folder).sites if not site.scope.path}
    layers: dict[str, _Reading] = {}
    found = []
    for group in find_groups(model, folder).groups:
        parts = readers_of(group, sites, blocks)
        if not parts:
            continue
        for name in parts:
            if name not in layers:
                layers[name] = _Reading(sites[name], blocks[name], moments.get(name), seed)
        best = _best([(layers[name], entries) for name, entries in parts.items()], group, seed)
        if best is not None:
            found.append(best)
            for name, entries in parts.items():
                layers[name].reorder(entries, best.order)
    return found


def readers_of(group: Group, sites: Mapping[str, Site], blocks: Mapping[str, Blocks]) -> dict[str, NDArray[np.int64]]:
    """The layers whose blocks hold different channels of the group, and where those lie: ``[size, entries of each]``.

    For a kernel that is coded as a whole, the order of the channels does not matter.
    """
    found: dict[str, NDArray[np.int64]] = {}
    for part in group.consumers:
        site, block = sites.get(part.name), blocks.get(part.name)
        if site is None or block is None or block.width < 2 or not _matters(site, part, block):
            continue
        entries = part.start + np.arange(group.size)[:, None] * part.run + np.arange(part.run)
        before = found.get(part.name)
        found[part.name] = entries if before is None else np.concatenate([before, entries], axis=1)
    return found


def _matters(site: Site, part: Part, block: Blocks) -> bool:
    if site.group != 1 or site.shape[part.axis] < block.width:
        return False
    if prod(site.kernel) > 1:
        return block.order == "hwi"
    return bool(part.run % block.width or part.start % block.width)


class _Reading:
    """A layer with its inputs in the order that they have so far."""

    def __init__(self, site: Site, block: Blocks, moments: Moments | None, seed: int) -> None:
        self.block, self.name, self.kernel, self.op_type = block, site.name, site.kernel, site.op_type
        self.seed = seed + zlib.crc32(site.name.encode()) % 2**16
        matrix = site.view(block.order).matrix(site.read())
        self.weights = matrix.size
        self.taps = prod(site.kernel)
        self.inputs = matrix.shape[1] // self.taps
        whole = moments is not None and moments.groups == 1 and moments.cols <= FULL_COLS and moments.rows > 0
        self.moments = moments if whole else None
        self.matrix = matrix
        wide = matrix.astype(np.float64).reshape(-1, self.inputs)
        self.gram = wide.T @ wide
        self.metric = None if self.moments is None else self._channel_metric(self.moments)
        limit = max(1, _MEASURED_VECTORS * block.width // matrix.shape[1])
        self.rows = np.arange(len(matrix))
        if limit < len(matrix):
            self.rows = np.sort(np.random.default_rng(self.seed).choice(len(matrix), limit, replace=False))
        self.errors: Array | None = None

    def _channel_metric(self, moments: Moments) -> Array:
        """The covariance of the input channels, a mean over taps."""
        covariance = moments.covariances()[0].reshape(self.taps, self.inputs, self.taps, self.inputs)
        mean: Array = np.einsum("titj->ij", covariance) / self.taps
        return mean

    def index(self, entries: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each input comes from."""
        index = np.arange(self.inputs)
        index[entries] = entries[order]
        return index

    def measure(self, index: NDArray[np.int64] | None = None) -> Array:
        """Errors of the layer when it is coded with its inputs in another order, one for each clustering."""
        matrix, moments = self.matrix[self.rows], self.moments
        if index is not None:
            columns = (np.arange(self.taps)[:, None] * self.inputs + index).ravel()
            matrix, moments = matrix[:, columns], _reordered(moments, columns)
        vectors = matrix.size // self.block.width
        runs = 2 if vectors < _FEW_VECTORS else 1
        errors = []
        for run in range(runs):
            layer = Layer(self.name, self.op_type, matrix, self.kernel, seed=self.seed + run, moments=moments)
            if moments is None:
                missed = matrix - PQ(width=self.block.width, bits=self.block.bits).encode(layer).decode()
                errors.append(float(np.sum(missed.astype(np.float64) ** 2)))
                continue
            method = Refined(width=self.block.width, bits=self.block.bits, rounds=1, asymmetric=False)
            missed = (matrix - method.encode(layer).decode()).astype(np.float64)
            errors.append(float(np.einsum("ij,ij->", missed @ moments.covariances()[0], missed)))
        return np.asarray(errors)

    def now(self) -> Array:
        """Errors in the present order."""
        if self.errors is None:
            self.errors = self.measure()
        return self.errors

    def reorder(self, entries: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        """Take an order as the present one."""
        index = self.index(entries, order)
        columns = (np.arange(self.taps)[:, None] * self.inputs + index).ravel()
        self.matrix, self.moments = self.matrix[:, columns], _reordered(self.moments, columns)
        self.gram = self.gram[np.ix_(index, index)]
        self.metric = None if self.metric is None else self.metric[np.ix_(index, index)]
        self.errors = None


def _reordered(moments: Moments | None, columns: NDArray[np.int64]) -> Moments | None:
    if moments is None:
        return None
    return Moments(moments.rows, moments.sums[:, columns], ((moments.blocks[0][0][np.ix_(columns, columns)],),))


def _best(readings: list[tuple[_Reading, NDArray[np.int64]]], group: Group, seed: int) -> Permuted | None:
    """The best order that the searches give, by the errors of the layers; None if none lowers them."""
    total = sum(reading.weights for reading, _ in readings)
    best: Permuted | None = None
    most = _LEAST_GAIN_DB
    for kind in ("weights", "metric"):
        consumers = []
        for reading, entries in readings:
            grams = _grams(reading, kind)
            weight = 10 / log(10) * reading.weights / total / reading.block.width
            consumers.append(Consumer(grams, entries, reading.block.width, weight))
        if kind != "weights" and all(reading.metric is None for reading, _ in readings):
            break
        swaps = max(_LEAST_SWAPS, _SWAPS_PER_CHANNEL * group.size)
        found: Search = search(consumers, group.size, swaps=swaps, seed=seed)
        gains = {
            reading.name: _gain(reading.now(), reading.measure(reading.index(entries, found.order)))
            for reading, entries in readings
        }
        gain = sum(gains[reading.name] * reading.weights for reading, _ in readings) / total
        if gain > most:
            most = gain
            best = Permuted(group, found.order, found.before, found.after, gains)
    return best


def _gain(before: Array, after: Array) -> float:
    """How far the error fell in dB, a mean over the clusterings; nothing where there is none to lose."""
    if not (before > 0).all() or not (after > 0).all():
        return 0.0
    return float(10 * np.mean(np.log10(before) - np.log10(after)))


def _grams(reading: _Reading, kind: str) -> tuple[Array, ...]:
    """What the search looks at: the covariance of the weights, and beside it that of the inputs."""
    if kind == "weights" or reading.metric is None:
        return (reading.gram,)
    return reading.gram, reading.metric
