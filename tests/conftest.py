"""Shared by all tests: where the real data lie, and no deadline for hypothesis on a busy machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("vqonnx", deadline=None)
settings.load_profile("vqonnx")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real models and images: ``$VQONNX_DATA``, or ``shared/data`` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    given = os.environ.get("VQONNX_DATA")
    for folder in (Path(given) if given else beside, beside):
        if folder.is_dir():
            return folder
    pytest.skip(f"no real data: VQONNX_DATA is {given or 'not set'}, and {beside} does not exist")
