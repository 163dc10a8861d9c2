"""Train the two networks of the compression literature on MNIST: LeNet-300-100 and LeNet-5.

    python benchmarks/lenet.py [--folder build/lenet]

LeNet-5 is the variant that came with Caffe and that papers on compression use: two 5x5 convolutions of 20 and 50
channels without a non-linearity of their own, each followed by max pooling, then 500 hidden units; 431,080 parameters.
LeNet-300-100 has 266,610. Trains on all 60,000 training images, unaltered, and uses the test images once, to print the
accuracy. Input `input` is float32 ``[N, 1, 28, 28]`` from 0 to 1 (`common.mnist_feeds`), output `output` the 10 logits.
Needs PyTorch; runs on one thread, so that the same versions on the same processor give the same weights.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from common import mnist_feeds, mnist_labels, setting
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

FOLDER = Path("build/lenet")
SEED = 0
BATCH = 100
CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A network as a list of layers: the one description that both PyTorch and ONNX get.

    Attributes:
        name: Name of the file.
        layers: ``(name, inputs, outputs, kernel)``; kernel 0 is a dense layer, which has Relu behind it unless it is
            the last; another one a convolution, which has max pooling behind it.
        epochs: Times that it sees the training images.
        rate: Largest learning rate.
    """

    name: str
    layers: tuple[tuple[str, int, int, int], ...]
    epochs: int
    rate: float

    @property
    def dense(self) -> tuple[str, ...]:
        """Names of the dense layers' weights, first to last."""
        return tuple(f"{name}.weight" for name, _, _, kernel in self.layers if not kernel)

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.onnx"


LENET_300_100 = Network("lenet300", (("fc1", 784, 300, 0), ("fc2", 300, 100, 0), ("fc3", 100, CLASSES, 0)), 20, 1e-3)
LENET_5 = Network(
    "lenet5", (("conv1", 1, 20, 5), ("conv2", 20, 50, 5), ("fc1", 800, 500, 0), ("fc2", 500, CLASSES, 0)), 8, 2e-3
)
NETWORKS = (LENET_300_100, LENET_5)


class Net(nn.Module):
    """A `Network` in PyTorch."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        for name, inputs, outputs, kernel in network.layers:
            self.add_module(name, nn.Conv2d(inputs, outputs, kernel) if kernel else nn.Linear(inputs, outputs))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for name, _, _, kernel in self.network.layers:
            if kernel:
                value = nn.functional.max_pool2d(self.get_submodule(name)(value), 2)
            else:
                value = self.get_submodule(name)(value.flatten(1))
                value = value if name == self.network.layers[-1][0] else torch.relu(value)
        return value


def fit(network: Network, images: np.ndarray, labels: np.ndarray, epochs: int | None = None) -> Net:
    """Train on ``[count, 1, 28, 28]`` from a fixed seed; the images come in a new order each epoch."""
    epochs = epochs or network.epochs
    rng = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    net = Net(network)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=network.rate, weight_decay=0.02)
    steps = epochs * -(-len(y) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=network.rate, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.from_numpy(rng.permutation(len(y))).split(BATCH):
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def export(net: Net, path: Path) -> None:
    """Write the network as ONNX."""
    nodes: list[NodeProto] = []
    value = "input"

    def node(op: str, name: str, inputs: list[str], **attributes: Any) -> str:
        last = name == net.network.layers[-1][0]
        nodes.append(helper.make_node(op, inputs, ["output" if last else f"{name}.out"], name=name, **attributes))
        return nodes[-1].output[0]

    flat = False
    for name, _, _, kernel in net.network.layers:
        if kernel:
            value = node("Conv", name, [value, f"{name}.weight", f"{name}.bias"], kernel_shape=[kernel] * 2)
            value = node("MaxPool", f"{name}.pool", [value], kernel_shape=[2, 2], strides=[2, 2])
            continue
        if not flat:
            value, flat = node("Flatten", "flatten", [value]), True
        value = node("Gemm", name, [value, f"{name}.weight", f"{name}.bias"], transB=1)
        if value != "output":
            value = node("Relu", f"{name}.relu", [value])
    graph = helper.make_graph(
        nodes,
        net.network.name,
        inputs=[helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 28, 28])],
        outputs=[helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", CLASSES])],
        initializer=[numpy_helper.from_array(value.numpy(), name) for name, value in net.state_dict().items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="vqonnx")
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def train(network: Network, folder: Path) -> Path:
    """Train on all training images and write the file; gives its path."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    images = mnist_feeds("train", 60_000, batch=60_000)[0]["input"]
    export(fit(network, images, mnist_labels("train")), network.path(folder))
    return network.path(folder)


def top1(path: Path) -> float:
    """Percent of the 10,000 test images that onnxruntime gets right with the model."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = np.concatenate([session.run(["output"], feed)[0] for feed in mnist_feeds("test", 10_000)])
    return 100 * float(np.mean(logits.argmax(axis=1) == mnist_labels()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the ONNX files go")
    folder = parser.parse_args().folder
    for network in NETWORKS:
        start = time.perf_counter()
        path = train(network, folder)
        seconds = time.perf_counter() - start
        print(
            f"{path.name}: top-1 {top1(path):.2f} %, {path.stat().st_size:,} bytes, {network.epochs} epochs, "
            f"{seconds:.0f} s",
            flush=True,
        )
    print(f"torch {torch.__version__}; {setting()}")


if __name__ == "__main__":
    main()
