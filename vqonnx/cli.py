"""The command line: parse, call one function, show one record, set the exit code.

Exit code 0: done. 1: a check failed. 2: something that was handed in cannot be used, or the run was interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast, get_args

from vqonnx import modelfile, show
from vqonnx.allocate import Progress
from vqonnx.bench import bench
from vqonnx.compress import compress
from vqonnx.config import Config, read_config
from vqonnx.errors import OptionError, VerifyError, VqonnxError
from vqonnx.expand import expand
from vqonnx.generate import generate_feeds
from vqonnx.graph import LINEAR
from vqonnx.labels import read_labels
from vqonnx.method import Method
from vqonnx.methods import DQC, METHODS, method_by_name
from vqonnx.place import Target
from vqonnx.published import import_kill_the_bits
from vqonnx.report import report, sizes_json
from vqonnx.verify import compare, junit

_FAILED, _UNUSABLE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    try:
        options = _parser().parse_args(arguments)
        level = logging.WARNING - 10 * options.verbose + 10 * options.quiet
        logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
        with _terminable():
            return int(options.run(options))
    except VerifyError as error:
        return _complain(str(error), _FAILED)
    except VqonnxError as error:
        return _complain(str(error), _UNUSABLE)
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was written under the output's name", _UNUSABLE)
    except MemoryError:
        return _complain("out of memory; use fewer calibration images or a smaller --batch", _UNUSABLE)
    except OSError as error:
        return _complain(f"{error.filename or 'a file'}: {error.strerror or error}", _UNUSABLE)


def _complain(message: str, code: int) -> int:
    print(f"vqonnx: {message}", file=sys.stderr)
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat a polite kill as Ctrl-C, so that temporary files are cleaned up."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread, where signals are somebody else's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# Commands


def _compress(options: argparse.Namespace) -> int:
    config = read_config(options.config) if options.config else Config()
    modelfile.check_output(options.output, options.model)
    with _progress(options, "compress") as progress:
        result = compress(
            options.model,
            _method(options, config),
            calibration=options.calibration,
            include=[*config.include, *options.include],
            exclude=[*config.exclude, *options.exclude],
            op_types=options.op_types or config.op_types or LINEAR,
            overrides=config.overrides,
            target=_target(options.target or config.target or "hybrid"),
            seed=options.seed if options.seed is not None else config.seed or 0,
            batch=options.batch,
            input_shapes=_shapes(options.input_shapes),
            allow_unchanged=options.allow_unchanged,
            progress=progress,
        )
    saved = result.save(options.output, verify=not options.no_verify, rtol=options.check_rtol, atol=options.check_atol)
    if options.json:
        content = sizes_json(result.bytes_before, saved.bytes, result.layers, result.skipped)
        content["verify"] = None if saved.comparison is None else saved.comparison.to_json()
        _print_json(content)
    elif not options.quiet:
        show.layers(result.layers)
        show.skipped(result.skipped)
        show.sizes(result.bytes_before, saved.bytes, saved.path)
        if saved.comparison is not None:
            data = "generated inputs" if options.calibration is None else "calibration data"
            show.moved(saved.comparison, data)
    return 0


def _target(name: str) -> Target:
    if name not in get_args(Target):
        raise OptionError(f"target '{name}' is unknown; choose one of {', '.join(get_args(Target))}")
    return cast(Target, name)


def _method(options: argparse.Namespace, config: Config) -> Method | None:
    """The method that command line and configuration ask for; None leaves the choice to `compress`."""
    name = options.method or config.method
    same = options.method in (None, config.method)  # options of the file belong to its method
    values: dict[str, Any] = dict(config.options) if same else {}
    for setting in options.set:
        key, sign, value = setting.partition("=")
        if not sign:
            raise OptionError(f"--set {setting}: write it as option=value")
        values[key] = value
    if options.bits is not None:
        values["bits"] = options.bits
    if options.width is not None:
        values["width"] = options.width
    if name is None and not values:
        return None
    return method_by_name(name or ("pq" if options.calibration is None else "bgd"), values)


def _distill(options: argparse.Namespace) -> int:
    try:
        from vqonnx.training.distill import distill
        from vqonnx.training.recipe import Recipe
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise OptionError("distill needs PyTorch; install it with: pip install 'vqonnx[distill]'") from error
    modelfile.check_output(options.output, options.original)
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
    return _FAILED if made.diverged else 0


def _train_dqc(options: argparse.Namespace) -> int:
    try:
        from vqonnx.training.dqc import Recipe, train_dqc
        from vqonnx.training.loop import Schedule
        from vqonnx.training.samples import Samples
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise OptionError("train-dqc needs PyTorch; install it with: pip install 'vqonnx[distill]'") from error
    modelfile.check_output(options.output, options.model)
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
            checkpoint=None if options.checkpoint is None else Path(options.checkpoint),
            data_name=f"{Path(options.data).name} {Path(options.labels).name}",
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
    return _FAILED if trained.history.diverged is not None else 0


def _verify(options: argparse.Namespace) -> int:
    _check_models(options)
    feeds = options.data or generate_feeds(options.original, shapes=_shapes(options.input_shapes), seed=0)
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
    return 0 if comparison.passed else _FAILED


def _report(options: argparse.Namespace) -> int:
    found = report(options.model)
    if options.json:
        _print_json(found.to_json())
    elif not options.quiet:
        show.layers(found.layers)
        show.skipped(found.skipped)
        show.sizes(found.bytes_before, found.bytes_after, Path(options.model))
        if found.distilled is not None:
            show.distilled(found.distilled)
    return 0


def _expand(options: argparse.Namespace) -> int:
    count = expand(options.model, options.output)
    if not options.quiet:
        show.line(f"{options.output}: {count} weights decoded, {modelfile.file_bytes(options.output):,} bytes")
    return 0


def _import(options: argparse.Namespace) -> int:
    modelfile.check_output(options.output, options.model)
    shapes, target = _shapes(options.input_shapes), _target(options.target)
    result = import_kill_the_bits(options.checkpoint, options.model, target=target, input_shapes=shapes)
    saved = result.save(options.output)
    paper = result.checkpoint.paper_mib
    if options.json:
        _print_json({**sizes_json(result.bytes_before, saved.bytes, result.layers, ()), "paper_mib": paper})
    elif not options.quiet:
        show.layers(result.layers)
        show.sizes(result.bytes_before, saved.bytes, saved.path)
        show.line(f"by the paper's rule {paper:.3f} MiB; the file has {saved.bytes / 2**20:.3f} MiB")
    return 0


def _bench(options: argparse.Namespace) -> int:
    _check_models(options)
    result = bench(
        options.original,
        options.compressed,
        feeds=options.data,
        threads=options.threads or 1,
        rounds=options.rounds,
        shapes=_shapes(options.input_shapes),
    )
    if options.json:
        _print_json(result.to_json())
    elif not options.quiet:
        show.bench(result)
    return 0


def _methods(options: argparse.Namespace) -> int:
    if not options.quiet:
        show.methods(METHODS)
    return 0


def _check_models(options: argparse.Namespace) -> None:
    """Refuse files that are no models in our words, before onnxruntime does in its own."""
    for path in (options.original, options.compressed):
        modelfile.load(path)


def _shapes(texts: Sequence[str]) -> dict[str, list[int]] | None:
    """``name:1x3x224x224`` as a dict; None without any."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        try:
            shapes[name] = [int(size) for size in sizes.replace(",", "x").split("x") if size]
        except ValueError:
            name = ""
        if not name:
            raise OptionError(f"--input-shapes {text}: write it as name:1x3x224x224")
    return shapes or None


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


@contextmanager
def _progress(options: argparse.Namespace, title: str) -> Iterator[Progress | None]:
    if options.quiet:
        yield None
        return
    with show.progress(title) as update:
        yield update


# The parser


class _Parser(argparse.ArgumentParser):
    """Complains in one line, like everything else."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see '{self.prog} --help'")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vqonnx", description="Make ONNX models smaller by vector quantisation, and prove that they still agree."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add = _command(commands, "compress", _compress, "replace weights by codes and codebooks")
    add("model", metavar="IN", help="the ONNX model")
    add("output", metavar="OUT", help="the compressed model")
    add("--method", metavar="M", help="see 'vqonnx methods'; default bgd with calibration data, pq without")
    add("--set", metavar="OPTION=VALUE", action="append", default=[], help="an option of the method; may be repeated")
    add("--bits", metavar="B", help="short for --set bits=B")
    add("--width", metavar="D", help="short for --set width=D")
    add("--calibration", metavar="PATH", help=".npz keyed by input name, or a folder of them")
    add("--include", metavar="PATTERN", action="append", default=[], help="compress only these layers")
    add("--exclude", metavar="PATTERN", action="append", default=[], help="leave these layers alone")
    add("--op-types", metavar="OP", nargs="+", help=f"compress only these operators (default {' '.join(LINEAR)})")
    add("--config", metavar="FILE.toml", help="methods by layer")
    add("--target", metavar="T", help=f"{', '.join(get_args(Target))} (default hybrid)")
    add("--seed", type=int, metavar="N", help="same seed, same bytes (default 0)")
    add("--batch", type=int, default=16, metavar="N", help="images run at once (default 16)")
    add("--input-shapes", metavar="NAME:SHAPE", nargs="+", default=[], help="for generated inputs: name:1x3x224x224")
    add("--check-rtol", type=float, metavar="R", help="refuse outputs further from the original's than this")
    add("--check-atol", type=float, metavar="A", help="the same, absolute")
    add("--no-verify", action="store_true", help="do not load and run the written model")
    add("--allow-unchanged", action="store_true", help="copy a model in which nothing can be compressed")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "distill", _distill, "move the codebooks of a compressed model towards the original")
    add("original", metavar="ORIGINAL")
    add("compressed", metavar="COMPRESSED")
    add("output", metavar="OUT")
    add("--calibration", metavar="PATH", required=True, help="unlabelled inputs: .npz, or a folder of them")
    add("--steps", type=int, metavar="N", help="steps for all codebooks (default nine passes over the inputs)")
    add("--rate", type=float, metavar="R", help="their learning rate")
    add("--layer-steps", type=int, metavar="N", help="steps for each layer before (default a quarter of a pass)")
    add("--layer-rate", type=float, metavar="R", help="their learning rate")
    add("--batch", type=int, metavar="N", help="images of a step (default 128)")
    add("--loss", metavar="L", help="kl for classifiers (default), mse for anything")
    add("--gradient", metavar="G", help="of a codeword: mean over its blocks (default) or sum")
    add("--biases", action="store_true", default=None, help="move biases as well")
    add("--seed", type=int, metavar="N", help="same seed, same bytes on one thread (default 0)")
    add("--checkpoint", metavar="FILE", help="keep the state here, and go on from it")
    add("--device", default="cpu", metavar="D", help="where PyTorch computes (default cpu)")
    add("--no-verify", action="store_true", help="do not load and run the written model")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "train-dqc", _train_dqc, "train a classifier whose weights are powers of two")
    add("model", metavar="IN", help="the ONNX model, best with its BatchNormalization nodes")
    add("output", metavar="OUT", help="the compressed model")
    add("--data", metavar="PATH", required=True, help="training inputs: .npz keyed by input name, or a folder of them")
    add("--labels", metavar="FILE", required=True, help="their classes: .npy, .npz, .csv or .txt")
    add("--bits", default="4", metavar="B", help="3, 4 or 5 (default 4)")
    add("--no-zero", action="store_true", help="a codebook without zero")
    add("--steps", type=int, metavar="N", help="steps (default one pass over the data)")
    add("--rate", type=float, default=0.003, metavar="R", help="learning rate; a tenth from 60 %% on, again from 85 %%")
    add("--rule", default="identity", metavar="R", help="gradient: identity (default) or magnitude, the paper's")
    add("--l1", type=float, default=0.0, metavar="X", help="times the sum of absolute weights, added to the loss")
    add("--l2", type=float, default=1e-4, metavar="X", help="times half the sum of squared weights (default 1e-4)")
    add("--teacher", type=float, default=0.0, metavar="S", help="share of the loss that is the original's outputs")
    add("--original", metavar="MODEL", help="the model that teaches, if IN is one that was coded and expanded again")
    add("--batch", type=int, default=128, metavar="N", help="images of a step (default 128)")
    add("--seed", type=int, metavar="N", help="same seed, same bytes on one thread (default 0)")
    add("--checkpoint", metavar="FILE", help="keep the state here, and go on from it")
    add("--no-verify", action="store_true", help="do not load and run the written model")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "verify", _verify, "compare two models on the same inputs")
    add("original", metavar="ORIGINAL")
    add("compressed", metavar="COMPRESSED")
    add("--data", metavar="PATH", help=".npz keyed by input name, or a folder of them; generated inputs if not given")
    add("--labels", metavar="FILE", help="right classes: .npy, .npz, .csv or .txt")
    add("--library", action="store_true", help="run the compressed model with the custom-op library")
    add("--min-snr", type=float, metavar="DB", help="least SNR of the worst output")
    add("--min-agreement", type=float, metavar="A", help="least share (0..1) of images with the same best class")
    add("--max-drop", type=float, metavar="P", help="most percentage points of accuracy lost")
    add("--check-rtol", type=float, metavar="R", help="every value within atol + rtol * |original|")
    add("--check-atol", type=float, metavar="A", help="see --check-rtol")
    add("--input-shapes", metavar="NAME:SHAPE", nargs="+", default=[], help="for generated inputs")
    add("--threads", type=int, metavar="N", help="threads of one operator")
    add("--json", action="store_true", help="print JSON")
    add("--junit", metavar="FILE", help="write JUnit XML")

    add = _command(commands, "report", _report, "what each layer of a compressed model costs")
    add("model", metavar="MODEL")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "expand", _expand, "turn a compressed model back into a plain one")
    add("model", metavar="IN")
    add("output", metavar="OUT")

    add = _command(
        commands, "import-kill-the-bits", _import, "put a checkpoint of Stock et al. 2020 into an ONNX model"
    )
    add("checkpoint", metavar="CHECKPOINT", help="the published .pth file (read with torch)")
    add("model", metavar="MODEL", help="ONNX model of the same network, batch normalisation folded")
    add("output", metavar="OUT", help="the compressed model")
    add("--target", metavar="T", default="hybrid", help=f"{', '.join(get_args(Target))} (default hybrid)")
    add("--input-shapes", metavar="NAME:SHAPE", nargs="+", default=[], help="for generated inputs: name:1x3x224x224")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "bench", _bench, "latency and memory of two models")
    add("original", metavar="ORIGINAL")
    add("compressed", metavar="COMPRESSED")
    add("--data", metavar="PATH", help="inputs; generated if not given")
    add("--threads", type=int, default=1, metavar="N", help="threads of one operator (default 1)")
    add("--rounds", type=int, default=30, metavar="N", help="timed runs of each (default 30)")
    add("--input-shapes", metavar="NAME:SHAPE", nargs="+", default=[], help="for generated inputs")
    add("--json", action="store_true", help="print JSON")

    _command(commands, "methods", _methods, "list the methods and their options")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Callable[..., Any]:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("--quiet", action="store_true", help="print nothing but errors")
    command.add_argument("--verbose", action="count", default=0, help="say more; twice for everything")
    add: Callable[..., Any] = command.add_argument
    return add


if __name__ == "__main__":
    sys.exit(main())
