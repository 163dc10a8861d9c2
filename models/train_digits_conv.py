"""Train the convolutional network `digits_conv.onnx`.

It is small, but holds what larger networks are made of: 3x3, strided, grouped, depthwise and 1x1 convolutions, residual
additions, global average pooling and a fully connected layer. Needs PyTorch, which nothing else in this folder does.
"""

from __future__ import annotations

from dataclasses import dataclass

import digits
import numpy as np
import torch
from numpy.typing import NDArray
from onnx import NodeProto, helper
from torch import nn

MODEL_FILE = digits.FOLDER / "digits_conv.onnx"
SEED = 0
EPOCHS = 80
BATCH = 50


@dataclass(frozen=True)
class Conv:
    """A convolution of the network, followed by batch normalisation and, after the addition if there is one, Relu.

    Attributes:
        name: Name of the layer in the exported model.
        cin: Channels in.
        cout: Channels out.
        kernel: Side of the square kernel; the padding keeps the image size.
        stride: Step between outputs.
        groups: Groups of channels that do not see each other.
        add: Name of an earlier layer whose output is added; empty for none.
    """

    name: str
    cin: int
    cout: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    add: str = ""


CONVS = (
    Conv("conv1", 1, 32),
    Conv("conv2", 32, 64),
    Conv("conv3", 64, 64),
    Conv("conv4", 64, 64, groups=2, add="conv2"),
    Conv("conv5", 64, 128, stride=2),
    Conv("conv6", 128, 128, groups=128),
    Conv("conv7", 128, 128, kernel=1),
    Conv("conv8", 128, 128, add="conv5"),
    Conv("conv9", 128, 192, kernel=1),
)


class Net(nn.Module):
    """The layers of `CONVS`, the mean over the image, and a fully connected layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict(
            {
                c.name: nn.Conv2d(c.cin, c.cout, c.kernel, c.stride, c.kernel // 2, groups=c.groups, bias=False)
                for c in CONVS
            }
        )
        self.norms = nn.ModuleDict({c.name: nn.BatchNorm2d(c.cout) for c in CONVS})
        self.fc = nn.Linear(CONVS[-1].cout, digits.CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        outputs = {}
        value = image
        for c in CONVS:
            value = self.norms[c.name](self.convs[c.name](value))
            if c.add:
                value = value + outputs[c.add]
            value = outputs[c.name] = torch.relu(value)
        return self.fc(value.mean(dim=(2, 3)))


def fit(train: digits.Digits) -> Net:
    rng = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    net = Net()
    steps = EPOCHS * (len(train.labels) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        images = torch.from_numpy(digits.augment(train.image, rng))
        labels = torch.from_numpy(train.labels)
        total = 0.0
        for batch in torch.from_numpy(rng.permutation(len(labels))).split(BATCH):
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1:3d}  loss {total / len(labels):.4f}", flush=True)
    return net.eval()


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the weight and bias of the one convolution that equals `conv` followed by `norm`."""
    with torch.no_grad():
        gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        weight = conv.weight.double() * gain[:, None, None, None]
        bias = norm.bias.double() - norm.running_mean.double() * gain
    return weight.float().numpy(), bias.float().numpy()


def export(net: Net) -> None:
    nodes: list[NodeProto] = []
    weights: dict[str, NDArray[np.float32]] = {}

    def node(op: str, name: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    value = "image"
    for c in CONVS:
        weights[f"{c.name}.weight"], weights[f"{c.name}.bias"] = fold(net.convs[c.name], net.norms[c.name])
        value = node(
            "Conv",
            c.name,
            [value, f"{c.name}.weight", f"{c.name}.bias"],
            f"{c.name}.out",
            kernel_shape=[c.kernel] * 2,
            strides=[c.stride] * 2,
            pads=[c.kernel // 2] * 4,
            group=c.groups,
        )
        if c.add:
            value = node("Add", f"{c.name}.add", [value, f"{c.add}.relu"], f"{c.name}.sum")
        value = node("Relu", f"{c.name}.relu", [value], f"{c.name}.relu")
    value = node("GlobalAveragePool", "pool", [value], "pool.out")
    value = node("Flatten", "flatten", [value], "features")
    weights["fc.weight"] = net.fc.weight.detach().numpy()
    weights["fc.bias"] = net.fc.bias.detach().numpy()
    node("Gemm", "fc", [value, "fc.weight", "fc.bias"], "logits", transB=1)
    digits.save_model(MODEL_FILE, nodes, weights)


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    train, test = digits.split()
    export(fit(train))
    print(f"{MODEL_FILE.name}: accuracy {digits.accuracy(MODEL_FILE, test):.4f}, {MODEL_FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
