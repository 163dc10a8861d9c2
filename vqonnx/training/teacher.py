"""The original network as teacher: images in random batches, each with what the network says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqonnx.errors import DataError
from vqonnx.feeds import read_feeds
from vqonnx.runtime import open_session, read_inputs, run, spell
from vqonnx.training.device import as_tensor

_CACHE_LIMIT = 2**29  # bytes of outputs that are kept; a teacher with larger ones is asked anew
_FEED_ROWS = 16

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch: inputs by name, and the teacher's outputs by name."""

    feeds: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class Teacher:
    """Unlabelled data, held in memory once, and the outputs of the original model on them, each computed once.

    Where the model leaves the number of rows open, a batch is any choice of rows. Where it fixes it, a batch is made
    of several whole feeds.

    Attributes:
        count: Images (rows of all feeds).
        checks: The first feeds, to run a written model on.
    """

    def __init__(self, model: Path, data: Any, *, device: str | torch.device = "cpu") -> None:
        """Read the data.

        Raises:
            ModelError: onnxruntime cannot load the model.
            DataError: The data do not fit it, or an output is not a tensor of floating point.
        """
        inputs = read_inputs(model)
        for entry in inputs:
            if entry.dtype is None or entry.dtype.kind == "O":
                raise DataError(
                    f"input '{entry.name}' is {spell(entry.dtype)}; only tensors of numbers can be trained on"
                )
        self._session = open_session(model, threads=torch.get_num_threads())
        self._device = device
        self._feeds: list[Arrays] = list(read_feeds(data, inputs, batch=_FEED_ROWS))
        self.checks: Sequence[Arrays] = self._feeds[:8]
        first = self._ask(self._feeds[0])
        for name, value in first.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
                raise DataError(f"output '{name}' is not a tensor of floating point; there is nothing to distil from")
        lengths = [{len(x) if np.ndim(x) else 0 for x in feed.values()} for feed in self._feeds]
        self._by_rows = (
            all(entry.shape is not None and entry.shape and not isinstance(entry.shape[0], int) for entry in inputs)
            and all(len(rows) == 1 for rows in lengths)
            and all(value.ndim and len(value) in lengths[0] for value in first.values())
        )
        rows = [max(numbers) if self._by_rows else 1 for numbers in lengths]
        self._place = np.array([(feed, row) for feed, many in enumerate(rows) for row in range(many)])
        self._rows_of_feed = 1 if self._by_rows else max(1, *lengths[0])
        self.count = len(self._place) * self._rows_of_feed
        each = sum(value.nbytes for value in first.values()) / rows[0]
        self._cache: dict[int, Arrays] | None = {} if each * len(self._place) <= _CACHE_LIMIT else None

    def lessons(self, step: int, batch: int, seed: Sequence[int]) -> list[Lesson]:
        """About ``batch`` images for a step; the same numbers give the same choice, every pass sees each image once.

        One lesson, or several where the model fixes the number of rows.
        """
        many = min(len(self._place), -(-batch // self._rows_of_feed))
        per_pass = len(self._place) // many
        order = np.random.default_rng([*seed, step // per_pass]).permutation(len(self._place))
        return self._lessons(order[step % per_pass * many :][:many])

    def sample(self, count: int) -> list[Lesson]:
        """The same images each time, about ``count`` of them, spread over all."""
        many = min(len(self._place), -(-count // self._rows_of_feed))
        return self._lessons(np.linspace(0, len(self._place) - 1, many).astype(np.int64))

    def _lessons(self, chosen: NDArray[np.int64]) -> list[Lesson]:
        if not self._by_rows:
            return [self._lesson(self._feeds[number], self._answer([int(number)])[0]) for number in chosen]
        feed = self._gather(chosen)
        answers = self._answer([int(number) for number in chosen])
        return [self._lesson(feed, {name: np.concatenate([a[name] for a in answers]) for name in answers[0]})]

    def _gather(self, chosen: Sequence[int] | NDArray[np.int64]) -> Arrays:
        places = self._place[np.asarray(chosen)]
        return {name: np.stack([self._feeds[feed][name][row] for feed, row in places]) for name in self._feeds[0]}

    def _answer(self, chosen: list[int]) -> list[Arrays]:
        """The teacher's outputs, each with one row or those of a whole feed."""
        cache = {} if self._cache is None else self._cache
        missing = [number for number in chosen if number not in cache]
        if missing and self._by_rows:
            made = self._ask(self._gather(missing))
            cache |= {number: {k: v[i : i + 1] for k, v in made.items()} for i, number in enumerate(missing)}
        elif missing:
            cache |= {number: self._ask(self._feeds[number]) for number in missing}
        return [cache[number] for number in chosen]

    def _ask(self, feed: Mapping[str, Any]) -> Arrays:
        return run(self._session, feed)

    def _lesson(self, feed: Arrays, outputs: Arrays) -> Lesson:
        return Lesson(
            {name: as_tensor(value, self._device) for name, value in feed.items()},
            {name: torch.from_numpy(np.ascontiguousarray(value)).to(self._device) for name, value in outputs.items()},
        )
