"""Models of one fused node, and the same layer in standard operators with the dense weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vqonnx.form import Coded
from vqonnx.runtime import get_library_path
from vqonnx.strips import to_strips

F32 = np.float32
CONV = ("Conv", "ConvRelu", "ConvClip", "ConvAdd", "ConvAddRelu", "ConvSilu")


@dataclass(frozen=True)
class Layer:
    """A layer: the op, its form, how the matrix becomes the tensor, and the attributes of the standard operator."""

    op: str
    form: Coded
    sizes: tuple[int, ...]
    perm: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    bias: NDArray[np.float32] | None = None
    low: float = -1.0
    high: float = 1.5
    opset: int = 17
    strips: bool = False

    @property
    def weight(self) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.form.decode().reshape(self.sizes).transpose(self.perm))

    @property
    def outputs(self) -> int:
        if self.op.startswith("Conv"):
            return self.weight.shape[0]
        return self.weight.shape[0 if self.attributes.get("transB") else 1]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The constant inputs of the fused node, in order."""
        form = self.form
        scales = np.ones((1, 1), F32) if form.scales is None else form.scales
        layout = np.array([form.bits, form.cols, *self.sizes], np.int64)
        codes = to_strips(form.packed) if self.strips else form.packed
        arrays = {"codes": codes, "codebooks": form.codebooks, "scales": scales, "layout": layout}
        if self.op != "MatMul":
            arrays["B"] = np.zeros(self.outputs, F32) if self.bias is None else self.bias
        if self.op == "ConvClip":
            arrays |= {"min": np.array(self.low, F32), "max": np.array(self.high, F32)}
        return arrays

    def fused(self, **extra: Any) -> bytes:
        """A model of the fused node alone."""
        arrays = self.arrays()
        inputs = ["X", *arrays, *(["Z"] if "Add" in self.op else [])]
        attributes = {"perm": list(self.perm), **self.attributes, **extra}
        attributes = {name: value for name, value in attributes.items() if value is not None}
        node = helper.make_node(self.op, inputs, ["Y"], name="layer", domain="vqonnx", **attributes)
        return self._model([node], arrays)

    def plain(self) -> bytes:
        """The same in standard operators."""
        arrays = {name: array for name, array in self.arrays().items() if name in ("B", "min", "max")}
        arrays["W"] = self.weight
        operator = next(name for name in ("Conv", "Gemm", "MatMul") if self.op.startswith(name))
        inputs = ["X", "W"] + (["B"] if operator != "MatMul" else [])
        steps = self.op.removeprefix(operator)
        nodes = [helper.make_node(operator, inputs, ["T"], **self.attributes)]
        if steps.startswith("Add"):
            nodes.append(helper.make_node("Add", ["T", "Z"], ["S"]))
        if steps.endswith("Relu"):
            nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["R"]))
        if steps == "Clip":
            nodes.append(helper.make_node("Clip", ["T", "min", "max"], ["R"]))
        if steps == "Silu":
            nodes += [helper.make_node("Sigmoid", ["T"], ["S"]), helper.make_node("Mul", ["T", "S"], ["R"])]
        nodes[-1].output[0] = "Y"
        return self._model(nodes, arrays)

    def _model(self, nodes: list[onnx.NodeProto], arrays: dict[str, NDArray[Any]]) -> bytes:
        names = ["X", *(["Z"] if "Add" in self.op else [])]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
            [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("vqonnx", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def open_session(model: bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(get_library_path())
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def conv(
    form: Coded,
    shape: tuple[int, ...],
    *,
    op: str = "Conv",
    order: str = "ihw",
    group: int = 1,
    strides: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    bias: NDArray[np.float32] | None = None,
) -> Layer:
    """A convolution whose weight has this shape, in one of the orders of docs/format.md."""
    outputs, inputs, *kernel = shape
    axes = len(kernel)
    sizes, perm = {
        "ihw": (shape, tuple(range(axes + 2))),
        "hwi": ((outputs, *kernel, inputs), (0, axes + 1, *range(1, axes + 1))),
        "ohw": ((inputs, outputs, *kernel), (1, 0, *range(2, axes + 2))),
    }[order]
    attributes = {
        "strides": list(strides or (1,) * axes),
        "dilations": list(dilations or (1,) * axes),
        "pads": list(pads or (0,) * 2 * axes),
        "group": group,
    }
    return Layer(op, form, sizes, perm, attributes, bias)


def matrix(
    form: Coded, *, op: str = "MatMul", trans: int = 0, order: str = "oi", bias: NDArray[np.float32] | None = None
) -> Layer:
    """A Gemm or MatMul; in the order ``io`` the rows of the form are inputs."""
    rows, cols = form.shape
    perm = (0, 1) if (order == "oi") == bool(trans) else (1, 0)
    return Layer(op, form, (rows, cols), perm, {} if op == "MatMul" else {"transB": trans}, bias)
