"""The pass: look at the inputs of the layers, search the orders, apply them, and prove that the outputs stay."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from vqonnx import modelfile
from vqonnx.calibrate import Walk
from vqonnx.errors import OptionError, VerifyError
from vqonnx.graph import Site
from vqonnx.method import Budgeted, Method
from vqonnx.moments import Moments, snr_db
from vqonnx.permute.apply import apply
from vqonnx.permute.groups import find_groups
from vqonnx.permute.search import Blocks, Permuted, permutations, readers_of
from vqonnx.runtime import open_session, run

_WIDTH, _BITS = 4, 6  # where a method leaves them open
# The order of sums changes and nothing else: float32 keeps some 100 dB, float16 some 50.
_LEAST_SNR_DB, _LEAST_SNR_DB_HALF = 60.0, 30.0

_log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]


def permute(
    model: ModelProto,
    folder: Path,
    plan: Sequence[tuple[Site, Method]],
    feeds: Iterable[Mapping[str, Any]] | None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Permuted]:
    """Change ``model`` in place so that its layers are easier to code by the methods of the plan.

    Args:
        model: The model; sites that come from it stay valid.
        folder: Where it lies, for external data.
        plan: The layers, and how each will be coded.
        feeds: Calibration batches, read once; None for the plain error of weights.
        seed: Same seed, same bytes.
        progress: Called with (layers seen, layers in all, name of the next).

    Raises:
        OptionError: No layer is coded in blocks of weights.
        DataError: The calibration data do not fit the model.
    """
    blocks = blocks_of_plan(plan)
    moments = {} if feeds is None else _moments(model, folder, plan, blocks, feeds, seed, progress)
    found = permutations(model, folder, moments, blocks, seed=seed)
    for each in found:
        gains = ", ".join(f"{name} {gain:+.2f} dB" for name, gain in each.gains_db.items())
        _log.info("%d channels in another order: %s", each.group.size, gains)
        apply(model, each.group, each.order, folder)
    return found


def blocks_of_plan(plan: Sequence[tuple[Site, Method]]) -> dict[str, Blocks]:
    """The blocks of each layer, by name of the weight; those in subgraphs are left out.

    Raises:
        OptionError: There are none.
    """
    blocks = {}
    for site, method in plan:
        if not hasattr(method, "width") or method.view_order != method.order or site.scope.path:
            continue
        width = method.width or _WIDTH
        bits = _BITS if isinstance(method, Budgeted) else getattr(method, "bits", _BITS)  # theirs are an average
        if width > 1:
            blocks[site.name] = Blocks(int(width), int(bits), method.order)
    if plan and not blocks:
        raise OptionError(
            f"permute: method '{plan[0][1].id}' has no blocks of inputs; choose one with a width, such as pq, or best "
            "with codes of one length"
        )
    return blocks


def prove(original: Path, model: ModelProto, feeds: Sequence[Mapping[str, Any]]) -> None:
    """Run the first batch through the original and the permuted model.

    Raises:
        VerifyError: The outputs are not the same.
    """
    before = run(open_session(original), dict(feeds[0]))
    with tempfile.TemporaryDirectory(prefix="vqonnx-permute-") as folder:
        path = Path(folder) / "permuted.onnx"
        twin = ModelProto()
        twin.CopyFrom(model)
        modelfile.save(twin, path, original.parent)
        after = run(open_session(path), dict(feeds[0]))
    for name, values in before.items():
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
            continue
        kept = np.isfinite(values)
        if not np.array_equal(kept, np.isfinite(after[name])):
            raise VerifyError(f"permute: '{name}' changed where it is not finite; compress without --permute")
        signal = values[kept].astype(np.float64)
        snr = snr_db(float(np.sum(signal**2)), float(np.sum((signal - after[name][kept]) ** 2)))
        least = _LEAST_SNR_DB_HALF if values.dtype == np.float16 else _LEAST_SNR_DB
        if snr is not None and snr < least:
            raise VerifyError(
                f"permute: '{name}' changed by {snr:.1f} dB (at least {least:.0f} expected); compress without --permute"
            )


def _moments(
    model: ModelProto,
    folder: Path,
    plan: Sequence[tuple[Site, Method]],
    blocks: Mapping[str, Blocks],
    feeds: Iterable[Mapping[str, Any]],
    seed: int,
    progress: Progress | None,
) -> dict[str, Moments]:
    """Second moments of the inputs of the layers that an order of channels can help."""
    by_name = {site.name: site for site, _ in plan if not site.scope.path}
    wanted = {name for group in find_groups(model, folder).groups for name in readers_of(group, by_name, blocks)}
    sites = [site for site, _ in plan if not site.scope.path and site.name in wanted]
    found = {}
    if not sites:
        return {}
    with Walk(model, folder, sites, feeds, seed=seed) as walk:
        for number, site in enumerate(sites):
            if progress:
                progress(number, len(sites), f"{site.name} (observed)")
            if walk.can_observe(site):
                found[site.name] = walk.observe(site, blocks[site.name].order)
    return found
