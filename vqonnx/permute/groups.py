"""Find the channels of a model that may be put in another order without a change of its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from vqonnx.permute.atoms import Atom, Piece, pin, resolve
from vqonnx.permute.reader import Reader, Role, Unknown, label
from vqonnx.permute.rules import RULES
from vqonnx.place import main_opset

_OLDEST_OPSET = 7  # before it broadcasting had other rules


@dataclass(frozen=True)
class Part:
    """Where the channels of a group lie in a constant: channel ``i`` at ``start + i * run`` and what follows.

    Attributes:
        name: Name of the constant, or of the weight as its layers read it.
        axis: Its axis.
        start: Entry of the first channel.
        run: Entries of each.
    """

    name: str
    axis: int
    start: int
    run: int


@dataclass(frozen=True)
class Group:
    """Channels that may take any order, if they take it everywhere.

    Attributes:
        size: Number of channels.
        producers: Weights of which they are outputs.
        consumers: Weights of which they are inputs.
        constants: All constants that have to change with them, those weights included.
    """

    size: int
    producers: tuple[Part, ...]
    consumers: tuple[Part, ...]
    constants: tuple[Part, ...]


@dataclass(frozen=True)
class Pinned:
    """Channels that have to stay in their order, and why.

    Attributes:
        size: Number of channels.
        consumers: Weights of which they are inputs.
        reason: Why.
    """

    size: int
    consumers: tuple[Part, ...]
    reason: str


@dataclass(frozen=True)
class Groups:
    """What `find_groups` saw, in the order of the graph."""

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]


def find_groups(model: ModelProto, folder: str | Path) -> Groups:
    """Find the groups of a model's main graph. ``folder`` is where it lies, for external data.

    Raises:
        ModelError: Its constants cannot be read.
    """
    if main_opset(model) < _OLDEST_OPSET:
        return Groups((), ())
    read = Reader(model, Path(folder))
    _read_nodes(read)
    _pin_ends(read)
    return _collect(read)


def _read_nodes(read: Reader) -> None:
    for node in read.scope.proto.node:
        if all(name in read.known.constants for name in node.output if name):
            continue
        read.begin()
        inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") and not inner else None
        try:
            if rule is None:
                raise Unknown(f"{label(node)} may mix channels")
            rule(read, node)
        except Unknown as reason:
            read.stop(node, str(reason))


def _pin_ends(read: Reader) -> None:
    """Pin what leaves the graph, what inner graphs read, and constants that others read as well."""
    for name, channels in read.seen.items():
        if name in read.scope.outputs:
            pin(channels.pieces, f"'{name}' is an output of the graph")
        for use in read.scope.uses.get(name, ()):
            if use.scope is not read.scope:
                pin(channels.pieces, f"'{name}' is read in a subgraph")
    for (name, _), slot in read.slots.items():
        if name in read.scope.outputs:
            pin(slot.pieces, f"'{name}' is an output of the graph")
        for use in read.scope.uses.get(name, ()):
            if (id(use.node), use.index) not in slot.uses:
                pin(slot.pieces, f"'{name}' is also read by {label(use.node)}")


def _collect(read: Reader) -> Groups:
    parts: dict[int, list[tuple[Role, bool, Part]]] = {}
    for (name, axis), slot in read.slots.items():
        stored = name in read.scope.initializers or read.scope.producers[name].op_type == "Constant"
        for atom, start, run in _places(slot.pieces):
            parts.setdefault(id(atom), []).append((slot.role, stored, Part(name, axis, start, run)))
    groups, pinned, done = [], [], set()
    for made in read.atoms:
        for atom in made.leaves():
            if id(atom) in done:
                continue
            done.add(id(atom))
            found = parts.get(id(atom), [])
            consumers = _readers(read, [part for role, _, part in found if role == "consumer"])
            if atom.pinned:
                pinned.append(Pinned(atom.size, consumers, atom.pinned))
            elif atom.size > 1 and found:
                producers = _readers(read, [part for role, _, part in found if role == "producer"])
                constants = tuple(part for _, stored, part in found if stored)
                groups.append(Group(atom.size, producers, consumers, constants))
    return Groups(tuple(groups), tuple(pinned))


def _readers(read: Reader, parts: list[Part]) -> tuple[Part, ...]:
    """The parts of tensors that a layer reads as its weight, not of what those are made of."""
    linear = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    return tuple(
        part
        for part in parts
        if any(use.node.op_type in linear and use.index == 1 for use in read.scope.uses.get(part.name, ()))
    )


def _places(pieces: tuple[Piece, ...]) -> Iterator[tuple[Atom, int, int]]:
    start = 0
    for piece in resolve(pieces):
        yield piece.atom, start, piece.run
        start += piece.atom.size * piece.run
