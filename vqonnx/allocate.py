"""Share bits out among the layers of a model: one Lagrange multiplier for all of them.

Young et al. 2021 (arXiv 2009.01174): the error of the network's output is taken as the sum of what each unit adds, and
bits go where they save most of it. A layer's curves count the error of its own output; its sensitivity turns that into
an error of the network's.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from vqonnx.calibrate import Walk
from vqonnx.errors import OptionError
from vqonnx.form import Matrix
from vqonnx.graph import Site
from vqonnx.lagrange import Curve, allocate, least_rate, lower_hull
from vqonnx.method import Budgeted, Layer, LeftAlone, Method, Way
from vqonnx.moments import Moments
from vqonnx.place import OVERHEAD
from vqonnx.sensitivity import Probe, noisy

# The codebooks of whole numbers, float16, for 1 to 8 bits: equal ones are stored once for the whole model.
_CODEBOOK_BYTES = 2 * (2**9 - 2)
_ROUNDING = 1e-4  # bits of a layer are written with four digits, rounded up

_log = logging.getLogger(__name__)
Plan = list[tuple[Site, Method]]
Progress = Callable[[int, int, str], None]


def layer_of(plan: Plan, number: int, method: Method, moments: Moments | None, seed: int) -> Layer:
    """What a method sees of a site of the plan."""
    site = plan[number][0]
    return Layer(
        name=site.name,
        op_type=site.op_type,
        weight=site.view(method.view_order).matrix(site.read()),
        kernel=site.kernel,
        first=number == 0,
        last=number == len(plan) - 1,
        seed=seed + zlib.crc32(site.name.encode()) % 2**16,
        moments=moments,
    )


def share_out(
    model: ModelProto,
    folder: Path,
    plan: Plan,
    feeds: Iterable[Mapping[str, Any]],
    seed: int,
    progress: Progress | None,
) -> Plan:
    """The plan with each `Budgeted` method replaced by one with the bits that its layer earns.

    Layers with equal methods share one budget. A layer that cannot be encoded keeps its method, which says why.

    Raises:
        OptionError: The layers take more than the bits that were asked for.
    """
    numbers = [number for number, (_, method) in enumerate(plan) if isinstance(method, Budgeted)]
    if not numbers:
        return plan
    probe = Probe(model, folder, feeds)
    offers = {}
    with Walk(model, folder, [plan[number][0] for number in numbers], feeds, seed=seed) as walk:
        for done, number in enumerate(numbers):
            if progress:
                progress(done, len(numbers), f"{plan[number][0].name} (measured)")
            offer = _offer(plan, number, walk, probe, seed)
            if offer is not None:
                offers[number] = offer
    _fill_in(list(offers.values()))
    shared = list(plan)
    for method in dict.fromkeys(method for _, method in plan if isinstance(method, Budgeted)):
        group = [number for number in offers if plan[number][1] == method]
        for number, chosen in zip(group, _choose(method, [offers[number] for number in group]), strict=True):
            shared[number] = plan[number][0], chosen
    return shared


@dataclass(eq=False)
class _Offer:
    """What one layer can do.

    Attributes:
        weights: Number of weights.
        ways: The ways to encode it.
        curve: Hull over all of them; its choices number ``points``.
        points: (way, bytes) of each offer.
        energy: Energy of the layer's output, in the unit of the curve's errors.
        factor: Error of the network's output for each unit of the layer's; None if it could not be measured.
    """

    weights: int
    ways: list[Way]
    curve: Curve
    points: list[tuple[int, float]]
    energy: float
    factor: float | None

    def method(self, pick: int) -> Method:
        """The method that encodes the layer at a vertex."""
        way, rate = self.points[int(self.curve.choices[pick])]
        bits = ceil(8 * rate / self.weights / _ROUNDING - 1e-6) * _ROUNDING
        return replace(self.ways[way].method, bits=round(bits, 4))


def _offer(plan: Plan, number: int, walk: Walk, probe: Probe, seed: int) -> _Offer | None:
    """What the layer can do, or None where nothing."""
    site, method = plan[number]
    assert isinstance(method, Budgeted)
    seen = site.view("ihw").matrix(site.read())
    if not np.isfinite(seen).all():
        return None
    moments = walk.observe(site, method.order) if walk.can_observe(site) else None
    ways: list[Way] = []
    for variant in method.variants:
        try:
            ways += variant.ways(layer_of(plan, number, variant, moments, seed))
        except LeftAlone:
            continue
    points = [(at, float(rate)) for at, way in enumerate(ways) for rate in way.curve.rates]
    errors = [float(error) for way in ways for error in way.curve.errors]
    fitting = [at for at, (_, rate) in enumerate(points) if rate + OVERHEAD < site.nbytes]
    if not fitting:
        return None
    hull = lower_hull([points[at][1] for at in fitting], [errors[at] for at in fitting])
    shaken = noisy(seen, seed + number)
    lost, energy = (_energy(matrix, moments) for matrix in (shaken - seen, seen))
    effect = probe.effect(site, shaken) if lost > 0 else None
    return _Offer(
        weights=seen.size,
        ways=ways,
        curve=replace(hull, choices=np.array(fitting)[hull.choices]),
        points=points,
        energy=energy,
        factor=effect / lost if effect else None,
    )


def _energy(matrix: Matrix, moments: Moments | None) -> float:
    """Of the output with such weights, or of the weights, as the curves count it."""
    return float(np.sum(matrix.astype(np.float64) ** 2)) if moments is None else moments.energy(matrix)


def _fill_in(offers: Sequence[_Offer]) -> None:
    """A layer that could not be measured counts like the median one, for the same relative error."""
    known = [offer.factor * offer.energy for offer in offers if offer.factor is not None]
    for offer in offers:
        if offer.factor is None:
            offer.factor = (float(np.median(known)) if known else 1.0) / (offer.energy or 1.0)


def _choose(method: Budgeted, offers: Sequence[_Offer]) -> list[Method]:
    """The method of each layer, in the budget of ``method``."""
    weights = sum(offer.weights for offer in offers)
    curves = [replace(offer.curve, errors=offer.curve.errors * (offer.factor or 0.0)) for offer in offers]
    spare = _CODEBOOK_BYTES + _ROUNDING * weights / 8
    budget = method.bits * weights / 8 - spare
    if offers and budget < least_rate(curves):
        least = ceil(800 * (least_rate(curves) + spare) / weights) / 100
        raise OptionError(
            f"method '{method.id}': bits is {method.bits:g}, but these {len(offers)} layers take at least {least:g} "
            f"bits a weight; choose {least:g} or more"
        )
    most = ceil(800 * (sum(curve.rates[-1] for curve in curves) + spare) / max(weights, 1)) / 100
    if offers and method.bits > max(most, 8):
        raise OptionError(
            f"method '{method.id}': bits is {method.bits:g}, but these {len(offers)} layers have use for at most "
            f"{most:g} bits a weight; choose {most:g} or less"
        )
    picks = allocate(curves, budget) if offers else []
    for offer, pick in zip(offers, picks, strict=True):
        _log.info("%s: %d weights", offer.method(pick), offer.weights)
    return [offer.method(pick) for offer, pick in zip(offers, picks, strict=True)]
