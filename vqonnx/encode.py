"""Encode the layers of a model, one after the other, each with its inputs as those before it make them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from vqonnx.allocate import Sharing
from vqonnx.bias import Bias, prepare
from vqonnx.bias import store as store_biases
from vqonnx.calibrate import Walk
from vqonnx.dual import DualWalk
from vqonnx.form import Form, stored_arrays
from vqonnx.graph import Site, Skipped
from vqonnx.menu import FewRows, Plan, Progress, layer_of
from vqonnx.method import Budgeted, Layer, LeftAlone, Method, Needs
from vqonnx.moments import Moments, snr_db
from vqonnx.pair import multiplications
from vqonnx.place import OVERHEAD, Placement
from vqonnx.record import LayerRecord
from vqonnx.share import parts_of, share_trees
from vqonnx.view import View

_log = logging.getLogger(__name__)
_Array = tuple[int, str, tuple[int, ...], bytes]  # scope and content of an array; a model stores equal ones once
Tune = Callable[[Site, View, Form], Form]


@dataclass(frozen=True)
class Encoded:
    """What became of the layers of a plan.

    Attributes:
        placements: Forms, and where they go.
        layers: How each was made.
        skipped: Those that were left alone, and why.
    """

    placements: list[Placement]
    layers: list[LayerRecord]
    skipped: list[Skipped]


def encode_layers(
    proto: ModelProto,
    folder: Path,
    plan: Plan,
    feeds: Iterable[Mapping[str, Any]] | None,
    seed: int,
    *,
    sharing: Sharing | None = None,
    tune: Tune | None = None,
    progress: Progress | None = None,
) -> Encoded:
    """Encode the layers in order; with feeds, each sees its inputs as the compressed layers before it make them.

    Args:
        proto: The model; its biases take up what layers lose of their mean, its weights stay.
        folder: Where it lies.
        plan: The layers and their methods.
        feeds: Calibration batches.
        seed: Of everything random.
        sharing: Chooses the methods of layers that share a budget.
        tune: Called with each layer's site, view and new form; gives the form that takes its place.
        progress: Called with (layers done, layers in all, name of the next).
    """
    sites = [site for site, _ in plan]
    placements, layers, skipped = [], [], []
    stored: set[_Array] = set()
    few = FewRows()
    biases: dict[str, Bias] = {}
    walking: Walk | DualWalk | nullcontext[None] = nullcontext()
    if feeds is not None and any(method.pairs for _, method in plan):
        biases = prepare(proto, [site for site, method in plan if method.pairs], folder)
        walking = DualWalk(proto, folder, sites, feeds, seed=seed)
    elif feeds is not None and plan:
        walking = Walk(proto, folder, sites, feeds, seed=seed)
    with walking as walk:
        for number, (site, method) in enumerate(plan):
            if progress:
                progress(number, len(plan), site.name)
            offer = None if sharing is None else sharing.choose(number)
            method = method if offer is None else offer.method
            view = site.view(method.view_order)
            moments, cross = None, None
            if isinstance(walk, DualWalk) and walk.can_observe(site):
                moments, cross = walk.observe(site, method.order)
            elif isinstance(walk, Walk) and walk.can_observe(site):
                moments = walk.observe(site, method.order)
            elif walk is not None and method.needs is Needs.MOMENTS:
                _log.warning("%s: in a subgraph or function, so its inputs are not observed", site.name)
            looks = method.needs is Needs.MOMENTS or method.pairs
            if looks and sharing is None:  # the menus have looked before
                few.look(site, moments)
            layer = replace(layer_of(plan, number, method, moments, seed), cross=cross)
            try:
                form, size = _encode(layer, method, site, stored)
            except LeftAlone as reason:
                skipped.append(Skipped(site.name, str(reason)))
                if sharing is not None:
                    sharing.spend(number, 0)
                continue
            if sharing is not None:
                sharing.spend(number, size)
            if tune is not None:
                form = tune(site, view, form)
            decoded = form.decode()
            if walk is not None and (method.pairs or not isinstance(method, Budgeted)):  # others get what was measured
                walk.replace(site, view.tensor(decoded))
            if isinstance(walk, DualWalk) and method.pairs and site.name in biases and moments and cross:
                seen = site.view(method.order)  # rows are outputs, whatever the method's own view
                before, after = (seen.matrix(view.tensor(matrix)) for matrix in (layer.weight, decoded))
                walk.set_constant(biases[site.name].shift(cross.lost(before, after, moments)))
            placements.append(Placement(site, form, view))
            layers.append(_record(layer, site, view, method, form, size, decoded, moments))
    few.warn()
    store_biases(proto, biases.values())
    if progress:
        progress(len(plan), len(plan), "")
    return Encoded(*_with_shared_trees(placements, layers), skipped)


def _with_shared_trees(
    placements: list[Placement], layers: list[LayerRecord]
) -> tuple[list[Placement], list[LayerRecord]]:
    """The same with one set of trees for all prefix codes, and the bytes that layers take with it."""
    if not any(part.coding for placement in placements for part in parts_of(placement.form)):
        return placements, layers
    shared = share_trees([placement.form for placement in placements])
    placements = [replace(placement, form=form) for placement, form in zip(placements, shared, strict=True)]
    stored: set[_Array] = set()
    sizes = [_count(placement.form, placement.site, stored) for placement in placements]
    return placements, [replace(layer, bytes=size) for layer, size in zip(layers, sizes, strict=True)]


def _encode(layer: Layer, method: Method, site: Site, stored: set[_Array]) -> tuple[Form, int]:
    """The form, and the bytes that it adds to those in ``stored``, which gets its arrays."""
    if not np.isfinite(layer.weight).all():
        raise LeftAlone("weights hold NaN or Inf")
    form = method.encode(layer)
    more = set(stored)
    size = _count(form, site, more)
    if size + OVERHEAD >= site.nbytes:
        raise LeftAlone(f"too small: {site.nbytes} bytes as it is, {size + OVERHEAD} with codes, codebook and node")
    stored |= more
    return form, size


def _count(form: Form, site: Site, stored: set[_Array]) -> int:
    """The bytes that a form adds to the arrays in ``stored``, which gets its own."""
    arrays = {(id(site.scope), a.dtype.str, a.shape, a.tobytes()): a.nbytes for a in stored_arrays(form)}
    size = sum(count for array, count in arrays.items() if array not in stored)
    stored.update(arrays)
    return size


def _record(
    layer: Layer,
    site: Site,
    view: View,
    method: Method,
    form: Form,
    size: int,
    decoded: np.ndarray,
    moments: Moments | None,
) -> LayerRecord:
    error = layer.weight - decoded
    output = None
    if moments is not None:
        seen = site.view(method.order)  # as the moments are, whatever the method's own view
        before, lost = (seen.matrix(view.tensor(matrix)) for matrix in (layer.weight, error))
        output = snr_db(moments.energy(before), moments.energy(lost))
    weight = snr_db(float(np.sum(layer.weight.astype(np.float64) ** 2)), float(np.sum(error.astype(np.float64) ** 2)))
    return LayerRecord(
        name=site.name,
        op_type=site.op_type,
        shape=site.shape,
        method=method.id,
        options=method.options,
        bytes=size,
        weight_snr_db=None if weight is None else round(weight, 2),
        output_snr_db=None if output is None else round(output, 2),
        multiplications=multiplications(site, view, form).share,
    )
