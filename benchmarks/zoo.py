"""Every model of the zoo: compress, load, run, compare; what is refused, and with which words.

    python benchmarks/zoo.py [--method M]
    python benchmarks/zoo.py --total           # every method with its defaults, one row each
    python benchmarks/zoo.py --total dqc svd   # these methods

Uses generated inputs, as most of these models come without data, so the SNR says that a model works rather than how
good it is. `kmeans` with 6 bits is the default here: small layers dominate in these models.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import data_dir, setting

import vqonnx
from vqonnx.generate import generate_feeds
from vqonnx.method import Method, Needs
from vqonnx.methods import METHODS, method_by_name
from vqonnx.result import Saved


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="kmeans")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--total", nargs="*", metavar="METHOD")
    options = parser.parse_args()
    paths = sorted([*data_dir().glob("zoo/*/*.onnx"), *data_dir().glob("models/*.onnx")])
    if options.total is not None:
        print_total(paths, options.total or [kind.id for kind in METHODS])
        return
    settings = dict(text.split("=", 1) for text in options.set) or ({"bits": 6} if options.method == "kmeans" else {})
    method = method_by_name(options.method, settings)
    print("| model | bytes | ratio | layers | left alone | SNR dB | + library SNR dB |\n|---|---|---|---|---|---|---|")
    for path in paths:
        print(row(path, method), flush=True)
    print(f"\n{method!r}; {setting()}")


def row(path: Path, method: Method) -> str:
    """A line of the table: what became of a model."""
    try:
        result, saved, with_library = attempt(path, method)
    except vqonnx.VqonnxError as error:
        return f"| {_name(path)} | refused: {error} | | | | | |".replace(str(path), path.name)
    return (
        f"| {_name(path)} | {result.bytes_before:,} -> {saved.bytes:,} | {result.bytes_before / saved.bytes:.2f} "
        f"| {len(result.layers)} | {len(result.skipped)} | {_db(saved.comparison)} | {_db(with_library)} |"
    )


def print_total(paths: Sequence[Path], methods: Sequence[str]) -> None:
    """Each method on every model: how many were compressed, loaded and run both ways, and what was refused."""
    print(
        "| method | compressed | layers | left alone | ratio, all bytes | library agrees to | refused |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name in methods:
        done, layers, alone, before, after, worst, refused = 0, 0, 0, 0, 0, math.inf, []
        for path in paths:
            try:
                result, saved, both = attempt(path, method_by_name(name, {}))
            except vqonnx.VqonnxError as error:
                refused.append(f"{_name(path)}: {error}".replace(str(path), path.name))
                continue
            done, layers, alone = done + 1, layers + len(result.layers), alone + len(result.skipped)
            before, after = before + result.bytes_before, after + saved.bytes
            plain = saved.comparison.snr_db if saved.comparison else None
            if plain is not None and both.snr_db is not None:
                worst = min(worst, -abs(plain - both.snr_db))
        agrees = f"{-worst:.2f} dB" if worst < math.inf else "-"
        print(
            f"| {name} | {done} of {len(paths)} | {layers} | {alone} | {before / after:.2f} | {agrees} "
            f"| {'; '.join(refused)} |",
            flush=True,
        )
    print(f"\n{setting()}")


def attempt(path: Path, method: Method) -> tuple[vqonnx.Result, Saved, vqonnx.Comparison]:
    """Compress a model, calibrated on generated inputs where the method looks at any; write it and run it both ways."""
    feeds = generate_feeds(path) if method.pairs or method.needs is Needs.MOMENTS else None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "small.onnx"
        try:
            result = vqonnx.compress(path, method, calibration=feeds)
            saved = result.save(out)
        except vqonnx.VqonnxError:
            assert not out.exists()
            raise
        return result, saved, vqonnx.compare(path, out, result.check_feeds, library=True)


def _name(path: Path) -> str:
    return path.stem if path.parent.name == "models" else path.parent.name


def _db(found: vqonnx.Comparison | None) -> str:
    if found is None:
        return "-"
    return "identical" if found.snr_db is None else f"{found.snr_db:.1f}"


if __name__ == "__main__":
    main()
