"""Read the checkpoints that Stock et al. 2020 published: codes, centroids, batch normalisation. Knows nothing of ONNX.

A checkpoint is a dict of dicts by layer name. A compressed layer has ``centroids`` float16 ``[words, width]``, flat
``assignments`` (block j of output c at ``j * Cout + c``), ``n_blocks``, ``is_conv`` and ``k``, the kernel size. A layer
that was not compressed has a ``weight``; a batch normalisation has a ``weight`` (scale) and a ``bias`` (shift), into
which its running statistics are folded; the classifier's bias is an entry of its own. torch is needed to read it.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import FormError, InputError, ModelError
from vqonnx.form import Coded
from vqonnx.rates import PaperLayer, paper_size_mib

_CODED = {"centroids", "assignments", "n_blocks", "is_conv", "k"}
_NORM = {"weight", "bias"}
# What torch.load raises on files that it did not write, or that are cut off; its reader of old files checks little.
_LOAD_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)

Entry = dict[str, Any]


@dataclass(frozen=True, eq=False)
class PublishedLayer:
    """A convolution or a fully connected layer, with the batch normalisation that follows it.

    Attributes:
        name: As in torch: ``layer1.0.conv1``.
        shape: Shape of the weight: ``[Cout, Cin, k, k]``, or ``[Cout, Cin]`` of a fully connected layer.
        form: The weight as a matrix ``[Cout, Cin*k*k]``; its scales are the scale of the batch normalisation. A layer
            that was not compressed has each of its rows as one word.
        bias: Shift of the batch normalisation, or the layer's own bias; float16 or float32 ``[Cout]``.
        compressed: False for a layer that the authors left as it was.
    """

    name: str
    shape: tuple[int, ...]
    form: Coded
    bias: NDArray[Any]
    compressed: bool


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A published network.

    Attributes:
        path: Where it was read.
        layers: In the order in which torch registers them, which is that of computation.
    """

    path: Path
    layers: tuple[PublishedLayer, ...]

    @property
    def paper_mib(self) -> float:
        """Size by the rule of the paper: see `vqonnx.rates.paper_size_bits`."""
        coded = [PaperLayer(prod(x.shape), x.form.width, x.form.words) for x in self.layers if x.compressed]
        rest = sum(prod(layer.shape) for layer in self.layers if not layer.compressed)
        values = [layer.bias.size * (1 if layer.form.scales is None else 2) for layer in self.layers]
        return paper_size_mib(coded, rest + sum(values))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ModelError: The file is missing, cut off, or not such a checkpoint.
        InputError: torch is not installed.
    """
    path = Path(path)
    entries = _load(path)
    layers = {name: entry for name, entry in entries.items() if "centroids" in entry or set(entry) == {"weight"}}
    norms = {name: entry for name, entry in entries.items() if set(entry) == _NORM}
    biases = {name: entry for name, entry in entries.items() if set(entry) == {"bias"}}
    if not any("centroids" in entry for entry in layers.values()):
        raise ModelError(f"{path}: not a checkpoint of kill-the-bits: no entry has centroids and assignments")
    used: set[str] = set()
    found = []
    for name, entry in layers.items():
        owners = [other for other in (_norm_name(name), f"{name}_bias") if other in norms or other in biases]
        if len(owners) != 1:
            raise ModelError(f"{path}: {name} has neither {_norm_name(name)} nor {name}_bias; the file is incomplete")
        used |= {name, owners[0]}
        try:
            layer = _layer(name, entry, entries[owners[0]])
        except (FormError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: {name}: {error}; the file is damaged") from error
        # Batch normalisations come in the order of torch, compressed layers apart from the others; biases come last.
        position = list(norms).index(owners[0]) if owners[0] in norms else len(norms)
        found.append((position, layer))
    strange = next((name for name in entries if name not in used), None)
    if strange is not None:
        raise ModelError(f"{path}: entry '{strange}' ({', '.join(map(str, entries[strange]))}) belongs to no layer")
    return Checkpoint(path, tuple(layer for _, layer in sorted(found, key=lambda pair: pair[0])))


def _load(path: Path) -> dict[str, Entry]:
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{path}: reading a checkpoint needs torch; pip install 'vqonnx[distill]'") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give the path of a .pth file") from error
    except _LOAD_ERRORS as error:
        raise ModelError(f"{path}: torch cannot read it; it is cut off, or not a checkpoint of weights only") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ModelError(f"{path}: not a checkpoint of kill-the-bits, which is a dict of dicts by layer")
    return {str(name): {str(key): _plain(value) for key, value in entry.items()} for name, entry in content.items()}


def _plain(value: Any) -> Any:
    """A torch tensor as an array (in float32 where numpy lacks its type), anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    tensor = value.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def _norm_name(layer: str) -> str:
    """The batch normalisation after a convolution: ``bn1`` after ``conv1``, and the next one of a Sequential."""
    *parents, last = layer.split(".")
    return ".".join([*parents, str(int(last) + 1) if last.isdigit() else last.replace("conv", "bn")])


def _layer(name: str, entry: Entry, after: Entry) -> PublishedLayer:
    compressed = "centroids" in entry
    shape, codes, words = _coded(entry) if compressed else _dense(entry)
    scale, bias = after.get("weight"), after["bias"]
    for what, values in (("scale", scale), ("bias", bias)):
        if values is not None and values.shape != shape[:1]:
            raise ValueError(f"{what} has shape {list(values.shape)}, the layer {shape[0]} outputs")
    scales = None if scale is None else scale.reshape(-1, 1)
    return PublishedLayer(name, shape, Coded.one_stage(codes, words, scales=scales), bias, compressed)


def _coded(entry: Entry) -> tuple[tuple[int, ...], NDArray[Any], NDArray[Any]]:
    """Shape of the weight, codes ``[rows, groups]`` and codebook of a compressed layer."""
    missing = _CODED - set(entry)
    if missing:
        raise ValueError(f"has no {', '.join(sorted(missing))}")
    words, flat = entry["centroids"], entry["assignments"]
    blocks, kernel = int(entry["n_blocks"]), int(entry["k"])
    if flat.ndim != 1 or blocks < 1 or flat.size % blocks or words.ndim != 2:
        raise ValueError(f"{flat.size} assignments, {blocks} blocks and centroids {list(words.shape)} do not fit")
    outputs, taps = flat.size // blocks, kernel**2 if entry["is_conv"] else 1
    inputs, rest = divmod(blocks * words.shape[1], taps)
    if rest:
        raise ValueError(f"{blocks} blocks of {words.shape[1]} weights do not fill kernels of {taps}")
    if int(flat.min()) < 0 or int(flat.max()) >= len(words):
        raise ValueError(f"assignments {int(flat.min())} to {int(flat.max())} go beyond {len(words)} centroids")
    shape = (outputs, inputs, kernel, kernel) if entry["is_conv"] else (outputs, inputs)
    return shape, flat.reshape(blocks, outputs).T, words


def _dense(entry: Entry) -> tuple[tuple[int, ...], NDArray[Any], NDArray[Any]]:
    """The same for a layer that was not compressed: word *r* is row *r*, which keeps float16 and takes a scale."""
    weight = entry["weight"]
    return weight.shape, np.arange(weight.shape[0])[:, None], weight.reshape(weight.shape[0], -1)
