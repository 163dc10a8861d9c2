"""What each command of the command line does: one function each, which gives the exit code."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vqonnx import modelfile, show
from vqonnx.analysis import analyze, override_table, plot
from vqonnx.arguments import limits_of, method_of, quick_method, shapes_of, target_of
from vqonnx.bench import bench
from vqonnx.breakdown import breakdown
from vqonnx.compact_file import compact_file
from vqonnx.compress import compress
from vqonnx.config import Config, read_config
from vqonnx.errors import OptionError, VqonnxError
from vqonnx.expand import expand
from vqonnx.fit import Limits
from vqonnx.fuse import fuse
from vqonnx.generate import generate_feeds
from vqonnx.graph import LINEAR
from vqonnx.labels import read_labels
from vqonnx.menu import Progress
from vqonnx.method import Budgeted
from vqonnx.methods import DQC, METHODS, Best, method_by_name
from vqonnx.published import import_kill_the_bits
from vqonnx.report import report, sizes_json
from vqonnx.result import Result
from vqonnx.verify import compare, junit

if TYPE_CHECKING:
    from vqonnx.training.last_step import LastStep

FAILED = 1  # exit code of a check that failed

_log = logging.getLogger(__name__)


def run_compress(options: argparse.Namespace) -> int:
    """Compress a model, check it and show what came out."""
    config = read_config(options.config) if options.config else Config()
    modelfile.check_output(
        options.output, options.model, options.calibration, options.data, options.labels, options.config
    )
    if options.distill and options.calibration is None:
        raise OptionError("--distill needs calibration data; give --calibration")
    if options.distill and options.permute:
        raise OptionError("--distill needs the channels in their order; give it or --permute, not both")
    if options.distill:
        _check_torch("--distill")  # before the work, not behind it
    if options.optimize not in ("size", "speed"):
        raise OptionError(f"--optimize {options.optimize}: choose size or speed")
    quick = options.optimize == "speed"
    limits = limits_of(options)
    with _progress(options, "compress") as progress:
        result = compress(
            options.model,
            quick_method(options, config) if quick else method_of(options, config),
            calibration=options.calibration,
            include=[*config.include, *options.include],
            exclude=[*config.exclude, *options.exclude],
            op_types=options.op_types or config.op_types or LINEAR,
            overrides=config.overrides,
            target=target_of(options.target or config.target or "hybrid"),
            limits=limits,
            seed=options.seed if options.seed is not None else config.seed or 0,
            batch=options.batch,
            input_shapes=shapes_of(options.input_shapes),
            allow_unchanged=options.allow_unchanged,
            fuse=True if quick and options.fuse is None else options.fuse,
            compact=False if quick and options.compact is None else options.compact,
            half_biases=options.half_biases,
            permute=options.permute,
            cache=options.cache,
            jobs=options.jobs if options.jobs is not None else os.cpu_count() or 1,
            progress=progress,
        )
    step, failed = None, False
    if options.distill:
        try:
            step = _last_step(options, result, limits)
        except VqonnxError as error:  # what is compressed took long, and is good without it
            _log.warning("not distilled: %s", error)
            failed = True
    result = result if step is None else step.result
    saved = result.save(options.output, verify=not options.no_verify, rtol=options.check_rtol, atol=options.check_atol)
    if options.json:
        content = sizes_json(result.bytes_before, saved.bytes, result.layers, result.skipped)
        content["parts"] = breakdown(result.model)
        if step is not None:
            content["distill"] = step.to_json()
        content["verify"] = None if saved.comparison is None else saved.comparison.to_json()
        _print_json(content)
    elif not options.quiet:
        show.layers(result.layers)
        show.skipped(result.skipped)
        show.sizes(result.bytes_before, saved.bytes, saved.path)
        if saved.comparison is not None:
            data = "generated inputs" if options.calibration is None else "calibration data"
            show.moved(saved.comparison, data)
        if step is not None:
            show.line(str(step))
    return FAILED if failed else 0


def _last_step(options: argparse.Namespace, result: Result, limits: Limits | None) -> LastStep:
    """Distil what was compressed, within the limits that were asked for."""
    try:
        from vqonnx.training.last_step import last_step
    except ModuleNotFoundError as error:
        raise _without_torch("--distill", error) from error
    with _progress(options, "distill") as progress:
        return last_step(
            result,
            options.calibration,
            batch=options.batch,
            limits=limits,
            progress=progress and (lambda done, total, text: progress(done - 1, total, text)),
        )


def _check_torch(what: str) -> None:
    """Refuse what needs PyTorch where it is not there, without loading it."""
    try:
        found = importlib.util.find_spec("torch")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise _without_torch(what, ModuleNotFoundError(name="torch"))


def _without_torch(what: str, error: ModuleNotFoundError) -> Exception:
    """What to say where a module is missing."""
    if error.name != "torch":
        return error
    return OptionError(f"{what} needs PyTorch; install it with: pip install 'vqonnx[distill]'")


def run_analyze(options: argparse.Namespace) -> int:
    """Show which layers hurt, and write the table for ``--config``."""
    options.width = None
    method = method_of(options, Config()) or Best()
    if not isinstance(method, Budgeted):
        raise OptionError(f"method '{method.id}' has no bits to share; choose best, entropy or transform")
    for path in (options.output, options.plot):
        if path is not None:
            modelfile.check_output(path, options.model, options.calibration)
    with _progress(options, "analyze") as progress:
        found = analyze(
            options.model,
            method,
            calibration=options.calibration,
            seed=options.seed,
            batch=options.batch,
            cache=options.cache,
            jobs=options.jobs if options.jobs is not None else os.cpu_count() or 1,
            progress=progress,
        )
    if options.output:
        with modelfile.whole_or_nothing(options.output) as draft:
            draft.write_text(override_table(found), encoding="utf-8")
    if options.plot:
        plot(found, options.plot)
    if options.json:
        _print_json({"layers": [layer.to_json() for layer in found]})
    elif not options.quiet:
        show.analysis(found)
    return 0


def run_distill(options: argparse.Namespace) -> int:
    """Tune the codebooks of a compressed model."""
    try:
        from vqonnx.training.distill import distill
        from vqonnx.training.recipe import Recipe
    except ModuleNotFoundError as error:
        raise _without_torch("distill", error) from error
    modelfile.check_output(options.output, options.original, options.calibration)
    modelfile.check_output(options.output, options.compressed)
    names = [field.name for field in fields(Recipe) if getattr(options, field.name, None) is not None]
    recipe = Recipe(**{name: getattr(options, name) for name in names})
    checkpoint = None if options.checkpoint is None else Path(options.checkpoint)
    with _progress(options, "distill") as progress:
        made = distill(
            options.original,
            options.compressed,
            options.calibration,
            recipe,
            checkpoint=checkpoint,
            device=options.device,
            progress=progress and (lambda done, total, text: progress(done - 1, total, text)),
        )
    saved = made.save(options.output, verify=not options.no_verify)
    if options.json:
        content = sizes_json(made.result.bytes_before, saved.bytes, made.result.layers, made.result.skipped)
        content["loss"] = {"before": made.loss_before, "after": made.loss_after}
        content["verify"] = None if saved.comparison is None else saved.comparison.to_json()
        _print_json(content)
    elif not options.quiet:
        show.layers(made.result.layers)
        show.sizes(made.result.bytes_before, saved.bytes, saved.path)
        show.line(f"loss {made.loss_before:.4g} -> {made.loss_after:.4g}")
        if saved.comparison is not None:
            show.moved(saved.comparison, "calibration data")
    return FAILED if made.diverged else 0


def run_train_dqc(options: argparse.Namespace) -> int:
    """Train a classifier with power-of-two weights."""
    try:
        from vqonnx.training.dqc import Recipe, train_dqc
        from vqonnx.training.loop import Schedule
        from vqonnx.training.samples import Samples
    except ModuleNotFoundError as error:
        raise _without_torch("train-dqc", error) from error
    modelfile.check_output(options.output, options.model, options.data, options.labels)
    method = cast(DQC, method_by_name("dqc", {"bits": options.bits, "zero": not options.no_zero, "fit": "paper"}))
    samples = Samples(
        options.model, options.data, read_labels(options.labels), batch=options.batch, seed=options.seed or 0
    )
    steps = options.steps or -(-samples.count // options.batch)
    drops = (int(0.6 * steps), int(0.85 * steps))
    with _progress(options, "train") as progress:
        trained = train_dqc(
            options.model,
            samples,
            method,
            Recipe(Schedule(steps, options.rate, drops), options.rule, options.l1, options.l2, options.teacher),
            original=options.original,
            teacher=options.taught_by,
            checkpoint=None if options.checkpoint is None else Path(options.checkpoint),
            data_name=f"{Path(options.data).name} {Path(options.labels).name}",
            device=options.device,
            progress=progress and (lambda done, total, text: progress(done - 1, total, text)),
        )
    saved = trained.result.save(options.output, verify=not options.no_verify)
    if options.json:
        content = sizes_json(trained.result.bytes_before, saved.bytes, trained.result.layers, trained.result.skipped)
        content["losses"] = trained.history.losses
        content["diverged"] = trained.history.diverged
        content["verify"] = None if saved.comparison is None else saved.comparison.to_json()
        _print_json(content)
    elif not options.quiet:
        show.layers(trained.result.layers)
        show.skipped(trained.result.skipped)
        show.sizes(trained.result.bytes_before, saved.bytes, saved.path)
    return FAILED if trained.history.diverged is not None else 0


def run_verify(options: argparse.Namespace) -> int:
    """Compare two models; exit code 1 if a limit is not kept."""
    _check_models(options)
    feeds = options.data or generate_feeds(options.original, shapes=shapes_of(options.input_shapes), seed=0)
    labels = None if options.labels is None else read_labels(options.labels)
    comparison = compare(
        options.original,
        options.compressed,
        feeds,
        labels=labels,
        library=options.library,
        min_snr=options.min_snr,
        min_agreement=options.min_agreement,
        max_drop=options.max_drop,
        rtol=options.check_rtol,
        atol=options.check_atol,
        threads=options.threads,
    )
    if options.junit:
        with modelfile.whole_or_nothing(options.junit) as draft:
            draft.write_text(junit(comparison, Path(options.compressed).name), encoding="utf-8")
    if options.json:
        _print_json(comparison.to_json())
    elif not options.quiet:
        show.comparison(comparison)
    return 0 if comparison.passed else FAILED


def run_report(options: argparse.Namespace) -> int:
    """Show what each layer of a compressed model costs."""
    found = report(options.model)
    if options.json:
        _print_json(found.to_json())
    elif not options.quiet:
        show.layers(found.layers)
        show.skipped(found.skipped)
        show.parts(found.parts)
        show.sizes(found.bytes_before, found.bytes_after, Path(options.model))
        if found.distilled is not None:
            show.distilled(found.distilled)
    return 0


def run_expand(options: argparse.Namespace) -> int:
    """Write a plain model."""
    count = expand(options.model, options.output)
    if not options.quiet:
        show.line(f"{options.output}: {count} weights decoded, {modelfile.file_bytes(options.output):,} bytes")
    return 0


def run_fuse(options: argparse.Namespace) -> int:
    """Fuse the layers of a compressed model, or take them apart."""
    made = fuse(
        options.model,
        options.output,
        undo=options.undo,
        verify=not options.no_verify,
        input_shapes=shapes_of(options.input_shapes),
    )
    if options.json:
        _print_json({"layers": dict(made.layers), "bytes": made.bytes})
    elif not options.quiet:
        show.fused(made, undone=options.undo)
    return 0


def run_compact(options: argparse.Namespace) -> int:
    """Make everything but the weights of a file smaller."""
    shapes = shapes_of(options.input_shapes)
    made = compact_file(options.model, options.output, verify=not options.no_verify, input_shapes=shapes)
    if options.json:
        _print_json(made.to_json())
    elif not options.quiet:
        show.parts(made.parts, made.parts_before)
        show.sizes(made.bytes_before, made.bytes, made.path)
    return 0


def run_import(options: argparse.Namespace) -> int:
    """Put a published checkpoint into a graph."""
    modelfile.check_output(options.output, options.model, options.checkpoint)
    shapes, target = shapes_of(options.input_shapes), target_of(options.target)
    result = import_kill_the_bits(
        options.checkpoint, options.model, target=target, fuse=options.fuse, input_shapes=shapes
    )
    saved = result.save(options.output)
    paper = result.checkpoint.paper_mib
    if options.json:
        _print_json({**sizes_json(result.bytes_before, saved.bytes, result.layers, ()), "paper_mib": paper})
    elif not options.quiet:
        show.layers(result.layers)
        show.sizes(result.bytes_before, saved.bytes, saved.path)
        show.line(f"by the paper's rule {paper:.3f} MiB; the file has {saved.bytes / 2**20:.3f} MiB")
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Show latency and memory of two models."""
    _check_models(options)
    result = bench(
        options.original,
        options.compressed,
        feeds=options.data,
        threads=options.threads or 1,
        rounds=options.rounds,
        shapes=shapes_of(options.input_shapes),
    )
    if options.json:
        _print_json(result.to_json())
    elif not options.quiet:
        show.bench(result)
    return 0


def run_methods(options: argparse.Namespace) -> int:
    """List the methods."""
    if not options.quiet:
        show.methods(METHODS)
    return 0


def _check_models(options: argparse.Namespace) -> None:
    """Refuse files that are no models in our words, before onnxruntime does in its own."""
    for path in (options.original, options.compressed):
        modelfile.load(path)


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


@contextmanager
def _progress(options: argparse.Namespace, title: str) -> Iterator[Progress | None]:
    if options.quiet:
        yield None
        return
    with show.progress(title) as update:
        yield update
