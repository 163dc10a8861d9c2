"""Time several ways to compute the same, in turn within one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnx.parser
import onnxruntime

from vqonnx.runtime import get_library_path

_BLOCK = 0.02  # seconds of back-to-back calls before the next one has its turn
_NEAR, _FAR = 215.0, 260.0  # nanoseconds there and back, at most and at least
_LEAST_ROUNDS = 5
_CALL = "call"  # what a call costs that computes nothing


@dataclass(frozen=True, eq=False)
class Way:
    """One way to compute: a model, whose every layer does the same work.

    Attributes:
        model: Path or bytes.
        library: Run with vqonnx's library.
        layers: Layers of that kind in the model; the time is that of one.
    """

    model: bytes | Path
    library: bool = False
    layers: int = 1


@dataclass(frozen=True)
class Timing:
    """Microseconds of one layer (or network) by way, and how many times as long as the first way the others take."""

    microseconds: dict[str, float]
    ratios: dict[str, float]
    near: Distance | None = None
    far: Distance | None = None


@dataclass(frozen=True)
class Distance:
    """The same of the rounds in which a cache line took so many nanoseconds to the other processor and back."""

    nanoseconds: tuple[float, float]
    rounds: int
    ratios: dict[str, float]


def use_threads(threads: int) -> None:
    """Call once, before the first session: with more than one thread all sessions share one pool."""
    if threads > 1:
        onnxruntime.set_global_thread_pool_sizes(threads, 1)


def pin_threads() -> None:
    """Keep this thread on one processor and all others of the process on the rest, where the system can.

    onnxruntime does so with its own pools; one that sessions share has no such setting. Call once all are open.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    first, *rest = sorted(os.sched_getaffinity(0))
    others = sorted(int(task.name) for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid())
    os.sched_setaffinity(0, {first})
    for thread, processor in zip(others, cycle(rest or [first])):
        os.sched_setaffinity(thread, {processor})


def open_way(way: Way, threads: int) -> onnxruntime.InferenceSession:
    """A session with onnxruntime's own settings, but for the threads."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads == 1:
        options.intra_op_num_threads = 1
    else:
        options.use_per_session_threads = False
    if way.library:
        options.register_custom_ops_library(get_library_path())
    source = way.model if isinstance(way.model, bytes) else str(way.model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def time_in_turn(
    sessions: Mapping[str, onnxruntime.InferenceSession],
    layers: Mapping[str, int],
    feed: Callable[[onnxruntime.InferenceSession], dict[str, np.ndarray]],
    *,
    threads: int,
    rounds: int,
    round_trip: Callable[[], float] | None = None,
) -> Timing:
    """Medians over rounds, and medians of each round's ratio to the first session.

    With one thread the clock is that thread's CPU time, which a busy neighbour does not lengthen (but for what it takes
    of caches and memory); with more it is wall time. What a call costs that computes nothing is taken off.
    ``round_trip`` is asked around each round, where processors may be near each other at some times only.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    calls = {name: _bound(session, feed(session)) for name, session in sessions.items()}
    calls[_CALL] = _bound(_nothing(threads), {"x": np.zeros(1, np.float32)})
    repeats = {name: _repeats(call) for name, call in calls.items()}
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    trips = [round_trip()] if round_trip else []
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            call = calls[name]
            start = clock()
            for _ in range(repeats[name]):
                call()
            taken[name].append((clock() - start) / repeats[name])
        trips += [round_trip()] if round_trip else []
    idle = median(taken.pop(_CALL))
    each = {name: [max(value - idle, 1e-9) / layers[name] for value in values] for name, values in taken.items()}
    first = each[names[0]]
    ratios = {
        name: [value / own for value, own in zip(values, first, strict=True)]
        for name, values in each.items()
        if name != names[0]
    }
    return Timing(
        {name: round(1e6 * median(values), 3) for name, values in each.items()},
        {name: round(median(values), 3) for name, values in ratios.items()},
        _at_distance(ratios, trips, 0, _NEAR),
        _at_distance(ratios, trips, _FAR, float("inf")),
    )


def _at_distance(ratios: Mapping[str, list[float]], trips: list[float], least: float, most: float) -> Distance | None:
    """Of the rounds that began and ended with such a round trip, if there are some."""
    chosen = [n for n in range(len(trips) - 1) if least <= min(trips[n : n + 2]) and max(trips[n : n + 2]) <= most]
    if len(chosen) < _LEAST_ROUNDS:
        return None
    of_chosen = [trip for n in chosen for trip in trips[n : n + 2]]
    return Distance(
        (min(of_chosen), max(of_chosen)),
        len(chosen),
        {name: round(median(values[n] for n in chosen), 3) for name, values in ratios.items()},
    )


def time_loading(ways: Mapping[str, Way], threads: int, rounds: int) -> Timing:
    """Seconds of wall time to make a session, in turn; the ratios as in `time_in_turn`."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            session = open_way(way, threads)
            taken[name].append(time.perf_counter() - start)
            del session
    first, *others = ways
    taken = {name: values[1:] for name, values in taken.items()}  # the first reads the file from the disk
    return Timing(
        {name: round(1e6 * median(values), 1) for name, values in taken.items()},
        {
            name: round(median(value / own for value, own in zip(taken[name], taken[first], strict=True)), 3)
            for name in others
        },
    )


def _bound(session: onnxruntime.InferenceSession, feed: Mapping[str, np.ndarray]) -> Callable[[], None]:
    """A call that copies no input or output."""
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(names, dict(feed))  # warms up, and gives the shapes
    binding = session.io_binding()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in feed.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in zip(names, outputs, strict=True):
        held[f"output {name}"] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
        binding.bind_ortvalue_output(name, held[f"output {name}"])

    def call(_: object = held) -> None:
        session.run_with_iobinding(binding)

    for _ in range(3):
        call()
    return call


def _nothing(threads: int) -> onnxruntime.InferenceSession:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 13]> g (float[1] x) => (float[1] y) { y = Neg(x) }'
    )
    return open_way(Way(model.SerializeToString()), threads)


def _repeats(call: Callable[[], None]) -> int:
    start = time.perf_counter()
    call()
    call()
    return max(1, round(_BLOCK / max((time.perf_counter() - start) / 2, 1e-7)))
