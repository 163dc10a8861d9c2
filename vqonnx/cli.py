"""The command line: parse, call one function, set the exit code. What the commands do is in `commands.py`.

Exit code 0: done. 1: a check failed. 2: something that was handed in cannot be used, or the run was interrupted.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, get_args

from vqonnx import commands as run
from vqonnx.errors import OptionError, VerifyError, VqonnxError
from vqonnx.fusion import BY_DEFAULT
from vqonnx.graph import LINEAR
from vqonnx.place import Target

_UNUSABLE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    try:
        options = _parser().parse_args(arguments)
        level = logging.WARNING - 10 * options.verbose + 10 * options.quiet
        logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
        with _terminable():
            return int(options.run(options))
    except VerifyError as error:
        return _complain(str(error), run.FAILED)
    except VqonnxError as error:
        return _complain(str(error), _UNUSABLE)
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was written under the output's name", _UNUSABLE)
    except MemoryError:
        return _complain("out of memory; use fewer calibration images, a smaller --batch or fewer --jobs", _UNUSABLE)
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

    add = _command(commands, "compress", run.run_compress, "replace weights by codes and codebooks")
    add("model", metavar="IN", help="the ONNX model")
    add("output", metavar="OUT", help="the compressed model")
    add("--method", metavar="M", help="see 'vqonnx methods'; default best with calibration data, pq without")
    add("--set", metavar="OPTION=VALUE", action="append", default=[], help="an option of the method; may be repeated")
    add("--bits", metavar="B", help="short for --set bits=B")
    add("--width", metavar="D", help="short for --set width=D")
    add("--calibration", metavar="PATH", help=".npz keyed by input name, or a folder of them")
    add("--include", metavar="PATTERN", action="append", default=[], help="compress only these layers")
    add("--exclude", metavar="PATTERN", action="append", default=[], help="leave these layers alone")
    add("--op-types", metavar="OP", nargs="+", help=f"compress only these operators (default {' '.join(LINEAR)})")
    add("--config", metavar="FILE.toml", help="methods by layer")
    add("--target-size", metavar="SIZE", help="bytes of the file, never more: 300KB (1,000), 1.5MiB (1,024)")
    add("--target-ratio", type=float, metavar="R", help="the file is this many times smaller than the original")
    add("--max-drop", type=float, metavar="P", help="percentage points that may be lost on --data, in as small a file")
    add("--data", metavar="PATH", help="for --max-drop: inputs other than those of the calibration")
    add("--labels", metavar="FILE", help="for --max-drop: right classes of --data; agreement counts without them")
    add("--cache", metavar="FOLDER", help="keep what layers can do at which size, and go on from it")
    add("--jobs", type=int, metavar="N", help="layers tried at the same time (default all cores)")
    add("--target", metavar="T", help=f"{', '.join(get_args(Target))} (default hybrid)")
    add("--seed", type=int, metavar="N", help="same seed, same bytes (default 0)")
    add("--batch", type=int, default=16, metavar="N", help="images run at once (default 16)")
    add("--input-shapes", metavar="NAME:SHAPE", nargs="+", default=[], help="for generated inputs: name:1x3x224x224")
    add("--check-rtol", type=float, metavar="R", help="refuse outputs further from the original's than this")
    add("--check-atol", type=float, metavar="A", help="the same, absolute")
    add("--no-verify", action="store_true", help="do not load and run the written model")
    add("--allow-unchanged", action="store_true", help="copy a model in which nothing can be compressed")
    _add_fuse(add)
    text = "make all that is not weights as small as it gets: names, attributes, constants (default with a target)"
    add("--compact", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "round biases to float16, which takes half the bytes with --compact (default with a target)"
    add("--half-biases", action=argparse.BooleanOptionalAction, default=None, help=text)
    add("--permute", action="store_true", help="put channels into an order that is easier to code, where outputs stay")
    text = "size (default), or speed with the library: codes of one length along the channels, and fused layers"
    add("--optimize", default="size", metavar="WHAT", help=text)
    text = "then move the codebooks to the original's outputs (needs PyTorch); kept where inputs held out agree better"
    add("--distill", action="store_true", help=text)
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "analyze", run.run_analyze, "which layers hurt when they are compressed")
    add("model", metavar="MODEL", help="the ONNX model")
    add("--calibration", metavar="PATH", required=True, help=".npz keyed by input name, or a folder of them")
    add("--method", metavar="M", help="best (default), entropy or transform")
    add("--set", metavar="OPTION=VALUE", action="append", default=[], help="an option of the method; may be repeated")
    add("--bits", metavar="B", help="bits a weight that the layers share")
    add("--output", metavar="FILE.toml", help="write the table of methods by layer that 'compress --config' reads")
    add("--plot", metavar="FILE.png", help="draw it (needs matplotlib)")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    add("--batch", type=int, default=16, metavar="N", help="images run at once (default 16)")
    add("--cache", metavar="FOLDER", help="keep what layers can do at which size, for 'compress --cache'")
    add("--jobs", type=int, metavar="N", help="layers tried at the same time (default all cores)")
    add("--json", action="store_true", help="print JSON")

    add = _command(
        commands, "distill", run.run_distill, "move the codebooks of a compressed model towards the original"
    )
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
    add("--optimiser", metavar="O", help="sgd (default, as published) or adam, for networks without BatchNormalization")
    add("--gradient", metavar="G", help="of a codeword: mean over its blocks (default) or sum")
    add("--biases", action="store_true", default=None, help="move biases as well")
    add("--seed", type=int, metavar="N", help="same seed, same bytes on one thread (default 0)")
    add("--checkpoint", metavar="FILE", help="keep the state here, and go on from it")
    add("--device", default="cpu", metavar="D", help="where PyTorch computes (default cpu)")
    add("--no-verify", action="store_true", help="do not load and run the written model")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "train-dqc", run.run_train_dqc, "train a classifier whose weights are powers of two")
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
    add("--taught-by", metavar="MODEL", help="the model that teaches, if another of the same classes")
    add("--original", metavar="MODEL", help="the original, if IN is one that was coded and expanded again")
    add("--batch", type=int, default=128, metavar="N", help="images of a step (default 128)")
    add("--seed", type=int, metavar="N", help="same seed, same bytes on one thread (default 0)")
    add("--checkpoint", metavar="FILE", help="keep the state here, and go on from it")
    add("--device", default="cpu", metavar="D", help="where PyTorch computes (default cpu)")
    add("--no-verify", action="store_true", help="do not load and run the written model")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "verify", run.run_verify, "compare two models on the same inputs")
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

    add = _command(commands, "report", run.run_report, "what each layer of a compressed model costs")
    add("model", metavar="MODEL")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "expand", run.run_expand, "turn a compressed model back into a plain one")
    add("model", metavar="IN")
    add("output", metavar="OUT")

    add = _command(commands, "fuse", run.run_fuse, "fuse the layers of a compressed model, or take them apart")
    add("model", metavar="IN", help="a compressed model of target hybrid or custom")
    add("output", metavar="OUT")
    add("--undo", action="store_true", help="take fused layers apart")
    add("--input-shapes", metavar="NAME:SHAPE", nargs="+", default=[], help="for generated inputs: name:1x3x224x224")
    add("--no-verify", action="store_true", help="do not run the old and the new model")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "compact", run.run_compact, "make all that is not weights in a compressed model smaller")
    add("model", metavar="IN", help="a compressed model")
    add("output", metavar="OUT", help="the same model in fewer bytes; its outputs are the same bit for bit")
    add("--input-shapes", metavar="NAME:SHAPE", nargs="+", default=[], help="for generated inputs: name:1x3x224x224")
    add("--no-verify", action="store_true", help="do not run both models")
    add("--json", action="store_true", help="print JSON")

    add = _command(
        commands, "import-kill-the-bits", run.run_import, "put a checkpoint of Stock et al. 2020 into an ONNX model"
    )
    add("checkpoint", metavar="CHECKPOINT", help="the published .pth file (read with torch)")
    add("model", metavar="MODEL", help="ONNX model of the same network, batch normalisation folded")
    add("output", metavar="OUT", help="the compressed model")
    add("--target", metavar="T", default="hybrid", help=f"{', '.join(get_args(Target))} (default hybrid)")
    _add_fuse(add)
    add("--input-shapes", metavar="NAME:SHAPE", nargs="+", default=[], help="for generated inputs: name:1x3x224x224")
    add("--json", action="store_true", help="print JSON")

    add = _command(commands, "bench", run.run_bench, "latency and memory of two models")
    add("original", metavar="ORIGINAL")
    add("compressed", metavar="COMPRESSED")
    add("--data", metavar="PATH", help="inputs; generated if not given")
    add("--threads", type=int, default=1, metavar="N", help="threads of one operator (default 1)")
    add("--rounds", type=int, default=30, metavar="N", help="timed runs of each (default 30)")
    add("--input-shapes", metavar="NAME:SHAPE", nargs="+", default=[], help="for generated inputs")
    add("--json", action="store_true", help="print JSON")

    _command(commands, "methods", run.run_methods, "list the methods and their options")
    return parser


def _add_fuse(add: Callable[..., Any]) -> None:
    state = "default" if BY_DEFAULT else "not the default"
    text = f"write one op for codes, layer and what follows it ({state} for targets hybrid and custom)"
    add("--fuse", action=argparse.BooleanOptionalAction, help=text)


def _command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], text: str) -> Callable[..., Any]:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=function)
    command.add_argument("--quiet", action="store_true", help="print nothing but errors")
    command.add_argument("--verbose", action="count", default=0, help="say more; twice for everything")
    add: Callable[..., Any] = command.add_argument
    return add


if __name__ == "__main__":
    sys.exit(main())
