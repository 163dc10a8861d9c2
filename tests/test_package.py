"""What holds for the package as a whole."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import vqonnx

_ROOT = Path(__file__).resolve().parent.parent
_MODULES = [module.name for module in pkgutil.walk_packages(vqonnx.__path__, "vqonnx.")]


@pytest.mark.parametrize("name", _MODULES)
def test_examples_in_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_some_docstrings_have_examples() -> None:
    attempted = sum(doctest.testmod(importlib.import_module(name)).attempted for name in _MODULES)
    assert attempted >= 2


def test_public_names_exist() -> None:
    assert all(hasattr(vqonnx, name) for name in vqonnx.__all__)


def test_the_lower_bounds_are_those_that_are_tested() -> None:
    """Each bound of pyproject.toml that names a runtime or model library is pinned in oldest.txt."""
    text = (_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'^\s+"([\w-]+)>=([\d.]+)"', text, re.MULTILINE))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (_ROOT / "tests/oldest.txt").read_text(), re.MULTILINE))
    assert len(bounds) >= 6
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pins[name]), f"{name}: bound {bound}, tested {pins[name]}"


def test_a_method_is_one_file_and_one_line() -> None:
    for kind in vqonnx.METHODS:
        module = importlib.import_module(kind.__module__)
        assert kind.__module__.startswith("vqonnx.methods.")
        assert module.__doc__, kind.id
        assert kind.__doc__, kind.id
        assert kind.__module__ == f"vqonnx.methods.{kind.id}"
