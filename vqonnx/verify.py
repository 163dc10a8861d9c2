"""Two models on the same inputs: how far apart their outputs are, and whether that is near enough."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqonnx.errors import DataError, OptionError, VerifyError
from vqonnx.feeds import read_feeds
from vqonnx.runtime import Model, open_session, read_inputs, run

_MOST_DB = 300.0  # stands for "beyond measure" in either direction, so that a number is always finite


@dataclass(frozen=True)
class Check:
    """One condition that was asked for.

    Attributes:
        name: What is bounded.
        value: What was measured; None where it is perfect.
        limit: The bound, as the user gave it.
        passed: Whether the value keeps it.
    """

    name: str
    value: float | None
    limit: float
    passed: bool


@dataclass(frozen=True)
class OutputComparison:
    """One output over all inputs.

    Attributes:
        name: Its name; a map's output has one record for each key.
        snr_db: ``10 log10(sum(original^2) / sum(difference^2))``; None if identical or not a float.
        max_abs: Largest absolute difference; None if not a number.
        cosine: Cosine similarity of all values as one vector; None if not a float.
        identical: Every value is the same; NaN is the same as NaN.
    """

    name: str
    snr_db: float | None
    max_abs: float | None
    cosine: float | None
    identical: bool


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; agreement and accuracies are fractions 0..1.

    Attributes:
        snr_db: The worst float output; None if all are identical, or none is a float.
        max_abs: The largest difference of any output; None if no output is a number.
        cosine: The worst float output; None if there is none.
        identical: All outputs are identical.
        top1_agreement: Share of images with the same best class; None if the first output is not a classifier's.
        top1_before: Accuracy of the original; None without labels.
        top1_after: Accuracy of the compressed model; None without labels.
        images: Rows of the first output.
        outputs: Each output.
        checks: Each condition; that NaN and infinity are at the same places is always one.
        passed: All conditions are met.
    """

    snr_db: float | None
    max_abs: float | None
    cosine: float | None
    identical: bool
    top1_agreement: float | None
    top1_before: float | None
    top1_after: float | None
    images: int
    outputs: tuple[OutputComparison, ...]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``, all finite."""
        return {
            "snr_db": self.snr_db,
            "max_abs": self.max_abs,
            "cosine": self.cosine,
            "top1_agreement": self.top1_agreement,
            "top1": {"before": self.top1_before, "after": self.top1_after},
            "passed": self.passed,
            "identical": self.identical,
            "outputs": [asdict(output) for output in self.outputs],
            "checks": [asdict(check) for check in self.checks],
        }


def compare(
    original: Model,
    compressed: Model,
    feeds: Any,
    *,
    labels: ArrayLike | None = None,
    library: bool = False,
    min_snr: float | None = None,
    min_agreement: float | None = None,
    max_drop: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    threads: int | None = None,
) -> Comparison:
    """Run both models batch by batch; memory does not grow with the data.

    Args:
        original: Path or bytes of the model before.
        compressed: Path or bytes of the model after.
        feeds: Data as `vqonnx.runtime.read_feeds` takes them.
        labels: The right class of each image.
        library: Run the compressed model with vqonnx's custom-op library.
        min_snr: Least SNR in dB of the worst float output.
        min_agreement: Least share (0..1) of images with the same best class.
        max_drop: Most percentage points of accuracy that may be lost.
        rtol: With ``atol``, every value must keep ``|after - before| <= atol + rtol * |before|``; 0 if not given.
        atol: See ``rtol``; 0 if not given.
        threads: Threads of one operator.

    Raises:
        OptionError: A condition needs a classifier, labels or a float output, and there is none.
        DataError: Data do not fit, or the models' outputs have different names, types or shapes.
        ModelError: A model does not load.
        VerifyError: The compressed model does not run where the original does.
    """
    limits = _Limits(min_snr, min_agreement, max_drop, rtol, atol)
    if max_drop is not None and labels is None:
        raise OptionError(f"max_drop {max_drop} needs labels; give the right class of each image")
    before_session = open_session(original, threads=threads)
    after_session = open_session(compressed, library=library, threads=threads)
    tallies: dict[str, _Tally] = {}
    classes = _Classes(None if labels is None else np.asarray(labels).ravel())
    for number, feed in enumerate(read_feeds(feeds, read_inputs(original))):
        before = run(before_session, feed)
        try:
            after = run(after_session, feed)
        except DataError as error:
            raise VerifyError(f"batch {number}: the compressed model does not run: {error}") from error
        for name, one, other in _pair(before, after, f"batch {number}: "):
            tallies.setdefault(name, _Tally(name, limits.tolerance)).add(one, other)
        classes.add(next(iter(before.values())), next(iter(after.values())))
    outputs = tuple(tally.result() for tally in tallies.values())
    agreement, top1_before, top1_after = classes.result()
    found = Comparison(
        snr_db=min((o.snr_db for o in outputs if o.snr_db is not None), default=None),
        max_abs=max((o.max_abs for o in outputs if o.max_abs is not None), default=None),
        cosine=min((o.cosine for o in outputs if o.cosine is not None), default=None),
        identical=all(o.identical for o in outputs),
        top1_agreement=agreement,
        top1_before=top1_before,
        top1_after=top1_after,
        images=classes.images,
        outputs=outputs,
        checks=(),
    )
    odd, outside = sum(t.odd for t in tallies.values()), sum(t.outside for t in tallies.values())
    return replace(found, checks=tuple(limits.check(found, odd, outside)))


@dataclass(frozen=True)
class _Limits:
    """The conditions that were asked for; see `compare`."""

    min_snr: float | None
    min_agreement: float | None
    max_drop: float | None
    rtol: float | None
    atol: float | None

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            if limit is not None and not math.isfinite(limit):
                raise OptionError(f"{name} is {limit}; give a finite number")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise OptionError(f"min_agreement is {self.min_agreement}; give a share from 0 to 1")

    @property
    def tolerance(self) -> tuple[float, float] | None:
        """(rtol, atol), or None if neither was given."""
        return None if self.rtol is None and self.atol is None else (self.rtol or 0.0, self.atol or 0.0)

    def check(self, found: Comparison, odd: int, outside: int) -> Iterator[Check]:
        """The checks of what was found; ``odd`` and ``outside`` count single values."""
        yield Check("NaN or infinity in one model only", odd, 0, odd == 0)
        if self.min_snr is not None:
            if found.cosine is None:
                raise OptionError(f"min_snr {self.min_snr} needs a float output; the model has none")
            yield Check("min_snr", found.snr_db, self.min_snr, found.snr_db is None or found.snr_db >= self.min_snr)
        if found.top1_agreement is None and (self.min_agreement is not None or self.max_drop is not None):
            name = found.outputs[0].name if found.outputs else "none"
            raise OptionError(
                "min_agreement and max_drop need a classifier, whose first output is floats [images, classes]; "
                f"{name!r} is not"
            )
        if self.min_agreement is not None and found.top1_agreement is not None:
            agreement = found.top1_agreement
            yield Check("min_agreement", agreement, self.min_agreement, agreement >= self.min_agreement)
        if self.max_drop is not None and found.top1_before is not None and found.top1_after is not None:
            # 0.3 points shall be 0.3, not 0.30000000000000004.
            drop = round(100 * (found.top1_before - found.top1_after), 9)
            yield Check("max_drop", drop, self.max_drop, drop <= self.max_drop)
        if self.tolerance is not None:
            rtol, atol = self.tolerance
            yield Check(f"values outside rtol {rtol:g}, atol {atol:g}", outside, 0, outside == 0)


def junit(comparison: Comparison, name: str) -> str:
    """JUnit XML: one test case for each check of ``comparison``; ``name`` says what was compared."""
    failed = sum(not check.passed for check in comparison.checks)
    suite = ET.Element("testsuite", name=name, tests=str(len(comparison.checks)), failures=str(failed), errors="0")
    properties = ET.SubElement(suite, "properties")
    for key in ("snr_db", "max_abs", "cosine", "top1_agreement", "top1_before", "top1_after", "images"):
        if (value := getattr(comparison, key)) is not None:
            ET.SubElement(properties, "property", name=key, value=str(value))
    for check in comparison.checks:
        case = ET.SubElement(suite, "testcase", classname=name, name=check.name)
        if not check.passed:
            ET.SubElement(case, "failure", message=f"{check.name}: {check.value} against the limit {check.limit}")
    root = ET.Element("testsuites")
    root.append(suite)
    return ET.tostring(root, encoding="unicode", xml_declaration=True)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of an output: a sequence's all under its name, a map's under name and key."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}[{key}]", item)
    elif isinstance(value, list):
        for item in value:
            yield from _tensors(name, item)
    elif value is not None:  # an optional that is absent
        yield name, np.asarray(value)


def _pair(
    before: Mapping[str, Any], after: Mapping[str, Any], where: str
) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    if list(before) != list(after):
        raise DataError(f"outputs differ: the original has {', '.join(before)}, the other {', '.join(after)}")
    for name in before:
        ones, others = list(_tensors(name, before[name])), list(_tensors(name, after[name]))
        looks = [[f"{key} {array.dtype}{list(array.shape)}" for key, array in side] for side in (ones, others)]
        if looks[0] != looks[1]:
            texts = [", ".join(look) or "absent" for look in looks]
            raise DataError(f"{where}output {name!r} differs: {texts[0]} in the original, {texts[1]} in the other")
        for (key, one), (_, other) in zip(ones, others, strict=True):
            yield key, one, other


@dataclass
class _Tally:
    """Sums over one output, in float64."""

    name: str
    bounds: tuple[float, float] | None
    floating: bool = False
    numeric: bool = False
    identical: bool = True
    signal: float = 0.0
    energy: float = 0.0  # of the other model's output
    noise: float = 0.0
    dot: float = 0.0
    max_abs: float = 0.0
    outside: int = 0
    odd: int = 0

    def add(self, before: NDArray[Any], after: NDArray[Any]) -> None:
        self.numeric = before.dtype.kind in "fiub"
        self.floating = before.dtype.kind == "f"
        if not self.numeric:
            self.identical &= bool(np.array_equal(before, after))
            return
        one, other = before.astype(np.float64), after.astype(np.float64)
        same = (before == after) | (np.isnan(one) & np.isnan(other))
        finite = np.isfinite(one) & np.isfinite(other)
        self.identical &= bool(same.all())
        self.odd += int(np.count_nonzero(~finite & ~same))
        one, other = one[finite], other[finite]
        with np.errstate(over="ignore", invalid="ignore"):  # squares of huge doubles; the result is clipped
            difference = np.abs(other - one)
            self.signal += float(one @ one)
            self.energy += float(other @ other)
            self.noise += float(difference @ difference)
            self.dot += float(one @ other)
            if self.bounds is not None:
                allowed = self.bounds[1] + self.bounds[0] * np.abs(one)
                self.outside += int(np.count_nonzero(difference > allowed))
        self.max_abs = max(self.max_abs, float(difference.max(initial=0.0)))

    def result(self) -> OutputComparison:
        return OutputComparison(
            name=self.name,
            snr_db=self._snr() if self.floating and not self.identical else None,
            max_abs=min(self.max_abs, float(np.finfo(np.float64).max)) if self.numeric else None,
            cosine=self._cosine() if self.floating else None,
            identical=self.identical,
        )

    def _snr(self) -> float:
        if self.odd or self.signal == 0 or math.isinf(self.noise):
            return -_MOST_DB
        if self.noise == 0 or math.isinf(self.signal):  # differences too small to be squared
            return _MOST_DB
        return max(-_MOST_DB, min(_MOST_DB, 10 * math.log10(self.signal) - 10 * math.log10(self.noise)))

    def _cosine(self) -> float:
        if self.identical:
            return 1.0
        length = math.sqrt(self.signal) * math.sqrt(self.energy)
        return max(-1.0, min(1.0, self.dot / length)) if 0 < length < math.inf and math.isfinite(self.dot) else 0.0


@dataclass
class _Classes:
    """Counts of best classes over the first output."""

    labels: NDArray[Any] | None
    images: int = 0
    classifier: bool = True
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))  # agreeing, right before, after

    def add(self, before: Any, after: Any) -> None:
        rows = slice(self.images, self.images + (len(before) if np.ndim(before) else 1))
        self.images = rows.stop
        self.classifier &= _is_scores(before)
        if not self.classifier or not len(before):
            return
        one, other = (values.reshape(len(values), -1).argmax(axis=1) for values in (before, after))
        self.counts[0] += np.count_nonzero(one == other)
        if self.labels is None:
            return
        right = self.labels[rows]
        if right.size != one.size:
            return  # `result` tells the whole counts
        classes = before.shape[1]
        if right.size and not 0 <= right.min() <= right.max() < classes:
            raise DataError(f"labels {right.min()} to {right.max()} for {classes} classes; count classes from 0")
        self.counts[1:] += [np.count_nonzero(one == right), np.count_nonzero(other == right)]

    def result(self) -> tuple[float | None, float | None, float | None]:
        """Agreement, accuracy before, accuracy after."""
        if self.labels is not None and self.labels.size != self.images:
            raise DataError(
                f"{self.labels.size} labels for {self.images} images; give as many "
                "(images that do not fill the model's fixed batch are not counted)"
            )
        if not self.classifier or not self.images:
            return None, None, None
        agreement, before, after = (float(count) / self.images for count in self.counts)
        return (agreement, None, None) if self.labels is None else (agreement, before, after)


def _is_scores(output: Any) -> bool:
    """Whether an output is floats ``[images, classes]``, perhaps with axes of size 1 behind."""
    if not isinstance(output, np.ndarray) or output.dtype.kind != "f" or output.ndim < 2:
        return False
    return output.shape[1] >= 2 and all(size == 1 for size in output.shape[2:])
