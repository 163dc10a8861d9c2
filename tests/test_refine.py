"""Laws of the refinement: no step makes the error larger, and the closed forms are what brute force finds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqonnx.refine import Array, Target, alternate, assign, descend, feed_back, refit, row_factors, update_words


def problem(rows: int, cols: int, width: int, words: int, seed: int, groups: int = 1, scaled: bool = False) -> Any:
    rng = np.random.default_rng(seed)
    metrics = []
    for _ in range(groups):
        mixing = rng.standard_normal((cols, cols))
        inputs = rng.standard_normal((3 * cols, cols)) @ (mixing * 0.5 + np.eye(cols))
        metrics.append(inputs.T @ inputs / len(inputs))
    scales = rng.uniform(0.5, 2, rows * groups) if scaled else None
    target = Target.of(rng.standard_normal((rows * groups, cols)), tuple(metrics), width, scales)
    book = rng.standard_normal((words, width))
    codes = rng.integers(0, words, (rows * groups, target.groups))
    return target, codes, book


PROBLEMS = st.builds(
    problem,
    rows=st.integers(1, 4),
    cols=st.integers(1, 9),
    width=st.integers(1, 4),
    words=st.integers(1, 6),
    seed=st.integers(0, 1000),
    groups=st.integers(1, 2),
    scaled=st.booleans(),
)


@given(made=PROBLEMS)
def test_the_error_is_the_energy_of_what_is_missed(made: Any) -> None:
    target, codes, words = made
    missed = target.weight - target.decode(codes, words)
    expected = sum(float(np.trace(missed[rows] @ metric @ missed[rows].T)) for rows, metric in target.parts())
    assert target.error(codes, words) == pytest.approx(expected, rel=1e-9)


@given(made=PROBLEMS)
def test_no_step_makes_the_error_larger(made: Any) -> None:
    target, codes, words = made
    before = target.error(codes, words)
    slack = 1e-9 * (1 + before)
    assert target.error(descend(target, codes, words), words) <= before + slack
    assert target.error(codes, refit(target, codes, words)) <= before + slack
    for scaled in (False, True):
        found, done, better = alternate(target, codes, words, 2, scaled=scaled)
        assert found.error(done, better) <= before + slack
        assert scaled or (found.scales == target.scales).all()


@given(made=PROBLEMS)
def test_no_other_factor_of_a_row_is_better(made: Any) -> None:
    target, codes, words = made
    decoded = target.decode(codes, words)
    factors = row_factors(target, decoded)
    assert (factors > 0).all()
    least = target.distance(factors[:, None] * decoded)
    for row in range(len(decoded)):
        for other in (0.5, 0.99, 1.01, 2.0):
            changed = factors.copy()
            changed[row] *= other
            assert least <= target.distance(changed[:, None] * decoded) * (1 + 1e-9) + 1e-12 or factors[row] == 1


@given(made=PROBLEMS)
def test_where_blocks_do_not_meet_the_best_of_each_is_the_best_of_all(made: Any) -> None:
    target, _, words = made
    apart = tuple(np.kron(np.eye(target.groups), np.ones((target.width,) * 2)) * metric for metric in target.metrics)
    alone = Target(target.weight, apart, target.width, target.scales)
    codes = assign(alone, words)
    assert alone.error(descend(alone, codes, words), words) == pytest.approx(alone.error(codes, words), rel=1e-9)
    assert alone.error(feed_back(alone, words, 0.0), words) <= alone.error(codes, words) * (1 + 1e-3) + 1e-4


@given(made=PROBLEMS)
def test_words_for_given_codes_lower_the_sum_over_the_blocks(made: Any) -> None:
    target, codes, words = made
    apart = tuple(np.kron(np.eye(target.groups), np.ones((target.width,) * 2)) * metric for metric in target.metrics)
    alone = Target(target.weight, apart, target.width, target.scales)
    found = update_words(alone, codes, words)
    assert alone.error(codes, found) <= alone.error(codes, words) * (1 + 1e-6) + 1e-9


@settings(max_examples=30)
@given(seed=st.integers(0, 1000))
def test_refit_is_least_squares(seed: int) -> None:
    target, codes, words = problem(5, 6, 2, 3, seed)
    found = refit(target, codes, words)
    # brute force: the decoded weight is linear in the words
    columns = []
    for index in range(words.size):
        unit = np.zeros(words.size)
        unit[index] = 1
        columns.append((target.decode(codes, unit.reshape(words.shape)) @ root(target)).ravel())
    wanted = (target.weight @ root(target)).ravel()
    best, *_ = np.linalg.lstsq(np.stack(columns, 1), wanted, rcond=None)
    assert target.error(codes, found) == pytest.approx(target.error(codes, best.reshape(words.shape)), rel=1e-4)


def root(target: Target) -> Array:
    return np.linalg.cholesky(target.metrics[0] + 1e-12 * np.eye(len(target.metrics[0])))


@settings(max_examples=30)
@given(seed=st.integers(0, 1000))
def test_descent_ends_where_no_single_code_can_be_better(seed: int) -> None:
    target, codes, words = problem(2, 6, 2, 4, seed)
    for _ in range(50):
        last, codes = codes, descend(target, codes, words)
        if (last == codes).all():
            break
    least = target.error(codes, words)
    for row, block, word in itertools.product(range(2), range(3), range(4)):
        other = codes.copy()
        other[row, block] = word
        assert target.error(other, words) >= least * (1 - 1e-9)


def test_error_feedback_beats_each_block_on_its_own() -> None:
    errors = {"alone": 0.0, "feedback": 0.0}
    for seed in range(10):
        target, _, words = problem(16, 24, 2, 16, seed)
        errors["alone"] += target.error(assign(target, words), words)
        errors["feedback"] += target.error(feed_back(target, words), words)
    assert errors["feedback"] < 0.9 * errors["alone"]


def test_the_update_of_error_feedback_is_the_best_for_the_weights_that_are_left() -> None:
    """Frantar et al. 2022: after a block is fixed the others move to where the error is least."""
    target, _, words = problem(1, 6, 2, 3, 5)
    metric = target.metrics[0]
    codes = feed_back(target, words, 0.0)
    missed = target.weight[0, :2] - words[codes[0, 0]]
    moved = target.weight[0, 2:] + np.linalg.solve(metric[2:, 2:], metric[2:, :2] @ missed)
    second = moved[:2]
    # given what is fixed, the best for block 1 in the metric of what the last block can still make good
    schur = metric[2:4, 2:4] - metric[2:4, 4:] @ np.linalg.solve(metric[4:, 4:], metric[4:, 2:4])
    costs = [float((second - word) @ schur @ (second - word)) for word in words]
    assert codes[0, 1] == int(np.argmin(costs))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    target, codes, words = problem(3, 4, 2, 3, 1)
    dead = target.metrics[0].copy()
    dead[2:], dead[:, 2:] = 0, 0
    flat = Target(target.weight, (dead,), 2, target.scales)
    for metric in (dead, np.zeros((4, 4))):
        flat = Target(target.weight, (metric,), 2, target.scales)
        _, done, better = alternate(flat, feed_back(flat, words), words, 2)
        assert np.isfinite(better).all()
        assert flat.error(done, better) <= flat.error(codes, words) + 1e-9


@pytest.mark.parametrize("width", [1, 3])
def test_rows_of_several_panels_are_searched_block_by_block(width: int) -> None:
    """What is put off to the end of a panel must reach the blocks behind it before they are decided."""
    target, codes, words = problem(rows=3, cols=200, width=width, words=5, seed=width, groups=2, scaled=True)
    by_one = codes.copy()
    for block in range(target.groups):
        trials = []
        for word in range(len(words)):
            tried = by_one.copy()
            tried[:, block] = word
            missed = target.weight - target.decode(tried, words)
            parts = [np.einsum("ij,ij->i", missed[rows] @ metric, missed[rows]) for rows, metric in target.parts()]
            trials.append(np.concatenate(parts))
        by_one[:, block] = np.argmin(trials, axis=0)
    assert len(list(target.panels())) > 2
    np.testing.assert_array_equal(descend(target, codes, words), by_one)


def test_error_feedback_reaches_the_panels_behind() -> None:
    target, _, words = problem(rows=3, cols=150, width=2, words=5, seed=4, scaled=True)
    damped = target.metrics[0] + 0.01 * np.diag(target.metrics[0]).mean() * np.eye(150)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    weight, expected = target.weight.copy(), []
    for start in range(0, 150, 2):
        inverse = np.linalg.inv(upper[start : start + 2, start : start + 2])
        left = (weight[:, None, start : start + 2] - target.scales[:, None, None] * words) @ inverse
        best = np.argmin(np.sum(left**2, axis=2), axis=1)
        expected.append(best)
        weight[:, start + 2 :] -= left[np.arange(3), best] @ upper[start : start + 2, start + 2 :]
    np.testing.assert_array_equal(feed_back(target, words), np.stack(expected, axis=1))
