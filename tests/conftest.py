"""Shared by all tests: where the real data lie, logging as it was, no deadline for hypothesis on a busy machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("vqonnx", deadline=None)
settings.load_profile("vqonnx")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """`main` sets up logging to the standard error of its time, which a later test no longer has."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real models and images: ``$VQONNX_DATA``, or ``shared/data`` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    given = os.environ.get("VQONNX_DATA")
    for folder in (Path(given) if given else beside, beside):
        if folder.is_dir():
            return folder
    pytest.skip(f"no real data: VQONNX_DATA is {given or 'not set'}, and {beside} does not exist")
