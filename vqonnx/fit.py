"""Meet a size of the whole file, or lose no more than is allowed in as small a file as will do."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqonnx.allocate import Sharing
from vqonnx.errors import OptionError
from vqonnx.modelfile import external_bytes
from vqonnx.result import Result
from vqonnx.verify import compare

_AIM = 0.996  # of the size that is asked for; what layers take differs a little from what they were given
_ENOUGH = (*[0.985] * 4, *[0.98] * 5)  # of it: after each attempt, the file may be so much smaller
_NEAR = 0.002  # of it: files on both sides for so nearly equal bytes are a step apart that nothing fills
_LEAP = 8.0  # times a correction, after one that changed nothing
_SEARCH = 6
_FLATTEST, _STEEPEST = 0.5, 8.0  # bytes of the file for a byte of codes: the most are of one bit, stored as bytes
_UNIT = {"": 1, "B": 1, "KB": 1000, "KIB": 1024, "MB": 1000**2, "MIB": 1024**2, "GB": 1000**3, "GIB": 1024**3}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a compressed file must keep to; exactly one of the first three.

    Attributes:
        size: Bytes of the file on disk: never more, and not much less where layers have a use for them.
        ratio: How many times smaller than the original.
        drop: Percentage points of accuracy that may be lost where there are ``labels``, of images with another best
            class where there are not; for outputs that are no classes, percent of their energy that may be noise.
        data: Inputs on which that is judged, as `compare` takes them; not those of the calibration.
        labels: Right classes of ``data``.
    """

    size: int | None = None
    ratio: float | None = None
    drop: float | None = None
    data: Any = None
    labels: Sequence[int] | np.ndarray | None = None

    def bytes_of(self, before: int) -> int | None:
        """The most bytes that the file of a model of ``before`` bytes may have; None if only the loss is limited."""
        return int(before / self.ratio) if self.ratio is not None else self.size

    def __post_init__(self) -> None:
        given = [name for name in ("size", "ratio", "drop") if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise OptionError(f"limits: {what} given; choose one of size, ratio and drop")
        if self.size is not None and self.size < 1:
            raise OptionError(f"limits: size is {self.size}; choose 1 or more bytes")
        if self.ratio is not None and not 1 < self.ratio < 1e6:
            raise OptionError(f"limits: ratio is {self.ratio:g}; choose more than 1, such as 16")
        if self.drop is not None and not 0 < self.drop < 100:
            raise OptionError(f"limits: drop is {self.drop:g}; choose more than 0 and less than 100")
        if self.drop is not None and self.data is None:
            raise OptionError("limits: drop needs data on which it is judged, other than the calibration data")


def parse_size(text: str) -> int:
    """Bytes from text as a user writes it.

    Raises:
        OptionError: The text is no size.

    >>> parse_size("300KB"), parse_size("1.5 MiB"), parse_size("4096")
    (300000, 1572864, 4096)
    """
    number = text.strip().rstrip("BbKkMmGgIi ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(float(number) * _UNIT[unit])
    except (ValueError, KeyError, OverflowError):
        raise OptionError(f"size '{text}' is not understood; write it like 300KB (1,000) or 1.5MiB (1,024)") from None


def fit(
    attempt: Callable[[float | None], Result], limits: Limits, before: int, sharing: Sharing | None, beside: float = 0
) -> Result:
    """The model that keeps to the limits.

    Args:
        attempt: Makes it with so many bytes for the layers that share.
        limits: What to keep to.
        before: Bytes of the original.
        sharing: The layers that share; None where there are none.
        beside: About what the file will have besides the bytes of these layers, for the first attempt.

    Raises:
        OptionError: No layer's size can be chosen, or the smallest file is larger, or loses more, than is allowed.
    """
    if sharing is None:
        raise OptionError("limits need calibration data and a method whose bits are shared, such as best")
    wanted = limits.bytes_of(before)
    if wanted is None:
        return _least_loss(attempt, limits, sharing)
    return _within(attempt, wanted, sharing, beside)


def _within(attempt: Callable[[float | None], Result], wanted: int, sharing: Sharing, beside: float) -> Result:
    """Bytes for the layers are corrected by what the file had too many or too few.

    They are halved between the most that kept to the size and the fewest that did not where a correction leads out of
    these. One that changes nothing is followed by a larger one.
    """
    low, high = sharing.least, sharing.most
    budget = min(max(_AIM * wanted - beside, low), high)
    best: Result | None = None
    sizes: dict[float, int] = {}  # of the file, by the bytes for the layers
    for enough in _ENOUGH:
        result = attempt(budget)
        size = _bytes(result)
        stuck = size in sizes.values()  # the layers have no use for some of their bytes
        sizes[budget] = size
        _log.info("%d bytes for the layers make a file of %d, %d are wanted", budget, size, wanted)
        low, high = (budget, high) if size <= wanted else (low, budget)
        if size <= wanted and (best is None or size > _bytes(best)):
            best = result
        if best is not None and _bytes(best) >= enough * wanted:
            break
        middle = (low + high) / 2
        change = (_AIM * wanted - size) / _slope(sizes) * (_LEAP if stuck else 1.0)
        is_far = stuck and abs(change) >= abs(middle - budget)
        budget = min(max(budget + change, sharing.least), sharing.most)
        if is_far or budget in sizes or not low <= budget <= high:
            budget = middle
        if budget in sizes or high - low < (1 if best is None else _NEAR * wanted / _steepness(sizes, low, high)):
            break
    if best is None and sharing.least not in sizes:  # before it is said that it cannot be done
        result = attempt(sharing.least)
        sizes[sharing.least] = _bytes(result)
        best = result if sizes[sharing.least] <= wanted else None
    if best is None:
        raise OptionError(
            f"a file of {wanted:,} bytes is not possible, the smallest has {min(sizes.values()):,}; choose that or more"
        )
    return best


def _steepness(sizes: Mapping[float, int], low: float, high: float) -> float:
    """Bytes of the file for each byte of the layers between two attempts, 1 or more."""
    if low not in sizes or high not in sizes:
        return 1.0
    return float(min(max((sizes[high] - sizes[low]) / (high - low), 1.0), _STEEPEST))


def _slope(sizes: Mapping[float, int]) -> float:
    """Bytes of the file for each byte of the layers, by the last two attempts; a file with plain codes has several."""
    if len(sizes) < 2:
        return 1.0
    (before, small), (now, large) = list(sizes.items())[-2:]
    return float(min(max((large - small) / (now - before), _FLATTEST), _STEEPEST))


def _bytes(result: Result) -> int:
    """Of the file, with what the model still has in files beside it."""
    return int(result.model.ByteSize()) + external_bytes(result.model, result.source.parent)


def _least_loss(attempt: Callable[[float | None], Result], limits: Limits, sharing: Sharing) -> Result:
    """Bisection on the logarithm of the bytes for the layers."""
    low, high = np.log(sharing.least + 1), np.log(max(sharing.most, sharing.least + 1))
    best = None
    worst = None
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(_SEARCH):
            middle = (low + high) / 2
            result = attempt(float(np.exp(middle)))
            draft = Path(folder) / "draft.onnx"
            result.save(draft, verify=False)
            lost = lost_by(result, draft, limits)
            draft.unlink()
            _log.info("%d bytes lose %.3g", result.model.ByteSize(), lost)
            assert limits.drop is not None
            if lost <= limits.drop:
                best, high = result, middle
            else:
                worst = lost if worst is None else min(worst, lost)
                low = middle
    if best is None:
        raise OptionError(
            f"drop {limits.drop:g} is not kept: {worst:.3g} at the largest size that was tried; choose more"
        )
    return best


def lost_by(result: Result, draft: Path, limits: Limits) -> float:
    """What a file loses on the data of the limits: percentage points, or percent of the energy.

    Raises:
        OptionError: There are labels, but the first output is no classifier's.
    """
    found = compare(result.source, draft, limits.data, labels=limits.labels, library=result.target == "custom")
    if found.top1_before is not None and found.top1_after is not None:
        return round(100 * (found.top1_before - found.top1_after), 9)
    if limits.labels is not None:
        raise OptionError(
            "limits: labels are for a classifier, whose first output is floats [images, classes]; leave them out, and "
            "drop counts percent of the outputs' energy"
        )
    if found.top1_agreement is not None:
        return round(100 * (1 - found.top1_agreement), 9)
    return 0.0 if found.snr_db is None else float(100 * 10 ** (-found.snr_db / 10))
