"""Share bytes out among the layers of a model: one Lagrange multiplier for all of them.

Young et al. 2021 (arXiv 2009.01174): the error of the network's output is taken as the sum of what each unit adds, and
bytes go where they save most of it. What a layer takes in the end differs from what it offered, so the rest is shared
out anew after each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from vqonnx.errors import OptionError
from vqonnx.lagrange import allocate, least_rate
from vqonnx.menu import Menu
from vqonnx.method import Budgeted, Method, Offer

# The codebooks of whole numbers, float16, for 1 to 8 bits: equal ones are stored once for the whole model.
_CODEBOOK_BYTES = 2 * (2**9 - 2)
_ROUNDING = 1e-4  # bits of a layer are written with four digits, rounded up


class Sharing:
    """The menus of all layers, and the bytes that are left for those that have not been encoded.

    Layers with equal methods share one budget: the bits a weight of the method, or what `restart` says.
    """

    def __init__(self, methods: Sequence[Method], menus: Mapping[int, Menu]) -> None:
        """Nothing is left before `restart` says how much.

        Args:
            methods: That of each layer.
            menus: By the number of the layer; the others keep their methods.
        """
        self._methods = methods
        self._menus = menus
        self._left: dict[Method, float] = {}
        self._todo: dict[Method, list[int]] = {}

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

    def choose(self, number: int) -> Offer | None:
        """What layer ``number`` gets of what is left; None where it does not share."""
        if number not in self._menus:
            return None
        method, menu = self._methods[number], self._menus[number]
        todo = self._todo[method]
        curves = [self._menus[other].weighted for other in todo]
        picks = allocate(curves, max(self._left[method], least_rate(curves)))
        return menu.offers[int(menu.curve.choices[picks[todo.index(number)]])]

    def spend(self, number: int, taken: float) -> None:
        """Layer ``number`` is encoded, in so many bytes."""
        if number in self._menus:
            method = self._methods[number]
            self._left[method] -= taken
            self._todo[method] = [other for other in self._todo[method] if other != number]

    def _from_bits(self, method: Budgeted, numbers: Sequence[int]) -> float:
        weights = sum(self._menus[number].weights for number in numbers)
        curves = [self._menus[number].curve for number in numbers]
        spare = _CODEBOOK_BYTES + _ROUNDING * weights / 8
        budget = method.bits * weights / 8 - spare
        if budget < least_rate(curves):
            bits = ceil(800 * (least_rate(curves) + spare) / weights) / 100
            raise OptionError(
                f"method '{method.id}': bits is {method.bits:g}, but these {len(numbers)} layers take at least "
                f"{bits:g} bits a weight; choose {bits:g} or more"
            )
        most = ceil(800 * (sum(curve.rates[-1] for curve in curves) + spare) / max(weights, 1)) / 100
        if method.bits > max(most, 8):
            raise OptionError(
                f"method '{method.id}': bits is {method.bits:g}, but these {len(numbers)} layers have use for at most "
                f"{most:g} bits a weight; choose {most:g} or less"
            )
        return budget
