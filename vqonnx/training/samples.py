"""Labelled data in memory, in random batches that depend on the number of the step alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import DataError, OptionError
from vqonnx.feeds import read_feeds
from vqonnx.runtime import read_inputs


class Samples:
    """Images with their classes, held in memory once. Called with a step, it gives a batch; every epoch sees each once.

    Attributes:
        count: Images.
    """

    def __init__(
        self, model: str | Path, data: Any, labels: NDArray[np.int64], *, batch: int = 128, seed: int = 0
    ) -> None:
        """Read the data.

        Args:
            model: Path of the model, whose inputs the data are for.
            data: As `read_feeds` takes them: a path of an ``.npz`` or a folder of them, or an iterable of dicts.
            labels: Right classes ``[N]``.
            batch: Images of a step.
            seed: Of the order.

        Raises:
            DataError: The data do not fit the model, or there are more or fewer labels than images.
            OptionError: ``batch`` is below 1.
        """
        if batch < 1:
            raise OptionError(f"batch is {batch}; choose 1 or more")
        feeds = list(read_feeds(data, read_inputs(model), batch=batch))
        self._arrays = {name: np.concatenate([np.asarray(feed[name]) for feed in feeds]) for name in feeds[0]}
        self.count = min(len(values) for values in self._arrays.values())
        if any(len(values) != self.count for values in self._arrays.values()) or len(labels) != self.count:
            raise DataError(f"{self.count} images and {len(labels)} labels; give one label for each image")
        self._labels = labels
        self._batch = min(batch, self.count)
        self._seed = seed

    def __call__(self, step: int) -> tuple[Mapping[str, NDArray[Any]], NDArray[np.int64]]:
        per_epoch = self.count // self._batch
        order = np.random.default_rng([self._seed, step // per_epoch]).permutation(self.count)
        chosen = order[step % per_epoch * self._batch :][: self._batch]
        return {name: values[chosen] for name, values in self._arrays.items()}, self._labels[chosen]
