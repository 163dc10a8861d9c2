"""Read a graph from its inputs on, and note for each tensor which of its axes holds channels and what they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from onnx import ModelProto, NodeProto

from vqonnx.permute.atoms import Atom, Piece, Pieces, join, length, pin, resolve
from vqonnx.permute.shapes import Shape, look
from vqonnx.scope import attributes, scopes

# What a constant does with the channels along one of its axes: makes them, reads them, or goes with them.
Role = Literal["producer", "consumer", "constant"]


class Unknown(Exception):
    """Says why channels must stay where they are; caught by the loop over nodes, which pins what the node reads."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The axis of a tensor that holds channels.

    Attributes:
        axis: Counted from the last, which is -1: so operands of different rank meet as broadcasting has it.
        pieces: What lies along it.
        rank: Axes of the tensor; None where it is not known.
    """

    axis: int
    pieces: tuple[Piece, ...]
    rank: int | None

    @property
    def length(self) -> int:
        return length(self.pieces)


@dataclass(eq=False)
class Slot:
    """An axis of a constant whose entries move with channels, and the inputs (node, index) that say so."""

    pieces: tuple[Piece, ...]
    role: Role
    uses: set[tuple[int, int]] = field(default_factory=set)


class Reader:
    """What has been read so far.

    Attributes:
        scope: The main graph.
        known: Values and shapes.
        seen: Channels of the tensors that depend on the model's inputs.
        why: For those without, the reason.
        slots: Axes of constants, by name and axis.
        atoms: All that were made, in order.
    """

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self.scope = scopes(model)[0]
        self.known = look(model, self.scope, folder)
        self.seen: dict[str, Channels] = {}
        self.why: dict[str, str] = {}
        self.slots: dict[tuple[str, int], Slot] = {}
        self.atoms: list[Atom] = []
        self._journal: list[Pieces] = []

    # For the rules

    def channels(self, name: str, axis: int, size: int | None) -> tuple[Piece, ...]:
        """The channels of an activation, which must lie along ``axis`` and number ``size`` (None: any).

        Raises:
            Unknown: They lie elsewhere.
        """
        found = self.seen.get(name)
        if found is None and size is None:
            raise Unknown(self.reason(name))
        if found is None:
            assert size is not None
            return self.pinned(size, self.reason(name))
        if found.axis != axis or (size is not None and found.length != size):
            raise Unknown(f"the channels of '{name}' lie along another axis")
        return found.pieces

    def fresh(self, size: int) -> tuple[Piece, ...]:
        """New channels."""
        atom = Atom(size)
        self.atoms.append(atom)
        return (Piece(atom),)

    def pinned(self, size: int, reason: str) -> tuple[Piece, ...]:
        """New channels that must stay in their order."""
        pieces = self.fresh(size)
        pin(pieces, reason)
        return pieces

    def reason(self, name: str) -> str:
        """Why nothing is known of the channels of a tensor."""
        return self.why.get(name, f"'{name}' is an input of the graph")

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor, with the channels that were seen; None where nothing is known of it."""
        return self.known.shapes.get(name)

    def constant_shape(self, node: NodeProto, index: int) -> tuple[int, ...]:
        """The shape of an input that must be a constant.

        Raises:
            Unknown: It is none, or its shape is not known.
        """
        name = node.input[index] if index < len(node.input) else ""
        shape = self.shape(name)
        if name not in self.known.constants or shape is None or None in shape:
            raise Unknown(f"'{name}' of {label(node)} is not a constant")
        return tuple(size for size in shape if size is not None)

    def declare(self, node: NodeProto, index: int, axis: int, pieces: Pieces, role: Role = "constant") -> None:
        """Say that along an axis of a constant lie these channels.

        Raises:
            Unknown: It is no constant, or has another size.
        """
        shape = self.constant_shape(node, index)
        if shape[axis] != length(pieces):
            raise Unknown(f"'{node.input[index]}' of {label(node)} has {shape[axis]} entries for {length(pieces)}")
        self._journal.append(pieces)
        self._declare(node.input[index], axis % len(shape), tuple(pieces), (id(node), index), role)

    def join(self, node: NodeProto, left: Pieces, right: Pieces) -> None:
        """Let channels that meet in a node move together.

        Raises:
            Unknown: They do not match.
        """
        if not join(left, right):
            pin(right, f"channels do not match in {label(node)}")
            raise Unknown(f"channels do not match in {label(node)}")

    def give(self, name: str, axis: int, pieces: Iterable[Piece], rank: int | None) -> None:
        """Note the channels of an output."""
        self.seen[name] = Channels(axis, tuple(pieces), rank)

    # For the loop over nodes

    def begin(self) -> None:
        """Forget what the last node declared."""
        self._journal = []

    def stop(self, node: NodeProto, reason: str) -> None:
        """Pin what a node reads and has declared; of its outputs nothing is known."""
        for pieces in self._journal:
            pin(pieces, reason)
        for name in node.input:
            if name in self.seen:
                pin(self.seen[name].pieces, reason)
        self.why.update((name, reason) for name in node.output if name)

    def _declare(self, name: str, axis: int, pieces: tuple[Piece, ...], use: tuple[int, int], role: Role) -> None:
        """Note a slot, and those of the constants that it comes from."""
        slot = self.slots.setdefault((name, axis), Slot(pieces, role))
        slot.uses.add(use)
        if slot.pieces is not pieces and not join(slot.pieces, pieces):
            pin(slot.pieces, f"'{name}' is read in different ways")
            pin(pieces, f"'{name}' is read in different ways")
        if name in self.scope.initializers:
            return
        node = self.scope.producers[name]
        if node.op_type == "Constant":
            if not any(attribute.name == "value" for attribute in node.attribute):
                pin(pieces, f"{label(node)} has no plain tensor value")
            return
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Identity", "Cast", "Transpose", *_RESHAPES):
            pin(pieces, f"'{name}' is computed by {label(node)}")
            return
        source = node.input[0]
        if node.op_type == "Transpose":
            rank = len(self.known.shapes[name])
            axis = list(attributes(node).get("perm", range(rank)[::-1]))[axis]
        elif node.op_type in _RESHAPES:
            moved = carried(self.shape(name), axis, pieces, self.shape(source))
            if moved is None:
                pin(pieces, f"{label(node)} mixes channels")
                return
            axis, pieces = moved
        self._declare(source, axis, pieces, (id(node), 0), role)


_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def label(node: NodeProto) -> str:
    """Operator and name of a node, for messages."""
    return f"{node.op_type} '{node.name or next(filter(None, node.output), '')}'"


def carried(
    before: Shape | None, axis: int, pieces: tuple[Piece, ...], after: Shape | None
) -> tuple[int, tuple[Piece, ...]] | None:
    """Where channels lie after a reshape (axes from the first); None if they do not lie along one axis, or unknown.

    In memory a channel is a digit of the place of an entry: an axis of the new shape holds channels if it holds that
    digit, with or without smaller ones, which make each channel a longer or shorter run.
    """
    if before is None or after is None:
        return None
    axis %= len(before)
    inner = _product(before[axis + 1 :])
    if inner is None:
        return None
    total = length(pieces)
    runs = {piece.run for piece in resolve(pieces)}
    for place, size in enumerate(after):
        outer = _product(after[place + 1 :])
        if size is None or outer is None or size * outer != total * inner:
            continue
        if outer == inner:
            return place, pieces
        run = runs.copy().pop()
        if len(runs) == 1 and run * inner % outer == 0:
            return place, tuple(Piece(piece.atom, run * inner // outer) for piece in resolve(pieces))
    return None


def _product(sizes: Shape) -> int | None:
    known = [size for size in sizes if size is not None]
    return prod(known) if len(known) == len(sizes) else None
