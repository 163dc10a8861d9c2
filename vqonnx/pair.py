"""One linear layer as two: the factors of a product as the weights of two nodes in a row, and back.

``W = left @ right`` is a layer of few outputs followed by one that makes the layer's own of them (Young et al. 2021,
section 4.4: "an a x b convolution with k outputs, then a 1 x 1 convolution", or the other way round where the rows of
``W`` are inputs). `place.py` writes the pair, `expand.py` joins it again; both know it from here alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, helper

from vqonnx.form import Blocks, Form, Product
from vqonnx.graph import Site
from vqonnx.scope import attributes
from vqonnx.view import View, ViewOrder, conv_transpose_view, conv_view, matmul_view

# A second layer writes and reads its activations once more, and has few outputs: with less to gain, the product is
# multiplied out.
_WORTHWHILE = 0.75


@dataclass(frozen=True, eq=False)
class Pair:
    """A product as the weights of two layers, the one after the other.

    Attributes:
        first: The factor that meets the activations first: ``right``, or ``left`` where rows are inputs.
        second: The other one.
        first_view: How the matrix of ``first`` becomes the weight of its node.
        second_view: The same for ``second``.
        copies: Groups of a convolution, all of which have the same first weight.
        by_input: The rows of the product are inputs: the layer's own node, with its kernel, is the second.
    """

    first: Form
    second: Form
    first_view: View
    second_view: View
    copies: int
    by_input: bool

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two weights."""
        rows, *rest = self.first_view.shape
        return (self.copies * rows, *rest), self.second_view.shape


@dataclass(frozen=True)
class Multiplications:
    """What a layer costs for one position of its output (a pixel, or a row of MatMul), edges of the input aside.

    Attributes:
        before: With the whole weight.
        after: As the form is run.
    """

    before: float
    after: float

    @property
    def share(self) -> float:
        """The part that is left; for a product of inner size k about ``k / rows`` (Young et al. 2021, section 4.4)."""
        return self.after / self.before


def multiplications(site: Site, view: View, form: Form) -> Multiplications:
    """The multiplications of the first layer of the site, before and after the form takes the place of its weight."""
    pair = pair_of(site, view, form)
    if pair is None:
        whole = _each(site.node, site.shape)
        return Multiplications(whole, whole)
    return _count(site, pair)


def pair_of(site: Site, view: View, form: Form) -> Pair | None:
    """The form as two layers where it asks for it and that can be (or, for ``cheaper``, is worthwhile); else None."""
    if not isinstance(form, Product) or form.apply == "weights" or obstacle(site, view, form):
        return None
    pair = _pair(site, view, form)
    if form.apply == "cheaper" and _count(site, pair).share > _WORTHWHILE:
        return None
    return pair


def obstacle(site: Site, view: View, form: Form) -> str | None:
    """Why a form that asks (or would) to be applied to activations cannot be; None if it can, or does not ask."""
    if not isinstance(form, Product) or form.apply == "weights":
        return "it is only a part of the weight" if _asks(form) else None
    if len(site.scope.uses[site.name]) != len(site.uses):
        return "another layer reads the weight through a Transpose or Reshape"
    nodes = [use.node for use in site.uses]
    if len({attributes(node).get("group", 1) for node in nodes}) > 1:
        return "layers of different groups share the weight"
    if any(a.ref_attr_name for node in nodes for a in node.attribute if a.name in ("group", "transB")):
        return "an attribute of a layer is set by the caller of its function"
    if site.op_type == "ConvTranspose" and not view.by_input and any("output_shape" in attributes(n) for n in nodes):
        # Where it is smaller than the input, onnx (1.23) infers two axes, and onnxruntime loads no layer behind that.
        return "onnx may infer a wrong shape behind a ConvTranspose with output_shape"
    return None


def _asks(form: Form) -> bool:
    """Whether a form, or a part of it, is a product that is to be applied to activations."""
    if isinstance(form, Blocks):
        return any(map(_asks, form.parts))
    return isinstance(form, Product) and (form.apply == "activations" or _asks(form.left) or _asks(form.right))


def _pair(site: Site, view: View, form: Product) -> Pair:
    order: ViewOrder = next(order for order in get_args(ViewOrder) if site.view(order) == view)
    by_input = view.by_input
    around: ViewOrder = "ohw" if by_input else "ihw"  # of the factor that has no kernel
    first, second = (form.left, form.right) if by_input else (form.right, form.left)
    inner, group = form.left.shape[1], site.group
    if site.op_type in ("Gemm", "MatMul"):
        outputs_first = site.op_type == "Gemm" and bool(attributes(site.node).get("transB", 0))
        *stack, inputs, outputs = site.shape[::-1] if outputs_first else site.shape
        shapes = [(inputs, inner), (*stack, inner, outputs)]
        shapes = [shape[::-1] if outputs_first else shape for shape in shapes]
        views = [matmul_view(shape, outputs_first=outputs_first, order=around) for shape in shapes]
        return Pair(first, second, views[0], views[1], 1, by_input)
    kernel, ones = site.kernel, (1,) * len(site.kernel)
    if site.op_type == "Conv":
        outputs, inputs = site.shape[:2]
        first_kernel, second_kernel = (ones, kernel) if by_input else (kernel, ones)
        views = [
            conv_view((inner, inputs, *first_kernel), order),
            conv_view((outputs, inner, *second_kernel), around),
        ]
    else:
        inputs, outputs = site.shape[0] // group, site.shape[1]
        if by_input:
            views = [
                conv_view((inner, inputs, *ones), around),
                conv_transpose_view((group * inner, outputs, *kernel), group, order),
            ]
        else:
            views = [
                conv_transpose_view((inputs, inner, *kernel), 1, order),
                conv_view((group * outputs, inner, *ones), around),
            ]
    return Pair(first, second, views[0], views[1], group, by_input)


def split(
    node: NodeProto, pair: Pair, weights: tuple[str, str], between: str, zero: str | None = None
) -> tuple[NodeProto, NodeProto]:
    """Two nodes that do what ``node`` does, the second with its name and bias.

    Args:
        node: A layer of the pair's site.
        pair: The product as two layers.
        weights: Names of the two weights.
        between: Name of what the first hands to the second.
        zero: Name of a bias of zeros for the first, where the operator demands one (Gemm before opset 11).
    """
    first, second = NodeProto(), NodeProto()
    second.CopyFrom(node)
    second.input[0], second.input[1] = between, weights[1]
    first.op_type, first.domain = node.op_type, node.domain
    first.input.extend([node.input[0], weights[0]])
    first.output.append(between)
    if node.op_type == "Gemm":
        first.attribute.extend(a for a in node.attribute if a.name in ("transA", "transB"))
        _set_attributes(second, (a for a in node.attribute if a.name != "transA"))
        if zero is not None:
            first.input.append(zero)
    elif node.op_type in ("Conv", "ConvTranspose"):
        groups = [helper.make_attribute("group", pair.copies)] if pair.copies > 1 else []
        small, whole = (first, second) if pair.by_input else (second, first)
        small.op_type = "Conv"
        whole_attributes = list(node.attribute)
        _set_attributes(small, groups)
        _set_attributes(whole, whole_attributes)
    return first, second


def join(first: NodeProto, second: NodeProto, weight: str) -> NodeProto:
    """Undo `split`: the one node that the two stand for."""
    node = NodeProto()
    node.CopyFrom(second)
    node.input[0], node.input[1] = first.input[0], weight
    if "ConvTranspose" in (first.op_type, second.op_type):
        node.op_type = "ConvTranspose"
    more, fewer = sorted((first, second), key=lambda part: -len(part.attribute))
    known = {attribute.name for attribute in more.attribute}
    _set_attributes(node, [*more.attribute, *(a for a in fewer.attribute if a.name not in known)])
    return node


def joined_shape(
    first: NodeProto, second: NodeProto, first_shape: tuple[int, ...], second_shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Shape of the weight that the weights of two nodes stand for."""
    if first.op_type == "MatMul":
        return (*second_shape[:-2], first_shape[-2], second_shape[-1])
    if first.op_type == "Gemm":
        if attributes(first).get("transB", 0):
            return second_shape[0], first_shape[1]
        return first_shape[0], second_shape[1]
    group = int(attributes(second).get("group", 1))
    kernel = tuple(map(max, first_shape[2:], second_shape[2:]))
    if first.op_type == "ConvTranspose":
        return (first_shape[0], second_shape[0] // group, *kernel)
    if second.op_type == "ConvTranspose":
        return (group * first_shape[1], second_shape[1], *kernel)
    return (second_shape[0], first_shape[1], *kernel)


def joined_weight(
    first: NodeProto, second: NodeProto, first_weight: NDArray[np.float32], second_weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The weight that the weights of two nodes stand for."""
    shape = joined_shape(first, second, first_weight.shape, second_weight.shape)
    if first.op_type in ("Gemm", "MatMul"):
        if attributes(first).get("transB", 0):
            return second_weight @ first_weight
        return first_weight @ second_weight
    # One letter an axis: i inputs, k inner, o outputs of one group, t taps of the kernel (all its axes).
    if first.op_type == "ConvTranspose":
        axes = "ikt,ok->iot"
    elif second.op_type == "ConvTranspose":
        axes = "ki,kot->iot"
    else:
        axes = "ki,okt->oit" if prod(second_weight.shape[2:]) > 1 else "kit,ok->oit"
    group = int(attributes(second).get("group", 1))
    factors = []
    for weight, letters in zip((first_weight, second_weight), axes.partition("->")[0].split(","), strict=True):
        taps = (-1,) if "t" in letters else ()
        factors.append(weight.reshape(group, len(weight) // group, weight.shape[1], *taps))
    joined = [np.einsum(axes, *each, optimize=True) for each in zip(*factors, strict=True)]
    return np.concatenate(joined).reshape(shape)


def count(
    first: NodeProto, second: NodeProto, first_shape: tuple[int, ...], second_shape: tuple[int, ...]
) -> Multiplications:
    """The multiplications of a layer as one node and as these two.

    Young et al. 2021, section 4.4, gives ``(n k + a b m k) / (a b m n)`` for the share; here a first layer in front of
    a convolution with strides also counts all the positions that it is computed at.
    """
    whole = _each(join(first, second, ""), joined_shape(first, second, first_shape, second_shape))
    steps = _steps(second)
    positions = steps if second.op_type == "Conv" else 1 / steps  # of what lies between, for one of the output
    return Multiplications(whole, _each(first, first_shape) * positions + _each(second, second_shape))


def _count(site: Site, pair: Pair) -> Multiplications:
    return count(*split(site.node, pair, ("", ""), ""), *pair.shapes)


def _each(node: NodeProto, shape: tuple[int, ...]) -> float:
    """Multiplications of one node for one position of its output."""
    if node.op_type == "MatMul":
        return prod(shape[-2:])  # a row meets one matrix of a stack
    return prod(shape) / (_steps(node) if node.op_type == "ConvTranspose" else 1)


def _steps(node: NodeProto) -> int:
    return int(prod(attributes(node).get("strides", ())))


def _set_attributes(node: NodeProto, values: Iterable[AttributeProto]) -> None:
    kept: list[Any] = list(values)
    del node.attribute[:]
    node.attribute.extend(kept)
