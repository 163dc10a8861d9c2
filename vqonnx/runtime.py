"""Models in onnxruntime: sessions with or without the library, generated inputs, and reading a user's data.

onnxruntime's own exceptions stop here: what leaves this file is a `ModelError` or a `DataError` of one line.
"""

from __future__ import annotations

import logging
import re
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from vqonnx.errors import DataError, ModelError, OptionError, VqonnxError
from vqonnx.ops import DOMAIN

Model = str | Path | bytes
Feed = Mapping[str, Any]  # input name to array; a list or dict where the model wants a sequence or map

BATCH = 16  # rows that are run at once where the model leaves the number open
LABELS = "labels"  # the key of an .npz that holds the right classes and is no input

_log = logging.getLogger(__name__)
_LIBRARY = {"win32": "vqonnx_ops.dll", "darwin": "libvqonnx_ops.dylib"}.get(sys.platform, "libvqonnx_ops.so")
# onnxruntime's exceptions have no common root, and its Python half raises the last two.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
)
_DTYPES: dict[int, np.dtype[Any]] = {
    getattr(onnx.TensorProto, name): np.dtype(dtype)
    for name, dtype in {
        **{name: name.lower() for name in ("FLOAT16", "INT8", "INT16", "INT32", "INT64")},
        **{name: name.lower() for name in ("UINT8", "UINT16", "UINT32", "UINT64")},
        **{"FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool", "STRING": "object"},
    }.items()
}
_SIZES = (224, 64, 32, 16, 8, 4, 2, 1, 128, 256, 512, 1024)  # tried for dimensions that the model leaves open
_CHANNELS = (3, 1)
_MOST = 2**24  # values of one generated input; more is a bad guess, not a model's wish
_WORDS_FOR_NONE = {"", "?", "None", "-1"}  # exporters' spellings of "unknown"; two of them need not be the same size


# Sessions


@dataclass(frozen=True)
class Input:
    """What a model wants to be fed.

    Attributes:
        name: Its name in the graph.
        dtype: The element type, ``object`` for strings; None for sequences, maps and types that numpy lacks.
        shape: Sizes, names of symbolic sizes, and None where neither is known; None if even the rank is unknown.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{_spell(self.dtype)}[{dims}]"

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an array of ``shape`` has the rank and the fixed sizes of this input."""
        if self.shape is None:
            return True
        pairs = zip(self.shape, shape, strict=False)
        return len(shape) == len(self.shape) and all(not isinstance(want, int) or want == got for want, got in pairs)


def get_library_path() -> str:
    """Path of the custom-op library, for ``SessionOptions.register_custom_ops_library``.

    Raises:
        VqonnxError: The library is not in the installed package.
    """
    # An editable install spreads the package over the source tree and site-packages.
    paths = [Path(folder, "lib", _LIBRARY) for folder in sys.modules[__package__].__path__]
    for path in paths:
        if path.is_file():
            return str(path)
    raise VqonnxError(f"{paths[0]}: the library is missing; reinstall vqonnx where CMake finds a C++20 compiler")


def read_inputs(model: Model) -> tuple[Input, ...]:
    """The inputs that must be fed, in the graph's order; initializers that old models list as inputs are left out.

    Raises:
        ModelError: The file is missing or is not an ONNX model.
    """
    graph = _parse(model).graph
    stored = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return tuple(_read_input(value) for value in graph.input if value.name not in stored)


def open_session(
    model: Model,
    *,
    library: bool = False,
    threads: int | None = None,
    optimise: bool = True,
    optimised_path: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Load a model on the CPU.

    Args:
        model: Path or bytes of the model.
        library: Register vqonnx's custom-op library, so that weights stay compressed in memory.
        threads: Threads of one operator; onnxruntime decides if None.
        optimise: False keeps the graph as it is written.
        optimised_path: Where onnxruntime shall write the graph that it runs.

    Raises:
        ModelError: onnxruntime cannot load the model.
        VqonnxError: ``library`` is asked for and is missing.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Idle workers must not spin: they would take the processor from the next session, which is often run in turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised_path is not None:
        options.optimized_model_filepath = str(optimised_path)
    path = get_library_path() if library else None
    source = model if isinstance(model, bytes) else str(model)
    try:
        if path is not None:
            options.register_custom_ops_library(path)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except _ORT_ERRORS as error:
        raise ModelError(f"{_name(model)}: {_explain_load(error)}") from error


def run(session: onnxruntime.InferenceSession, feed: Feed) -> dict[str, Any]:
    """All outputs by name.

    Raises:
        DataError: onnxruntime does not run on ``feed``.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # the exception says the same
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feed), options), strict=True))
    except _ORT_ERRORS as error:
        raise DataError(f"onnxruntime does not run on this input: {_one_line(error)}") from error


def _name(model: Model) -> str:
    return "model" if isinstance(model, bytes) else str(model)


def _spell(dtype: np.dtype[Any] | None) -> str:
    return "?" if dtype is None else "string" if dtype.kind == "O" else str(dtype)


def _parse(model: Model) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    try:
        if isinstance(model, bytes):
            parsed = onnx.load_model_from_string(model)
        else:
            parsed = onnx.load_model(model, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{_name(model)}: cannot be read: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{_name(model)}: is not an ONNX model") from error
    if not parsed.graph.node:
        raise ModelError(f"{_name(model)}: is not an ONNX model, or has no nodes")
    return parsed


def _read_input(value: onnx.ValueInfoProto) -> Input:
    if value.type.WhichOneof("value") != "tensor_type":
        return Input(value.name, None, None)
    tensor = value.type.tensor_type
    shape = tuple(_read_dim(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return Input(value.name, _DTYPES.get(tensor.elem_type), shape)


def _read_dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.dim_value > 0:  # 0 and -1 are exporters' ways to say that they do not know
        return int(dim.dim_value)
    return None if dim.dim_param in _WORDS_FOR_NONE else str(dim.dim_param)


def _explain_load(error: Exception) -> str:
    text = _one_line(error)
    unknown = re.search(r"([\w.]*):(\w+)\(-?\d+\) is not a registered function/op", text)
    if unknown is None:
        return f"onnxruntime does not load it: {text}"
    domain, operator = unknown.groups()
    hint = "open it with the vqonnx library" if domain == DOMAIN else "its custom-op library is not known here"
    return f"the model needs operators of domain {domain} ({operator}), which onnxruntime does not have; {hint}"


def _one_line(error: Exception) -> str:
    """onnxruntime's complaint without error numbers, C++ signatures and line breaks."""
    text = " ".join(str(error).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"Load model from .*? failed:\s*", "", text)
    text = re.sub(
        r"Non-zero status code returned while running (\S+) node\. Name:('.*?') Status Message: ", r"\1 \2: ", text
    )
    arguments = r"\((?:[^()]|\([^()]*\))*\)"
    text = re.sub(rf"\S+\.(?:cc|h|cpp):\d+ (?:[^()]*?{arguments}(?: const)?(?: \[with [^\]]*\])? )?", "", text)
    return text if len(text) <= 300 else text[:297] + "..."


# Generated inputs


def generate_feeds(
    model: Model, *, shapes: Mapping[str, Sequence[int]] | None = None, count: int = 2, seed: int = 0
) -> list[dict[str, Any]]:
    """Random inputs that the model runs on: floats in 0..1, integers and strings 0 or 1.

    Sizes that the model leaves open are guessed until onnxruntime runs: 1 for the batch, common sizes for the others.
    A symbolic name gets the same size everywhere. The first ``n`` feeds do not depend on ``count``.

    Args:
        model: Path or bytes of the model.
        shapes: Shapes by input name, where the guess would be wrong.
        count: Feeds to make.
        seed: The same seed gives the same values.

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
    session = open_session(model)
    complaint = "no shape was tried"
    for guess in _guess_shapes(inputs, given):
        tried = ", ".join(f"{name} {list(shape)}" for name, shape in guess.items())
        try:
            run(session, _random_feed(inputs, guess, seed, 0))
        except DataError as error:
            complaint = f"{tried}: {error}"
            _log.debug("%s: %s", _name(model), complaint)
            continue
        _log.debug("%s: runs with %s", _name(model), tried)
        return [_random_feed(inputs, guess, seed, number) for number in range(count)]
    raise DataError(
        f"{_name(model)}: no generated input runs; give --input-shapes or calibration data (last try {complaint})"
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


# Reading data


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
    shapes and not every input has rows. One ``.npz`` member is held in memory at a time for each input.

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
        entries = [e for e in self._inputs.values() if e.shape and e.dtype is not None]  # scalars go with every batch
        cut = {entry.name: np.asarray(arrays[entry.name]) for entry in entries}
        lengths = {name: array.shape[0] for name, array in cut.items() if array.ndim}
        fixed = {e.name: e.shape[0] for e in entries if e.shape and isinstance(e.shape[0], int)}
        whole = all(entry.fits(cut[entry.name].shape) for entry in entries)
        wrong_rank = any(cut[entry.name].ndim != len(entry.shape or ()) for entry in entries)
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
            part = {name: array[start : start + step] for name, array in cut.items()}
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
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}input {entry.name!r} is not an array: {error}") from error
    found = f"{_spell(array.dtype)}{list(array.shape)}"
    if not entry.fits(array.shape):
        raise DataError(f"{where}input {entry.name!r} is {found}; the model wants {entry}")
    cast = _cast(array, entry.dtype)
    if cast is None:
        raise DataError(f"{where}input {entry.name!r} is {found}; the model wants {entry}; convert it without loss")
    if entry.dtype.kind == "f" and not np.isfinite(cast).all():
        raise DataError(f"{where}input {entry.name!r}, {found}, holds NaN or infinite values as {entry}")
    return cast


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
