"""Read the right classes of images from a file."""

from __future__ import annotations

import csv
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import DataError
from vqonnx.feeds import LABELS


def read_labels(path: str | Path) -> NDArray[np.int64]:
    """Right classes: ``.npy``; ``.npz`` (``labels``, or its only array); last column of ``.csv`` or ``.txt``.

    Raises:
        DataError: The file is missing or holds no whole numbers in one row or column.
    """
    path = Path(path)
    readers = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_table, ".txt": _read_table}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: labels are read from .npy, .npz, .csv or .txt, not {path.suffix or 'no extension'}")
    try:
        values = readers[path.suffix.lower()](path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, csv.Error) as error:
        raise DataError(f"{path}: labels cannot be read: {error}") from error
    if values.size != max(values.shape, default=0) or values.dtype.kind not in "iuf":
        raise DataError(f"{path}: labels are {values.dtype}{list(values.shape)}; give one whole number an image")
    if not values.size or not np.array_equal(values, np.trunc(values)):
        raise DataError(f"{path}: labels are empty or not whole numbers; give one class number an image")
    return values.ravel().astype(np.int64)


def _read_npy(path: Path) -> NDArray[Any]:
    return np.asarray(np.load(path))


def _read_npz(path: Path) -> NDArray[Any]:
    if not zipfile.is_zipfile(path):  # np.load would leave the file open
        raise ValueError("no .npz file, or cut off")
    with np.load(path) as archive:
        names = [LABELS] if LABELS in archive.files else archive.files
        if len(names) != 1:
            raise DataError(f"{path}: has the arrays {', '.join(names) or 'none'}; name one of them {LABELS!r}")
        return np.asarray(archive[names[0]])


def _read_table(path: Path) -> NDArray[Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    # Columns of a .txt may be parted by blanks; a comma has been dealt with already.
    cells = [row[-1].split()[-1] if row[-1].split() else "" for row in rows]
    if cells and not _is_number(cells[0]):
        cells = cells[1:]  # a header
    return np.array([float(cell) for cell in cells])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
