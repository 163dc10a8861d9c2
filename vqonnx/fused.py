"""The fused ops: a layer that reads its weight as codes, with what follows it, and their bodies as ONNX functions.

Depthwise convolutions have hardly any weights and keep them as they are, and a MaxPool has none; their ops are there
because between layers of other ops onnxruntime's own would change the order of values in memory, or be slow.

A body calls ``vqonnx.Decode`` and then the standard operators, so that onnxruntime without the library makes the same
graph of a fused file as of the original. ``docs/format.md`` gives inputs and attributes; `fusion.py` puts the ops in.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx.parser
from onnx import FunctionProto

from vqonnx.ops import DOMAIN, VERSION
from vqonnx.strips import row_lines

CODED = ("codes", "codebooks", "scales", "layout")  # the inputs of Decode, which follow X in every fused op
CLIP_OPSET = 11  # from which on the limits of Clip are inputs
LAYERS = ("Conv", "Gemm", "MatMul")  # operators with a weight
# Attributes of the layer that the body hands on; every node has them.
_HANDED_ON = {
    "Conv": {"strides": "ints", "pads": "ints", "dilations": "ints", "group": "int"},
    "Gemm": {"transB": "int"},
    "MatMul": {},
    "MaxPool": {"kernel_shape": "ints", "strides": "ints", "pads": "ints"},
}
# Attributes that a node may keep from its layer. They say nothing new, so the body does not read them.
_KEPT = {
    "Conv": ["kernel_shape: ints = []", 'auto_pad: string = "NOTSET"'],
    "Gemm": ["alpha: float = 1.0", "beta: float = 1.0", "transA: int = 0"],
    "MatMul": [],
    "MaxPool": [
        "dilations: ints = []",
        'auto_pad: string = "NOTSET"',
        "ceil_mode: int = 0",
        "storage_order: int = 0",
    ],
}
_FURTHER = {"Add": ["Z"], "Clip": ["min", "max"]}  # inputs of a follower besides those of the nodes before it
SILU = ("Sigmoid", "Mul")  # of the layer's output, and of both


@dataclass(frozen=True)
class FusedOp:
    """A layer and the operators after it that are computed with it.

    Attributes:
        layer: ``Conv``, ``Gemm`` or ``MatMul``; ``DepthwiseConv`` has its weight as it is, not as codes; ``MaxPool``
            has none.
        tail: What follows, first to last.
    """

    layer: str
    tail: tuple[str, ...] = ()

    @property
    def coded(self) -> bool:
        """Whether the weight is a Decode."""
        return self.layer in LAYERS

    @property
    def operator(self) -> str:
        """The standard operator that computes the layer."""
        return "Conv" if self.layer == _DEPTHWISE else self.layer

    @property
    def name(self) -> str:
        """Name of the op, such as ``ConvAddRelu`` or ``ConvSilu``."""
        return self.layer + ("Silu" if self.tail == SILU else "".join(self.tail))

    @property
    def inputs(self) -> list[str]:
        """Its inputs in order."""
        weight = CODED if self.coded else ("W",) if self.layer == _DEPTHWISE else ()
        bias = ["B"] if self.operator in ("Conv", "Gemm") else []
        return ["X", *weight, *bias, *(name for step in self.tail for name in _FURTHER.get(step, []))]

    def function(self, opset: int, *, strips: bool = False) -> FunctionProto:
        """The body for a model at ``opset``; with ``strips`` for codes in strips as well as by rows."""
        handed_on = _HANDED_ON[self.operator]
        declared = [*handed_on, *_KEPT[self.operator]]
        values = ", ".join(f"{name}: {kind} = @{name}" for name, kind in handed_on.items())
        weight = ["W"] if self.coded else []
        layer_inputs = ["X", *weight, *(name for name in ("W", "B") if name in self.inputs)]
        lines = [f"Y = {self.operator} {f'<{values}>' if values else ''} ({', '.join(layer_inputs)})"]
        if self.coded:
            # `coding` stays behind: onnx.reference looks for no defaults, and another coding would bring another body.
            declared = ["perm", *declared, 'coding: string = "fixed"', 'precision: string = "auto"']
            codes, *others = CODED
            rows = "rows" if strips else codes
            lines.insert(0, f"W = {DOMAIN}.Decode <perm: ints = @perm> ({', '.join([rows, *others])})")
            lines[:0] = row_lines(codes, rows, opset) if strips else []
        for step in self.tail:
            before = f"before_{step}"
            lines[-1] = lines[-1].replace("Y = ", f"{before} = ", 1)
            operands = ["before_Sigmoid", before] if step == "Mul" else [before, *_FURTHER.get(step, [])]
            lines.append(f"Y = {step} ({', '.join(operands)})")
        body = "\n".join(lines)
        return onnx.parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}]>\n'
            f"{self.name} <{', '.join(declared)}> ({', '.join(self.inputs)}) => (Y) {{\n{body}\n}}"
        )


_DEPTHWISE = "DepthwiseConv"
_ALL = (
    FusedOp("Conv"),
    FusedOp("Conv", ("Relu",)),
    FusedOp("Conv", ("Clip",)),
    FusedOp("Conv", ("Add",)),
    FusedOp("Conv", ("Add", "Relu")),
    FusedOp("Conv", SILU),
    FusedOp("Gemm"),
    FusedOp("Gemm", ("Relu",)),
    FusedOp("MatMul"),
    FusedOp(_DEPTHWISE),
    FusedOp(_DEPTHWISE, ("Relu",)),
    FusedOp(_DEPTHWISE, ("Clip",)),
    FusedOp(_DEPTHWISE, SILU),
    FusedOp("MaxPool"),
)
FUSED = {op.name: op for op in _ALL}
