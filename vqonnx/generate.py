"""Random inputs of the right shapes and types, for models that come without data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import DataError, OptionError
from vqonnx.runtime import Input, Model, model_name, open_session, read_inputs, run

_SIZES = (224, 64, 32, 16, 8, 4, 2, 1, 128, 256, 512, 1024)  # tried for dimensions that the model leaves open
_CHANNELS = (3, 1)
_MOST = 2**24  # values of one generated input; more is a bad guess, not a model's wish

_log = logging.getLogger(__name__)


def generate_feeds(
    model: Model,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    count: int = 2,
    seed: int = 0,
    library: bool = False,
) -> list[dict[str, Any]]:
    """Random inputs that the model runs on: floats in 0..1, integers and strings 0 or 1.

    Sizes that the model leaves open are guessed until onnxruntime runs: 1 for the batch, common sizes for the others.
    A symbolic name gets the same size everywhere. The first ``n`` feeds do not depend on ``count``.

    Args:
        model: Path or bytes of the model.
        shapes: Shapes by input name, where the guess would be wrong.
        count: Feeds to make.
        seed: The same seed gives the same values.
        library: The model needs vqonnx's custom-op library.

    Raises:
        ModelError: onnxruntime cannot load the model.
        OptionError: ``shapes`` names an unknown input or does not fit it.
        DataError: An input is no tensor, or the model runs on none of the guesses.
    """
    inputs = read_inputs(model)
    given = _check_shapes(inputs, shapes or {})
    for entry in inputs:
        if entry.dtype is None:
            raise DataError(
                f"input {entry.name!r} is a sequence, map, optional or a type that numpy lacks; give calibration data"
            )
        if entry.shape is None and entry.name not in given:
            raise DataError(f"input {entry.name!r} has no rank; give its shape (--input-shapes) or calibration data")
    session = open_session(model, library=library)
    complaint = "no shape was tried"
    for guess in _guess_shapes(inputs, given):
        tried = ", ".join(f"{name} {list(shape)}" for name, shape in guess.items())
        try:
            run(session, _random_feed(inputs, guess, seed, 0))
        except DataError as error:
            complaint = f"{tried}: {error}"
            _log.debug("%s: %s", model_name(model), complaint)
            continue
        _log.debug("%s: runs with %s", model_name(model), tried)
        return [_random_feed(inputs, guess, seed, number) for number in range(count)]
    raise DataError(
        f"{model_name(model)}: no generated input runs; give --input-shapes or calibration data (last try {complaint})"
    )


def _check_shapes(inputs: Sequence[Input], shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    known = {entry.name: entry for entry in inputs}
    for name, shape in shapes.items():
        if name not in known:
            raise OptionError(f"input shape for {name!r}: the model's inputs are {', '.join(known) or 'none'}")
        if not known[name].fits(shape) or any(size < 1 for size in shape):
            raise OptionError(f"input shape {list(shape)} does not fit input {name!r}, which is {known[name]}")
    return {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}


_Symbol = str | tuple[str, int]  # a symbolic size, or an input's name and axis where the size has no name


def _guess_shapes(
    inputs: Sequence[Input], given: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes for all inputs, the likeliest first."""
    wanted: dict[str, list[int | _Symbol]] = {}
    known: dict[_Symbol, int] = {}
    batch: set[_Symbol] = set()
    channels: set[_Symbol] = set()
    for entry in inputs:
        if entry.shape is None:
            wanted[entry.name] = list(given[entry.name])
            continue
        dims = wanted[entry.name] = [(entry.name, axis) if d is None else d for axis, d in enumerate(entry.shape)]
        for axis, dim in enumerate(dims):
            if isinstance(dim, int):
                continue
            if entry.name in given:
                known.setdefault(dim, given[entry.name][axis])
            if axis == 0 or (isinstance(dim, str) and "batch" in dim.lower()):
                batch.add(dim)
            if axis == 1 and len(dims) >= 4:
                channels.add(dim)
    seen = set()
    for rows, size, depth in product((1, None), _SIZES, (*_CHANNELS, None)):
        sizes = dict.fromkeys(channels, size if depth is None else depth)
        sizes |= dict.fromkeys(batch, size if rows is None else rows)
        sizes |= known
        guess = {
            name: given.get(name) or tuple(dim if isinstance(dim, int) else sizes.get(dim, size) for dim in dims)
            for name, dims in wanted.items()
        }
        key = tuple(guess.values())
        if key not in seen and all(prod(shape) <= _MOST for shape in key):
            seen.add(key)
            yield guess


def _random_feed(
    inputs: Sequence[Input], shapes: Mapping[str, tuple[int, ...]], seed: int, number: int
) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng((seed, number))
    feed = {}
    for entry in inputs:
        assert entry.dtype is not None
        floating = entry.dtype.kind == "f"
        values = rng.random(shapes[entry.name]) if floating else rng.integers(0, 2, shapes[entry.name])
        feed[entry.name] = (
            np.asarray(values, str).astype(object) if entry.dtype.kind == "O" else np.asarray(values, entry.dtype)
        )
    return feed
