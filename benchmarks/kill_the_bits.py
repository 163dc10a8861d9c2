"""The networks that Stock et al. 2020 published, on a stock onnxruntime: size, and outputs against the same in fp32.

    python benchmarks/kill_the_bits.py

Each checkpoint is imported into a graph that has random weights. Beside it stands a plain fp32 model whose weights are
decoded here by the formula of the paper's code, with numpy and nothing of vqonnx. All 650 images of imagenet/val; top-1
is 8-14 points above that on the full validation set there, so read the agreement. Ends with an error where the models
do not agree. The largest difference is, over all images, ``max |logit - logit of fp32| / max |logit of fp32|``, each
maximum over the classes of one image.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from common import Feed, data_dir, imagenet_val_labels, setting, torchvision_feeds
from resnet import random_weights, resnet_model

import vqonnx

# Depth, and top-1 on the full ImageNet validation set and size as published.
_PUBLISHED = {
    "resnet18_small_blocks": (18, 65.81, 1.54),
    "resnet18_large_blocks": (18, 61.18, 1.03),
    "resnet50_large_blocks": (50, 68.21, 3.19),
}
_MOST_APART, _MOST_POINTS = 1e-4, 0.5


def decode(path: Path) -> dict[str, np.ndarray]:
    """Weights and biases of a checkpoint in float32, batch normalisation folded in."""
    entries = torch.load(path, map_location="cpu", weights_only=True)
    weights: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        if "centroids" in entry:
            blocks = entry["centroids"].detach().float().numpy()[entry["assignments"].numpy()]  # [m * Cout, d]
            weight = np.concatenate(np.split(blocks, entry["n_blocks"]), axis=1)  # block j of every output at a time
            weights[name] = weight.reshape(len(weight), -1, entry["k"], entry["k"]) if entry["is_conv"] else weight
        elif entry.keys() == {"weight"}:
            weights[name] = entry["weight"].detach().float().numpy()
    full: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        norm = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
        after = entries[f"{name}_bias" if name == "fc" else norm]
        scale = after["weight"].detach().float().numpy() if "weight" in after else np.ones(len(weight), np.float32)
        full[f"{name}.weight"] = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        full[f"{name}.bias"] = after["bias"].detach().float().numpy()
    return full


def logits(model: Path, feeds: Iterable[Feed], *, library: bool = False) -> np.ndarray:
    """Outputs ``[images, classes]`` of a session that is made as a user makes it."""
    options = onnxruntime.SessionOptions()
    if library:
        options.register_custom_ops_library(vqonnx.get_library_path())
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], feed)[0] for feed in feeds])


def main() -> None:
    feeds, labels = list(torchvision_feeds("val", 650)), imagenet_val_labels()
    print(
        "| checkpoint | paper's rule, MiB (published) | file, bytes | plain fp32, bytes | ratio | top-1, fp32 | file "
        "| + library | published, full set | largest difference | + library |\n" + "|---" * 11 + "|"
    )
    for name, (depth, published, size) in _PUBLISHED.items():
        source = data_dir() / "published_vq" / f"{name}.pth"
        with tempfile.TemporaryDirectory() as folder:
            model, plain, small = (Path(folder) / f"{stem}.onnx" for stem in ("model", "plain", "small"))
            onnx.save(resnet_model(depth, random_weights(depth)), model)
            onnx.save(resnet_model(depth, decode(source)), plain)
            result = vqonnx.import_kill_the_bits(source, model)
            saved = result.save(small)
            wanted = logits(plain, feeds)
            found = [logits(small, feeds), logits(small, feeds, library=True)]
            before = plain.stat().st_size
        top1 = [100 * float(np.mean(values.argmax(1) == labels)) for values in (wanted, *found)]
        apart = [float(np.max(np.abs(one - wanted).max(1) / np.abs(wanted).max(1))) for one in found]
        print(
            f"| {name} | {result.checkpoint.paper_mib:.3f} ({size}) | {saved.bytes:,} | {before:,} "
            f"| {before / saved.bytes:.1f} | {top1[0]:.2f} | {top1[1]:.2f} | {top1[2]:.2f} | {published} "
            f"| {apart[0]:.1e} | {apart[1]:.1e} |",
            flush=True,
        )
        if max(apart) > _MOST_APART or max(abs(value - top1[0]) for value in top1) > _MOST_POINTS:
            raise SystemExit(f"{name}: the imported model does not agree with the decoded one")
    print(f"\n{setting()}")


if __name__ == "__main__":
    main()
