"""Networks of whole numbers for the tests of permutations: any order of their sums is exact."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def whole(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Small whole numbers: sums of their products are exact in any order."""
    return rng.integers(-1, 2, shape).astype(np.float32)


class Builder:
    """A graph of whole numbers with a fixed input ``x [N, 3, 4, 4]``."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(whole(self.rng, *shape), name))
        return name

    def numbers(self, *values: int) -> str:
        """A constant of sizes or axes."""
        name = f"n{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def node(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        names = [f"t{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=f"n{len(self.nodes)}", **attributes))
        return names[0]

    def conv(self, x: str, inputs: int, outputs: int, size: int = 1, group: int = 1) -> str:
        weight, bias = self.weight(outputs, inputs // group, size, size), self.weight(outputs)
        return self.node("Conv", x, weight, bias, pads=[size // 2] * 4, group=group)

    def model(self, output: str, rank: int = 2) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 4])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * rank)],
            self.tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model


STEPS = (
    *("conv", "kernel", "depthwise", "grouped", "shared", "up", "relu", "prelu", "norm", "add", "concat", "scale"),
    *("pool", "split", "slice", "pad", "last", "squeeze", "reduce", "shuffle", "project"),
)


def random_net(seed: int, steps: list[str]) -> ModelProto:
    """Branches of activations ``[N, C, 4, 4]``, each step working on one or two of them; a classifier at the end."""
    b = Builder(seed)
    live = [(b.conv("x", 3, 6), 6), (b.conv("x", 3, 6, 3), 6)]
    shared = b.weight(6, 6, 1, 1), b.weight(6)
    for step in steps:
        x, c = live[b.rng.integers(len(live))]
        same = [name for name, count in live if count == c]
        if step in ("conv", "kernel"):
            count = int(b.rng.choice([4, 6, c]))
            live.append((b.conv(x, c, count, 3 if step == "kernel" else 1), count))
        elif step == "depthwise":
            times = int(b.rng.integers(1, 3))
            live.append((b.conv(x, c, c * times, 3, group=c), c * times))
        elif step == "grouped" and c % 2 == 0:
            live.append((b.conv(x, c, 4, group=2), 4))
        elif step == "shared" and c == 6:
            live.append((b.node("Conv", x, *shared), 6))
        elif step == "slice" and c > 2:
            first = int(b.rng.integers(0, c - 1))
            live.append((b.node("Slice", x, b.numbers(first), b.numbers(c), b.numbers(1)), c - first))
        elif step == "last":  # channels last, and back
            last = b.node("Add", b.node("Transpose", x, perm=[0, 2, 3, 1]), b.weight(c))
            live.append((b.node("Transpose", last, perm=[0, 3, 1, 2]), c))
        elif step == "project":  # channels last through a matrix
            last = b.node("MatMul", b.node("Transpose", x, perm=[0, 2, 3, 1]), b.weight(c, 5))
            live.append((b.node("Transpose", last, perm=[0, 3, 1, 2]), 5))
        elif step == "squeeze":  # squeeze and excite, with a sum
            flat = b.node("Squeeze", b.node("GlobalMaxPool", x), b.numbers(2, 3))
            back = b.node("Unsqueeze", b.node("Gemm", flat, b.weight(c, c), b.weight(c)), b.numbers(2, 3))
            live.append((b.node("Add", x, back), c))
        elif step == "reduce":
            flat = b.node("ReduceMax", x, axes=[2, 3], keepdims=0)
            live.append((b.node("Add", b.node("Reshape", flat, b.numbers(0, c, 1, 1)), x), c))
        elif step == "shuffle" and c % 2 == 0:
            cut = b.node("Transpose", b.node("Reshape", x, b.numbers(0, 2, c // 2, 4, 4)), perm=[0, 2, 1, 3, 4])
            live.append((b.node("Reshape", cut, b.numbers(0, c, 4, 4)), c))
        elif step == "relu":
            live.append((b.node(str(b.rng.choice(["Relu", "Identity", "Neg", "Abs"])), x), c))
        elif step == "prelu":
            live.append((b.node("PRelu", x, b.weight(c, 1, 1)), c))
        elif step == "norm":
            one = [b.weight(c) for _ in range(3)]
            b.tensors.append(numpy_helper.from_array(np.full(c, 0.25, np.float32), f"var{len(b.tensors)}"))
            live.append((b.node("BatchNormalization", x, *one, b.tensors[-1].name, epsilon=0.0), c))
        elif step == "add":
            live.append((b.node(str(b.rng.choice(["Add", "Sub", "Max"])), x, str(b.rng.choice(same))), c))
        elif step == "concat":
            y, d = live[b.rng.integers(len(live))]
            live.append((b.node("Concat", x, y, axis=1), c + d))
        elif step == "scale":
            live.append((b.node("Add", x, b.weight(*((1, c, 1, 1) if b.rng.integers(2) else (c, 4, 4)))), c))
        elif step == "pool":
            live.append((b.node("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4), c))
        elif step == "split" and c > 2:
            first = int(b.rng.integers(1, c))
            name = b.node("Split", x, b.numbers(first, c - first), outputs=2, axis=1)
            live += [(name, first), (name[:-1] + "1", c - first)]
        elif step == "pad":
            live.append((b.node("Pad", x, b.numbers(0, 2, 0, 0, 0, 1, 0, 0)), c + 3))
        elif step == "up":
            live.append((b.node("ConvTranspose", x, b.weight(c, 4, 1, 1), b.weight(4)), 4))
    x, c = live[-1]
    if b.rng.integers(2):
        flat, size = b.node("Flatten", x), 16 * c
    else:
        flat, size = b.node("Flatten", b.node("GlobalAveragePool", x)), c
    hidden = b.node("Gemm", flat, b.weight(8, size), b.weight(8), transB=1)
    return b.model(b.node("MatMul", b.node("Relu", hidden), b.weight(8, 5)))


def text(nodes: str, opset: int = 17, **shapes: tuple[int, ...]) -> ModelProto:
    """A model in ONNX's text form with weights of whole numbers."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}]>
        net (float[N, 3, 4, 4] x) => (y) {{ {nodes} }}"""
    )
    rng = np.random.default_rng(1)
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(whole(rng, *shape), name))
    return model
