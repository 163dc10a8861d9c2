"""Which layers of a model hurt when they are compressed: sensitivities, and what each gets of a budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqonnx import modelfile
from vqonnx.allocate import Sharing
from vqonnx.errors import ModelError, OptionError
from vqonnx.feeds import read_feeds
from vqonnx.graph import LINEAR, find
from vqonnx.menu import Menu, Progress, read_menus
from vqonnx.method import Budgeted, Method
from vqonnx.methods import Best
from vqonnx.plan import check_numbers, make_plan
from vqonnx.runtime import open_session, read_inputs


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer.

    Attributes:
        name: Name of its weight.
        op_type: Its operator.
        shape: Shape of the weight.
        sensitivity: Error of the model's outputs, in units of their energy, for an error of the layer's output as large
            as that output.
        even: Share of all layers' harm that the layer does where each has the same bits a weight.
        bits: Bits a weight that the layer gets of the budget.
        harm: Share of all layers' harm that it does with them.
        snr_db: Energy of the layer's output over its error with them, in dB.
        method: The method that encodes it so.
    """

    name: str
    op_type: str
    shape: tuple[int, ...]
    sensitivity: float
    even: float
    bits: float
    harm: float
    snr_db: float
    method: Method

    def to_json(self) -> dict[str, Any]:
        """The keys that other tools may rely on."""
        return {
            "name": self.name,
            "op_type": self.op_type,
            "shape": list(self.shape),
            "sensitivity": self.sensitivity,
            "even": round(self.even, 5),
            "bits": round(self.bits, 3),
            "harm": round(self.harm, 5),
            "snr_db": round(self.snr_db, 2),
            "method": self.method.id,
            "options": self.method.options,
        }


def analyze(
    model: str | Path,
    method: Budgeted | None = None,
    *,
    calibration: Any,
    seed: int = 0,
    batch: int = 16,
    cache: str | Path | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> tuple[LayerAnalysis, ...]:
    """Try each layer at every size and see what the model makes of its error; the layers in the order of the model.

    Args:
        model: Path of the ONNX model.
        method: What encodes the layers, and the bits a weight that they share; by default `Best` with its bits.
        calibration: Inputs, as `compress` takes them.
        seed: Of everything random.
        batch: Images that are run at once where the model leaves the number open.
        cache: As for `compress`, which can then use what was found.
        jobs: Layers tried at the same time.
        progress: Called with (layers done, layers in all, name of the next).

    Raises:
        ModelError: The model cannot be read, does not run, or has no layer that can be compressed.
        DataError: The calibration data do not fit it.
        OptionError: A number cannot be used, the method has no bits to share, or they are fewer than the layers take.
    """
    check_numbers(seed=seed, batch=batch, jobs=jobs)
    path, method = Path(model), method or Best()
    if not isinstance(method, Budgeted):
        raise OptionError(f"method '{method.id}' has no bits to share; choose best, entropy or transform")
    if not method.shares:
        raise OptionError(
            f"method '{method.id}' with these options has no bits to share; leave out what fixes a layer's size"
        )
    proto = modelfile.load(path)
    inputs = read_inputs(path)
    open_session(path)
    plan, _ = make_plan(find(proto, path.parent).sites, method, (), (), LINEAR, ())
    feeds = list(read_feeds(calibration, inputs, batch=batch))
    folder = None if cache is None else Path(cache)
    menus = read_menus(proto, path.parent, plan, feeds, seed, cache=folder, jobs=jobs, progress=progress)
    if not menus:
        raise ModelError(f"{path}: no layer can be compressed; 'vqonnx compress' says why")
    sharing = Sharing([chosen for _, chosen in plan], menus)
    sharing.restart()
    offers = {}
    for number in menus:
        offer = sharing.choose(number)
        assert offer is not None
        offers[number] = offer
        sharing.spend(number, offer.bytes)
    even = _shares({n: (menu.factor or 0) * _error_at(menu, method.bits) for n, menu in menus.items()})
    harm = _shares({n: (menu.factor or 0) * offers[n].error for n, menu in menus.items()})
    return tuple(
        LayerAnalysis(
            name=plan[number][0].name,
            op_type=plan[number][0].op_type,
            shape=plan[number][0].shape,
            sensitivity=float((menu.factor or 0) * menu.energy),
            even=even[number],
            bits=8 * offers[number].bytes / menu.weights,
            harm=harm[number],
            snr_db=float(10 * np.log10(max(menu.energy, 1e-300) / max(offers[number].error, 1e-300))),
            method=offers[number].method,
        )
        for number, menu in menus.items()
    )


def _error_at(menu: Menu, bits: float) -> float:
    """The error at so many bits a weight, on the line between the offers of the hull."""
    rates = 8 * menu.curve.rates / menu.weights
    return float(np.exp(np.interp(bits, rates, np.log(np.maximum(menu.curve.errors, 1e-300)))))


def _shares(values: dict[int, float]) -> dict[int, float]:
    total = sum(values.values()) or 1.0
    return {number: value / total for number, value in values.items()}


def override_table(layers: Sequence[LayerAnalysis]) -> str:
    """TOML for ``--config``: a method and options for each layer by its name, the most harmful first."""
    parts = ["# Written by 'vqonnx analyze': change what you know better; the first pattern that matches a name wins."]
    for layer in sorted(layers, key=lambda layer: -layer.even):
        usual = type(layer.method)().options
        options = {key: value for key, value in layer.method.options.items() if value != usual[key]}
        text = ", ".join(f"{key} = {_toml(value)}" for key, value in options.items())
        parts.append(
            f"\n[[layer]]  # {layer.even:.1%} of the harm at even bits\nmatch = {_toml(_literal(layer.name))}\n"
            f'method = "{layer.method.id}"\noptions = {{ {text} }}'
        )
    return "\n".join(parts) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return '"none"' if value is None else repr(value)


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def plot(layers: Sequence[LayerAnalysis], path: str | Path) -> None:
    """Draw harm and bits of each layer into a picture file.

    Raises:
        OptionError: matplotlib is not installed, or does not know such files.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise OptionError("a plot needs matplotlib; install it with: pip install 'vqonnx[report]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(max(6, 0.28 * len(layers)), 6), sharex=True)
    places = np.arange(len(layers))
    axes[0].bar(places - 0.2, [100 * layer.even for layer in layers], 0.4, label="even bits")
    axes[0].bar(places + 0.2, [100 * layer.harm for layer in layers], 0.4, label="bits as shared out")
    axes[0].set(ylabel="% of the harm")
    axes[0].legend()
    axes[1].bar(places, [layer.bits for layer in layers])
    axes[1].set(ylabel="bits a weight")
    axes[1].set_xticks(places, [layer.name[-28:] for layer in layers], rotation=90, fontsize=7)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:
        raise OptionError(f"{path}: matplotlib does not write such files; give a name that ends in .png") from error
    finally:
        plt.close(figure)
