"""The handwritten digits that the models of this folder are trained and tested on, and the two files made from them.

`python models/digits.py` writes the calibration and the test file. The digits come with scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy.ndimage import affine_transform
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FOLDER = Path(__file__).parent
CALIBRATION_FILE = FOLDER / "digits_calibration.npz"
TEST_FILE = FOLDER / "digits_test.npz"

CLASSES = 10
TEST_COUNT = 797
CALIBRATION_COUNT = 256
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images of digits and what they show.

    Attributes:
        image: float32 ``[count, 1, 8, 8]``, 0 is paper and 1 is ink.
        labels: int64 ``[count]``, 0 to 9.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.int64]


def split() -> tuple[Digits, Digits]:
    """Return the 1000 training and the 797 test digits, in shuffled order, each digit in the same share in both."""
    values, labels = load_digits(return_X_y=True)
    images = (values / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_COUNT, stratify=labels, random_state=SPLIT_SEED
    )
    return Digits(images[train], labels[train].astype(np.int64)), Digits(images[test], labels[test].astype(np.int64))


def augment(images: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the images, about two of three turned by up to 10 degrees and shifted by up to 0.7 pixels.

    The others stay as they are: moving blurs, and a network that sees only blurred digits does worse on sharp ones.
    """
    angles = np.deg2rad(rng.uniform(-10, 10, len(images)))
    shifts = rng.uniform(-0.7, 0.7, (len(images), 2))
    cos, sin = np.cos(angles), np.sin(angles)
    turns = np.stack([cos, -sin, sin, cos], axis=-1).reshape(-1, 2, 2)
    centre = np.array([3.5, 3.5])
    moved = images.copy()
    for i in np.flatnonzero(rng.random(len(images)) < 2 / 3):
        offset = centre - turns[i] @ (centre + shifts[i])
        moved[i, 0] = affine_transform(images[i, 0], turns[i], offset=offset, order=1)
    return moved


def save_model(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, NDArray[np.float32]]) -> None:
    """Write a checked model from ``image`` ``[N, 1, 8, 8]`` to ``logits`` ``[N, 10]``."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        inputs=[helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        outputs=[helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        initializer=[numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="vqonnx")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def accuracy(path: Path, digits: Digits) -> float:
    """Return the share of digits, 0 to 1, that onnxruntime on the CPU gets right with the model at `path`."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": digits.image})
    return float(np.mean(logits.argmax(axis=1) == digits.labels))


def main() -> None:
    train, test = split()
    np.savez_compressed(CALIBRATION_FILE, image=train.image[:CALIBRATION_COUNT])
    np.savez_compressed(TEST_FILE, image=test.image, labels=test.labels)
    for file in (CALIBRATION_FILE, TEST_FILE):
        print(f"{file.name}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
