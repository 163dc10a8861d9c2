"""Error feedback with several choices: factors, order, and that more choices and sweeps are no worse."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqonnx.ecsq import quantise
from vqonnx.feedback import LARGEST, WORDS, Frame, Problem
from vqonnx.refine import Target


def target(rows: int, cols: int, groups: int, seed: int) -> Target:
    """A weight, and metrics of inputs that depend on each other."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, 3 * cols + 2, cols)) @ rng.standard_normal((groups, cols, cols))
    metrics = tuple(mixed.swapaxes(1, 2) @ mixed / mixed.shape[1])
    return Target.of(rng.standard_normal((rows * groups, cols)), metrics, 1)


def costs(problem: Problem, levels: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """``[G, R]``: what error feedback makes small."""
    missed = problem.weight - levels
    damped = np.linalg.inv(problem.frame.factors.swapaxes(1, 2) @ problem.frame.factors)
    error = np.einsum("grc,gcd,grd->gr", missed, damped, missed)
    price = bits[problem.classes, levels + LARGEST].sum(axis=2)
    return np.asarray(error + problem.frame.price * price)


@settings(deadline=None)
@given(rows=st.integers(1, 5), cols=st.integers(1, 40), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_factors_are_those_of_the_inverse_in_the_order_of_the_frame(
    rows: int, cols: int, groups: int, seed: int
) -> None:
    aim = target(rows, cols, groups, seed)
    frame = Frame.of(aim)
    for number in range(groups):
        order, upper = frame.order[number], frame.factors[number]
        assert sorted(order) == list(range(cols))
        metric = aim.metrics[number]
        np.testing.assert_array_equal(frame.metrics[number], metric[np.ix_(order, order)])
        damped = metric + 0.01 * np.trace(metric) / cols * np.eye(cols)
        np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(damped)[np.ix_(order, order)], rtol=1e-6, atol=1e-9)
        assert not np.tril(upper, -1).any()
    np.testing.assert_array_equal(frame.turn_back(frame.turn(aim.weight)), aim.weight)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 4), cols=st.integers(1, 70), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_what_is_kept_costs_what_it_seems_to_and_groups_are_apart(rows: int, cols: int, groups: int, seed: int) -> None:
    aim = target(rows, cols, groups, seed)
    frame = Frame.of(aim)
    bits = np.abs(np.arange(-LARGEST, LARGEST + 1))[None] + np.ones((1, WORDS))
    problem = Problem(frame, frame.turn(aim.weight / 0.7), np.zeros((groups, rows, cols), np.int64))
    levels = problem.feed_back(bits, 8)
    for number in range(groups):
        alone = Target(aim.weight[number * rows : (number + 1) * rows], aim.metrics[number : number + 1], 1, aim.scales)
        one = replace(Frame.of(alone), price=frame.price)
        single = Problem(one, one.turn(alone.weight / 0.7), problem.classes[:1])
        np.testing.assert_array_equal(single.feed_back(bits, 8)[0], levels[number])
    assert (problem.descend(levels, bits)).shape == levels.shape


def test_a_wide_beam_finds_the_best_there_is() -> None:
    aim = target(6, 5, 1, 3)
    frame = Frame.of(aim)
    bits = np.abs(np.arange(-LARGEST, LARGEST + 1))[None] + np.ones((1, WORDS))
    problem = Problem(frame, frame.turn(aim.weight), np.zeros((1, 6, 5), np.int64))
    everything = np.array(list(itertools.product(range(-3, 4), repeat=5)))
    best = np.min([costs(problem, np.broadcast_to(each, (1, 6, 5)), bits)[0] for each in everything], axis=0)
    found = [costs(problem, problem.feed_back(bits, beam), bits)[0] for beam in (1, 4, 200)]
    assert (found[2] <= found[1] + 1e-9).all()
    assert found[1].sum() <= found[0].sum()
    np.testing.assert_allclose(found[2], best, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 4])
def test_more_choices_make_the_error_smaller_at_no_more_bits(groups: int) -> None:
    aim = target(24, 54, groups, 0)
    error, zeros = [], []
    for beam in (1, 4, 16):
        levels = quantise(aim, 1.0, 9, sweeps=2, beam=beam).levels
        missed = aim.weight - levels
        error.append(sum(np.einsum("ij,ij->", missed[rows] @ metric, missed[rows]) for rows, metric in aim.parts()))
        zeros.append(np.mean(levels == 0))
    assert error[2] < error[1] < error[0]
    assert zeros[2] > zeros[0] - 0.02
