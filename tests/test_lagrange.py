"""Hulls lie below every offer, and what one slope picks is the best that its rate allows."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqonnx.lagrange import Curve, allocate, least_rate, lower_hull, total

Offers = list[tuple[float, float]]


def offers(least: int = 1, most: int = 7) -> st.SearchStrategy[Offers]:
    number = st.one_of(st.integers(0, 9).map(float), st.floats(1e-6, 1e6))
    return st.lists(st.tuples(number, number), min_size=least, max_size=most)


def hull_of(entries: Offers) -> Curve:
    return lower_hull([rate for rate, _ in entries], [error for _, error in entries])


@given(offers())
def test_a_hull_is_made_of_offers_and_lies_below_all_of_them(entries: Offers) -> None:
    hull = hull_of(entries)
    rates, errors = np.array(entries).T
    np.testing.assert_array_equal(rates[hull.choices], hull.rates)
    np.testing.assert_array_equal(errors[hull.choices], hull.errors)
    assert (np.diff(hull.rates) > 0).all(), hull
    assert (np.diff(hull.errors) < 0).all(), hull
    assert (np.diff(hull.slopes) <= 1e-9 * hull.slopes[:-1]).all(), hull
    assert hull.rates[0] == rates.min()
    assert hull.errors[-1] == errors.min()
    below = np.interp(rates, hull.rates, hull.errors)
    assert (below <= errors + 1e-9 * errors.max()).all(), hull


def test_the_vertices_of_a_small_case() -> None:
    hull = lower_hull([0, 1, 2, 3, 4, 4], [10, 6, 5.9, 1, 1, 0.5])
    assert hull.choices.tolist() == [0, 1, 3, 5]
    assert hull.slopes.tolist() == [4, 2.5, 0.5]


def test_of_equal_offers_the_first_counts() -> None:
    assert lower_hull([1, 1, 0, 0], [2, 2, 5, 5]).choices.tolist() == [2, 0]


def reached(curves: list[Curve], picks: list[int]) -> tuple[float, float]:
    pairs = [(curve.rates[pick], curve.errors[pick]) for curve, pick in zip(curves, picks, strict=True)]
    return sum(rate for rate, _ in pairs), sum(error for _, error in pairs)


@settings(max_examples=200)
@given(st.lists(offers(most=4), min_size=1, max_size=4), st.floats(0, 1))
def test_nothing_beats_the_picks_at_their_own_rate(units: list[Offers], share: float) -> None:
    """Everett's theorem: the picks of one slope err least among all choices that cost no more."""
    curves = [hull_of(unit) for unit in units]
    least, most = least_rate(curves), sum(curve.rates[-1] for curve in curves)
    budget = least + share * (most - least)
    picks = allocate(curves, budget)
    rate, error = reached(curves, picks)
    assert rate <= budget * (1 + 1e-12)
    for choice in product(*units):
        if sum(r for r, _ in choice) <= rate:
            assert sum(e for _, e in choice) >= error - 1e-6 * (1 + error), (picks, choice)


@given(st.lists(offers(), min_size=1, max_size=5), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_more_budget_never_errs_more_and_never_takes_less(units: list[Offers], shares: list[float]) -> None:
    curves = [hull_of(unit) for unit in units]
    least, most = least_rate(curves), sum(curve.rates[-1] for curve in curves)
    found = [reached(curves, allocate(curves, least + share * (most - least))) for share in sorted(shares)]
    assert [rate for rate, _ in found] == sorted(rate for rate, _ in found)
    errors = [error for _, error in found]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors)), errors


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=8), st.integers(0, 8))
def test_never_worse_than_as_many_bits_for_all(variances: list[float], bits: int) -> None:
    """Units that lose 6 dB a bit: equal bits cost what the picks may cost, and err at least as much."""
    depths = np.arange(9.0)
    curves = [lower_hull(depths, variance * 4.0**-depths) for variance in variances]
    rate, error = reached(curves, allocate(curves, bits * len(variances)))
    assert rate <= bits * len(variances)
    assert error <= sum(variance * 4.0**-bits for variance in variances) * (1 + 1e-9)


@given(st.lists(offers(), min_size=1, max_size=5))
def test_the_total_is_what_the_curves_reach_together(units: list[Offers]) -> None:
    curves = [hull_of(unit) for unit in units]
    whole = total(curves)
    assert len(whole.rates) == 1 + sum(len(curve.rates) - 1 for curve in curves)
    assert whole.rates[-1] == pytest.approx(sum(curve.rates[-1] for curve in curves))
    for rate, error in zip(whole.rates, whole.errors, strict=True):
        picks = allocate(curves, rate * (1 + 1e-12) + 1e-12)
        assert reached(curves, picks)[1] <= error + 1e-6 * (1 + error)


def test_a_budget_below_the_cheapest_is_refused_with_both_numbers() -> None:
    curve = lower_hull([3, 5], [1, 0])
    with pytest.raises(ValueError, match=r"take 6, the budget is 5\.5"):
        allocate([curve, curve], 5.5)
    assert allocate([curve, curve], 6) == [0, 0]
    assert allocate([], 0) == []


def test_what_one_large_step_leaves_goes_to_small_ones() -> None:
    large = lower_hull([0, 100], [100, 0])
    small = lower_hull([0, 10, 20], [9, 4, 1])
    assert allocate([large, small], 60) == [0, 0]
    assert allocate([large, small], 60, fill=True) == [0, 2]
    assert allocate([large, small], 115, fill=True) == [1, 1]
