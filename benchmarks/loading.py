"""What loading a file takes with codes of one length and with prefix codes: seconds, and memory at the peak.

    python benchmarks/loading.py

Each file is loaded by a plain onnxruntime in a process of its own; memory is what that process holds more at its peak
than before (Linux). Layers are encoded quickly (`beam=1`, few images), as only loading is judged.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from common import cifar_feeds, data_dir, setting, squeezenet_feeds

import vqonnx
from vqonnx.fit import Limits, parse_size
from vqonnx.methods import Best

_LOAD = """
import re, sys, time
import onnxruntime
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
held = peak()
start = time.monotonic()
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
seconds = time.monotonic() - start
print(f"{seconds:.2f} {(peak() - held) / 1000:.0f}")
"""


def main() -> None:
    print("| network | file | bytes | seconds | MB at the peak |\n|---|---|---|---|---|")
    for network, size in (("resnet20", "64KB"), ("squeezenet", "520KB")):
        model = data_dir() / "models" / f"{network}.onnx"
        feeds = cifar_feeds("train_0", 128, batch=64) if network == "resnet20" else list(squeezenet_feeds("calib", 16))
        with tempfile.TemporaryDirectory() as folder:
            files = {"original": model}
            for codes in ("fixed", "prefix"):
                out = files[f"`codes={codes}`"] = Path(folder) / f"{codes}.onnx"
                method = Best(codes=codes, beam=1)  # type: ignore[arg-type]
                result = vqonnx.compress(
                    model, method, calibration=feeds, limits=Limits(size=parse_size(size)), cache=Path(folder) / "cache"
                )
                result.save(out, verify=False)
            for name, path in files.items():
                found = subprocess.run(
                    [sys.executable, "-c", _LOAD, str(path)], check=True, capture_output=True, text=True
                )
                seconds, megabytes = found.stdout.split()
                print(f"| {network} | {name} | {path.stat().st_size:,} | {seconds} | {megabytes} |", flush=True)
    print(f"\n{setting()}")


if __name__ == "__main__":
    main()
