"""Walk through the original and the compressed model side by side, looking at the same places of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from vqonnx.calibrate import Walk
from vqonnx.graph import Site
from vqonnx.moments import FULL_COLS, Cross, Moments, MomentsAccumulator
from vqonnx.view import Order


class DualWalk:
    """Like `Walk`, with what the original's layer sees beside it. Runs the model twice over the calibration data.

    Args:
        model: The original model; not changed.
        folder: Where it lies, for external data.
        sites: Those that will be observed, in order of their layers.
        feeds: Calibration batches; read once.
        seed: Seed for the choice of positions.

    Raises:
        DataError: As `Walk`.
    """

    def __init__(
        self,
        model: ModelProto,
        folder: str | Path,
        sites: Iterable[Site],
        feeds: Iterable[Mapping[str, Any]],
        *,
        seed: int = 0,
    ) -> None:
        sites = list(sites)
        with ExitStack() as undo:
            self._original = undo.enter_context(Walk(model, folder, sites, feeds, seed=seed))
            self._current = undo.enter_context(Walk(model, folder, sites, self._original.batches(), seed=seed))
            undo.pop_all()

    def can_observe(self, site: Site) -> bool:
        """Whether the layer's input can be seen."""
        return self._current.can_observe(site)

    def observe(self, site: Site, order: Order) -> tuple[Moments, Cross]:
        """Moments of what the layer sees in the compressed model, and how that goes with what it saw before.

        The two see the same positions: they draw them in the same order from the same seed.
        """
        accumulator: MomentsAccumulator | None = None
        sums = np.zeros(0)
        products: list[NDArray[np.float64]] = []
        for before, after in zip(self._original.rows(site, order), self._current.rows(site, order), strict=True):
            groups, _, cols = after.shape
            if accumulator is None:
                accumulator = MomentsAccumulator(groups, cols)
                sums = np.zeros((groups, cols))
                products = [np.zeros((cols, cols)) for _ in range(groups if cols <= FULL_COLS else 0)]
            accumulator.add(after)
            sums += before.sum(axis=1, dtype=np.float64)
            for product, x, xh in zip(products, before, after, strict=False):
                product += xh.astype(np.float64).T @ x.astype(np.float64)
        assert accumulator is not None
        return accumulator.result(), Cross(sums, tuple(products))

    def replace(self, site: Site, tensor: NDArray[np.float32]) -> None:
        """Use ``tensor`` as the weight of the site in the compressed model from here on."""
        self._current.replace(site, tensor)

    def set_constant(self, tensor: TensorProto) -> None:
        """Use another value for an initializer in the compressed model from here on."""
        self._current.set_constant(tensor)

    def __enter__(self) -> DualWalk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._original.__exit__(kind, error, trace)
        self._current.__exit__(kind, error, trace)
