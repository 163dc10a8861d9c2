"""Speed and memory of a model and its compressed form, measured fairly on one machine.

Latencies are taken in turn within one process, so that a busy moment hits all alike. Memory is taken in a process of
its own for each, because an allocator does not give back what another session has used.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime

from vqonnx.errors import ModelError, OptionError, VqonnxError
from vqonnx.feeds import read_feeds
from vqonnx.generate import generate_feeds
from vqonnx.runtime import Model, open_session, read_inputs, run

_log = logging.getLogger(__name__)
_MOST_FEEDS = 8  # held in memory at once, and used in turn
_MB = 1e6
_CHILD = "import sys; sys.path[:] = {path!r}; from vqonnx.bench import _measure_here; _measure_here()"


@dataclass(frozen=True)
class Figures:
    """One number for each way to run; None where it could not be obtained.

    Attributes:
        original: The model before.
        compressed: The compressed model on onnxruntime alone.
        compressed_library: The compressed model with vqonnx's custom-op library.
    """

    original: float | None
    compressed: float | None
    compressed_library: float | None


@dataclass(frozen=True)
class BenchResult:
    """What `bench` measured.

    Attributes:
        latency_ms: Medians over the rounds.
        ratio: Latency over the original's in the same round, median over the rounds; below 1 is faster.
        memory_mb: Growth of resident memory by loading, in 10^6 bytes.
        peak_mb: The same, at its highest from before loading to after the first run.
        threads: Threads of one operator.
        rounds: Runs of each that were timed.
        versions: Version by package.
        machine: System, processor and number of cores.
    """

    latency_ms: Figures
    ratio: Figures
    memory_mb: Figures
    peak_mb: Figures
    threads: int
    rounds: int
    versions: Mapping[str, str]
    machine: Mapping[str, str | int]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return {
            "latency_ms": asdict(self.latency_ms),
            "memory_mb": asdict(self.memory_mb),
            "peak_mb": asdict(self.peak_mb),
            "ratio": asdict(self.ratio),
            "threads": self.threads,
            "rounds": self.rounds,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
        }


def bench(
    original: Model,
    compressed: Model,
    *,
    feeds: Any = None,
    threads: int = 1,
    rounds: int = 30,
    warmup: int = 5,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> BenchResult:
    """Time both models in turn, and weigh each in a process of its own.

    Args:
        original: Path or bytes of the model before.
        compressed: Path or bytes of the model after; it is run without and with the library.
        feeds: Data as `vqonnx.runtime.read_feeds` takes them, one row at a time; generated if None.
        threads: Threads of one operator.
        rounds: Timed runs of each.
        warmup: Runs of each before that.
        shapes: Shapes of generated inputs by name.

    Raises:
        OptionError: ``rounds`` or ``threads`` is below 1, ``warmup`` below 0, or ``shapes`` does not fit.
        ModelError: A model does not load.
        DataError: A model does not run on the data.
        VqonnxError: The library is missing.
    """
    for name, value, least in (("threads", threads, 1), ("rounds", rounds, 1), ("warmup", warmup, 0)):
        if value < least:
            raise OptionError(f"{name} is {value}; give {least} or more")
    if feeds is None:
        batches = generate_feeds(original, shapes=shapes)
    else:
        batches = list(islice(read_feeds(feeds, read_inputs(original), batch=1), _MOST_FEEDS))
    ways = [("original", original, False), ("compressed_library", compressed, True), ("compressed", compressed, False)]
    sessions = {}
    for name, model, library in ways:
        try:
            sessions[name] = open_session(model, library=library, threads=threads)
        except ModelError as error:
            if name != "compressed":
                raise
            _log.info("only runs with the library: %s", error)
    latencies, ratios = _time(sessions, batches, rounds, warmup)
    memory = {
        name: measure_memory(model, library, threads, batches[0]) for name, model, library in ways if name in sessions
    }
    return BenchResult(
        latency_ms=_figures(latencies),
        ratio=_figures(ratios),
        memory_mb=_figures({name: loaded for name, (loaded, _) in memory.items()}),
        peak_mb=_figures({name: peak for name, (_, peak) in memory.items()}),
        threads=threads,
        rounds=rounds,
        versions=_versions(),
        machine={"system": platform.system(), "processor": _processor(), "cores": os.cpu_count() or 1},
    )


def _figures(values: Mapping[str, float | None]) -> Figures:
    return Figures(values.get("original"), values.get("compressed"), values.get("compressed_library"))


def _time(
    sessions: Mapping[str, onnxruntime.InferenceSession], feeds: Sequence[dict[str, Any]], rounds: int, warmup: int
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Median milliseconds, and median ratio to the original, by name."""
    for session in sessions.values():
        for feed in feeds:
            run(session, feed)  # complains in our words; below, nothing but onnxruntime is timed
    names = list(sessions)
    taken = np.zeros((warmup + rounds, len(names)))  # [round, way], milliseconds
    for number, row in enumerate(taken):
        feed = feeds[number % len(feeds)]
        for place in range(len(names)):
            way = (place + number) % len(names)  # each comes first as often as the others
            session = sessions[names[way]]
            start = time.perf_counter_ns()
            session.run(None, feed)
            row[way] = (time.perf_counter_ns() - start) / 1e6
    taken = taken[warmup:]
    ratios = taken / taken[:, [names.index("original")]]
    return (
        {name: float(median(taken[:, way])) for way, name in enumerate(names)},
        {name: float(median(ratios[:, way])) for way, name in enumerate(names)},
    )


def measure_memory(
    model: Model, library: bool, threads: int, feed: dict[str, Any]
) -> tuple[float | None, float | None]:
    """Growth of memory in MB: after loading, and at the highest up to the end of the first run; None if unknown.

    In a new process, as an allocator does not give back what another session has used.
    """
    child = subprocess.run(
        [sys.executable, "-c", _CHILD.format(path=[os.path.abspath(folder) for folder in sys.path])],
        input=pickle.dumps((model, library, threads, feed)),
        capture_output=True,
        check=False,
    )
    if child.returncode:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        raise VqonnxError(f"{'model' if isinstance(model, bytes) else model}: memory was not measured: {last[0]}")
    loaded, peak = json.loads(child.stdout.splitlines()[-1])
    return loaded, peak


def _measure_here() -> None:
    """The new process: a pickled job on standard input, a line of JSON on standard output."""
    model, library, threads, feed = pickle.load(sys.stdin.buffer)
    sys.stdout.write("\n" + json.dumps(_measure(model, library, threads, feed)) + "\n")


def _measure(model: Model, library: bool, threads: int, feed: dict[str, Any]) -> tuple[float | None, float | None]:
    """Growth of resident memory in MB: after loading, and at the highest up to the end of the first run."""
    # The first session of a process pays for onnxruntime itself; let a trivial one pay.
    trivial = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 13]> g (float[1] x) => (float[1] y) { y = Neg(x) }'
    )
    run(open_session(trivial.SerializeToString(), library=library, threads=threads), {"x": np.zeros(1, np.float32)})
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest so far
    base, _ = _resident()
    session = open_session(model, library=library, threads=threads)
    loaded, _ = _resident()
    run(session, feed)
    _, peak = _resident()
    if base is None or loaded is None or peak is None:
        return None, None
    return max(0.0, loaded - base), max(0.0, loaded - base, peak - base)


def _resident() -> tuple[float | None, float | None]:
    """Resident memory of this process in MB, now and at its highest."""
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmRSS" in fields and "VmHWM" in fields:
            return int(fields["VmRSS"].split()[0]) * 1024 / _MB, int(fields["VmHWM"].split()[0]) * 1024 / _MB
    with suppress(ImportError):
        import psutil

        info = psutil.Process().memory_info()
        return info.rss / _MB, getattr(info, "peak_wset", info.rss) / _MB
    with suppress(ImportError):
        import resource

        # Only the highest is known; macOS counts bytes, the others kilobytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / _MB
        return peak, peak
    return None, None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    with suppress(metadata.PackageNotFoundError):  # run from a checkout
        versions["vqonnx"] = metadata.version("vqonnx")
    return versions


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
