"""K-means on scikit-learn: seeding, empty clusters, and clustering in a metric."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import ThreadpoolController

ITERATIONS = 60
_QUICK = 6
_RESEED_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Clusters:
    """Centres and the number of the centre of each point.

    Attributes:
        words: float32 ``[k, width]``.
        labels: int ``[points]``, each smaller than ``k``.
    """

    words: NDArray[np.float32]
    labels: NDArray[np.int64]


def kmeans(
    points: NDArray[np.floating],
    words: int,
    *,
    seed: int = 0,
    weights: NDArray[np.floating] | None = None,
    quick: bool = False,
) -> Clusters:
    """Ordinary k-means (Lloyd's algorithm from k-means++).

    The number of words is clamped to the number of distinct points; with no more points than words each distinct
    point is its own centre, without error. Runs on one thread, because scikit-learn adds the threads' partial sums
    in the order in which they finish: the same seed gives the same bytes.

    Args:
        points: ``[n, width]``.
        words: Number of centres asked for.
        seed: Seed of the initial centres.
        weights: ``[n]``, how often each point counts; None for once each.
        quick: From points chosen at random, in few iterations: enough to see what so many words can do.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    distinct, inverse = _distinct(points, words)
    if distinct is not None and inverse is not None:
        return Clusters(distinct, inverse)
    start, iterations = ("random", _QUICK) if quick else ("k-means++", ITERATIONS)
    model = KMeans(words, init=start, n_init=1, max_iter=iterations, tol=1e-5, random_state=seed)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # words that coincide are put elsewhere below
        model.fit(points, sample_weight=weights)
    return _without_empty(points, model.cluster_centers_.astype(np.float32), model.labels_.astype(np.int64), weights)


def kmeans_in_metric(
    points: NDArray[np.floating], words: int, metric: NDArray[np.float64], *, seed: int = 0
) -> Clusters:
    """K-means under the distance ``(v - c)^T G (v - c)``.

    With ``G = L L^T`` this is ordinary k-means on ``L^T v``, mapped back by ``L^-T`` (Stock et al. 2020).
    A small multiple of the identity keeps the factor regular where inputs are dead or dependent.

    Args:
        points: ``[n, width]``.
        words: Number of centres asked for.
        metric: G, ``[width, width]``, positive semi-definite.
        seed: Seed of the initial centres.
    """
    width = metric.shape[0]
    scale = float(np.trace(metric)) / width
    if scale <= 0:
        return kmeans(points, words, seed=seed)
    factor = np.linalg.cholesky(metric / scale + 1e-6 * np.eye(width))
    whitened = kmeans(points @ factor, words, seed=seed)
    centres = np.linalg.solve(factor.T, whitened.words.T.astype(np.float64)).T
    return Clusters(centres.astype(np.float32), whitened.labels)


def nearest(points: NDArray[np.floating], words: NDArray[Any]) -> NDArray[np.int64]:
    """The number of the nearest word of each point; of equals the first. ``[n, width], [k, width] -> [n]``."""
    words = words.astype(np.float32)
    half = 0.5 * np.einsum("kd,kd->k", words, words)
    labels = np.empty(len(points), np.int64)
    step = min(65536, 2**24 // len(words))  # 64 MB of distances at a time, or less
    for start in range(0, len(points), step):
        chunk = points[start : start + step].astype(np.float32)
        labels[start : start + step] = np.argmin(half - chunk @ words.T, axis=1)
    return labels


def one_thread() -> AbstractContextManager[Any]:
    """While it is entered, numpy and scikit-learn compute on one thread."""
    return cast("AbstractContextManager[Any]", _threads().limit(limits=1))


@cache
def _threads() -> ThreadpoolController:
    """The libraries with threads that scikit-learn has loaded; finding them takes as long as a small clustering."""
    return ThreadpoolController()


def _distinct(
    points: NDArray[np.float32], words: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]] | tuple[None, None]:
    """The distinct points and where each point went, if they are no more than ``words``."""
    if len(np.unique(points[: 4 * words + 4], axis=0)) > words:  # a look at the first few settles most layers
        return None, None
    distinct, inverse = np.unique(points, axis=0, return_inverse=True)
    if len(distinct) > words:
        return None, None
    return distinct, inverse.reshape(-1).astype(np.int64)


def _without_empty(
    points: NDArray[np.float32],
    words: NDArray[np.float32],
    labels: NDArray[np.int64],
    weights: NDArray[np.floating] | None,
) -> Clusters:
    """Put unused centres where the error is largest, and re-assign, until none is unused."""
    importance = np.ones(len(points)) if weights is None else weights
    for _ in range(_RESEED_ROUNDS):
        empty = np.setdiff1d(np.arange(len(words)), labels)
        if not len(empty):
            break
        errors = importance * ((points - words[labels]) ** 2).sum(axis=1)
        worst = np.argsort(-errors, kind="stable")[: len(empty)]
        words = words.copy()
        words[empty] = points[worst]
        labels = nearest(points, words)
    return Clusters(words, labels)
