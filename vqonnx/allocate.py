"""Share bytes out among the layers of a model: one Lagrange multiplier for all of them.

Young et al. 2021 (arXiv 2009.01174): the error of the network's output is taken as the sum of what each unit adds, and
bytes go where they save most of it. What a layer takes in the end may differ from what it offered, so once what is left
is no longer what was planned, the rest is shared out anew, in units of what those before took for what they offered.
The last layers, often a small classifier, must not pay for all that a large one took too much, so what is left for them
may not move far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from vqonnx.errors import OptionError
from vqonnx.lagrange import Curve, allocate, least_rate
from vqonnx.menu import Menu
from vqonnx.method import Budgeted, Method, Offer

# The codebooks of whole numbers for 1 to 8 bits: equal ones are stored once for the whole model.
_CODEBOOK_BYTES = 2**9 - 2
_ROUNDING = 1e-4  # bits of a layer are written with four digits, rounded up
_RESERVE = 0.01  # of what layers may take by their bits, for those that take more than is left
_DRIFT = 0.003  # of what all layers have: by so much may what is left differ from what is planned
_MOVE = 0.1  # of what layers would have had at the start, up or down
_UNLIKE = 0.7, 1.4  # a layer may take so many times what it offered


class Sharing:
    """The menus of all layers, and the bytes that are left for those that have not been encoded.

    Layers with equal methods share one budget: the bits a weight of the method, or what `restart` says.
    """

    def __init__(self, methods: Sequence[Method], menus: Mapping[int, Menu], *, lenient: bool = False) -> None:
        """Nothing is left before `restart` says how much.

        Args:
            methods: That of each layer.
            menus: By the number of the layer; the others keep their methods.
            lenient: Take as few bits as the layers can where those of the method are too few.
        """
        self._lenient = lenient
        self._methods = methods
        self._menus = menus
        self._left: dict[Method, float] = {}
        self._drift: dict[Method, float] = {}  # by so much may that differ from what is planned
        self._todo: dict[Method, list[int]] = {}
        self._offered: dict[int, float] = {}
        self._ratios: dict[int, float] = {}  # what a layer took for each byte that it had offered, when it last did
        self._picks: dict[int, int] = {}  # the planned vertex of a layer's curve
        self._planned: dict[int, float] = {}  # what the layer is expected to take with it
        self._start: dict[int, float] = {}  # what it was at the start

    @property
    def least(self) -> float:
        """The bytes that the layers take at least."""
        return least_rate([menu.curve for menu in self._menus.values()])

    @property
    def most(self) -> float:
        """The bytes that they have a use for."""
        return float(sum(menu.curve.rates[-1] for menu in self._menus.values()))

    def restart(self, limit: float | None = None) -> None:
        """Begin anew, with ``limit`` bytes for all layers that share, or with the bits of their methods.

        Raises:
            OptionError: Layers take more than the bits of their method, or have no use for as many; or layers with
                different methods shall share one limit.
        """
        self._todo = {}
        for number in self._menus:
            self._todo.setdefault(self._methods[number], []).append(number)
        if limit is not None and len(self._todo) > 1:
            kinds = ", ".join(sorted({method.id for method in self._todo}))
            raise OptionError(f"a size for the whole file needs one method whose bits are shared, not {kinds}")
        for method, numbers in self._todo.items():
            assert isinstance(method, Budgeted)
            self._left[method] = self._from_bits(method, numbers) if limit is None else limit
            self._drift[method] = _DRIFT * self._left[method]
            self._plan(numbers, self._left[method])
        self._start = dict(self._planned)

    def choose(self, number: int) -> Offer | None:
        """What layer ``number`` gets of what is left; None where it does not share."""
        if number not in self._menus:
            return None
        method, menu = self._methods[number], self._menus[number]
        todo = self._todo[method]
        start = sum(self._start[other] for other in todo)
        budget = min(max(self._left[method], (1 - _MOVE) * start), (1 + _MOVE) * start)
        if abs(budget - sum(self._planned[other] for other in todo)) > self._drift[method]:
            self._plan(todo, budget)
        pick = self._picks[number]
        self._offered[number] = float(menu.curve.rates[pick])
        return menu.offers[int(menu.curve.choices[pick])]

    def spend(self, number: int, taken: float) -> None:
        """Layer ``number`` is encoded, in so many bytes."""
        if number in self._menus:
            method = self._methods[number]
            self._left[method] -= taken
            self._todo[method] = [other for other in self._todo[method] if other != number]
            if taken and self._offered[number]:
                self._ratios[number] = min(max(taken / self._offered[number], _UNLIKE[0]), _UNLIKE[1])

    def _plan(self, numbers: Sequence[int], budget: float) -> None:
        """Share out what there is among these layers."""
        curves = self._curves(numbers)
        picks = allocate(curves, max(budget, least_rate(curves)), fill=True)
        for number, curve, pick in zip(numbers, curves, picks, strict=True):
            self._picks[number], self._planned[number] = pick, float(curve.rates[pick])

    def _curves(self, numbers: Sequence[int]) -> list[Curve]:
        """Rates as they are expected to be, errors as they are in the network's output."""
        known = [(self._ratios[n], self._offered[n]) for n in self._ratios]
        weight = sum(offered for _, offered in known)
        mean = sum(ratio * offered for ratio, offered in known) / weight if weight else 1.0
        curves = []
        for number in numbers:
            curve = self._menus[number].weighted
            curves.append(Curve(curve.rates * self._ratios.get(number, mean), curve.errors, curve.choices))
        return curves

    def _from_bits(self, method: Budgeted, numbers: Sequence[int]) -> float:
        weights = sum(self._menus[number].weights for number in numbers)
        curves = [self._menus[number].curve for number in numbers]
        spare = _CODEBOOK_BYTES + _ROUNDING * weights / 8
        budget = (1 - _RESERVE) * (method.bits * weights / 8 - spare)
        if budget < least_rate(curves) and self._lenient:
            budget = least_rate(curves)
        elif budget < least_rate(curves):
            bits = ceil(800 * (least_rate(curves) / (1 - _RESERVE) + spare) / weights) / 100
            raise OptionError(
                f"method '{method.id}': bits is {method.bits:g}, but these {len(numbers)} layers take at least "
                f"{bits:g} bits a weight; choose {bits:g} or more"
            )
        all_of_them = sum(curve.rates[-1] for curve in curves) / (1 - _RESERVE)
        most = ceil(800 * (all_of_them + spare) / max(weights, 1)) / 100
        if method.bits > max(most, 8):
            raise OptionError(
                f"method '{method.id}': bits is {method.bits:g}, but these {len(numbers)} layers have use for at most "
                f"{most:g} bits a weight; choose {most:g} or less"
            )
        return budget
