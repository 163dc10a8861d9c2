"""The pass over a model: find the layers, encode one after the other, put the forms in place, prove the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from vqonnx import modelfile
from vqonnx.allocate import Plan, Progress, layer_of, share_out
from vqonnx.bias import Bias, halve_biases, prepare
from vqonnx.bias import store as store_biases
from vqonnx.calibrate import Walk
from vqonnx.compact import compact as make_compact
from vqonnx.dual import DualWalk
from vqonnx.errors import ModelError, OptionError
from vqonnx.feeds import read_feeds
from vqonnx.form import Form, stored_arrays
from vqonnx.fusion import fuse_layers, is_fused
from vqonnx.generate import generate_feeds
from vqonnx.graph import LINEAR, Site, Skipped, find
from vqonnx.method import Budgeted, Layer, LeftAlone, Method, Needs
from vqonnx.methods import BGD, PQ
from vqonnx.moments import Moments, snr_db
from vqonnx.ops import DOMAIN
from vqonnx.pair import multiplications
from vqonnx.permute import permute as permute_channels
from vqonnx.permute import prove
from vqonnx.place import OVERHEAD, Placement, Target, place
from vqonnx.record import KEY, LayerRecord, write_record
from vqonnx.result import Result
from vqonnx.runtime import open_session, read_inputs
from vqonnx.share import parts_of, share_trees
from vqonnx.view import View

# Batches of the calibration data on which the written model is run; enough to see that it works.
_CHECKED_BATCHES = 8
_SEEDS = 2**31  # each layer adds to the seed, and scikit-learn takes less than 2**32

_log = logging.getLogger(__name__)
_Array = tuple[int, str, tuple[int, ...], bytes]  # scope and content of an array; a model stores equal ones once
Tune = Callable[[Site, View, Form], Form]


@dataclass(frozen=True)
class Override:
    """A method for the layers whose weight or node name matches a pattern; None leaves them alone."""

    pattern: str
    method: Method | None


def compress(
    model: str | Path,
    method: Method | None = None,
    *,
    calibration: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    op_types: Sequence[str] = LINEAR,
    overrides: Sequence[Override] = (),
    target: Target = "hybrid",
    seed: int = 0,
    batch: int = 16,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    allow_unchanged: bool = False,
    fuse: bool | None = None,
    compact: bool = False,
    half_biases: bool = False,
    permute: bool = False,
    tune: Tune | None = None,
    progress: Progress | None = None,
) -> Result:
    """Replace the weights of a model by codes and codebooks.

    Args:
        model: Path of the ONNX model.
        method: How; by default `BGD` with calibration data and `PQ` without.
        calibration: A path of an ``.npz`` keyed by input name or of a folder of them, an iterable of dicts, or an
            onnxruntime ``CalibrationDataReader``.
        include: Compress only layers whose weight or node name matches one of these patterns (``*`` and ``?``).
        exclude: Leave these alone.
        op_types: Compress only these operators.
        overrides: Methods for certain layers; the first pattern that matches wins.
        target: ``hybrid``, ``portable`` or ``custom`` (docs/format.md).
        seed: Same seed, same bytes.
        batch: Images that are run at once where the model leaves the number open.
        input_shapes: Shapes for generated inputs, where no calibration data are given.
        allow_unchanged: Give the model back as it is where no layer can be compressed, instead of an error.
        fuse: Write one op for the codes of a weight, its layer, and what follows it, where there is such an op; if it
            is None, `vqonnx.fusion.BY_DEFAULT` says, for the targets ``hybrid`` and ``custom``.
        compact: Make all that is not weights as small as it gets (`vqonnx.compact`): names, attributes, constants.
        half_biases: Round biases to float16, which a compact file stores in half the bytes.
        permute: Put channels into an order in which layers are coded with less error, where that does not change the
            outputs; reads the calibration data twice.
        tune: Called with each layer's site, view and new form; gives the form of the same size that takes its place, in
            the model and in what the layers behind it see (`vqonnx.training.tuner`).
        progress: Called with (layers done, layers in all, name of the next).

    Raises:
        ModelError: The model cannot be read, does not run, or has nothing to compress.
        DataError: The calibration data do not fit it.
        OptionError: A seed, a batch or a pattern cannot be used, a method needs calibration data and there are none, or
            layers shall be fused in a portable or a compact file, or biases be halved in one that is not compact.
    """
    if not 0 <= seed < _SEEDS:
        raise OptionError(f"seed is {seed}; choose 0 to {_SEEDS - 1}")
    if batch < 1:
        raise OptionError(f"batch is {batch}; choose 1 or more")
    if compact and fuse:
        raise OptionError("a compact file has no fused layers; give --compact or --fuse, not both")
    fusing = not compact and is_fused(fuse, target)
    if half_biases and not compact:
        raise OptionError("half_biases saves nothing unless the file is compact; give --compact as well")
    if permute and tune is not None:
        raise OptionError("permute and tune exclude each other: a tuner knows the layers in their old order")
    path = Path(model)
    proto = modelfile.load(path)
    _refuse_compressed(proto, path)
    inputs = read_inputs(path)
    open_session(path)  # a model that onnxruntime does not load cannot be verified either
    found = find(proto, path.parent)
    method = method or (PQ() if calibration is None else BGD())
    plan, skipped = _plan(found.sites, method, include, exclude, op_types, overrides)
    skipped = [*found.skipped, *skipped]
    needs = any(chosen.needs is Needs.MOMENTS for _, chosen in plan)
    if needs and calibration is None:
        names = sorted({chosen.id for _, chosen in plan if chosen.needs is Needs.MOMENTS})
        raise OptionError(f"method '{names[0]}' needs calibration data; give --calibration, or choose method pq")
    feeds = None if calibration is None else _Remembering(read_feeds(calibration, inputs, batch=batch))
    permuted = 0
    if permute:
        permuted = len(permute_channels(proto, path.parent, plan, feeds, seed=seed, progress=progress))
        shown = generate_feeds(path, shapes=input_shapes, seed=seed) if feeds is None else feeds.first()
        prove(path, proto, shown)
    if feeds is not None:
        plan = share_out(proto, path.parent, plan, feeds, seed, progress)
    placements, layers = _encode_all(proto, path, plan, skipped, feeds, seed, tune, progress)
    if not placements and not allow_unchanged:
        why = _why(skipped) or "it has no linear layer"
        raise ModelError(f"{path}: no layer can be compressed ({why}); --allow-unchanged copies it as it is")
    before = modelfile.file_bytes(path)
    if placements:
        if half_biases:
            halve_biases(proto, path.parent)
        factors = place(proto, placements, target)
        fused = fuse_layers(proto, path.parent) if fusing else {}
        layers = [_as_run(layer, names, fused) for layer, names in zip(layers, factors, strict=True)]
        write_record(proto, before, tuple(layers), tuple(skipped), permuted=permuted)
        if compact:
            make_compact(proto, path.parent)
    elif permuted:
        proto = modelfile.load(path)  # as it was
    check = generate_feeds(path, shapes=input_shapes, seed=seed) if feeds is None else feeds.first()
    return Result(proto, tuple(layers), tuple(skipped), target, path, before, check)


def _as_run(layer: LayerRecord, factors: tuple[str, ...], fused: Mapping[str, str]) -> LayerRecord:
    """The record with the names of its two layers, if any, and the fused ops that run it."""
    ops = tuple(fused[name] for name in factors or (layer.name,) if name in fused)
    return replace(layer, factors=factors, fused=ops)


def _why(skipped: Sequence[Skipped]) -> str:
    """The reasons in one line, each with the layers that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for entry in skipped:
        by_reason.setdefault(entry.reason, []).append(entry.name)
    texts = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        texts.append(f"{', '.join(names[:2])}{more}: {reason}")
    return "; ".join(texts)


class _Remembering:
    """Feeds that keep the first batches for the check at the end: a data reader may give them only once."""

    def __init__(self, feeds: Iterable[dict[str, Any]]) -> None:
        self._feeds = feeds
        self._kept: list[dict[str, Any]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for feed in self._feeds:
            if len(self._kept) < _CHECKED_BATCHES:
                self._kept.append(feed)
            yield feed

    def first(self) -> list[dict[str, Any]]:
        """The first batches; reads them where nothing has been read yet."""
        return self._kept or list(islice(iter(self), _CHECKED_BATCHES))


def _refuse_compressed(model: ModelProto, path: Path) -> None:
    portable = any(entry.key == KEY for entry in model.metadata_props)  # has the record, but not the domain
    if portable or any(entry.domain == DOMAIN for entry in model.opset_import):
        raise ModelError(f"{path}: is already compressed by vqonnx; 'vqonnx expand' turns it back into a plain model")


def _plan(
    sites: Sequence[Site],
    method: Method,
    include: Sequence[str],
    exclude: Sequence[str],
    op_types: Sequence[str],
    overrides: Sequence[Override],
) -> tuple[Plan, list[Skipped]]:
    """The method of each site, by the user's patterns. A pattern that matches nothing is an error."""
    unknown = sorted(set(op_types) - set(LINEAR))
    if unknown:
        raise OptionError(f"operator '{unknown[0]}' is not compressed; choose from {', '.join(LINEAR)}")
    for pattern in (*include, *exclude, *(override.pattern for override in overrides)):
        if sites and not any(_matches(site, pattern) for site in sites):
            names = ", ".join(site.name for site in sites[:5])
            raise OptionError(f"pattern '{pattern}' matches none of the {len(sites)} layers ({names} ...)")
    plan: Plan = []
    skipped = []
    for site in sites:
        chosen = next((o.method for o in overrides if _matches(site, o.pattern)), method)
        if site.op_type not in op_types:
            skipped.append(Skipped(site.name, f"{site.op_type} is not among the operators asked for"))
        elif include and not any(_matches(site, pattern) for pattern in include):
            skipped.append(Skipped(site.name, "not included"))
        elif any(_matches(site, pattern) for pattern in exclude):
            skipped.append(Skipped(site.name, "excluded"))
        elif chosen is None:
            skipped.append(Skipped(site.name, "left alone by the configuration"))
        else:
            plan.append((site, chosen))
    return plan, skipped


def _matches(site: Site, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (site.name, *(use.node.name for use in site.uses)) if name)


def _encode_all(
    proto: ModelProto,
    path: Path,
    plan: Plan,
    skipped: list[Skipped],
    feeds: Iterable[Mapping[str, Any]] | None,
    seed: int,
    tune: Tune | None,
    progress: Progress | None,
) -> tuple[list[Placement], list[LayerRecord]]:
    """Encode the layers in order; with feeds, each sees its inputs as the compressed layers before it make them."""
    sites = [site for site, _ in plan]
    placements, layers = [], []
    stored: set[_Array] = set()
    biases: dict[str, Bias] = {}
    walking: Walk | DualWalk | nullcontext[None] = nullcontext()
    if feeds is not None and any(method.pairs for _, method in plan):
        biases = prepare(proto, [site for site, method in plan if method.pairs], path.parent)
        walking = DualWalk(proto, path.parent, sites, feeds, seed=seed)
    elif feeds is not None and plan:
        walking = Walk(proto, path.parent, sites, feeds, seed=seed)
    with walking as walk:
        for number, (site, method) in enumerate(plan):
            if progress:
                progress(number, len(plan), site.name)
            view = site.view(method.view_order)
            moments, cross = None, None
            if isinstance(walk, DualWalk) and walk.can_observe(site):
                moments, cross = walk.observe(site, method.order)
            elif isinstance(walk, Walk) and walk.can_observe(site):
                moments = walk.observe(site, method.order)
            elif walk is not None and method.needs is Needs.MOMENTS:
                _log.warning("%s: in a subgraph or function, so its inputs are not observed", site.name)
            layer = replace(layer_of(plan, number, method, moments, seed), cross=cross)
            try:
                form, size = _encode(layer, method, site, stored)
            except LeftAlone as reason:
                skipped.append(Skipped(site.name, str(reason)))
                continue
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
    store_biases(proto, biases.values())
    if progress:
        progress(len(plan), len(plan), "")
    return _with_shared_trees(placements, layers)


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
