"""Every model of the zoo: compress, load, run, compare; what is refused, and with which words.

    python benchmarks/zoo.py [--method M]

Uses generated inputs, as most of these models come without data, so the SNR says that a model works rather than how
good it is. `kmeans` with 6 bits is the default here: small layers dominate in these models.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import data_dir, setting

import vqonnx
from vqonnx.methods import method_by_name


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="kmeans")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    options = parser.parse_args()
    settings = dict(text.split("=", 1) for text in options.set) or ({"bits": 6} if options.method == "kmeans" else {})
    method = method_by_name(options.method, settings)
    paths = sorted([*data_dir().glob("zoo/*/*.onnx"), *data_dir().glob("models/*.onnx")])
    print("| model | bytes | ratio | layers | left alone | SNR dB | + library SNR dB |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            out = Path(folder) / "small.onnx"
            name = path.stem if path.parent.name == "models" else path.parent.name
            out.unlink(missing_ok=True)
            try:
                result = vqonnx.compress(path, method)
                saved = result.save(out)
            except vqonnx.VqonnxError as error:
                print(f"| {name} | refused: {error} | | | | | |".replace(str(path), path.name), flush=True)
                assert not out.exists()
                continue
            with_library = vqonnx.compare(path, out, result.check_feeds, library=True)
            print(
                f"| {name} | {result.bytes_before:,} -> {saved.bytes:,} | {result.bytes_before / saved.bytes:.2f} "
                f"| {len(result.layers)} | {len(result.skipped)} | {_db(saved.comparison)} | {_db(with_library)} |",
                flush=True,
            )
    print(f"\n{method!r}; {setting()}")


def _db(found: vqonnx.Comparison | None) -> str:
    if found is None:
        return "-"
    return "identical" if found.snr_db is None else f"{found.snr_db:.1f}"


if __name__ == "__main__":
    main()
