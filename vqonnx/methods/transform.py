"""Transform quantisation: make the rows of a weight independent, then give each block of them the bits that it earns.

Young et al. 2021 (arXiv 2009.01174). A weight ``A [n, cols]`` is stored as ``S @ T``: a basis and coefficients, both
uniformly quantised. Two things differ from the paper: the coefficients are those in the basis *as stored*, so that
rounding the basis costs coding gain and no error of its own; and each row has a step, each block a bit depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from vqonnx import uniform
from vqonnx.bases import coefficients, elt, klt, projected
from vqonnx.errors import OptionError
from vqonnx.form import Apply, Blocks, Coded, Form, Product, row_bytes
from vqonnx.lagrange import Curve, allocate, least_rate, lower_hull, total
from vqonnx.method import Budgeted, Layer, LeftAlone, Needs, Offer, check_range
from vqonnx.metric import Metric
from vqonnx.view import ViewOrder

_MOST_BITS = 32  # a small layer takes more than 8 a weight, with its steps and basis; none takes what float32 does
_DEPTHS = range(1, uniform.DEEPEST + 1)
_BASIS_BITS = (3, 4, 5, 6)  # that are tried where the user names none
_LARGEST_BASIS = 2048  # eigenvectors of more rows take minutes
_RUNS = 8  # blocks at most where there is no basis
_ROUNDING = 1e-4  # bits of a layer are written with four digits, rounded up
_CONDITION = 1e4  # of a stored basis; beyond it the coefficients grow more than they gain

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Transform(Budgeted):
    """Transform quantisation, bits allotted by rate and distortion.

    Attributes:
        bits: Stored bits for each weight, basis and steps included: an average over the layers of a model.
        basis: ``elt`` suits the weights and the layer's inputs, ``klt`` the weights alone, ``none`` quantises them as
            they are.
        basis_bits: Bits of a stored entry of the basis; None lets each layer choose, or go without a basis.
        axis: Transform the input channels (``rows``, which the paper prefers), the outputs (``columns``), or whichever
            is better for a layer (``either``).
        blocks: Blocks of rows that share a bit depth of 0 to 8; None gives each row its own.
        apply: How a layer with a basis is run: basis times coefficients as ``weights``, one after the other on the
            ``activations`` (without the components that have no bits), or whichever is ``cheaper``.
    """

    id: ClassVar[str] = "transform"
    needs: ClassVar[Needs] = Needs.MOMENTS
    basis: Literal["elt", "klt", "none"] = "elt"
    basis_bits: int | None = None
    axis: Literal["rows", "columns", "either"] = "rows"
    blocks: int | None = 8
    apply: Apply = "weights"

    def __post_init__(self) -> None:
        if not 0 < self.bits <= _MOST_BITS:
            raise OptionError(f"method '{self.id}': bits is {self.bits:g}; choose more than 0, and up to {_MOST_BITS}")
        check_range(self, "basis_bits", 1, uniform.DEEPEST)
        check_range(self, "blocks", 1, 4096)
        if self.order != "ihw":
            raise OptionError(f"method '{self.id}': order is {self.order}; choose ihw, and axis=rows or axis=columns")

    @property
    def view_order(self) -> ViewOrder:
        return "ihw" if self.axis == "columns" else "ohw"

    @property
    def variants(self) -> tuple[Budgeted, ...]:
        if self.axis != "either":
            return (self,)
        return replace(self, axis="rows"), replace(self, axis="columns")

    def offers(self, layer: Layer) -> list[Offer]:
        found = []
        with threadpool_limits(limits=1):  # same layer, same bytes
            for frame in self._frames(layer):
                curve = total(frame.curves)
                for rate, error in zip(curve.rates, curve.errors, strict=True):
                    bits = ceil(8 * rate / layer.weight.size / _ROUNDING - 1e-6) * _ROUNDING
                    if bits > _MOST_BITS:
                        continue
                    found.append(Offer(replace(self._fixed(frame), bits=round(bits, 4)), float(rate), float(error)))
        return found

    def encode(self, layer: Layer) -> Form:
        with threadpool_limits(limits=1):
            form = self._encode(layer)
        return replace(form, apply=self.apply) if isinstance(form, Product) else form

    def _encode(self, layer: Layer) -> Form:
        budget = int(self.bits * layer.weight.size / 8 + 1e-6)
        best: tuple[float, _Frame, list[int]] | None = None
        least = np.inf
        for frame in self._frames(layer):
            least = min(least, least_rate(frame.curves))
            if least_rate(frame.curves) > budget:
                continue
            picks = allocate(frame.curves, budget)
            error = sum(curve.errors[pick] for curve, pick in zip(frame.curves, picks, strict=True))
            if best is None or error < best[0]:
                best = error, frame, picks
        if best is None:
            bits = ceil(800 * least / layer.weight.size) / 100
            raise LeftAlone(f"{self.bits:g} bits a weight are {budget} bytes, it takes {least:.0f}; set bits={bits:g}")
        return best[1].form(best[2])

    def _fixed(self, frame: _Frame) -> Transform:
        """The method that encodes in this frame only."""
        axis: Literal["rows", "columns"] = "columns" if self.axis == "columns" else "rows"
        if frame.basis is None:
            return replace(self, axis=axis, basis="none", basis_bits=None)
        return replace(self, axis=axis, basis_bits=frame.basis.bits)

    def _frames(self, layer: Layer) -> Iterator[_Frame]:
        """The bases that are considered, with the coefficients in each; none at all only where one is asked for."""
        rows = layer.weight.astype(np.float64)
        metric = Metric(len(rows), prod(layer.kernel), self.view_order == "ohw", layer.moments)
        if self.basis_bits is None or self.basis == "none":  # in the order of the weight every run of rows is a node
            yield _Frame(None, rows, metric, min(self.blocks or _RUNS, _RUNS))
        if self.basis == "none":
            return
        if len(rows) > _LARGEST_BASIS:
            if self.basis_bits is not None:
                raise LeftAlone(f"a basis of {len(rows)} rows is too large ({_LARGEST_BASIS} at most)")
            return
        exact = elt(rows, metric.sensitivity) if self.basis == "elt" else klt(rows)
        weights = np.mean(coefficients(exact, rows) ** 2, axis=1)
        for bits in _BASIS_BITS if self.basis_bits is None else (self.basis_bits,):
            basis = uniform.coded(exact, uniform.search_steps(exact, bits, weights), bits)
            stored = basis.decode().astype(np.float64)
            if np.linalg.cond(stored) < _CONDITION:
                yield _Frame(basis, coefficients(stored, rows), metric.within(stored), self.blocks)
            elif self.basis_bits is not None:
                raise LeftAlone(f"a basis of {bits} bits does not span the weight; set basis_bits={bits + 1} or more")


@dataclass(frozen=True, eq=False)
class _Frame:
    """A basis as it is stored, the coefficients in it, and what each block of them costs and errs at each bit depth.

    Attributes:
        basis: Coded ``[n, n]``; None is the identity, which takes no bytes but needs every row.
        rows: Coefficients ``[n, cols]``.
        metric: What counts as error of the coefficients.
        blocks: Number of blocks; None: each row is one.
    """

    basis: Coded | None
    rows: Array
    metric: Metric
    blocks: int | None

    @cached_property
    def _parts(self) -> list[NDArray[np.int64]]:
        """The rows of each block."""
        return np.array_split(np.arange(len(self.rows)), min(self.blocks or len(self.rows), len(self.rows)))

    @cached_property
    def _steps(self) -> list[NDArray[Any]]:
        """The steps of all rows, for each bit depth from 1 on."""
        weights = self.metric.weights(self.rows.shape[1])
        return [uniform.search_steps(self.rows, bits, weights) for bits in _DEPTHS]

    @cached_property
    def curves(self) -> list[Curve]:
        """Bytes against error: of what is there in any case, then of each block, whose choices are bit depths."""
        rows, cols = self.rows.shape
        errors, sizes = [self.metric.energies(self.rows)], [np.zeros(rows)]
        column = 0.0 if self.basis is None else rows * self.basis.bits / 8
        for bits, steps in zip(_DEPTHS, self._steps, strict=True):
            errors.append(self.metric.energies(self.rows - uniform.dequantise(self.rows, steps, bits)))
            sizes.append(np.full(rows, row_bytes(cols, bits) + steps.itemsize + column))
        # Steps of the basis, and the bits that are left over at the end of its rows.
        fixed = 0.0 if self.basis is None or self.basis.scales is None else self.basis.scales.nbytes + rows
        curves = [Curve(np.array([fixed]), np.zeros(1), np.zeros(1, np.int64))]
        for number, part in enumerate(self._parts):
            least = 1 if self.basis is None or number == 0 else 0  # a product of nothing cannot be stored
            hull = lower_hull(*([float(each[part].sum()) for each in table[least:]] for table in (sizes, errors)))
            curves.append(replace(hull, choices=hull.choices + least))
        return curves

    def form(self, picks: list[int]) -> Form:
        """The form with the picked vertex of each curve."""
        depths = np.zeros(len(self.rows), np.int64)
        for part, curve, pick in zip(self._parts, self.curves[1:], picks[1:], strict=True):
            depths[part] = curve.choices[pick]
        if self.basis is None:
            return self._coded(self.rows, np.arange(len(depths)), depths)
        order = np.argsort(-depths, kind="stable")[: np.count_nonzero(depths)]  # the order of components is free
        left = replace(self.basis, codes=self.basis.codes[:, :, order], cols=len(order))
        kept = self.rows[order]
        if len(order) < len(depths):  # those that are left take over what they can of those that are not
            weight = self.basis.decode().astype(np.float64) @ self.rows
            kept = projected(left.decode().astype(np.float64), weight, self.metric.sensitivity)
        return Product(left, self._coded(kept, order, depths))

    def _coded(self, rows: Array, order: NDArray[np.int64], depths: NDArray[np.int64]) -> Form:
        """The rows, which belong to the components ``order``, runs of one depth together."""
        parts: list[Form] = []
        cuts = np.flatnonzero(np.diff(depths[order])) + 1
        for run, part in zip(np.split(order, cuts), np.split(rows, cuts), strict=True):
            bits = int(depths[run[0]])
            parts.append(uniform.coded(part, self._steps[bits - 1][run], bits))
        return parts[0] if len(parts) == 1 else Blocks(tuple(parts), axis=0)
