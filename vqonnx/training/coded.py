"""Weights of a compressed model as functions of their codebooks: the codes are fixed, the codebooks may move.

Prefix codes and the codes of `settled` stand for multiples of a step, in one codebook of whole numbers for the whole
model; there the steps move, which are the scales of the ``Decode`` nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper
from torch import Tensor

from vqonnx import modelfile
from vqonnx.errors import ModelError, VqonnxError
from vqonnx.form import WORD_TYPES, Coded, code_bits, unpack
from vqonnx.ops import DOMAIN
from vqonnx.place import Target, main_opset
from vqonnx.recompute import compute
from vqonnx.record import read_record
from vqonnx.scope import attributes
from vqonnx.stored import StoredWeight, find_stored
from vqonnx.training.executor import TorchGraph
from vqonnx.uniform import DEEPEST, book

Gradient = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class FixedCodes:
    """What is fixed of a `Coded` form.

    Attributes:
        index: int64 ``[stages, rows, groups]``: the word of each block, counted over all stages and books.
        words: Words of all stages and books.
        cols: Columns of the matrix.
        scales: float32 ``[rows, 1]`` or ``[1, 1]``; None means 1.
    """

    index: Tensor
    words: int
    cols: int
    scales: Tensor | None

    @classmethod
    def of(cls, form: Coded) -> FixedCodes:
        """The codes and scales of a form."""
        first = np.arange(form.stages)[:, None, None] * form.books + np.arange(form.groups) % form.books
        index = torch.from_numpy(first * form.words + form.codes)
        scales = None if form.scales is None else torch.from_numpy(form.scales.astype(np.float32))
        return cls(index, form.stages * form.books * form.words, form.cols, scales)

    @property
    def uses(self) -> Tensor:
        """How many blocks use each word, ``[words]``."""
        return torch.bincount(self.index.reshape(-1), minlength=self.words)

    def decode(self, codebooks: Tensor) -> Tensor:
        """The matrix ``[rows, cols]``, in the order of arithmetic of `vqonnx.form.Coded.decode`.

        Args:
            codebooks: float32 ``[stages, books, words, width]``.
        """
        table = codebooks.reshape(self.words, -1)
        blocks = F.embedding(self.index[0], table)
        for stage in range(1, len(self.index)):
            blocks = blocks + F.embedding(self.index[stage], table)
        matrix = blocks.reshape(self.index.shape[1], -1)
        if self.scales is not None:
            matrix = matrix * self.scales
        return matrix[:, : self.cols]

    def to(self, device: str | torch.device) -> FixedCodes:
        """The same on a device."""
        scales = None if self.scales is None else self.scales.to(device)
        return FixedCodes(self.index.to(device), self.words, self.cols, scales)


@dataclass(frozen=True, eq=False)
class _Decode:
    """A ``Decode`` node: the blocks of a matrix, and how it becomes a tensor.

    Attributes:
        blocks: The codes; without scales where these move.
        moving: Name of the initializer that moves: the codebooks, or the scales of multiples of a step.
        uses: How many blocks each of its words has, or how many weights each scale.
        steps: The codebooks, where the scales move.
        split: Axes of the matrix.
        perm: Their order in the tensor.
    """

    blocks: FixedCodes
    moving: str
    uses: Tensor
    steps: Tensor | None
    split: tuple[int, ...]
    perm: tuple[int, ...]

    def compute(self, values: Mapping[str, Tensor]) -> Tensor:
        if self.steps is None:
            matrix = self.blocks.decode(values[self.moving])
        else:
            matrix = self.blocks.decode(self.steps) * values[self.moving]
        return matrix.reshape(self.split).permute(self.perm)

    def to(self, device: str | torch.device) -> _Decode:
        steps = None if self.steps is None else self.steps.to(device)
        return replace(self, blocks=self.blocks.to(device), steps=steps)


class CodedWeight:
    """One weight of a compressed model, made by ``Decode`` nodes or by standard nodes (target ``portable``).

    Attributes:
        name: Its name.
        shape: Its shape.
        books: Names of the initializers that move: those that hold its codebooks, or the scales of prefix codes.
    """

    def __init__(self, weight: StoredWeight, model: ModelProto) -> None:
        if not isinstance(weight.scope.proto, GraphProto) or weight.scope.path:
            raise ModelError(f"{weight.name}: is in a subgraph or function, which cannot be trained")
        self.name, self.shape = weight.name, weight.shape
        self._decodes = {n.output[0]: _read(weight, n, model) for n in weight.nodes if n.op_type == "Decode"}
        tables = {} if self._decodes else _tables(weight)
        self.books = tuple(dict.fromkeys([*(d.moving for d in self._decodes.values()), *tables]))
        for name in self.books:
            if name not in weight.scope.initializers:
                raise ModelError(f"{weight.name}: its codebook '{name}' is no initializer; compress the model again")
        self._rest: TorchGraph | None = None  # what follows the blocks, where there is more than a Decode node
        if self.name not in self._decodes:
            self._rest = TorchGraph(
                _alone(weight, main_opset(model)), supplied=[*self._decodes, *tables], folder=weight.folder
            )
        self.uses = {name: torch.zeros((), dtype=torch.int64) for name in self.books}
        for decode in self._decodes.values():
            self.uses[decode.moving] = self.uses[decode.moving] + decode.uses
        for name, index in tables.items():
            assert self._rest is not None
            codes, words = self._rest.values[index].long().reshape(-1), weight.scope.initializers[name].dims[0]
            self.uses[name] = self.uses[name] + torch.bincount(codes, minlength=words)

    def compute(self, codebooks: Mapping[str, Tensor]) -> Tensor:
        """The weight from codebooks by name, each float32 in its stored shape."""
        made = {output: decode.compute(codebooks) for output, decode in self._decodes.items()}
        if self._rest is None:
            return made[self.name]
        if not self._decodes:
            made = {name: codebooks[name] for name in self.books}
        return self._rest.run({}, made)[self.name]

    def to(self, device: str | torch.device) -> None:
        """Move what is fixed to a device."""
        for output, decode in self._decodes.items():
            self._decodes[output] = decode.to(device)
        if self._rest is not None:
            self._rest.to(device)


class CodedModel:
    """All weights of a compressed model that are stored as codes.

    A codebook that several weights share is one: it gets the gradients of all of them.

    Attributes:
        weights: In the order of their layers.
        target: What the model was written for.
    """

    def __init__(self, model: ModelProto, path: Path) -> None:
        """Read the codes.

        Raises:
            ModelError: The model holds no codes, or holds them where they cannot be trained.
        """
        stored = find_stored(model, path.parent, read_record(model))
        self.weights = tuple(CodedWeight(weight, model) for weight in stored)
        if not any(weight.books for weight in self.weights):
            raise ModelError(f"{path}: holds no codebooks; give a file that 'vqonnx compress' wrote")
        names = list(dict.fromkeys(name for weight in self.weights for name in weight.books))
        initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._arrays = {name: modelfile.to_array(initializers[name], path.parent) for name in names}
        self._uses = {name: sum(weight.uses.get(name, 0) for weight in self.weights) for name in names}
        coded = any(node.domain == DOMAIN for weight in stored for node in weight.nodes)
        has_body = any(function.domain == DOMAIN for function in model.functions)
        self.target: Target = "portable" if not coded else "hybrid" if has_body else "custom"

    def parameters(self, gradient: Gradient, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """New float32 copies of the codebooks by name, which require gradients.

        Args:
            gradient: ``mean``: the gradient of a word is the mean of those of the blocks that use it (Stock et al.
                2020, released code); ``sum``: the gradient itself.
            device: Where they are.
        """
        return {
            name: moving(values, torch.as_tensor(self._uses[name]), gradient, device)
            for name, values in self._arrays.items()
        }

    def stored(self, parameters: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
        """The codebooks rounded to the type in which they are stored, as float32.

        Raises:
            VqonnxError: A value is beyond the range of that type.
        """
        return {
            name: rounded(name, parameters[name], before.dtype).astype(np.float32)
            for name, before in self._arrays.items()
        }

    def to(self, device: str | torch.device) -> CodedModel:
        """Move what is fixed to a device."""
        for weight in self.weights:
            weight.to(device)
        return self


def moving(codebooks: NDArray[Any], uses: Tensor, gradient: Gradient, device: str | torch.device = "cpu") -> Tensor:
    """A float32 copy of codebooks ``[..., words, width]`` that requires gradients.

    Args:
        codebooks: Values as stored.
        uses: How many blocks use each word, ``[words of all stages and books]``.
        gradient: As in `CodedModel.parameters`.
        device: Where it is.
    """
    parameter = torch.tensor(codebooks.astype(np.float32), device=device, requires_grad=True)
    if gradient == "mean":
        share = 1 / uses.clamp(min=1).reshape(*codebooks.shape[:-1], 1).to(device, torch.float32)
        parameter.register_hook(lambda slope: slope * share)  # type: ignore[no-untyped-call]
    return parameter


def rounded(name: str, codebooks: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Codebooks in the type in which they are stored; whole numbers end where int8 does.

    Raises:
        VqonnxError: A value is beyond the range of a floating-point type.
    """
    values = codebooks.detach().cpu().numpy()
    if dtype == np.int8:
        return np.asarray(np.clip(np.rint(values), -128, 127), dtype)
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = values.astype(dtype) + dtype.type(0)  # docs/format.md: no negative zero
    if not np.isfinite(stored).all():
        raise VqonnxError(
            f"codebook '{name}' has grown to {np.abs(values).max():.3g}, beyond {dtype}; choose a smaller rate"
        )
    return stored


def _read(weight: StoredWeight, node: NodeProto, model: ModelProto) -> _Decode:
    """The node's form. Its constants are checked as `Coded` checks them."""
    made = any(node.input[0] in other.output for other in weight.nodes)
    codes = compute(weight, [node.input[0]], model)[0] if made else weight.constant(node.input[0])
    codebooks, scales = (weight.constant(name) for name in node.input[1:3])
    bits, cols, *split = (int(number) for number in weight.constant(node.input[3]))
    groups = -(-cols // codebooks.shape[3])
    place = tuple(split), tuple(attributes(node)["perm"])
    values = unpack(codes, bits, groups)
    if made or _are_multiples(codebooks):
        blocks = FixedCodes.of(Coded(values, codebooks, cols))
        uses = torch.full((scales.size,), values.size // scales.size)
        return _Decode(blocks, node.input[2], uses, torch.from_numpy(codebooks.astype(np.float32)), *place)
    plain = scales.size == 1 and scales.item() == 1
    blocks = FixedCodes.of(Coded(values, codebooks, cols, None if plain else scales))
    return _Decode(blocks, node.input[1], blocks.uses, None, *place)


def _are_multiples(codebooks: NDArray[Any]) -> bool:
    """Whether the words are all the whole numbers of some bits, as layers share them: their steps are the scales."""
    bits = code_bits(codebooks.shape[2])
    return codebooks.dtype == np.int8 and bits <= DEEPEST and np.array_equal(codebooks, book(bits)[None, None])


def _tables(weight: StoredWeight) -> dict[str, str]:
    """Of a weight that standard nodes make: the tables of words, and the name of the numbers that look them up."""
    makers = {output: node for node in weight.nodes for output in node.output}
    found = {}
    for node in weight.nodes:
        if node.op_type == "Gather" and attributes(node).get("axis", 0) == 0:
            source = node.input[0]
            source = makers[source].input[0] if source in makers and makers[source].op_type == "Cast" else source
            if source not in makers and weight.constant(source).dtype in WORD_TYPES:
                found[source] = node.input[1]
    return found


def _alone(weight: StoredWeight, opset: int) -> ModelProto:
    """A model without inputs that yields the weight; ``Decode`` nodes are left out."""
    constants = [name for name in weight.constants if name in weight.scope.initializers]
    others = [weight.scope.producers[name] for name in weight.constants if name not in weight.scope.initializers]
    graph = helper.make_graph(
        [*others, *(node for node in weight.nodes if node.domain != DOMAIN)],
        "weight",
        [],
        [ValueInfoProto(name=weight.name)],
        initializer=[weight.scope.initializers[name] for name in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
