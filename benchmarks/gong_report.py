"""Tables and plots of what `benchmarks/gong.py` measured.

    python benchmarks/gong_report.py        prints the tables of docs/papers.md, draws docs/plots/gong_*.png

Reads benchmarks/results/gong.json. Needs matplotlib.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from gong import RESULTS
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

PLOTS = Path(__file__).parents[1] / "docs" / "plots"
NAMES = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5"}
# family: text in the legend, colour, marker, and the labels that a line joins (None: all)
FAMILIES: dict[str, tuple[str, str, str, str | None]] = {
    "KM": ("scalar k-means", "#0072b2", "o", None),
    "PQ": ("PQ, groups of inputs, k=8", "#d55e00", "s", "k=8,"),
    "PQ outputs": ("PQ, groups of outputs, k=8", "#e69f00", "D", "k=8,"),
    "PQ one": ("PQ, one codebook, k=16 (not in the paper)", "#999999", "v", "k=16,"),
    "RQ": ("residual, whole rows, k=16", "#cc79a7", "^", "k=16,"),
    "SVD": ("SVD", "#009e73", "P", None),
    "Binary": ("binary", "#000000", "*", ""),
}
BOUNDS = (2, 4, 8, 16, 24, 32)
# (family, label): top-1 error that the paper's figures show, all dense layers; the uncompressed network has 41.1.
PLAIN = 41.1
PUBLISHED: dict[tuple[str, str], tuple[float, float] | str | None] = {
    ("KM", "k=256"): (4, 41.2),
    ("KM", "k=16"): (8, 41.7),
    ("KM", "k=4"): (16, 45.0),
    ("KM", "k=2"): (32, 59.3),
    ("PQ", "k=8, length 1"): (9.7, 42.0),
    ("PQ", "k=8, length 2"): (20.2, 45.0),
    ("PQ", "k=8, length 3"): (29.6, 50.0),
    ("PQ", "k=8, length 4"): (38.4, 58.0),
    ("PQ outputs", "k=8, length 1"): None,
    ("PQ outputs", "k=8, length 2"): None,
    ("PQ outputs", "k=8, length 3"): None,
    ("PQ outputs", "k=8, length 4"): None,
    ("RQ", "k=256, t=1"): "2.3x, +18.2; 3.6x, +29.9 (t not known)",
    ("RQ", "k=64, t=1"): None,
    ("RQ", "k=16, t=8"): None,
    ("RQ", "k=16, t=4"): None,
    ("RQ", "k=16, t=2"): None,
    ("RQ", "k=16, t=1"): None,
    ("SVD", "aims at 2"): (2, 42.6),
    ("SVD", "aims at 4"): (4, 45.3),
    ("SVD", "aims at 8"): (8, 51.4),
    ("SVD", "aims at 16"): (16, 67.6),
    ("SVD", "aims at 24"): (24, 82.0),
    ("SVD", "aims at 32"): (32, 89.0),
    ("Binary", "no scale"): (32, 50.4),
    ("Binary", "a scale per layer"): None,
    ("Binary", "a scale per row"): None,
}
# One layer at a time; both axes of PQ, as a layer with few outputs suits only one of them.
ALONE = (
    ("KM", "k=4"),
    ("KM", "k=2"),
    ("PQ", "k=8, length 4"),
    ("PQ outputs", "k=8, length 4"),
    ("PQ outputs", "k=4, length 2"),
    ("SVD", "aims at 2"),
    ("SVD", "aims at 8"),
    ("Binary", "no scale"),
    ("Binary", "a scale per row"),
)
Points = list[dict[str, Any]]


def main() -> None:
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    points: Points = content["points"]
    plain = {name: network["error"] for name, network in content["networks"].items()}
    print_settings(points, plain)
    print_best(points, content["networks"])
    for name, network in content["networks"].items():
        print_layers(points, name, network)
    print(content["setting"])
    PLOTS.mkdir(exist_ok=True)
    for name, error in plain.items():
        draw_network([p for p in points if p["network"] == name and p["layers"] == "all"], name, error)
    draw_layers(points, content["networks"])


def print_settings(points: Points, plain: dict[str, float]) -> None:
    """Each setting of the paper, all dense layers: rates and how many points of error it adds."""
    print(
        "| method | setting | paper: rate, added | "
        + " | ".join(f"{NAMES[n]}: rate, in file, added" for n in plain)
        + " |"
    )
    print("|---|---|---|" + "---|" * len(plain))
    for (family, label), published in PUBLISHED.items():
        if isinstance(published, tuple):
            published = f"{published[0]:g}x, +{published[1] - PLAIN:.1f}"
        cells = [published or ""]
        for name, error in plain.items():
            found = [p for p in _of(points, name, "all", family) if p["label"] == label]
            cells += [
                f"{p['paper_rate']:.1f}x, {p['file_rate']:.1f}x, {p['error'] - error:+.2f}{_spread(p)}" for p in found
            ] or ["none smaller"]
        print(f"| {family} | {label} | {' | '.join(cells)} |")
    print()


def print_best(points: Points, networks: dict[str, Any]) -> None:
    """The lowest error that each method reaches at a rate or beyond."""
    for name, network in networks.items():
        hidden = list(network["dense"])[:-1]
        for layers, text in (("all", "all"), ("hidden" if len(hidden) > 1 else hidden[0], "all but the classifier")):
            print(f"{NAMES[name]}, {network['error']:.2f} % uncompressed; {text}: lowest error at the rate or beyond\n")
            print(f"| | {' | '.join(f'{bound}x' for bound in BOUNDS)} |\n|---|{'---|' * len(BOUNDS)}")
            for family in FAMILIES:
                cells = [_best(_of(points, name, layers, family), bound) for bound in BOUNDS]
                print(f"| {family} | {' | '.join(cells)} |")
            print()


def _best(points: Points, bound: float) -> str:
    enough = [p for p in points if p["paper_rate"] >= bound - 0.05]
    best = min(enough, key=lambda p: p["error"], default=None)
    return f"{best['error']:.2f} ({best['label']}, {best['paper_rate']:.1f}x)" if best else ""


def print_layers(points: Points, name: str, network: dict[str, Any]) -> None:
    """One layer at a time: added points, and for each thousand weights of the layer."""
    weights = {layer: rows * cols for layer, (rows, cols) in network["dense"].items()}
    heads = " | ".join(f"{layer} ({count:,}): rate, added, per 1,000 weights" for layer, count in weights.items())
    print(f"| {NAMES[name]} | {heads} |\n|---|{'---|' * len(weights)}")
    for family, label in ALONE:
        cells = []
        for layer, count in weights.items():
            found = [p for p in _of(points, name, layer, family) if p["label"] == label]
            cells += [
                f"{p['paper_rate']:.1f}x, {(added := p['error'] - network['error']):+.2f}, {1000 * added / count:+.4f}"
                for p in found
            ] or [""]
        print(f"| {family} {label} | {' | '.join(cells)} |")
    print()


def draw_network(points: Points, name: str, plain: float) -> None:
    """Error against rate, as the paper counts and from the bytes of the file."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    titles = ("rate as the paper counts (32-bit codebooks)", "rate from the bytes in the file (16-bit codebooks)")
    for axis, key, title in zip(axes, ("paper_rate", "file_rate"), titles, strict=True):
        for family, (text, colour, marker, joined) in FAMILIES.items():
            of = [p for p in points if p["family"] == family]
            line = sorted((p for p in of if joined is None or (joined and joined in p["label"])), key=lambda p: p[key])
            others = [p for p in of if p not in line]
            style = {"color": colour, "marker": marker}
            axis.plot([p[key] for p in line], [p["error"] for p in line], label=text if line else None, **style)
            faint = {"alpha": 0.35, "markersize": 4} if line else {"label": text, "markersize": 9}
            axis.plot([p[key] for p in others], [p["error"] for p in others], linestyle="none", **style, **faint)
        _finish(axis, plain, title, (1.8, 110))
    axes[0].set_ylabel("top-1 error, %")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    figure.suptitle(f"{NAMES[name]}: all dense layers compressed, no training afterwards (faint: other k)")
    figure.savefig(PLOTS / f"gong_{name}.png", dpi=110)


def draw_layers(points: Points, networks: dict[str, Any]) -> None:
    """One layer at a time against all."""
    shown = ("KM", "PQ outputs", "RQ", "SVD")
    figure, axes = plt.subplots(len(networks), len(shown), figsize=(13, 6.8), sharey="row", layout="constrained")
    for row, (name, network) in zip(axes, networks.items(), strict=True):
        first, *middle, last = network["dense"]
        looks = {first: ("first", "#0072b2", "o")} | {layer: ("middle", "#009e73", "s") for layer in middle}
        looks |= {last: ("classifier", "#d55e00", "D"), "all": ("all", "black", "^")}
        for axis, family in zip(row, shown, strict=True):
            text, _, _, joined = FAMILIES[family]
            for layer, (place, colour, marker) in looks.items():
                of = [p for p in _of(points, name, layer, family) if joined is None or joined in p["label"]]
                of = sorted(of, key=lambda p: p["paper_rate"])
                label = place if layer == "all" else f"{layer.removesuffix('.weight')} only ({place})"
                style = {"color": colour, "marker": marker, "linestyle": "--" if layer == "all" else "-"}
                axis.plot([p["paper_rate"] for p in of], [p["error"] for p in of], label=label, **style)
            _finish(axis, network["error"], f"{NAMES[name]}: {text}", (1.8, 45))
        row[0].set_ylabel("top-1 error, %")
        row[0].legend(fontsize=8, loc="upper left")
    figure.suptitle("One dense layer compressed at a time; rate of what is compressed, as the paper counts")
    figure.savefig(PLOTS / "gong_layers.png", dpi=100)


def _finish(axis: Axes, plain: float, title: str, across: tuple[float, float]) -> None:
    axis.axhline(plain, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_xlim(*across)
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_xlabel("times smaller")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)


def _of(points: Points, network: str, layers: str, family: str) -> Points:
    return [p for p in points if (p["network"], p["layers"], p["family"]) == (network, layers, family)]


def _spread(point: dict[str, Any]) -> str:
    errors = point["errors"]
    return f" (±{(max(errors) - min(errors)) / 2:.2f})" if len(errors) > 1 else ""


if __name__ == "__main__":
    main()
