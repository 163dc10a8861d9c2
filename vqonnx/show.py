"""Records as tables for people: rich on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vqonnx.analysis import LayerAnalysis
from vqonnx.bench import BenchResult
from vqonnx.fuse import FusedFile
from vqonnx.graph import Skipped
from vqonnx.method import Method
from vqonnx.record import LayerRecord
from vqonnx.verify import Comparison

_PLAIN_WIDTH = 10_000  # no line is broken where the output is read by programs


def _console() -> Console:
    """Made when used, so that it follows a redirected standard output."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def line(text: str) -> None:
    """One line."""
    _console().print(text)


def layers(records: Sequence[LayerRecord]) -> None:
    """One row a layer; options, multiplications and fused ops only where layers differ in them."""
    if not records:
        return
    table = Table("layer", "op", "shape", "method", box=None, pad_edge=False)
    split, fused = any(record.factors for record in records), any(record.fused for record in records)
    for title in ("bytes", "bits/weight", "weight dB", "output dB", *(["multiplications"] if split else [])):
        table.add_column(title, justify="right")
    if fused:
        table.add_column("fused")
    ways = {_way(record) for record in records}
    for record in records:
        table.add_row(
            record.name,
            record.op_type,
            "x".join(map(str, record.shape)),
            record.method if len(ways) == 1 else _way(record),
            f"{record.bytes:,}",
            f"{record.bits_per_weight:.2f}",
            _decibel(record.weight_snr_db),
            _decibel(record.output_snr_db),
            *([f"{record.multiplications:.1%}"] if split else []),
            *([", ".join(record.fused) or "-"] if fused else []),
        )
    _console().print(table)
    if len(ways) == 1:
        line(f"method: {ways.pop()}")


def analysis(found: Sequence[LayerAnalysis]) -> None:
    """One row a layer, the most harmful first."""
    table = Table("layer", "op", "shape", box=None, pad_edge=False)
    for title in ("sensitivity", "harm, even bits", "bits/weight", "harm", "output dB"):
        table.add_column(title, justify="right")
    table.add_column("method")
    for entry in sorted(found, key=lambda entry: -entry.even):
        table.add_row(
            entry.name,
            entry.op_type,
            "x".join(map(str, entry.shape)),
            f"{entry.sensitivity:.3g}",
            f"{entry.even:.1%}",
            f"{entry.bits:.2f}",
            f"{entry.harm:.1%}",
            f"{entry.snr_db:.1f}",
            entry.method.id,
        )
    _console().print(table)


def skipped(entries: Sequence[Skipped]) -> None:
    """Layers left alone, and why."""
    if not entries:
        return
    line(f"\nleft alone ({len(entries)}):")
    for entry in entries:
        line(f"  {entry.name}: {entry.reason}")


def parts(after: dict[str, int], before: dict[str, int] | None = None) -> None:
    """Bytes of each kind of content, in one line."""
    texts = [f"{name} {f'{before[name]:,} -> ' if before else ''}{count:,}" for name, count in after.items()]
    line(f"\nbytes: {', '.join(texts)}")


def sizes(before: int | None, after: int, path: Path) -> None:
    """What was saved."""
    if before is None:
        line(f"\n{path}: {after:,} bytes")
    else:
        line(f"\n{path}: {before:,} -> {after:,} bytes, {before / after:.2f}x smaller")
        if after >= before:
            line("nothing was gained: the layers are too small for codebooks and a decoder; keep the original")


def fused(made: FusedFile, *, undone: bool) -> None:
    """What became of the layers, in one line."""
    counts = Counter(made.layers.values())
    what = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    how = "taken apart" if undone else "fused"
    line(f"{made.path}: {len(made.layers)} layers {how} ({what}), {made.bytes:,} bytes")


def distilled(note: dict[str, Any]) -> None:
    """How the codebooks were distilled, in one line."""
    line(f"distilled: {', '.join(f'{name}={_spell(value)}' for name, value in note.items())}")


def moved(comparison: Comparison, data: str) -> None:
    """How far the outputs moved, in one line."""
    parts = ["outputs are identical" if comparison.identical else f"outputs at {_decibel(comparison.snr_db)} dB SNR"]
    if comparison.top1_agreement is not None:
        parts.append(f"the same best class on {comparison.top1_agreement:.1%} of {comparison.images} images")
    line(f"on the {data}: {', '.join(parts)}")


def comparison(found: Comparison) -> None:
    """Everything that `verify` measured."""
    table = Table("output", box=None, pad_edge=False)
    for title in ("SNR dB", "max abs", "cosine"):
        table.add_column(title, justify="right")
    for output in found.outputs:
        snr = "identical" if output.identical else _decibel(output.snr_db)
        table.add_row(output.name, snr, _number(output.max_abs, ".3g"), _number(output.cosine, ".6f"))
    _console().print(table)
    if found.top1_agreement is not None:
        line(f"top-1 agreement: {found.top1_agreement:.2%} of {found.images}")
    if found.top1_before is not None and found.top1_after is not None:
        drop = 100 * (found.top1_before - found.top1_after)
        line(f"top-1 accuracy: {found.top1_before:.2%} -> {found.top1_after:.2%} ({drop:+.2f} points lost)")
    for check in found.checks:
        verdict = "passed" if check.passed else "FAILED"
        line(f"{verdict}: {check.name} {_number(check.value, '.6g')} (limit {check.limit:g})")


def bench(result: BenchResult) -> None:
    """Latency and memory of the three ways to run."""
    table = Table("", box=None, pad_edge=False)
    for title in ("latency ms", "ratio", "memory MB", "peak MB"):
        table.add_column(title, justify="right")
    for field in fields(result.latency_ms):
        row = (result.latency_ms, result.ratio, result.memory_mb, result.peak_mb)
        cells = [_number(getattr(figures, field.name), ".3f") for figures in row]
        table.add_row(field.name.replace("_", " + "), *cells)
    _console().print(table)
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    line(f"threads {result.threads}, rounds {result.rounds}; {result.machine['processor']}; {versions}")


def methods(kinds: Sequence[type[Method]]) -> None:
    """Each method with its options and their defaults."""
    for kind in kinds:
        line(f"{kind.id}: {_summary(kind)} (needs {kind.needs.value})")
        hints = get_type_hints(kind)
        for option in fields(kind):
            line(f"    {option.name} = {_spell(option.default)}  ({_choices(hints[option.name])})")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, plain lines elsewhere; both on standard error."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:

        def plain(done: int, total: int, name: str) -> None:
            if name:
                print(f"{title}: {done + 1}/{total} {name}", file=sys.stderr, flush=True)

        yield plain
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title} {name}".rstrip())

        yield update


def _way(record: LayerRecord) -> str:
    options = ", ".join(f"{name}={value}" for name, value in record.options.items())
    return f"{record.method}({options})"


def _spell(value: Any) -> str:
    """A value of an option as the command line takes it."""
    if value is None:
        return "auto"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choices(hint: Any) -> str:
    """What an option may be."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if NoneType in get_args(hint):
        return " or ".join(["auto", *(_choices(choice) for choice in get_args(hint) if choice is not NoneType)])
    words: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false"}
    return words.get(hint, "text")


def _summary(kind: type[Method]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _decibel(value: float | None) -> str:
    return _number(value, ".1f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
