"""How fast layers and networks run from their codes: against onnxruntime in fp32, int8 and 4 bits, on this machine.

    python benchmarks/speed.py                   # every case that has no result yet
    python benchmarks/speed.py gemm-4096 mlp     # the cases whose names begin so, again
    python benchmarks/speed.py table             # the table, from benchmarks/results/speed/ or --results

All ways of a case are timed in turn within one process: a round is a block of some 20 ms of calls of each. Shown are
medians over rounds and medians of the rounds' ratios. Processes differ by a few percent, so that five are run; shown is
the one whose ratio to fp32 is the median, with the range of the five. With one thread the clock is the thread's CPU
time, with two it is wall time, and all sessions share one pool. ``hot``: the same weights at every call; ``cold``:
copies of the layer that take 160 MB or more, all within one session, one after the other, for each way. ``--work``
keeps the networks. ``--round-trip build/check/kernels_check`` asks that program around each round with two threads how
far apart the processors are, and adds the ratios of near and of far rounds to the result (give more ``--rounds``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from common import setting
from speed_models import NETWORKS, conv_ways, gemm_ways, network_ways
from speed_timing import Way, open_way, pin_threads, time_in_turn, time_loading, use_threads

from vqonnx.bench import measure_memory
from vqonnx.generate import generate_feeds

RESULTS = Path(__file__).resolve().parent / "results" / "speed"
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512vbmi", "asimd")
Goals = dict[str, tuple[float, float]]  # by the other way: at least, aim


@dataclass(frozen=True)
class Case:
    """What is timed, and what it must show.

    Attributes:
        name: Name of the result.
        kind: ``memory`` and ``loading`` are of a network.
        sizes: Outputs, inputs and batch of a Gemm; outputs, inputs, kernel and positions of a Conv.
        goals: How many times as long the other ways must take at least, and shall take.
        network: Name of a network.
        threads: Threads of one operator.
        cold: Weights come from memory, not from a cache.
        isa: Instruction set that the library is held to; None for the best.
        width: Weights of one code.
        words: Words of a codebook.
        order: Order of columns of a Conv.
        precision: How exactly kernels compute; None leaves it to them.
    """

    name: str
    kind: Literal["gemm", "conv", "network", "memory", "loading"]
    sizes: tuple[int, ...] = ()
    goals: Goals = field(default_factory=dict)
    network: str = ""
    threads: int = 1
    cold: bool = False
    isa: str | None = None
    width: int = 8
    words: int = 256
    order: str = "hwi"
    precision: str | None = None

    def ways(self, work: Path) -> dict[str, Way]:
        """The ways to compute it; ours comes first."""
        if self.kind == "gemm":
            outputs, inputs, batch = self.sizes
            return gemm_ways(outputs, inputs, batch, cold=self.cold, width=self.width, words=self.words)
        if self.kind == "conv":
            outputs, inputs, kernel, size = self.sizes
            return conv_ways(
                outputs, inputs, kernel, size, width=self.width, order=self.order, precision=self.precision
            )
        return network_ways(self.network, work)


_LARGE = (4096, 4096)
_CONVS = ((64, 56, (1.1, 1.3)), (128, 28, (1.7, 2.1)), (256, 14, (2.5, 3.1)), (512, 7, (3.3, 4.1)))
_NOT_SLOWER: Goals = {"fp32": (0.9, 1.0)}
_WHOLE: dict[tuple[str, int], Goals] = {
    ("resnet50-hwi8", 1): {"fp32": (1.25, 1.6)},
    ("resnet50-hwi8", 2): {"fp32": (1.1, 1.6)},
}
CASES = (
    Case(
        "gemm-4096-batch1-cold",
        "gemm",
        (*_LARGE, 1),
        {"fp32": (25, 31), "int8": (6, 7.7), "int4": (4.5, 5.8)},
        cold=True,
    ),
    Case("gemm-4096-batch1-cold-2-threads", "gemm", (*_LARGE, 1), cold=True, threads=2),
    Case("gemm-1000x2048-batch1-hot", "gemm", (1000, 2048, 1), {"fp32": (8, 12), "int4": (2.2, 3)}),
    Case("gemm-4096-batch16-cold", "gemm", (*_LARGE, 16), {"fp32": (6.5, 8.4), "int4": (2.6, 3.3)}, cold=True),
    Case("gemm-4096-batch256-hot", "gemm", (*_LARGE, 256), {"fp32": (2.8, 3.6)}),
    *(
        Case(
            f"gemm-{name}-batch{batch}-{'hot' if batch > 16 else 'cold'}-{isa}",
            "gemm",
            (*sizes, batch),
            cold=batch <= 16,
            isa=isa,
        )
        for name, sizes in (("4096", _LARGE), ("1000x2048", (1000, 2048)))
        for batch in (4, 16, 256)
        for isa in ("avx2", "avx512")
        if name == "4096" or batch > 16
    ),
    Case("gemm-4096-batch1-cold-avx2", "gemm", (*_LARGE, 1), {"fp32": (3.5, 5.5)}, cold=True, isa="avx2"),
    *(
        Case(
            f"gemm-4096-batch1-cold-{words}-words-width{width}{f'-{isa}' if isa else ''}",
            "gemm",
            (*_LARGE, 1),
            cold=True,
            isa=isa,
            width=width,
            words=words,
        )
        for words, width, isa in (
            *((16, width, isa) for width in (1, 4) for isa in (None, "avx512", "avx2")),
            (8, 1, None),
            (64, 1, None),
        )
    ),
    *(Case(f"conv3x3-{c}-hwi8", "conv", (c, c, 3, size), {"fp32": goal}) for c, size, goal in _CONVS),
    *(
        Case(f"conv3x3-{c}-hwi8-{isa}", "conv", (c, c, 3, size), isa=isa)
        for isa in ("avx2", "avx512")
        for c, size, _ in _CONVS
    ),
    *(
        Case(
            f"conv3x3-{c}-{order}{width}-exact",
            "conv",
            (c, c, 3, size),
            {"fp32": (0.9, 1.05)},
            width=width,
            order=order,
            precision="exact",
        )
        for order, width in (("ihw", 9), ("hwi", 8))
        for c, size, _ in _CONVS
    ),
    *(
        Case(
            f"{network}-{threads}-thread{'s' * (threads > 1)}",
            "network",
            (),
            _WHOLE.get((network, threads), _NOT_SLOWER),
            network,
            threads,
        )
        for network in NETWORKS
        for threads in (1, 2)
    ),
    *(
        Case(f"resnet50-hwi8-1-thread-{isa}", "network", (), network="resnet50-hwi8", isa=isa)
        for isa in ("avx2", "avx512")
    ),
    Case("resnet50-hwi8-memory", "memory", network="resnet50-hwi8"),
    Case("mlp-8x4096-memory", "memory", network="mlp-8x4096"),
    Case("resnet50-hwi8-loading", "loading", (), {"fp32": (1.0, 2.0)}, "resnet50-hwi8"),
)
_MEMORY = {"resnet50-hwi8": (20.0, 8.0)}  # MB by which memory may grow at loading, and shall
_MEMORY_BY_SIZE = (1.3, 10.0)  # of any network: so many times the file, and so many MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="beginnings of names, or 'table'")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("build/speed"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="another folder for those of another processor")
    parser.add_argument("--round-trip", type=Path, help="kernels_check, for cases with two threads")
    parser.add_argument("--here", choices=("make", "time"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case == ["table"]:
        print(table(chosen.results))
        return
    cases = [case for case in CASES if any(case.name.startswith(begin) for begin in chosen.case)]
    if chosen.case and not cases:
        raise SystemExit(
            f"no case begins with {' or '.join(chosen.case)}; there are {', '.join(c.name for c in CASES)}"
        )
    if chosen.here:
        (case,) = (case for case in CASES if [case.name] == chosen.case)
        if chosen.here == "make":
            case.ways(chosen.work)
        else:
            print(json.dumps(measure(case, chosen.work, chosen.rounds, chosen.round_trip)))
        return
    chosen.results.mkdir(parents=True, exist_ok=True)
    for case in cases or [case for case in CASES if not result_path(case, chosen.results).exists()]:
        environment = {key: value for key, value in os.environ.items() if key not in ("VQONNX_ISA", "VQONNX_PRECISION")}
        if case.isa is not None:
            environment["VQONNX_ISA"] = case.isa
        command = [sys.executable, __file__, case.name, "--work", str(chosen.work), "--rounds", str(chosen.rounds)]
        command += ["--round-trip", str(chosen.round_trip)] if chosen.round_trip else []
        # Each in a process of its own: threads and instruction set are settled once, and to make a network's files
        # takes sessions with other threads.
        found: list[dict[str, Any]] = []
        repeats = 1 if case.kind in ("memory", "loading") else chosen.processes
        for step in ["make"] * bool(case.network) + ["time"] * repeats:
            child = subprocess.run(
                [*command, "--here", step], env=environment, stdout=subprocess.PIPE, text=True, check=False
            )
            if child.returncode:
                break
            if step == "time":
                found.append(json.loads(child.stdout.splitlines()[-1]))
        if child.returncode:
            print(f"{case.name}: failed with exit status {child.returncode}", file=sys.stderr)
            continue
        result = found[0] if len(found) == 1 else _middle(found)
        result_path(case, chosen.results).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{case.name}: {_spell(result)}", flush=True)


def _middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The result whose ratio to fp32 is the median, with the smallest and the largest of all."""
    found = sorted(found, key=lambda result: float(result["ratios"]["fp32"]))
    ratios = [result["ratios"]["fp32"] for result in found]
    return found[len(found) // 2] | {"processes": len(found), "fp32_ratios": [ratios[0], ratios[-1]]}


def result_path(case: Case, folder: Path) -> Path:
    return folder / f"{case.name}.json"


def measure(case: Case, work: Path, rounds: int, round_trip: Path | None = None) -> dict[str, Any]:
    """What a result says."""
    use_threads(case.threads)
    ways = case.ways(work)
    result: dict[str, Any] = {
        "case": case.name,
        "threads": case.threads,
        "rounds": rounds,
        "state": "cold" if case.cold else "hot",
    }
    result |= {
        "isa": case.isa or "best",
        "flags": _cpu_flags(),
        "setting": setting(),
        "date": datetime.date.today().isoformat(),
    }
    if case.kind == "memory":
        feed = generate_feeds(ways["fp32"].model, count=1)[0]
        grown = {name: measure_memory(way.model, way.library, 1, feed) for name, way in ways.items()}
        return result | {
            "megabytes": {name: loaded for name, (loaded, _) in grown.items()},
            "peak": {name: peak for name, (_, peak) in grown.items()},
            "file": ways["vqonnx"].model.stat().st_size / 1e6,
        }
    if case.kind == "loading":
        timing = time_loading(ways, case.threads, rounds)
        return result | {"microseconds": timing.microseconds, "ratios": timing.ratios}
    sessions = {name: open_way(way, case.threads) for name, way in ways.items()}
    if case.threads > 1:
        pin_threads()
    asked = _round_trip(round_trip) if round_trip and case.threads > 1 else None
    timing = time_in_turn(
        sessions,
        {name: way.layers for name, way in ways.items()},
        _feed,
        threads=case.threads,
        rounds=rounds,
        round_trip=asked,
    )
    apart = {name: asdict(found) for name, found in (("near", timing.near), ("far", timing.far)) if found}
    result |= {"microseconds": timing.microseconds, "ratios": timing.ratios} | apart
    return result | {"relative_error": _errors(sessions)}


def _round_trip(program: Path) -> Callable[[], float]:
    """Nanoseconds, as the program says; it may use all processors, whatever this thread is kept on."""
    everywhere = set(range(os.cpu_count() or 1))

    def ask() -> float:
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, everywhere)  # which the program inherits
        try:
            said = subprocess.run([program, "--round-trip"], capture_output=True, text=True, check=True).stdout
        finally:
            os.sched_setaffinity(0, own)
        return float(said.split()[0])

    return ask


def _feed(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Normal numbers, the same for all inputs of the same shape."""
    return {
        entry.name: np.random.default_rng(0)
        .standard_normal([size if isinstance(size, int) else 1 for size in entry.shape])
        .astype(np.float32)
        for entry in session.get_inputs()
    }


def _errors(sessions: dict[str, onnxruntime.InferenceSession]) -> dict[str, float]:
    """Norm of the difference from fp32 over that of fp32, for the first output."""
    outputs = {
        name: session.run([session.get_outputs()[0].name], _feed(session))[0] for name, session in sessions.items()
    }
    exact = outputs.pop("fp32").astype(np.float64)
    return {name: float(np.linalg.norm(value - exact) / np.linalg.norm(exact)) for name, value in outputs.items()}


def _cpu_flags() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return [flag for flag in _FLAGS if flag in words]


def _spell(result: dict[str, Any]) -> str:
    if "megabytes" in result:
        return ", ".join(f"{name} {value:.1f} MB" for name, value in result["megabytes"].items())
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in result["ratios"].items())
    return f"{result['microseconds']['vqonnx']:.1f} us; {ratios}{_span(result)}"


def _span(result: dict[str, Any]) -> str:
    """The smallest and the largest ratio to fp32, where several processes gave one."""
    return " ({:.2f} to {:.2f}x fp32)".format(*result["fp32_ratios"]) if "fp32_ratios" in result else ""


def _apart(result: dict[str, Any], other: str) -> str:
    """The ratios of rounds with the processors near each other and far apart, if there were both or one of them."""
    return "".join(f", {name} {result[name]['ratios'][other]:.2f}x" for name in ("near", "far") if name in result)


def table(folder: Path) -> str:
    """Every case with a result in a folder: floors, aims, and what was measured."""
    lines = [
        "| case | threads | against | at least | aim | measured | ours, us | other, us | error |",
        "|---" * 9 + "|",
    ]
    settings = set()
    for case in CASES:
        if result_path(case, folder).exists():
            result = json.loads(result_path(case, folder).read_text(encoding="utf-8"))
            settings.add(result["setting"])
            lines += _memory_rows(case, result) if case.kind == "memory" else _rows(case, result)
    return "\n".join([*lines, "", *sorted(settings)])


def _rows(case: Case, result: dict[str, Any]) -> list[str]:
    """A row for each other way."""
    times, error = result["microseconds"], result.get("relative_error", {}).get("vqonnx")
    rows = []
    for other, ratio in result["ratios"].items():
        least, aim = case.goals.get(other, (None, None))
        below = "" if least is None or ratio >= least else "**below** "
        span = (_span(result) if other == "fp32" else "") + _apart(result, other)
        rows.append(
            f"| {case.name} | {case.threads} | {other} | {_cell(least)} | {_cell(aim)} | {below}{ratio:.2f}x{span} "
            f"| {times['vqonnx']:.1f} | {times[other]:.1f} | {'' if error is None else f'{error:.1e}'} |"
        )
    return rows


def _memory_rows(case: Case, result: dict[str, Any]) -> list[str]:
    found, (times, more) = result["megabytes"], _MEMORY_BY_SIZE
    by_size = times * result["file"] + more
    most, aim = _MEMORY.get(case.network, (by_size, None))
    above = "" if found["vqonnx"] <= min(most, by_size) else "**above** "
    return [
        f"| {case.name} | 1 | fp32: {found['fp32']:.1f} MB | at most {most:.3g} MB "
        f"| {'' if aim is None else f'{aim:g} MB'} | {above}{found['vqonnx']:.1f} MB | | | |"
    ]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:g}x"


if __name__ == "__main__":
    main()
