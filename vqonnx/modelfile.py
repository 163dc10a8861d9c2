"""Model files: read one without its big tensors, write one whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    external_data_helper,
    helper,
    numpy_helper,
)

from vqonnx.errors import InputError, ModelError

# Protobuf cannot serialise 2 GiB; some room is left for the rest of the graph.
SINGLE_FILE_LIMIT = 2**31 - 2**24
_INLINE_LIMIT = 1024  # tensors up to this size stay in the graph when the others go to the data file


def load(path: str | Path) -> ModelProto:
    """Read a model; tensors in external data files stay there (see `to_array`).

    Raises:
        ModelError: The file is missing, empty, cut off, or not an ONNX model.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give the path of an .onnx file") from error
    if not data:
        raise ModelError(f"{path}: the file is empty (0 bytes); export the model again")
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(
            f"{path}: not an ONNX model, or cut off ({len(data)} bytes); export or copy it again"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path}: not an ONNX model ({len(data)} bytes without a graph or opset); give an .onnx file")
    for tensor in external_tensors(model):
        data_file = path.parent / _location(tensor)
        if not data_file.is_file():
            raise ModelError(f"{path}: tensor '{tensor.name}' is in '{_location(tensor)}', which is missing beside it")
    return model


def to_array(tensor: TensorProto, folder: Path) -> NDArray[Any]:
    """The values of a tensor, bfloat16 as float32; ``folder`` is where the model lies, for external data.

    Raises:
        ModelError: The external data are not there or too short.
    """
    tensor = inlined(tensor, folder)  # onnx 1.17 leaves what it reads in the tensor that it is given
    if tensor.data_type == TensorProto.BFLOAT16 and tensor.HasField("raw_data"):  # nor does it read these
        upper = np.frombuffer(tensor.raw_data, "<u2").astype(np.uint32)
        return (upper << 16).view(np.float32).reshape(tuple(tensor.dims))
    try:
        return numpy_helper.to_array(tensor)
    except ValueError as error:
        raise _damaged(tensor, error) from error


def inlined(tensor: TensorProto, folder: Path) -> TensorProto:
    """The tensor itself, or a copy with its external data brought in.

    Raises:
        ModelError: The external data are not there or too short.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    copy = TensorProto()
    copy.CopyFrom(tensor)
    _bring_in(copy, folder)
    return copy


def external_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model that is stored in another file."""
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor


def save(model: ModelProto, path: str | Path, folder: str | Path) -> None:
    """Write the model to ``path``, or to it and ``<path>.data`` above 2 GB. Not atomic; see `whole_or_nothing`.

    Tensors that are still external to ``folder`` are brought in, one at a time. ``model`` is changed accordingly.

    Raises:
        InputError: The file cannot be written.
        ModelError: External data are not there or too short.
    """
    path, folder = Path(path), Path(folder)
    whole = bring_in(model, folder)
    try:
        if not whole:
            _write_data_file(model, path.with_name(path.name + ".data"), folder)
        with path.open("wb") as file:
            file.write(model.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another folder"
        ) from error


def external_bytes(model: ModelProto, folder: Path) -> int:
    """Bytes of the tensors that the model still has in other files."""
    return sum(_external_length(tensor, folder) for tensor in external_tensors(model))


def bring_in(model: ModelProto, folder: Path) -> bool:
    """Read all external data into the model, unless it then is too large for one file; gives whether it is not.

    Raises:
        ModelError: External data are not there or too short.
    """
    if model.ByteSize() + external_bytes(model, folder) > SINGLE_FILE_LIMIT:
        return False
    for tensor in external_tensors(model):
        _bring_in(tensor, folder)
    return True


def check_output(path: str | Path, source: str | Path, *others: str | Path | None) -> None:
    """Refuse an output path that cannot work, before the work begins.

    Args:
        path: Where to.
        source: The model that is read.
        others: What else is read, such as calibration data.

    Raises:
        InputError: It is the input, or a file with the input's external data; or a folder, in a missing folder, or in
            one that cannot be written.
    """
    path, source = Path(path), Path(source)
    if _same_file(path, source):
        raise InputError(f"{path}: is the input itself, which is never changed; choose another output path")
    if any(other is not None and _same_file(path, Path(other)) for other in others):
        raise InputError(f"{path}: is read as input, which is never changed; choose another output path")
    _refuse_data_files([path, path.with_name(path.name + ".data")], source)  # where the weights of a large output go
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is a device or pipe, which would be replaced; give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder '{path.parent}' does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: the folder '{path.parent}' cannot be written; choose another one")


def _same_file(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _refuse_data_files(written: Sequence[Path], source: Path) -> None:
    there = [path for path in written if path.is_file()]
    try:
        files = _data_files(load(source), source.parent) if there else set()
    except (InputError, ModelError):  # said when it is read; or it is no model, such as a checkpoint
        return
    for path in there:
        if any(_same_file(path, file) for file in files):
            raise InputError(f"{path}: holds weights of the input, which is never changed; choose another output path")


def _data_files(model: ModelProto, folder: Path) -> set[Path]:
    """The files that hold the model's external data."""
    return {folder / _location(tensor) for tensor in external_tensors(model)}


@contextmanager
def whole_or_nothing(path: str | Path) -> Iterator[Path]:
    """A path in a new hidden folder beside ``path``; what lies there takes the final name when the block ends well.

    Nothing is ever left under the final name otherwise, and the folder is removed in either case. A kill that cannot
    be caught leaves at most that hidden folder, never a partial output.

    Raises:
        InputError: The folder cannot be written.
    """
    path = Path(path)
    try:
        temporary = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    with temporary as name:
        draft = Path(name) / path.name
        yield draft
        data = draft.with_name(draft.name + ".data")
        final_data = path.with_name(data.name)
        moves = [(data, final_data)] if data.exists() else []
        try:
            for source, target in [*moves, (draft, path)]:
                os.replace(source, target)
        except OSError as error:
            if moves and not data.exists():
                final_data.unlink()
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


def file_bytes(path: str | Path) -> int:
    """Bytes on disk of a model: the file and the external data files that it names."""
    path = Path(path)
    files = {path} | _data_files(load(path), path.parent)
    return sum(file.stat().st_size for file in files)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor in a graph, those in its nodes' attributes and subgraphs included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from graph_tensors(graph)


def _location(tensor: TensorProto) -> str:
    return str(external_data_helper.ExternalDataInfo(tensor).location)


def _external_length(tensor: TensorProto, folder: Path) -> int:
    info = external_data_helper.ExternalDataInfo(tensor)
    return int(info.length or (folder / info.location).stat().st_size)


def _bring_in(tensor: TensorProto, folder: Path) -> None:
    """Read the external data of a tensor into it."""
    length = int(external_data_helper.ExternalDataInfo(tensor).length or 0)  # 0: up to the end of the file
    try:
        external_data_helper.load_external_data_for_tensor(tensor, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise _damaged(tensor, error) from error
    if length and len(tensor.raw_data) != length:
        raise _damaged(tensor, f"{len(tensor.raw_data)} bytes of external data instead of {length}")
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def _damaged(tensor: TensorProto, what: object) -> ModelError:
    return ModelError(f"tensor '{tensor.name}': {what}; the file or its external data are damaged")


def _write_data_file(model: ModelProto, path: Path, folder: Path) -> None:
    with path.open("wb") as file:
        for tensor in _tensors(model):
            if tensor.data_location == TensorProto.EXTERNAL:
                _bring_in(tensor, folder)
            if not tensor.HasField("raw_data") or len(tensor.raw_data) <= _INLINE_LIMIT:
                continue
            file.seek(-(-file.tell() // 4096) * 4096)  # page aligned, so that runtimes can map the file
            offset, length = file.tell(), len(tensor.raw_data)
            file.write(tensor.raw_data)
            external_data_helper.set_external_data(tensor, path.name, offset, length)
            tensor.ClearField("raw_data")
        file.flush()
        os.fsync(file.fileno())


def make_tensor(values: NDArray[np.float32], elem_type: int, name: str) -> TensorProto:
    """A tensor of an ONNX element type from float32 values; bfloat16 keeps the upper half, rounded to even."""
    if elem_type != TensorProto.BFLOAT16:
        return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(elem_type)), name)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    tensor = TensorProto(name=name, data_type=elem_type, dims=values.shape)
    tensor.raw_data = rounded.astype("<u2").tobytes()
    return tensor


def set_nodes(proto: GraphProto | FunctionProto, nodes: Iterable[NodeProto]) -> None:
    """Make ``nodes``, some of which may be those of ``proto`` already, its nodes."""
    kept = []
    for node in nodes:  # copied first, as emptying the list may take the originals with it
        copy = NodeProto()
        copy.CopyFrom(node)
        kept.append(copy)
    del proto.node[:]
    proto.node.extend(kept)


def remove_entries(entries: Any, unwanted: Callable[[Any], bool]) -> None:
    """Remove from a repeated field of a message, in place: the others are not copied."""
    for index in reversed(range(len(entries))):
        if unwanted(entries[index]):
            del entries[index]
