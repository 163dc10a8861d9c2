"""Train the multi-layer perceptron `digits_mlp.onnx`: 64 pixels, 512 and 256 hidden units, 10 digits."""

from __future__ import annotations

import digits
import numpy as np
from onnx import helper
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

MODEL_FILE = digits.FOLDER / "digits_mlp.onnx"
SEED = 0
EPOCHS = 300


def fit(train: digits.Digits) -> MLPClassifier:
    rng = np.random.default_rng(SEED)
    model = MLPClassifier((512, 256), batch_size=100, random_state=SEED)
    for _ in range(EPOCHS):  # each time the digits are moved anew
        moved = digits.augment(train.image, rng)
        model.partial_fit(moved.reshape(len(moved), -1), train.labels, classes=np.arange(digits.CLASSES))
    return model


def export(model: MLPClassifier) -> None:
    nodes = [helper.make_node("Flatten", ["image"], ["pixels"], name="flatten")]
    weights = {}
    value = "pixels"
    layers = zip(("fc1", "fc2", "fc3"), (0, 1, 1), model.coefs_, model.intercepts_, strict=True)
    for name, transposed, weight, bias in layers:  # weight: [inputs, outputs]
        weights[f"{name}.weight"] = weight.T if transposed else weight
        weights[f"{name}.bias"] = bias
        output = "logits" if name == "fc3" else f"{name}.out"
        inputs = [value, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Gemm", inputs, [output], name=name, transB=transposed))
        if name != "fc3":
            value = f"{name}.relu"
            nodes.append(helper.make_node("Relu", [output], [value], name=value))
    digits.save_model(MODEL_FILE, nodes, weights)


def main() -> None:
    train, test = digits.split()
    with threadpool_limits(1):
        export(fit(train))
    print(f"{MODEL_FILE.name}: accuracy {digits.accuracy(MODEL_FILE, test):.4f}, {MODEL_FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
