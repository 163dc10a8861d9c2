"""The override table: a TOML file that says which method goes to which layer.

::

    method = "bgd"                  # everything here is optional
    options = { bits = 6 }
    target = "hybrid"
    seed = 0
    include = ["features.*"]
    exclude = ["*.classifier.*"]
    op_types = ["Conv", "Gemm"]

    [[layer]]                       # the first pattern that matches a layer wins
    match = "layer4.*"
    method = "pq"                   # or "none": leave it alone
    options = { width = 4 }
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqonnx.errors import OptionError
from vqonnx.methods import METHODS, method_by_name
from vqonnx.plan import Override

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LAYER_KEYS = ("match", "method", "options")


@dataclass(frozen=True)
class Config:
    """What a configuration file says; None where it says nothing."""

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    seed: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()


def read_config(path: str | Path) -> Config:
    """Read a configuration file.

    Raises:
        OptionError: It cannot be read, or holds something unknown.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: is not TOML ({error})") from error
    layers = _typed(path, content, "layer", list, [])
    known = [name for name in Config.__dataclass_fields__ if name != "overrides"]
    unknown = sorted(set(content) - {*known, "layer"})
    if unknown:
        raise OptionError(f"{path}: key '{unknown[0]}' is unknown; the keys are {', '.join(known)} and [[layer]]")
    return Config(
        method=_typed(path, content, "method", str, None),
        options=_typed(path, content, "options", dict, {}),
        target=_typed(path, content, "target", str, None),
        seed=_typed(path, content, "seed", int, None),
        include=_texts(path, content, "include"),
        exclude=_texts(path, content, "exclude"),
        op_types=_texts(path, content, "op_types"),
        overrides=tuple(_override(path, number, layer) for number, layer in enumerate(layers, start=1)),
    )


def _override(path: Path, number: int, layer: Any) -> Override:
    where = f"{path}: [[layer]] number {number}"
    if not isinstance(layer, dict) or not isinstance(layer.get("match"), str):
        raise OptionError(f"{where} needs a key 'match' with a pattern")
    unknown = sorted(set(layer) - set(_LAYER_KEYS))
    if unknown:
        raise OptionError(f"{where}: key '{unknown[0]}' is unknown; the keys are {', '.join(_LAYER_KEYS)}")
    name = _typed(path, layer, "method", str, None)
    options = _typed(path, layer, "options", dict, {})
    if name is None:
        raise OptionError(f"{where} needs a key 'method': one of {', '.join(kind.id for kind in METHODS)} or \"none\"")
    return Override(layer["match"], None if name == "none" else method_by_name(name, options))


def _texts(path: Path, content: dict[str, Any], key: str) -> tuple[str, ...]:
    values = _typed(path, content, key, list, [])
    odd = [value for value in values if not isinstance(value, str)]
    if odd:
        raise OptionError(f"{path}: {key} holds {odd[0]!r}; it should be a list of texts")
    return tuple(values)


def _typed(path: Path, content: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key, default)
    if value is not default and not isinstance(value, kind):
        raise OptionError(f"{path}: {key} = {value!r} should be a {kind.__name__}")
    return value
