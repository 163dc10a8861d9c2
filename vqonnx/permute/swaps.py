"""Search an order of channels in which neighbouring ones make good blocks: a greedy start, then random swaps.

For a codebook of vectors of ``width`` weights the error at a given rate goes with the determinant of the covariance of
those vectors (Martinez et al. 2021); for the metric of the input the same holds of its mean over blocks.
Both are sums over blocks of parts of a matrix between channels, so a swap changes the part of two blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Order = NDArray[np.int64]

_TOGETHER = 128  # swaps that are tried at once
_RIDGE = 1e-6  # times the mean of the diagonal: dead channels have no variance


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads the channels, as the search sees it.

    Attributes:
        grams: Matrices float64 ``[entries, entries]`` between the entries of its input axis, whose mean over blocks
            counts by the logarithm of its determinant.
        entries: int ``[size, run]``: where each channel of the group lies.
        width: Entries of a block.
        weight: How much the layer counts.
    """

    grams: tuple[Array, ...]
    entries: NDArray[np.int64]
    width: int
    weight: float


@dataclass(frozen=True, eq=False)
class Search:
    """What came out.

    Attributes:
        order: Channel ``i`` is what ``order[i]`` was.
        before: Sum of the weighted logarithms in the old order.
        after: The same in the new one.
    """

    order: Order
    before: float
    after: float


class _State:
    """Sums over the blocks of one consumer, kept up to date."""

    def __init__(self, consumer: Consumer, order: Order) -> None:
        self._consumer = consumer
        total = len(consumer.grams[0])
        width = consumer.width
        self._blocks = -(-total // width)
        # What lies at each entry; what fills up the last block is a row of zeros.
        self._at = np.full(self._blocks * width, total)
        self._at[:total] = np.arange(total)
        self._at[consumer.entries] = consumer.entries[order]
        self._grams = np.zeros((len(consumer.grams), total + 1, total + 1))
        for number, gram in enumerate(consumer.grams):
            self._grams[number, :total, :total] = gram / max(float(np.trace(gram)), 1e-300)
        self._ridge = _RIDGE / width * np.eye(width)
        self._sums = self._parts(self._at.reshape(self._blocks, width))
        self.value = self._log(self._sums)
        self._tried: tuple[Array, float, NDArray[np.int64], NDArray[np.int64]] | None = None

    def try_swaps(self, pairs: NDArray[np.int64]) -> Array:
        """``[n]``: the value with each of the pairs ``[n, 2]`` of channels in each other's place."""
        width, entries = self._consumer.width, self._consumer.entries
        if entries.shape[1] > 1:
            return np.array([self.try_swap(one, other) for one, other in pairs.tolist()])
        places = entries[pairs, 0]  # [n, 2]
        blocks, number = places // width, np.arange(len(pairs))
        before = self._at.reshape(-1, width)[blocks]  # [n, 2, width]
        after = before.copy()
        together = blocks[:, 0] == blocks[:, 1]
        for one, other in ((0, 1), (1, 0)):
            after[number, one, places[:, one] % width] = self._at[places[:, other]]
        after[together, 0, places[together, 1] % width] = self._at[places[together, 0]]
        change = self._gathered(after) - self._gathered(before)  # [grams, n, 2, width, width]
        change[:, together, 1] = 0
        logs = np.linalg.slogdet(self._sums[:, None] + change.sum(axis=2) + self._ridge)[1]
        return np.asarray(self._consumer.weight * logs.sum(axis=0))

    def try_swap(self, one: int, other: int) -> float:
        """The same for one pair, which may be accepted."""
        width = self._consumer.width
        first, second = self._consumer.entries[one], self._consumer.entries[other]
        places = np.concatenate([first, second])
        kept, values = self._at[places], np.concatenate([self._at[second], self._at[first]])
        shape = np.unique(places // width)[:, None] * width + np.arange(width)
        before = self._at[shape]
        self._at[places] = values
        after = self._at[shape]
        self._at[places] = kept
        sums = self._sums - self._parts(before) + self._parts(after)
        value = self._log(sums)
        self._tried = sums, value, places, values
        return value

    def accept(self) -> None:
        """Keep the swap that was tried last."""
        assert self._tried is not None
        self._sums, self.value, places, values = self._tried
        self._at[places] = values

    def _gathered(self, at: NDArray[np.int64]) -> Array:
        part: Array = self._grams[:, at[..., :, None], at[..., None, :]]
        return part

    def _parts(self, at: NDArray[np.int64]) -> Array:
        """``[grams, width, width]``: sum over the blocks of their part of each matrix."""
        return np.asarray(self._gathered(at).sum(axis=1))

    def _log(self, sums: Array) -> float:
        return self._consumer.weight * float(np.linalg.slogdet(sums + self._ridge)[1].sum())


def search(consumers: Sequence[Consumer], size: int, *, swaps: int = 10_000, seed: int = 0) -> Search:
    """Look for a good order of ``size`` channels.

    Args:
        consumers: The layers that read them.
        size: Number of channels.
        swaps: Number of pairs that are tried.
        seed: Of the choice of pairs.
    """
    own = np.arange(size)
    before = _value(consumers, own)
    order = min((own, *_starts(consumers, size)), key=lambda start: _value(consumers, start))
    order = order.copy()
    states = [_State(consumer, order) for consumer in consumers]
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, size, (swaps, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    now = sum(state.value for state in states)
    for start in range(0, len(pairs), _TOGETHER):
        batch = pairs[start : start + _TOGETHER]
        values = np.sum([state.try_swaps(batch) for state in states], axis=0)
        for number in np.argsort(values, kind="stable"):
            if values[number] >= now:
                break
            one, other = batch[number]
            value = sum(state.try_swap(one, other) for state in states)  # others may have come between
            if value < now - 1e-12 * abs(now):
                for state in states:
                    state.accept()
                order[one], order[other] = order[other], order[one]
                now = value
    return Search(order, before, _value(consumers, order))


def _value(consumers: Sequence[Consumer], order: Order) -> float:
    return sum(_State(consumer, order).value for consumer in consumers)


def _starts(consumers: Sequence[Consumer], size: int) -> list[Order]:
    """Channels dealt by variance to the places of a block: evenly, and the largest all to the first place."""
    main = max(consumers, key=lambda consumer: consumer.weight)
    variance = np.zeros(size)
    for consumer in consumers:
        gram = consumer.grams[0]
        variance += (
            consumer.weight * np.diagonal(gram)[consumer.entries].sum(axis=1) / max(float(np.trace(gram)), 1e-300)
        )
    phases = main.entries[:, 0] % main.width
    ranked = np.argsort(-variance, kind="stable")
    places = [np.flatnonzero(phases == phase).tolist() for phase in range(main.width)]
    even, sorted_ = np.empty(size, np.int64), np.empty(size, np.int64)
    sums = np.zeros(main.width)
    left = [list(reversed(free)) for free in places]
    for channel in ranked:
        phase = min((p for p in range(main.width) if left[p]), key=lambda p: sums[p])
        even[left[phase].pop()] = channel
        sums[phase] += variance[channel]
    sorted_[np.concatenate([np.asarray(free, np.int64) for free in places])] = ranked
    return [even, sorted_]
