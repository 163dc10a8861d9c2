"""Rate against error: lower convex hulls, and one Lagrange multiplier for all of them.

Shoham and Gersho 1988; Young et al. 2021 (arXiv 2009.01174), section on rate-distortion optimal bit depths: with errors
that add up, the least error in a budget is where every unit stands at the same slope of its own curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Curve:
    """A lower convex hull: each vertex costs more than the one before, errs less, and saves less for what it costs.

    Attributes:
        rates: float64 ``[vertices]``, rising.
        errors: float64 ``[vertices]``, falling.
        choices: int64 ``[vertices]``: the number of the offer that a vertex is.
    """

    rates: NDArray[np.float64]
    errors: NDArray[np.float64]
    choices: NDArray[np.int64]

    @property
    def slopes(self) -> NDArray[np.float64]:
        """Error saved for each unit of rate by the step to the next vertex: ``[vertices - 1]``, falling."""
        return -np.diff(self.errors) / np.diff(self.rates)


def lower_hull(rates: ArrayLike, errors: ArrayLike) -> Curve:
    """The hull of offers, each a rate and an error; the cheapest one is always a vertex, and the best one.

    Of offers with the same rate and error the first counts.
    """
    costs, wrongs = np.asarray(rates, np.float64), np.asarray(errors, np.float64)
    hull: list[int] = []
    for at in np.lexsort((np.arange(len(costs)), wrongs, costs)):
        if hull and wrongs[at] >= wrongs[hull[-1]]:
            continue  # costs more and errs no less
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (wrongs[a] - wrongs[b]) * (costs[at] - costs[b]) > (wrongs[b] - wrongs[at]) * (costs[b] - costs[a]):
                break
            hull.pop()  # on or above the line between its neighbours
        hull.append(int(at))
    chosen = np.array(hull, np.int64)
    return Curve(costs[chosen], wrongs[chosen], chosen)


def allocate(curves: Sequence[Curve], budget: float, *, fill: bool = False) -> list[int]:
    """A vertex of each curve: the least total error that one slope for all reaches within the budget.

    Steps are taken from the steepest down, until one does not fit; with ``fill`` others go on, and only the curve whose
    step does not fit ends there: with one large layer among small ones, much would be left over otherwise.

    Raises:
        ValueError: The cheapest vertices together exceed the budget; see `least_rate`.
    """
    left = budget - least_rate(curves)
    if left < 0:
        raise ValueError(f"the cheapest choices take {least_rate(curves):g}, the budget is {budget:g}")
    picks = [0] * len(curves)
    ended = set()
    for curve, cost in _steps(curves):
        if curve in ended:
            continue
        if cost > left:
            if not fill:
                break
            ended.add(curve)
            continue
        left -= cost
        picks[curve] += 1
    return picks


def least_rate(curves: Sequence[Curve]) -> float:
    """What the cheapest vertices take together."""
    return float(sum(curve.rates[0] for curve in curves))


def total(curves: Sequence[Curve]) -> Curve:
    """The hull of what the curves reach together; its choices number the vertices."""
    rates, errors = [least_rate(curves)], [float(sum(curve.errors[0] for curve in curves))]
    at = [0] * len(curves)
    for curve, cost in _steps(curves):
        rates.append(rates[-1] + cost)
        errors.append(errors[-1] - (curves[curve].errors[at[curve]] - curves[curve].errors[at[curve] + 1]))
        at[curve] += 1
    return Curve(np.array(rates), np.array(errors), np.arange(len(rates)))


def _steps(curves: Sequence[Curve]) -> list[tuple[int, float]]:
    """All steps as (number of the curve, cost), the steepest first; those of one curve stay in order."""
    # Rounding must not put a step before the one that it follows.
    slopes = np.concatenate([np.minimum.accumulate(curve.slopes) for curve in curves] or [np.zeros(0)])
    costs = np.concatenate([np.diff(curve.rates) for curve in curves] or [np.zeros(0)])
    owners = np.repeat(np.arange(len(curves)), [len(curve.rates) - 1 for curve in curves])
    order = np.argsort(-slopes, kind="stable")
    return [(int(owners[step]), float(costs[step])) for step in order]
