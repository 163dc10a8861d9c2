"""K-means: laws of the result, of weights and seeds, and of the metric."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vqonnx.cluster import Clusters, _without_empty, kmeans, kmeans_in_metric, nearest


def cloud(count: int, width: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def distances(points: NDArray[np.floating], words: NDArray[np.floating]) -> NDArray[np.float64]:
    """``[n, k]``, squared, without any trick."""
    return ((points[:, None].astype(np.float64) - words[None].astype(np.float64)) ** 2).sum(axis=2)


def objective(points: NDArray[np.floating], found: Clusters, metric: NDArray[np.floating] | None = None) -> float:
    error = points.astype(np.float64) - found.words[found.labels]
    metric = np.eye(points.shape[1]) if metric is None else metric
    return float(np.einsum("ni,ij,nj->", error, metric, error))


def random_metric(width: int, rank: int, seed: int) -> NDArray[np.float64]:
    inputs = np.random.default_rng(seed).normal(size=(rank, width)) * np.logspace(0, 1, width)
    return inputs.T @ inputs


CLOUDS = {
    "count": st.integers(1, 120),
    "width": st.integers(1, 6),
    "words": st.integers(1, 20),
    "seed": st.integers(0, 99),
}


@given(**CLOUDS)
@settings(max_examples=60)
def test_labels_are_nearest_and_all_words_are_used(count: int, width: int, words: int, seed: int) -> None:
    points = cloud(count, width, seed)
    found = kmeans(points, words, seed=seed)
    where = f"{count} points of width {width}, {words} words, seed {seed}"
    assert found.words.dtype == np.float32
    assert found.labels.dtype == np.int64
    assert found.words.shape == (min(count, words), width), where
    apart = distances(points, found.words)
    chosen = apart[np.arange(count), found.labels]
    np.testing.assert_allclose(chosen, apart.min(axis=1), rtol=1e-4, atol=1e-5, err_msg=where)
    assert set(found.labels.tolist()) == set(range(len(found.words))), where


@given(**CLOUDS)
@settings(max_examples=40)
def test_the_same_seed_gives_the_same_bytes(count: int, width: int, words: int, seed: int) -> None:
    points, metric = cloud(count, width, seed), random_metric(width, width, seed)
    for once, again in (
        (kmeans(points, words, seed=seed), kmeans(points.copy(), words, seed=seed)),
        (kmeans_in_metric(points, words, metric, seed=seed), kmeans_in_metric(points, words, metric, seed=seed)),
    ):
        assert once.words.tobytes() == again.words.tobytes()
        assert once.labels.tobytes() == again.labels.tobytes()


def test_the_same_bytes_where_threads_would_share_the_work() -> None:
    points = cloud(20_000, 4, 0)
    first = kmeans(points, 64, seed=1)
    assert all(kmeans(points, 64, seed=1).words.tobytes() == first.words.tobytes() for _ in range(3))
    assert kmeans(points, 64, seed=2).words.tobytes() != first.words.tobytes()


@given(distinct=st.integers(1, 9), extra=st.integers(0, 5), repeats=st.integers(1, 30), seed=st.integers(0, 99))
def test_no_more_distinct_points_than_words_is_exact(distinct: int, extra: int, repeats: int, seed: int) -> None:
    base = cloud(distinct, 3, seed)
    points = base[np.random.default_rng(seed).permutation(np.arange(distinct * repeats) % distinct)]
    found = kmeans(points, distinct + extra, seed=seed)
    assert len(found.words) == distinct, f"{distinct} distinct of {len(points)}, {extra} extra words, seed {seed}"
    assert found.words[found.labels].tobytes() == points.tobytes()


def test_distinct_points_that_appear_late_are_noticed() -> None:
    points = np.concatenate([np.zeros((500, 2), np.float32), cloud(30, 2, 0)])
    found = kmeans(points, 4, seed=0)
    assert found.words.shape == (4, 2)
    assert objective(points, found) > 0


@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("words", [1, 4, 256])
def test_all_zero_points_are_one_zero_word(count: int, words: int) -> None:
    for found in (
        kmeans(np.zeros((count, 3)), words),
        kmeans_in_metric(np.zeros((count, 3)), words, np.eye(3)),
        kmeans_in_metric(np.zeros((count, 3)), words, np.zeros((3, 3))),
    ):
        assert found.words.tolist() == [[0, 0, 0]]
        assert found.labels.tolist() == [0] * count


def test_one_point_is_its_own_word() -> None:
    point = np.array([[1.5, -2.25]], np.float32)
    assert kmeans(point, 8).words.tolist() == point.tolist()
    np.testing.assert_allclose(kmeans_in_metric(point, 8, random_metric(2, 2, 0)).words, point, rtol=1e-5)


def test_one_word_is_the_mean() -> None:
    points = cloud(100, 3, 1)
    np.testing.assert_allclose(kmeans(points, 1).words[0], points.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(
        kmeans_in_metric(points, 1, random_metric(3, 3, 1)).words[0], points.mean(axis=0), atol=1e-5
    )


@pytest.mark.parametrize("seed", range(5))
def test_more_words_never_raise_the_error_much(seed: int) -> None:
    points = cloud(400, 2, seed)
    errors = [objective(points, kmeans(points, words, seed=seed)) for words in (1, 2, 4, 8, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True), f"seed {seed}: {errors}"


# ---------------------------------------------------------------- weights


def lumps(seed: int) -> NDArray[np.float32]:
    """Four far lumps of ten points: k-means finds them from any seed, so that results can be compared."""
    return np.concatenate(
        [cloud(10, 2, seed + at) * 0.1 + 10 * np.array([[at % 2, at // 2]]) for at in range(4)]
    ).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_weights_act_like_repeated_points(seed: int) -> None:
    points = lumps(seed)
    times = np.random.default_rng(seed).integers(1, 6, len(points))
    weighted = kmeans(points, 4, seed=seed, weights=times.astype(np.float64))
    repeated = kmeans(np.repeat(points, times, axis=0), 4, seed=seed)

    def ordered(found: Clusters) -> NDArray[np.float32]:
        return found.words[np.lexsort(np.round(found.words).T)]

    np.testing.assert_allclose(ordered(weighted), ordered(repeated), atol=1e-4, err_msg=f"seed {seed}")
    expected = [points[weighted.labels == at].T @ times[weighted.labels == at] for at in range(4)]
    counts = [times[weighted.labels == at].sum() for at in range(4)]
    np.testing.assert_allclose(weighted.words, np.array(expected) / np.array(counts)[:, None], atol=1e-4)


def test_equal_weights_change_nothing() -> None:
    points = lumps(7)
    plain, weighted = kmeans(points, 4, seed=1), kmeans(points, 4, seed=1, weights=np.full(len(points), 2.0))
    np.testing.assert_allclose(plain.words, weighted.words, atol=1e-5)
    np.testing.assert_array_equal(plain.labels, weighted.labels)


def test_a_heavy_point_draws_its_word() -> None:
    points = cloud(200, 2, 3)
    weights = np.ones(200)
    weights[5] = 1e4
    found = kmeans(points, 8, seed=0, weights=weights)
    assert np.linalg.norm(found.words[found.labels[5]] - points[5]) < 0.05
    plain = kmeans(points, 8, seed=0)
    assert np.linalg.norm(plain.words[plain.labels[5]] - points[5]) > 0.05


# ---------------------------------------------------------------- unused words


@pytest.mark.parametrize("weights", [None, np.ones(40)])
def test_unused_words_are_put_where_the_error_is(weights: NDArray[np.floating] | None) -> None:
    points = lumps(0)
    words = np.array([[0, 0], [500, 500], [10, 0], [-500, 0]], np.float32)  # two of them are near no point
    found = _without_empty(points, words, nearest(points, words), weights)
    assert set(found.labels.tolist()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(found.labels, distances(points, found.words).argmin(axis=1))
    assert objective(points, found) < objective(points, Clusters(words, nearest(points, words)))


def test_an_unused_word_goes_to_a_point_that_counts() -> None:
    points = np.array([[0], [1], [100], [40]], np.float32)
    words = np.array([[0], [-900]], np.float32)
    found = _without_empty(points, words, np.zeros(4, np.int64), np.array([1, 1, 0, 1.0]))
    assert found.words[:, 0].tolist() == [0, 40]


def test_words_in_use_are_left_alone() -> None:
    points, words = lumps(0), np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    labels = nearest(points, words)
    found = _without_empty(points, words, labels, None)
    assert found.words is words
    assert found.labels is labels


def test_many_equal_points_leave_no_word_unused() -> None:
    """Most weights of a pruned layer are zero; k-means++ then has few points to choose from."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        points = np.zeros((2000, 1), np.float32)
        points[:40, 0] = rng.normal(size=40)
        found = kmeans(points, 32, seed=seed)
        assert set(found.labels.tolist()) == set(range(32)), f"seed {seed}"


@pytest.mark.parametrize("seed", range(3))
def test_points_that_nearly_coincide_pass_without_a_warning(seed: int) -> None:
    """Distinct, but in fewer heaps than words: scikit-learn warns of that, and users should not read it."""
    points = cloud(500, 4, seed)
    points[:, :2] = np.round(points[:, :2])
    points[:, 2:] *= 1e-6
    metric = np.diag([1.0, 0.0, 0.0, 0.0])
    heaps = len(np.unique(points[:, 0]))
    found = kmeans_in_metric(points, 64, metric, seed=seed)
    assert heaps < 64
    assert objective(points, found, metric) < 1e-6 * objective(points, kmeans(points, 1), metric), f"seed {seed}"


# ---------------------------------------------------------------- nearest


def test_nearest_of_thousands_of_words() -> None:
    """So many that the points are looked at in pieces; the words are the whole numbers, in another order."""
    order = np.random.default_rng(0).permutation(4096)
    points = np.random.default_rng(1).integers(0, 4096, 10_000)
    labels = nearest(points[:, None].astype(np.float32) / 4, order[:, None].astype(np.float32) / 4)
    np.testing.assert_array_equal(order[labels], points)


@given(**CLOUDS)
def test_nearest_is_the_nearest(count: int, width: int, words: int, seed: int) -> None:
    points, centres = cloud(count, width, seed), cloud(words, width, seed + 1)
    apart = distances(points, centres)
    labels = nearest(points, centres)
    np.testing.assert_allclose(apart[np.arange(count), labels], apart.min(axis=1), atol=1e-5)


def test_nearest_in_pieces_and_of_equals_the_first() -> None:
    points = np.arange(70_000, dtype=np.float32)[:, None] % 3
    words = np.array([[0], [2], [1], [0]], np.float16)
    np.testing.assert_array_equal(nearest(points, words), np.array([0, 2, 1])[np.arange(70_000) % 3])


# ---------------------------------------------------------------- the metric


@given(width=st.integers(1, 5), words=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_labels_are_nearest_in_the_metric(width: int, words: int, seed: int) -> None:
    points, metric = cloud(80, width, seed), random_metric(width, width + 2, seed)
    found = kmeans_in_metric(points, words, metric, seed=seed)
    error = points[:, None].astype(np.float64) - found.words[None]
    apart = np.einsum("nki,ij,nkj->nk", error, metric, error)
    chosen = apart[np.arange(80), found.labels]
    where = f"width {width}, {words} words, seed {seed}"
    np.testing.assert_allclose(chosen, apart.min(axis=1), rtol=1e-3, atol=1e-4 * np.trace(metric), err_msg=where)
    for word in range(len(found.words)):  # Stock et al.: with a regular metric the best word is the plain mean
        mean = points[found.labels == word].mean(axis=0)
        np.testing.assert_allclose(found.words[word], mean, atol=0.05, err_msg=where)


@pytest.mark.parametrize(("width", "rank"), [(2, 2), (4, 40), (4, 4), (8, 8), (9, 3), (4, 1)])
def test_the_metric_lowers_its_own_objective(width: int, rank: int) -> None:
    """Against plain k-means of the same size, on average over seeds; singular metrics too."""
    ours = plain = 0.0
    for seed in range(6):
        points, metric = cloud(600, width, seed), random_metric(width, rank, seed)
        scale = np.trace(metric)
        ours += objective(points, kmeans_in_metric(points, 16, metric, seed=seed), metric) / scale
        plain += objective(points, kmeans(points, 16, seed=seed), metric) / scale
    assert 0 < ours < 0.97 * plain, f"width {width}, rank {rank}: {ours} against {plain}"


def test_two_words_in_a_metric_are_the_best_of_all_splits() -> None:
    """Brute force over all ways to split eight points; the best of a few seeds finds it."""
    for seed in range(3):
        points, metric = cloud(8, 3, seed), random_metric(3, 5, seed)
        best = np.inf
        for split in range(1, 2**7):
            labels = np.array([split >> at & 1 for at in range(8)], np.int64)
            words = np.stack([points[labels == at].mean(axis=0) for at in range(2)])
            best = min(best, objective(points, Clusters(words, labels), metric))
        found = min(objective(points, kmeans_in_metric(points, 2, metric, seed=at), metric) for at in range(12))
        assert best * (1 - 1e-5) <= found <= best * (1 + 1e-4), f"seed {seed}: {found} against {best}"


def test_identity_is_the_plain_distance() -> None:
    points = lumps(2)
    plain, metric = kmeans(points, 4, seed=0), kmeans_in_metric(points, 4, 3 * np.eye(2), seed=0)
    np.testing.assert_array_equal(plain.labels, metric.labels)
    np.testing.assert_allclose(plain.words, metric.words, atol=1e-4)


def test_a_zero_metric_is_the_plain_distance() -> None:
    points = cloud(100, 3, 0)
    plain, metric = kmeans(points, 8, seed=5), kmeans_in_metric(points, 8, np.zeros((3, 3)), seed=5)
    assert plain.words.tobytes() == metric.words.tobytes()


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_the_size_of_the_metric_does_not_matter(factor: float) -> None:
    points, metric = cloud(100, 3, 0), random_metric(3, 3, 0)
    a, b = kmeans_in_metric(points, 8, metric, seed=1), kmeans_in_metric(points, 8, metric * factor, seed=1)
    assert objective(points, a, metric) == pytest.approx(objective(points, b, metric), rel=0.05)


def test_dead_inputs_keep_words_near_the_weights() -> None:
    """A column that no input reaches may take any value, but not a wild one: the moments may change later."""
    metric = np.diag([1.0, 0.0, 2.0])
    points = cloud(500, 3, 0)
    found = kmeans_in_metric(points, 16, metric, seed=0)
    assert np.abs(found.words).max() <= np.abs(points).max() * 1.01
