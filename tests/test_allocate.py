"""Bytes are shared out once, and again where layers do not take what they offered."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vqonnx.allocate import Sharing
from vqonnx.lagrange import lower_hull
from vqonnx.menu import Menu
from vqonnx.method import Offer
from vqonnx.methods import Best

Layers = list[tuple[int, float]]  # weights and how much the error of each counts


def layers() -> st.SearchStrategy[Layers]:
    return st.lists(st.tuples(st.integers(100, 100_000), st.floats(0.1, 100)), min_size=1, max_size=12)


def menus_of(entries: Layers) -> dict[int, Menu]:
    """Each weight takes 1 to 8 bits and loses 6 dB a bit."""
    menus = {}
    for number, (weights, factor) in enumerate(entries):
        offers = [Offer(Best(), weights * bits / 8, weights * 4.0**-bits) for bits in range(1, 9)]
        curve = lower_hull([offer.bytes for offer in offers], [offer.error for offer in offers])
        menus[number] = Menu(weights, offers, curve, float(weights), factor)
    return menus


def chosen(sharing: Sharing, limit: float, times: np.ndarray) -> tuple[list[float], float]:
    """What the layers offer, and what they take: so many times as much."""
    sharing.restart(limit)
    offered = []
    for number, more in enumerate(times):
        offer = sharing.choose(number)
        assert offer is not None
        offered.append(offer.bytes)
        sharing.spend(number, more * offer.bytes)
    return offered, float(np.sum(times * offered))


@given(layers(), st.floats(0, 1))
def test_layers_that_take_what_they_offer_use_what_is_planned_at_the_start(entries: Layers, share: float) -> None:
    """The same whatever has been tried before, and as near to the limit as the smallest step that fits no more."""
    menus = menus_of(entries)
    sharing = Sharing([Best()] * len(menus), menus)
    limit = sharing.least + share * (sharing.most - sharing.least)
    exact = np.ones(len(menus))
    offered, taken = chosen(sharing, limit, exact)
    assert taken <= limit * (1 + 1e-9)
    left = [menus[n].weights / 8 for n, size in enumerate(offered) if size < menus[n].curve.rates[-1]]
    assert limit - taken <= max(left, default=0) + 1e-6
    chosen(sharing, (sharing.least + sharing.most) / 2, exact)
    assert chosen(sharing, limit, exact)[0] == offered


@given(layers(), st.floats(0.1, 0.9), st.integers(0, 2**32 - 1))
def test_a_little_more_or_less_does_not_change_what_is_planned(entries: Layers, share: float, seed: int) -> None:
    menus = menus_of(entries)
    sharing = Sharing([Best()] * len(menus), menus)
    limit = sharing.least + share * (sharing.most - sharing.least)
    planned, _ = chosen(sharing, limit, np.ones(len(menus)))
    assume(limit - sum(planned) < 0.001 * limit)  # otherwise what is left over is shared out again
    fresh = Sharing([Best()] * len(menus), menus)
    slightly = np.random.default_rng(seed).uniform(0.998, 1.002, len(menus))
    assert chosen(fresh, limit, slightly)[0] == planned


@settings(max_examples=50)
@given(st.floats(0.8, 1.25), st.floats(0.2, 0.7))
def test_what_layers_take_more_is_taken_from_those_that_follow(times: float, share: float) -> None:
    """And known at the next start."""
    menus = menus_of([(1000 * (7 + number % 3), 1 + number % 5) for number in range(40)])
    sharing = Sharing([Best()] * len(menus), menus)
    limit = sharing.least + share * (sharing.most - sharing.least)
    every = np.full(len(menus), times)
    _, taken = chosen(sharing, limit, every)
    assert abs(taken - limit) <= 0.05 * limit
    _, taken = chosen(sharing, limit, every)
    assert 0.985 * limit <= taken <= 1.005 * limit
