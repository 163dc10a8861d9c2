"""A user's data as feeds: files, folders, dicts and data readers, checked against the model's inputs."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import DataError
from vqonnx.runtime import Feed, Input, spell

BATCH = 16  # rows that are run at once where the model leaves the number open
LABELS = "labels"  # the key of an .npz that holds the right classes and is no input

_log = logging.getLogger(__name__)


def read_feeds(source: Any, inputs: Sequence[Input], *, batch: int = BATCH) -> FeedSource:
    """The user's data as checked feeds, ready for `run`.

    Args:
        source: An ``.npz`` keyed by input name or a folder of them; a dict of arrays, or one array if the model has
            one input; an iterable of dicts, or onnxruntime's ``CalibrationDataReader``, each dict being one feed.
        inputs: What `read_inputs` says of the model.
        batch: Rows of a feed that is cut from larger arrays, where the model's first dimension is open.

    Raises:
        DataError: ``source`` is none of these. Reading it raises the same for data that do not fit.
    """
    return source if isinstance(source, FeedSource) else FeedSource(source, inputs, batch)


class FeedSource:
    """Checked feeds; iterating again starts again where the source allows it.

    Arrays of an ``.npz``, a dict or a bare array are cut along their first axis into ``batch`` rows, or into as many as
    the model asks for; then a remainder is dropped and logged. They are fed whole if they already have the model's
    shapes and not every input has rows. The arrays of one ``.npz`` are in memory at a time.

    Attributes:
        once: The source can be read only once; a second pass raises `DataError`.
    """

    def __init__(self, source: Any, inputs: Sequence[Input], batch: int = BATCH) -> None:
        self._source = source
        self._inputs = {entry.name: entry for entry in inputs}
        self._batch = batch
        self._started = False
        if isinstance(source, (str, PathLike)):
            self._files = _find_archives(Path(source))
        elif isinstance(source, np.ndarray) and len(self._inputs) != 1:
            raise DataError(f"one array for {len(self._inputs)} inputs; give a dict with {', '.join(self._inputs)}")
        elif not isinstance(source, (np.ndarray, Mapping, Iterable)) and not hasattr(source, "get_next"):
            raise DataError(
                f"data are a {type(source).__name__}; give an .npz, a folder of them, dicts or a CalibrationDataReader"
            )
        if hasattr(source, "get_next"):
            self.once = not hasattr(source, "rewind")
        else:
            self.once = isinstance(source, Iterator)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._started and self.once:
            raise DataError(
                f"the data ({type(self._source).__name__}) can be read only once and are needed again; "
                "give a list, an .npz, or a reader with rewind()"
            )
        if self._started and hasattr(self._source, "rewind"):
            self._source.rewind()
        self._started = True
        return self._checked()

    def _checked(self) -> Iterator[dict[str, Any]]:
        empty = True
        for where, feed in self._feeds():
            empty = False
            yield {name: _fit(entry, feed[name], where) for name, entry in self._inputs.items()}
        if empty:
            raise DataError(f"the data ({_describe(self._source)}) hold not a single batch")

    def _feeds(self) -> Iterator[tuple[str, Feed]]:
        source = self._source
        if isinstance(source, (str, PathLike)):
            for path in self._files:
                yield from self._cut(f"{path.name}: ", self._load(path))
        elif isinstance(source, np.ndarray):
            yield from self._cut("", {next(iter(self._inputs)): source})
        elif isinstance(source, Mapping):
            yield from self._cut("", source)
        else:
            feeds = iter(source.get_next, None) if hasattr(source, "get_next") else source
            for number, feed in enumerate(feeds):
                if not isinstance(feed, Mapping):
                    raise DataError(f"batch {number} is a {type(feed).__name__}; give a dict of input name to array")
                self._check_names(f"batch {number}: ", feed)
                yield f"batch {number}: ", feed

    def _check_names(self, where: str, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._inputs and name != LABELS]
        missing = [name for name in self._inputs if name not in names]
        if unknown or missing:
            has = f"has no {missing[0]!r}" if missing else f"has {unknown[0]!r}"
            raise DataError(f"{where}the data {has}; the model's inputs are {', '.join(self._inputs)}")

    def _load(self, path: Path) -> dict[str, NDArray[Any]]:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: is not an .npz; write it with numpy.savez")
        try:
            with np.load(path) as archive:
                self._check_names(f"{path.name}: ", archive.files)
                return {name: archive[name] for name in self._inputs}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: is not a readable .npz: {error}") from error

    def _cut(self, where: str, arrays: Feed) -> Iterator[tuple[str, Feed]]:
        """Slice arrays along their first axis into feeds, or give them whole."""
        self._check_names(where, arrays)
        # Scalars and sequences go with every batch.
        entries = [entry for entry in self._inputs.values() if entry.shape != () and entry.dtype is not None]
        cut = {entry.name: _as_array(entry, arrays[entry.name], where) for entry in entries}
        lengths = {name: array.shape[0] for name, array in cut.items() if array.ndim}
        fixed = {e.name: e.shape[0] for e in entries if e.shape and isinstance(e.shape[0], int)}
        whole = all(entry.fits(cut[entry.name].shape) for entry in entries)
        wrong_rank = any(e.shape is not None and cut[e.name].ndim != len(e.shape) for e in entries)
        if (whole and fixed) or not lengths or wrong_rank:
            yield f"{where}batch 0: ", arrays
            return
        for sizes, what in ((fixed, "rows in a batch"), (lengths, "rows")):
            one, other = min(sizes, key=sizes.__getitem__, default=""), max(sizes, key=sizes.__getitem__, default="")
            if sizes and sizes[one] != sizes[other]:
                raise DataError(
                    f"{where}input {one!r} has {sizes[one]} {what}, {other!r} has {sizes[other]}; "
                    "give an iterable of dicts, one a batch"
                )
        step = next(iter(fixed.values()), self._batch)
        rows = next(iter(lengths.values()))
        if fixed and rows % step:
            _log.warning("%s%d of %d rows dropped: they do not fill a batch of %d", where, rows % step, rows, step)
            rows -= rows % step
        for start in range(0, rows, step):
            part = {name: array[start : start + step] for name, array in cut.items() if array.ndim}
            yield f"{where}batch {start // step}: ", {**arrays, **part}


def _find_archives(path: Path) -> list[Path]:
    files = sorted(path.glob("*.npz"), key=lambda file: file.name) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: the folder has no .npz files")
    if not files[0].is_file():
        raise DataError(f"{path}: there is no such file or folder")
    if files[0].suffix != ".npz":
        raise DataError(
            f"{path}: data are read from .npz files, not from {path.suffix or 'files without an extension'}"
        )
    return files


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, (str, PathLike)) else type(source).__name__


def _fit(entry: Input, value: Any, where: str) -> Any:
    """``value`` as the model wants it: the same numbers, the model's type."""
    if entry.dtype is None:
        return value
    array = _as_array(entry, value, where)
    found = f"{spell(array.dtype)}{list(array.shape)}"
    if not entry.fits(array.shape):
        raise DataError(f"{where}input {entry.name!r} is {found}; the model wants {entry}")
    cast = _cast(array, entry.dtype)
    if cast is None:
        raise DataError(f"{where}input {entry.name!r} is {found}; the model wants {entry}; convert it without loss")
    if entry.dtype.kind == "f" and not np.isfinite(cast).all():
        raise DataError(f"{where}input {entry.name!r}, {found}, holds NaN or infinite values as {entry}")
    return cast


def _as_array(entry: Input, value: Any, where: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}input {entry.name!r} is not an array: {error}") from error


def _cast(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """None if the numbers would change, or floats would be made of integers."""
    if array.dtype == dtype:
        return array
    if array.dtype.kind == dtype.kind == "f" or (dtype.kind == "O" and array.dtype.kind == "U"):
        with np.errstate(over="ignore"):
            return array.astype(dtype)
    if array.dtype.kind in "iu" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not array.size or (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
            return array.astype(dtype)
    return None
