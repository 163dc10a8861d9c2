"""What a method sees (a layer), and what it must offer (a way to encode it)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from math import prod
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from vqonnx.errors import OptionError
from vqonnx.form import Form, Matrix
from vqonnx.moments import Cross, Moments
from vqonnx.view import Order, ViewOrder

# A codeword holds weights of neighbouring inputs of one output, or of neighbouring outputs of one input.
Along = Literal["inputs", "outputs"]


class Needs(Enum):
    """What a method wants to know of a layer besides its weight."""

    WEIGHT = "weight"
    MOMENTS = "moments"


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer, as a method sees it.

    Attributes:
        name: Name of the weight.
        op_type: Conv, ConvTranspose, Gemm or MatMul.
        weight: float32 ``[rows, cols]``, seen in the method's `Method.view_order`.
        kernel: Sizes of a convolution's kernel; empty for Gemm and MatMul.
        groups: Groups of a convolution; a depthwise one has one row and one input channel in each.
        first: It is the first layer of the model.
        last: It is the last one.
        seed: Seed for everything random.
        moments: Second moments of what an output sees of the input, in the method's `Method.order`, or None where there
            is no calibration data.
    """

    name: str
    op_type: str
    weight: Matrix
    kernel: tuple[int, ...] = ()
    groups: int = 1
    first: bool = False
    last: bool = False
    seed: int = 0
    moments: Moments | None = None
    cross: Cross | None = None

    @property
    def depthwise(self) -> bool:
        """Whether every output sees one channel."""
        return self.groups > 1 and self.weight.shape[1] == prod(self.kernel)


class LeftAlone(Exception):
    """Raised by a method for a layer that it does not compress; the message is the reason that the user sees."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to turn a weight into a form. Its options are its fields.

    Attributes:
        order: Column order of a convolution's rows: ``ihw`` as ONNX stores them, ``hwi`` with the channels innermost.
    """

    id: ClassVar[str]
    needs: ClassVar[Needs] = Needs.WEIGHT
    depthwise: ClassVar[bool] = False  # it has something to offer for depthwise convolutions

    order: Order = "ihw"

    @property
    def view_order(self) -> ViewOrder:
        """How the weight is seen: rows are outputs, in `order`, unless a method says otherwise."""
        return self.order

    @abstractmethod
    def encode(self, layer: Layer) -> Form:
        """The form that takes the place of the weight; `LeftAlone` with the reason if there is none.

        The same layer, seed included, gives the same bytes.
        """

    @property
    def pairs(self) -> bool:
        """Whether it makes use of the original's inputs beside the compressed model's, and leaves the mean to the bias.

        With them the pass corrects the bias of each layer.
        """
        return False

    @property
    def options(self) -> dict[str, Any]:
        """The options as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Offer:
    """One way to encode a layer.

    Attributes:
        method: The method for it; it encodes the layer in about so many bytes.
        bytes: What the layer takes, without a codebook that a model stores once for many layers.
        error: Mean squared error of the layer's output (of its weight, summed, where there are no moments).
    """

    method: Method
    bytes: float
    error: float


@dataclass(frozen=True)
class Budgeted(Method):
    """A method whose bits are an average over the layers of a model; `allocate` shares them out.

    Attributes:
        bits: Stored bits for each weight; on its own, `encode` gives them to one layer.
    """

    bits: float = 4.0

    @property
    def shares(self) -> bool:
        """Whether its bits are shared out, or an option says already what each layer gets."""
        return True

    @property
    def variants(self) -> tuple[Budgeted, ...]:
        """The same method in each `view_order` that it leaves open."""
        return (self,)

    @abstractmethod
    def offers(self, layer: Layer) -> list[Offer]:
        """The ways to encode the layer, at every size; `LeftAlone` with the reason if there is none."""


def make_method(kind: type[Method], options: Mapping[str, Any]) -> Method:
    """Build a method from options as a user writes them: text is converted to the type of the field.

    Raises:
        OptionError: An option is unknown, or its value is not of the right kind.
    """
    known = {field.name: field for field in fields(kind)}
    hints = get_type_hints(kind)
    values = {}
    for name, value in options.items():
        if name not in known:
            raise OptionError(f"method '{kind.id}' has no option '{name}'; it has {', '.join(known)}")
        try:
            values[name] = _convert(hints[name], value)
        except ValueError as error:
            raise OptionError(f"method '{kind.id}': option {name}={value!r} is not {error}") from error
    missing = [n for n, f in known.items() if n not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise OptionError(f"method '{kind.id}' needs a value for {', '.join(missing)}")
    return kind(**values)


def _convert(hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint``; a ValueError whose text names what was wanted."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        if str(value) not in map(str, choices):
            raise ValueError(f"one of {', '.join(map(str, choices))}")
        return next(choice for choice in choices if str(choice) == str(value))
    if type(None) in choices:
        if value is None or str(value).lower() in ("none", "auto"):
            return None
        return _convert(next(choice for choice in choices if choice is not type(None)), value)
    if hint is bool:
        text = str(value).lower()
        if text not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("true or false")
        return text in ("true", "1", "yes")
    if hint is int:
        try:
            return int(str(value))
        except ValueError:
            raise ValueError("a whole number") from None
    if hint is float:
        try:
            return float(value)
        except ValueError:
            raise ValueError("a number") from None
    return str(value)


def check_range(method: Method, name: str, low: int, high: int) -> None:
    """Refuse an option outside ``low..high``.

    Raises:
        OptionError: It is outside.
    """
    value = getattr(method, name)
    if value is not None and not low <= value <= high:
        raise OptionError(f"method '{method.id}': {name} is {value}; choose {low} to {high}")


def check_along(method: Method, along: Along) -> None:
    """Refuse a column order where vectors run along outputs: their rows have only one.

    Raises:
        OptionError: Both are given.
    """
    if along == "outputs" and method.order != "ihw":
        raise OptionError(f"method '{method.id}': order={method.order} needs along=inputs; choose one of the two")


def blocks_of(matrix: Matrix, width: int) -> NDArray[np.float32]:
    """The rows cut into blocks ``[rows, groups, width]``; the last block is filled up with zeros."""
    rows, cols = matrix.shape
    groups = -(-cols // width)
    padded = np.pad(matrix, ((0, 0), (0, groups * width - cols)))
    return padded.reshape(rows, groups, width)
