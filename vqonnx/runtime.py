"""Models in onnxruntime: sessions with or without the library, their inputs, and running them.

onnxruntime's own exceptions stop here: what leaves this file is a `ModelError` or a `DataError` of one line.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from vqonnx.errors import DataError, ModelError, OptionError, VqonnxError
from vqonnx.modelfile import load
from vqonnx.ops import DOMAIN
from vqonnx.shapes import UNKNOWN_SIZES

Model = str | Path | bytes
Feed = Mapping[str, Any]  # input name to array; a list or dict where the model wants a sequence or map


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
_MOST_THREADS = 1024  # onnxruntime makes as many as it is told, and hangs the machine


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
        return f"{spell(self.dtype)}[{dims}]"

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
        OptionError: ``threads`` is below 1 or absurdly large.
        VqonnxError: ``library`` is asked for and is missing.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Idle workers must not spin: they would take the processor from the next session, which is often run in turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise OptionError(f"threads is {threads}; choose 1 to {_MOST_THREADS}")
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
        raise ModelError(f"{model_name(model)}: {_explain_load(error)}") from error


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


def model_name(model: Model) -> str:
    """A name for messages."""
    return "model" if isinstance(model, bytes) else str(model)


def spell(dtype: np.dtype[Any] | None) -> str:
    """An element type in words for messages."""
    return "?" if dtype is None else "string" if dtype.kind == "O" else str(dtype)


def _parse(model: Model) -> onnx.ModelProto:
    if not isinstance(model, bytes):
        return load(model)
    parsed = onnx.ModelProto()
    try:
        parsed.ParseFromString(model)
    except DecodeError as error:
        raise ModelError("model: is not an ONNX model") from error
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
    return None if dim.dim_param in UNKNOWN_SIZES else str(dim.dim_param)


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
