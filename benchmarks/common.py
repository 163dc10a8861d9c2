"""What the benchmarks share: where the data are, how images are prepared, and what to write beside a figure."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image

Feed = dict[str, np.ndarray]

_ROOT = Path(__file__).resolve().parent.parent
_RGB_MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
_RGB_STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]


def data_dir() -> Path:
    """The folder with real models and images: $VQONNX_DATA, or shared/data beside the checkout."""
    for folder in (os.environ.get("VQONNX_DATA"), _ROOT.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    raise SystemExit("no data: set VQONNX_DATA to the folder with models/, cifar10/, mnist/, imagenet/ and zoo/")


def setting() -> str:
    """Machine, instruction set, versions and date, for the line under a table."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        words = set(cpuinfo.read_text().split())
        flags = next((name for name in ("avx512_vnni", "avx512f", "avx2") if name in words), "")
    return (
        f"{_processor()}, {os.cpu_count()} cores, {flags or platform.machine()}; Python {platform.python_version()}, "
        f"onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}, numpy {np.__version__}; "
        f"{datetime.date.today().isoformat()}"
    )


def cifar_feeds(split: str, count: int, batch: int = 100) -> list[Feed]:
    """Batches of CIFAR-10 images of a sheet (``test`` or ``train_0`` ..), normalised."""
    with Image.open(data_dir() / "cifar10" / f"{split}.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    images = pixels.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)[:count]
    ready = ((images.astype(np.float32) / 255 - _RGB_MEAN) / _RGB_STD).astype(np.float32)
    return [{"input": ready[start : start + batch]} for start in range(0, count, batch)]


def cifar_labels() -> np.ndarray:
    """Right classes of the test sheet."""
    with np.load(data_dir() / "cifar10" / "labels.npz") as arrays:
        return arrays["test"].astype(np.int64)


def mnist_feeds(split: str, count: int, batch: int = 500) -> list[Feed]:
    """Batches of MNIST images of ``train`` (60,000) or ``test`` (10,000), scaled to 0..1.

    Fewer than all are taken evenly from the whole file: in ``train``, images that look alike lie side by side.
    """
    ready = _mnist("x", split, count).astype(np.float32) / 255
    return [{"input": ready[start : start + batch]} for start in range(0, len(ready), batch)]


def mnist_labels(split: str = "test", count: int | None = None) -> np.ndarray:
    """What those images show."""
    return _mnist("y", split, count).astype(np.int64)


def _mnist(kind: str, split: str, count: int | None) -> np.ndarray:
    with np.load(data_dir() / "mnist" / "mnist.npz") as arrays:
        whole = arrays[f"{kind}_{split}"]
    count = len(whole) if count is None else count
    return whole[np.arange(count) * len(whole) // count]


def imagenet_feeds(split: str, count: int, batch: int = 16) -> Iterator[Feed]:
    """Batches of ``calib`` or ``val`` images as the MobileNets want them: RGB / 127.5 - 1, 224 x 224."""
    return _feeds(split, count, batch, _mobilenet)


def torchvision_feeds(split: str, count: int, batch: int = 16) -> Iterator[Feed]:
    """The same as torchvision's models want them: the middle 224 x 224, RGB / 255, mean and standard deviation."""
    return _feeds(split, count, batch, _torchvision)


def squeezenet_feeds(split: str, count: int) -> Iterator[Feed]:
    """The same as SqueezeNet wants them, one at a time: the middle 224 x 224, BGR minus (104, 117, 123)."""
    for feed in _feeds(split, count, 1, _caffe):
        yield {"data_0": feed["input"]}


def _feeds(split: str, count: int, batch: int, prepare: Callable[[Path], np.ndarray]) -> Iterator[Feed]:
    paths = sorted(
        path for path in (data_dir() / "imagenet" / split).iterdir() if path.suffix.lower() in (".jpg", ".jpeg")
    )
    for start in range(0, min(count, len(paths)), batch):
        yield {"input": np.stack([prepare(path) for path in paths[start : min(start + batch, count)]])}


def imagenet_val_labels() -> np.ndarray:
    """Right classes (0..999) of the val images in the order of their names."""
    with (data_dir() / "imagenet" / "val_labels.csv").open() as file:
        rows = list(csv.reader(file))
    labels = {row[0]: int(row[1]) for row in rows if row[1].strip().isdigit()}
    return np.array([labels[name] for name in sorted(labels)], np.int64)


def _mobilenet(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        edge = round(side * 224 / 256) if side >= 256 else 224
        inset = (side - edge) // 2
        cropped = square.crop((inset, inset, inset + edge, inset + edge)).resize((224, 224), Image.Resampling.BILINEAR)
    return (np.asarray(cropped, np.float32) / 127.5 - 1).transpose(2, 0, 1)


def _caffe(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.asarray(image.convert("RGB").crop((left, top, left + 224, top + 224)), np.float32)
    return (pixels[..., ::-1] - np.array([104, 117, 123], np.float32)).transpose(2, 0, 1)


def _torchvision(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        left, top = (round((size - 224) / 2) for size in image.size)
        pixels = np.asarray(image.convert("RGB").crop((left, top, left + 224, top + 224)), np.float32)
    return (pixels.transpose(2, 0, 1) / 255 - _RGB_MEAN) / _RGB_STD


def _processor() -> str:
    """Name, family and model: clouds call processors of several generations by the same name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().partition("\n\n")[0].splitlines()
        found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
        if "model name" in found:
            more = [f"{key.removeprefix('cpu ')} {found[key]}" for key in ("cpu family", "model") if key in found]
            return f"{found['model name']} ({', '.join(more)})" if more else found["model name"]
    return platform.processor() or platform.machine()
