"""The pass over a model: find the layers, encode one after the other, put the forms in place, prove the result."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from onnx import ModelProto

from vqonnx import modelfile
from vqonnx.allocate import Sharing
from vqonnx.bias import halve_biases
from vqonnx.compact import compact as make_compact
from vqonnx.encode import Tune, encode_layers
from vqonnx.errors import ModelError, OptionError
from vqonnx.feeds import read_feeds
from vqonnx.fit import Limits, fit
from vqonnx.fusion import fuse_layers, is_fused
from vqonnx.generate import generate_feeds
from vqonnx.graph import LINEAR, Skipped, find
from vqonnx.menu import Progress, and_more, read_menus
from vqonnx.method import Budgeted, Method, Needs
from vqonnx.methods import PQ, Best
from vqonnx.ops import DOMAIN
from vqonnx.permute import permute as permute_channels
from vqonnx.permute import prove
from vqonnx.place import Target, place
from vqonnx.plan import Override, check_numbers, make_plan
from vqonnx.record import KEY, LayerRecord, write_record
from vqonnx.result import Result
from vqonnx.runtime import open_session, read_inputs

# Batches of the calibration data on which the written model is run; enough to see that it works.
_CHECKED_BATCHES = 8
_BESIDE = 0.6  # of what a model has besides the weights that are compressed: about what a compact file has at most
_NOISE_DB = 3.0  # of a layer's output: below, its error has half of its energy or more

_log = logging.getLogger(__name__)


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
    limits: Limits | None = None,
    seed: int = 0,
    batch: int = 16,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    allow_unchanged: bool = False,
    fuse: bool | None = None,
    compact: bool | None = None,
    half_biases: bool | None = None,
    permute: bool = False,
    tune: Tune | None = None,
    cache: str | Path | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Result:
    """Replace the weights of a model by codes and codebooks.

    Args:
        model: Path of the ONNX model.
        method: How; by default `Best` with calibration data and `PQ` without.
        calibration: A path of an ``.npz`` keyed by input name or of a folder of them, an iterable of dicts, or an
            onnxruntime ``CalibrationDataReader``. They are read several times where bits are shared out (`Best`), with
            ``permute`` and with ``limits``; then an iterator, or a reader that cannot be rewound, will not do.
        include: Compress only layers whose weight or node name matches one of these patterns (``*`` and ``?``).
        exclude: Leave these alone.
        op_types: Compress only these operators.
        overrides: Methods for certain layers; the first pattern that matches wins.
        target: ``hybrid``, ``portable`` or ``custom`` (docs/format.md).
        limits: How large the file may be, or how much may be lost, in the place of the bits of the method.
        seed: Same seed, same bytes.
        batch: Images that are run at once where the model leaves the number open.
        input_shapes: Shapes for generated inputs, where no calibration data are given.
        allow_unchanged: Give the model back as it is where no layer can be compressed, instead of an error.
        fuse: Write one op for the codes of a weight, its layer, and what follows it, where there is such an op; if it
            is None, `vqonnx.fusion.BY_DEFAULT` says, for the targets ``hybrid`` and ``custom``.
        compact: Make all that is not weights as small as it gets (`vqonnx.compact`): names, attributes, constants; None
            does so where there are ``limits``.
        half_biases: Round biases to float16, which a compact file stores in half the bytes; None as ``compact``.
        permute: Put channels into an order in which layers are coded with less error, where that does not change the
            outputs; reads the calibration data twice.
        tune: Called with each layer's site, view and new form; gives the form of the same size that takes its place, in
            the model and in what the layers behind it see (`vqonnx.training.tuner`).
        cache: Folder in which it is kept what layers can do at which size; a run that was stopped goes on from it.
        jobs: Layers that are tried at the same time.
        progress: Called with (layers done, layers in all, name of the next).

    Raises:
        ModelError: The model cannot be read, does not run, or has nothing to compress.
        DataError: The calibration data do not fit it.
        OptionError: A seed, a batch or a pattern cannot be used, options contradict each other, a method needs
            calibration data and there are none, or the limits cannot be kept.
    """
    check_numbers(seed=seed, batch=batch, jobs=jobs)
    compact = (limits is not None and not fuse) if compact is None else compact
    if compact and fuse:
        raise OptionError("a compact file has no fused layers; give --compact or --fuse, not both")
    fusing = not compact and is_fused(fuse, target)
    half_biases = limits is not None and compact if half_biases is None else half_biases
    if half_biases and not compact:
        raise OptionError("half_biases saves nothing unless the file is compact; give --compact as well")
    if permute and tune is not None:
        raise OptionError("permute and tune exclude each other: a tuner knows the layers in their old order")
    path = Path(model)
    proto = modelfile.load(path)
    _refuse_compressed(proto, path)
    inputs = read_inputs(path)
    open_session(path)  # a model that onnxruntime does not load cannot be verified either
    by_default = method is None
    method = method or (PQ() if calibration is None else Best())
    found = find(proto, path.parent)
    plan, left = make_plan(found.sites, method, include, exclude, op_types, overrides)
    needing = sorted({chosen.id for _, chosen in plan if chosen.needs is Needs.MOMENTS})
    if needing and calibration is None:
        raise OptionError(f"method '{needing[0]}' needs calibration data; give --calibration, or choose method pq")
    feeds = None if calibration is None else _Remembering(read_feeds(calibration, inputs, batch=batch))
    if limits is not None and limits.drop is not None:
        limits = replace(limits, data=read_feeds(limits.data, inputs))  # what cannot be read is refused before the work
        if limits.data.once:
            raise OptionError("limits: the data for drop are read many times; give a path, a list or arrays")
    permuted = 0
    if permute:
        permuted = len(permute_channels(proto, path.parent, plan, feeds, seed=seed, progress=progress))
        shown = generate_feeds(path, shapes=input_shapes, seed=seed) if feeds is None else feeds.first()
        prove(path, proto, shown)
    sharing, beside = None, 0.0
    before = modelfile.file_bytes(path)
    if feeds is not None and any(isinstance(chosen, Budgeted) and chosen.shares for _, chosen in plan):
        menus = read_menus(
            proto,
            path.parent,
            plan,
            feeds,
            seed,
            cache=None if cache is None else Path(cache),
            jobs=jobs,
            progress=progress,
        )
        sharing = Sharing([chosen for _, chosen in plan], menus, lenient=by_default)
        beside = (_BESIDE if compact else 1) * (before - sum(plan[number][0].nbytes for number in menus))

    def attempt(limit: float | None) -> Result:
        """The compressed model; ``limit`` bytes for the layers that share, or what their methods say."""
        draft = ModelProto()
        draft.CopyFrom(proto)
        again, _ = make_plan(find(draft, path.parent).sites, method, include, exclude, op_types, overrides)
        if sharing is not None:
            sharing.restart(limit)
        made = encode_layers(draft, path.parent, again, feeds, seed, sharing=sharing, tune=tune, progress=progress)
        skipped = (*found.skipped, *left, *made.skipped)
        if not made.placements and not allow_unchanged:
            why = _why(skipped) or "it has no linear layer"
            raise ModelError(f"{path}: no layer can be compressed ({why}); --allow-unchanged copies it as it is")
        layers = made.layers
        if made.placements:
            if half_biases:
                halve_biases(draft, path.parent)
            factors = place(draft, made.placements, target)
            fused = fuse_layers(draft, path.parent) if fusing else {}
            layers = [_as_run(layer, names, fused) for layer, names in zip(layers, factors, strict=True)]
            write_record(draft, before, tuple(layers), skipped, permuted=permuted)
            if compact:
                make_compact(draft, path.parent)
        else:
            draft = modelfile.load(path)  # as it was
        if limits is not None:
            modelfile.bring_in(draft, path.parent)  # so that its size is that of the file
        check = generate_feeds(path, shapes=input_shapes, seed=seed) if feeds is None else feeds.first()
        return Result(draft, tuple(layers), skipped, target, path, before, check)

    result = attempt(None) if limits is None else fit(attempt, limits, before, sharing, beside)
    _warn_of_noise(result.layers)
    return result


def _warn_of_noise(layers: Sequence[LayerRecord]) -> None:
    """One line for all layers of whose output little is left."""
    found = sorted(
        (layer.output_snr_db, layer.name)
        for layer in layers
        if layer.output_snr_db is not None and layer.output_snr_db < _NOISE_DB
    )
    if found:
        worst, name = found[0]
        more = and_more(len(found) - 1)
        _log.warning(
            "%s%s: %sits output on the calibration data is only %.1f dB above its error (less than %g); give it more "
            "bits, or exclude it",
            name,
            more,
            "at worst " if more else "",
            worst,
            _NOISE_DB,
        )


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
        for number, feed in enumerate(self._feeds):
            if number == len(self._kept) < _CHECKED_BATCHES:  # an earlier pass may have kept the first ones
                self._kept.append(feed)
            yield feed

    def first(self) -> list[dict[str, Any]]:
        """The first batches; reads them where nothing has been read yet."""
        return self._kept or list(islice(iter(self), _CHECKED_BATCHES))


def _refuse_compressed(model: ModelProto, path: Path) -> None:
    portable = any(entry.key == KEY for entry in model.metadata_props)  # has the record, but not the domain
    if portable or any(entry.domain == DOMAIN for entry in model.opset_import):
        raise ModelError(f"{path}: is already compressed by vqonnx; 'vqonnx expand' turns it back into a plain model")
