"""How much a model's outputs move when the output of one layer does: one run of the model for each layer.

Young et al. 2021 (arXiv 2009.01174) quantise one unit after the other to one bit depth after the other and run the
network each time. Here the error of a layer's output is known from second moments, so one run with a little noise on
its weight gives the factor between the two.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from vqonnx import modelfile
from vqonnx.errors import DataError, ModelError
from vqonnx.form import Dense, Matrix
from vqonnx.graph import Site, find
from vqonnx.place import Placement, place
from vqonnx.runtime import open_session, run

_IMAGES = 64  # enough: the factor is a mean over all outputs of them, and over all weights of the layer
_SOFTMAX = ("Softmax", "LogSoftmax")

Outputs = list[list[NDArray[Any]]]  # for each batch, the floating-point outputs


class Probe:
    """A model whose weights can be replaced one at a time.

    Args:
        model: The original; not changed.
        folder: Where it lies, for external data.
        feeds: Inputs; the first 64 images of them are run.
    """

    def __init__(self, model: ModelProto, folder: Path, feeds: Iterable[Mapping[str, Any]]) -> None:
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._whole = modelfile.bring_in(self._model, folder)  # or each run writes its weights to a file of their own
        _look_before_softmax(self._model)
        self._folder = folder
        self._feeds = _first(feeds)
        self._numbers = {(site.scope.path, site.name): at for at, site in enumerate(find(self._model, folder).sites)}
        self._reference = self._run(self._model)

    def effect(self, site: Site, matrix: Matrix) -> float | None:
        """The mean squared change of the outputs, each in units of its own mean square, with ``matrix`` as the weight.

        ``matrix`` is in the order ``ihw``. None where the outputs do not tell: none is floating point, or the model
        does not run with that weight.
        """
        changed = ModelProto()
        changed.CopyFrom(self._model)
        twin = find(changed, self._folder).sites[self._numbers[site.scope.path, site.name]]
        place(changed, [Placement(twin, Dense(matrix), twin.view("ihw"))], "portable")
        try:
            outputs = self._run(changed)
        except (DataError, ModelError):
            return None
        noise, signal = _energies(self._reference, outputs)
        shares = noise[signal > 0] / signal[signal > 0]
        found = float(shares.sum())
        return found if shares.size and np.isfinite(found) else None

    def _run(self, model: ModelProto) -> Outputs:
        with self._openable(model) as source:
            session = open_session(source)
            results = [run(session, dict(feed)) for feed in self._feeds]
            del session  # its file goes
        return [[y for y in found.values() if isinstance(y, np.ndarray) and y.dtype.kind == "f"] for found in results]

    @contextmanager
    def _openable(self, model: ModelProto) -> Iterator[bytes | Path]:
        """The model in bytes, or in a file that is there for as long."""
        if self._whole:
            yield model.SerializeToString()
            return
        with tempfile.TemporaryDirectory(prefix="vqonnx-probe-") as folder:
            path = Path(folder) / "model.onnx"
            copy = ModelProto()
            copy.CopyFrom(model)
            modelfile.save(copy, path, self._folder)
            yield path


def noisy(matrix: Matrix, seed: int, means: NDArray[np.float64] | None = None) -> Matrix:
    """The matrix with white noise of 1 % of each row's energy.

    Args:
        matrix: ``[rows, cols]``.
        seed: Of the noise.
        means: The mean input, ``[groups, cols]``, or any multiple of it, where a bias will take up what the mean of
            the output loses: then the noise does not move that mean. What moves it matters more, by other factors
            from layer to layer, than what an encoder leaves (docs/decisions.md).
    """
    rng = np.random.default_rng(seed)
    size = np.sqrt(np.mean(matrix.astype(np.float64) ** 2, axis=1, keepdims=True))
    noise = 0.1 * size * rng.standard_normal(matrix.shape)
    if means is not None:
        for part, mean in zip(np.split(noise, len(means)), means, strict=True):
            part -= np.outer(part @ mean, mean) / max(float(mean @ mean), np.finfo(float).tiny)
    return np.asarray(matrix + noise, np.float32)


def _energies(before: Outputs, after: Outputs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Energy of the change and of the output, for each output whose shape stays."""
    noise, signal = np.zeros(len(before[0])), np.zeros(len(before[0]))
    for one, other in zip(before, after, strict=True):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            if a.shape == b.shape:
                noise[number] += float(np.sum((a.astype(np.float64) - b) ** 2))
                signal[number] += float(np.sum(a.astype(np.float64) ** 2))
    return noise, signal


def _look_before_softmax(model: ModelProto) -> None:
    """Make the inputs of a final Softmax outputs in place of what it makes of them: the paper measures logits."""
    makers = {name: node for node in model.graph.node for name in node.output}
    for output in model.graph.output:
        maker = makers.get(output.name)
        if maker is not None and maker.op_type in _SOFTMAX and maker.input[0] in makers:
            output.CopyFrom(ValueInfoProto(name=maker.input[0], type=output.type))
            for dim in output.type.tensor_type.shape.dim:
                dim.Clear()  # older versions of Softmax may flatten


def _first(feeds: Iterable[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """As many batches as hold 64 images."""
    taken, images = [], 0
    for feed in feeds:
        taken.append(feed)
        images += max((len(x) for x in feed.values() if isinstance(x, np.ndarray) and x.ndim), default=1)
        if images >= _IMAGES:
            break
    return taken
