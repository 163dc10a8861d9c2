"""What options of the command line mean: methods, limits and shapes from the words of the user."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from vqonnx.config import Config
from vqonnx.errors import OptionError
from vqonnx.fit import Limits, parse_size
from vqonnx.labels import read_labels
from vqonnx.method import Method
from vqonnx.methods import Best, method_by_name
from vqonnx.place import Target


def method_of(options: argparse.Namespace, config: Config) -> Method | None:
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
    return method_by_name(name or ("pq" if options.calibration is None else "best"), values)


def quick_method(options: argparse.Namespace, config: Config) -> Best:
    """`Best` as the fused kernels like it; what the user says of codes and order stays."""
    method = method_of(options, config) or (None if options.calibration is None else Best())
    if not isinstance(method, Best):
        raise OptionError(
            "--optimize speed is for method best, which needs calibration data; choose it, or leave it out"
        )
    said = {setting.partition("=")[0] for setting in options.set} | set(config.options)
    liked = {"codes": "fixed", "order": "hwi"}
    return replace(method, **{name: value for name, value in liked.items() if name not in said})  # type: ignore[arg-type]


def limits_of(options: argparse.Namespace) -> Limits | None:
    """What the user allows the file; None if nothing is said."""
    given = {"size": options.target_size, "ratio": options.target_ratio, "drop": options.max_drop}
    if all(value is None for value in given.values()):
        if options.data is not None or options.labels is not None:
            raise OptionError("--data and --labels are for --max-drop; 'vqonnx verify' compares a file that is there")
        return None
    if options.max_drop is None and (options.data is not None or options.labels is not None):
        raise OptionError("--data and --labels are for --max-drop, which is not given; leave them out")
    size = None if options.target_size is None else parse_size(options.target_size)
    labels = None if options.labels is None else read_labels(options.labels)
    return Limits(size=size, ratio=options.target_ratio, drop=options.max_drop, data=options.data, labels=labels)


def target_of(name: str) -> Target:
    """The target of that name."""
    if name not in get_args(Target):
        raise OptionError(f"target '{name}' is unknown; choose one of {', '.join(get_args(Target))}")
    return cast(Target, name)


def shapes_of(texts: Sequence[str]) -> dict[str, list[int]] | None:
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
