"""What each layer of a model can do at every size, and how much an error of its output matters to the model's.

Layers are tried one after the other, or several at a time (joblib: Dask and Ray can take its place), and what was found
is kept by content, so that a run that was stopped does not try them again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from joblib.parallel import get_active_backend
from onnx import ModelProto

from vqonnx.calibrate import Walk
from vqonnx.errors import OptionError, VqonnxError
from vqonnx.form import Matrix
from vqonnx.graph import Site
from vqonnx.lagrange import Curve, lower_hull
from vqonnx.method import Budgeted, Layer, LeftAlone, Method, Offer
from vqonnx.methods import method_by_name
from vqonnx.moments import Moments
from vqonnx.place import OVERHEAD
from vqonnx.sensitivity import Probe, noisy

_KEPT_VERSION = 10  # of what a cache holds; another one whenever methods offer something else

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
        groups=site.group,
        first=number == 0,
        last=number == len(plan) - 1,
        seed=seed + zlib.crc32(site.name.encode()) % 2**16,
        moments=moments,
    )


@dataclass(frozen=True, eq=False)
class Menu:
    """What one layer can do.

    Attributes:
        weights: Number of weights.
        offers: The ways to encode it.
        curve: Hull over them; its choices number the offers.
        energy: Energy of the layer's output, in the unit of the curve's errors.
        factor: Error of the network's output for each unit of the layer's; None if it could not be measured.
    """

    weights: int
    offers: Sequence[Offer]
    curve: Curve
    energy: float
    factor: float | None

    @property
    def weighted(self) -> Curve:
        """The hull with errors of the network's output."""
        return Curve(self.curve.rates, self.curve.errors * (self.factor or 0.0), self.curve.choices)


def read_menus(
    model: ModelProto,
    folder: Path,
    plan: Plan,
    feeds: Iterable[Mapping[str, Any]],
    seed: int,
    *,
    cache: Path | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> dict[int, Menu]:
    """The menu of each layer whose method is `Budgeted` and shares, by its number; none for one that offers nothing.

    Args:
        model: The original; not changed.
        folder: Where it lies.
        plan: The layers and their methods.
        feeds: Calibration batches.
        seed: Of everything random.
        cache: Folder in which offers are kept; None keeps nothing.
        jobs: Layers that are tried at the same time.
        progress: Called with (layers done, layers in all, name of the next).

    Raises:
        OptionError: The cache is no folder, and cannot be made one.
        VqonnxError: A process that tried a layer was killed.
    """
    numbers = [number for number, (_, method) in enumerate(plan) if isinstance(method, Budgeted) and method.shares]
    if not numbers:
        return {}
    if cache is not None:
        _make_folder(cache)
    probe, few = Probe(model, folder, feeds), FewRows()
    waiting: deque[tuple[int, float, float | None]] = deque()
    found = {}

    def tasks() -> Iterator[Any]:
        with Walk(model, folder, [plan[number][0] for number in numbers], feeds, seed=seed) as walk:
            for done, number in enumerate(numbers):
                if progress:
                    progress(done, len(numbers), f"{plan[number][0].name} (measured)")
                layers, energy, factor = _look(plan, number, walk, probe, few, seed)
                waiting.append((number, energy, factor))
                yield delayed(_tried)(layers, cache)

    # Ray's workers, like those of multiprocessing, give their results only together.
    together = not get_active_backend()[0].supports_return_generator
    parallel = Parallel(n_jobs=jobs, return_as="list" if together else "generator", pre_dispatch=2 * jobs)
    with _killed_workers():
        for offers in parallel(tasks()):
            number, energy, factor = waiting.popleft()
            site = plan[number][0]
            fitting = [at for at, offer in enumerate(offers) if offer.bytes + OVERHEAD < site.nbytes]
            if fitting:
                hull = lower_hull([offers[at].bytes for at in fitting], [offers[at].error for at in fitting])
                curve = Curve(hull.rates, hull.errors, np.array(fitting)[hull.choices])
                found[number] = Menu(int(np.prod(site.shape)), offers, curve, energy, factor)
    few.warn()
    return _with_factors(found)


class FewRows:
    """Layers that see fewer calibration rows than they have columns: what is not seen is made up for by damping."""

    def __init__(self) -> None:
        self._found: list[tuple[float, str, int, int]] = []

    def look(self, site: Site, moments: Moments | None) -> None:
        """Remember the layer if it is one of them."""
        if moments is not None and moments.rows < moments.cols:
            self._found.append((moments.rows / moments.cols, site.name, moments.rows, moments.cols))

    def warn(self) -> None:
        """One line for all of them."""
        if not self._found:
            return
        _, name, rows, cols = min(self._found)
        more = len(self._found) - 1
        _log.warning(
            "%s%s: %s%d calibration rows for %d columns, so inputs are known in part and damped; more data help",
            name,
            and_more(more),
            "at worst " if more else "",
            rows,
            cols,
        )


def and_more(layers: int) -> str:
    """What follows the name of a layer where a line is about more of them."""
    return f" and {layers} more layer{'s' * (layers > 1)}" if layers else ""


def _make_folder(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{cache}: cannot be the folder of a cache ({error.strerror}); choose another") from error


@contextmanager
def _killed_workers() -> Iterator[None]:
    """Say in our words that a process of joblib's was killed."""
    try:
        yield
    except BrokenProcessPool as error:
        raise VqonnxError(
            "a process that tried layers was killed, as happens when memory runs out; choose fewer jobs"
        ) from error


def _look(
    plan: Plan, number: int, walk: Walk, probe: Probe, few: FewRows, seed: int
) -> tuple[list[tuple[Budgeted, Layer]], float, float | None]:
    """The layer as each variant of its method sees it; the energy of its output; and how much that matters."""
    site, method = plan[number]
    assert isinstance(method, Budgeted)
    view = site.view(method.order)
    weight = view.matrix(site.read())
    if not np.isfinite(weight).all():
        return [], 0.0, None
    moments = walk.observe(site, method.order) if walk.can_observe(site) else None
    few.look(site, moments)
    layers = [(variant, layer_of(plan, number, variant, moments, seed)) for variant in method.variants]
    shaken = noisy(weight, seed + number, moments.sums if moments is not None and method.pairs else None)
    lost, energy = _energy(shaken - weight, moments), _energy(weight, moments)
    effect = probe.effect(site, site.view("ihw").matrix(view.tensor(shaken))) if lost > 0 else None
    return layers, energy, effect / lost if effect else None


def _energy(matrix: Matrix, moments: Moments | None) -> float:
    """Of the output with such weights, or of the weights, as offers count it."""
    return float(np.sum(matrix.astype(np.float64) ** 2)) if moments is None else moments.energy(matrix)


def _with_factors(menus: dict[int, Menu]) -> dict[int, Menu]:
    """A layer that could not be measured counts like the median one, for the same relative error."""
    known = [menu.factor * menu.energy for menu in menus.values() if menu.factor is not None]
    middle = float(np.median(known)) if known else 1.0
    return {
        number: menu
        if menu.factor is not None
        else Menu(menu.weights, menu.offers, menu.curve, menu.energy, middle / (menu.energy or 1.0))
        for number, menu in menus.items()
    }


def _tried(layers: Sequence[tuple[Budgeted, Layer]], cache: Path | None) -> list[Offer]:
    """What the variants of a method offer for a layer, from the cache where it is there."""
    offers: list[Offer] = []
    for method, layer in layers:
        kept = None if cache is None else cache / f"{_key(method, layer)}.json"
        made = None if kept is None else _load(kept)
        if made is None:
            try:
                made = list(method.offers(layer))
            except LeftAlone:
                made = []
            if kept is not None:
                _save(kept, made)
        offers += made
    return offers


def _key(method: Budgeted, layer: Layer) -> str:
    """Tells apart all that what a layer offers depends on."""
    digest = hashlib.sha256(repr((_KEPT_VERSION, method.id, method.options, layer.kernel, layer.groups)).encode())
    digest.update(repr((layer.first, layer.last, layer.seed, layer.weight.shape)).encode())
    digest.update(layer.weight.tobytes())
    if layer.moments is not None:
        digest.update(repr(layer.moments.rows).encode() + layer.moments.sums.tobytes())
        for blocks in layer.moments.blocks:
            for block in blocks:
                digest.update(block.tobytes())
    return digest.hexdigest()[:40]


def _load(path: Path) -> list[Offer] | None:
    """The offers that were kept; None where there are none, or the file cannot be used."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not all(np.isfinite(entry[2:]).all() for entry in entries):
            raise ValueError("it holds no offers")
        return [
            Offer(method_by_name(name, options), float(size), float(error)) for name, options, size, error in entries
        ]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OptionError) as error:
        _log.warning("%s: cannot be used (%s), so the layer is tried again", path, error)
        return None


def _save(path: Path, offers: Sequence[Offer]) -> None:
    """Write offers; the file appears whole or not at all."""
    entries = [(offer.method.id, offer.method.options, offer.bytes, offer.error) for offer in offers]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.part")
    draft.write_text(json.dumps(entries), encoding="utf-8")
    os.replace(draft, path)
