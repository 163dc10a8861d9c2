"""Names of values in all scopes of a model: which there are, how often each is written, and giving them new ones.

A subgraph sees the names around it; a function sees its own alone. Inputs and outputs of subgraphs and functions are
matched by position, so their names are as free as those inside; those of the main graph are the model's interface.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

STANDARD = ("", "ai.onnx")
_LETTERS = string.ascii_letters + string.digits + "_"


@dataclass(eq=False)
class Space:
    """A graph or function, and the names that it defines.

    Attributes:
        proto: The graph or function.
        parent: The space around a subgraph, whose names it sees.
        uses: How often each name that it defines is written, in order of definition.
        fixed: Those that must stay as they are.
        inner: Subgraphs of its nodes.
    """

    proto: GraphProto | FunctionProto
    parent: Space | None
    uses: dict[str, int] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    inner: list[Space] = field(default_factory=list)

    @property
    def all(self) -> list[Space]:
        """The space and those in it."""
        return [self, *(space for part in self.inner for space in part.all)]

    def home(self, name: str) -> Space | None:
        """The space that defines a name as it is seen here."""
        space: Space | None = self
        while space is not None and name not in space.uses:
            space = space.parent
        return space

    @property
    def leaving(self) -> set[str]:
        """Names that others than its own nodes read: its outputs, and what its subgraphs read (also their own)."""
        names = set(entry_names(self.proto.output))
        for each in (each for part in self.inner for each in part.all):
            names.update(entry_names(each.proto.output))
            names.update(name for node in each.proto.node for name in node.input)
        return names

    def mention(self, name: str) -> None:
        """Count one more writing of a name; one that nobody defines stays as it is."""
        home = self.home(name)
        if home is None:
            home = self
            home.uses[name] = 0
            home.fixed.add(name)
        home.uses[name] += 1


def spaces(model: ModelProto) -> list[Space]:
    """The main graph and each function."""
    main = _space(model.graph, None, fixed=False)
    main.fixed |= {entry.name for entry in (*model.graph.input, *model.graph.output)}
    found = [main, *(_space(function, None, fixed=False) for function in model.functions)]
    for space in found:
        for each in space.all:
            for name in _mentions(each.proto):
                each.mention(name)
            if isinstance(each.proto, GraphProto):  # parameters of quantised tensors name tensors in free text
                for note in each.proto.quantization_annotation:
                    named = {note.tensor_name, *(entry.value for entry in note.quant_parameter_tensor_names)}
                    for name in named:
                        home = each.home(name)
                        if home is not None:
                            home.fixed.add(name)
    return found


def shorten(space: Space, taken: Iterable[str] = (), first: Sequence[str] = ()) -> None:
    """Give every name in a space and its subgraphs that may change the shortest one, the most written ones first.

    Args:
        space: The main graph or a function. Its proto is changed; the space is of no use afterwards.
        taken: Names that must not be given.
        first: Of names that are written as often, these come first, in this order; the others in that of definition.
    """
    everywhere = space.all
    kept = {*taken, *(name for each in everywhere for name in each.fixed)}
    free = [(each, name) for each in everywhere for name in each.uses if name not in each.fixed]
    order = {name: place for place, name in reversed(list(enumerate(first)))}
    free.sort(key=lambda entry: (-entry[0].uses[entry[1]], order.get(entry[1], len(order))))
    fresh = short_names(kept)
    given: dict[int, dict[str, str]] = {id(each): {} for each in everywhere}
    for each, name in free:
        given[id(each)][name] = next(fresh)
    rename(space, lambda each, name: given[id(each)].get(name, name))


def short_names(taken: set[str], after: str = "") -> Iterator[str]:
    """Names of one letter or digit, then of two, and so on, without those that are taken.

    Args:
        taken: Those to leave out.
        after: Begin behind this one; nothing is given where it is none of these names.
    """
    number = 0
    for letter in after:
        if letter not in _LETTERS:
            return
        number = number * len(_LETTERS) + _LETTERS.index(letter) + 1
    while True:
        number += 1
        name, rest = "", number
        while rest:
            rest, digit = divmod(rest - 1, len(_LETTERS))
            name = _LETTERS[digit] + name
        if name not in taken:
            yield name


def rename(space: Space, new: Callable[[Space, str], str]) -> None:
    """Write another name for each, given the space that defines it and the old one."""

    def renamed(each: Space, name: str) -> str:
        home = each.home(name) if name else None
        return name if home is None else new(home, name)

    for each in space.all:
        proto = each.proto
        for node in proto.node:
            _replace(node.input, each, renamed)
            _replace(node.output, each, renamed)
        if isinstance(proto, FunctionProto):
            _replace(proto.input, each, renamed)
            _replace(proto.output, each, renamed)
            continue
        for entry in (*proto.input, *proto.output, *proto.value_info, *proto.initializer):
            entry.name = renamed(each, entry.name)
        for sparse in proto.sparse_initializer:
            sparse.values.name = renamed(each, sparse.values.name)


def substitute(space: Space, instead: Mapping[str, str]) -> None:
    """Read other values for those of one space, wherever they are seen; what defines them is left as it is."""
    for each in space.all:
        for node in each.proto.node:
            for index, name in enumerate(node.input):
                if name in instead and each.home(name) is space:
                    node.input[index] = instead[name]
        if each is not space and isinstance(each.proto, GraphProto):
            for entry in each.proto.output:
                if entry.name in instead and each.home(entry.name) is space:
                    entry.name = instead[entry.name]


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def entry_names(entries: Iterable[Any]) -> list[str]:
    """Names of the inputs or outputs of a graph or function."""
    return [entry if isinstance(entry, str) else entry.name for entry in entries]


def _space(proto: GraphProto | FunctionProto, parent: Space | None, *, fixed: bool) -> Space:
    space = Space(proto, parent)
    names = entry_names(proto.input)
    if isinstance(proto, GraphProto):
        if fixed:
            space.fixed |= {*names, *entry_names(proto.output)}
        names += [tensor.name for tensor in proto.initializer]
        names += [tensor.values.name for tensor in proto.sparse_initializer]
    names += [name for node in proto.node for name in node.output]
    space.uses = {name: 0 for name in names if name}
    for node in proto.node:
        # Some operators that are not of the standard know their subgraphs' inputs by name.
        space.inner += [_space(graph, space, fixed=node.domain not in STANDARD) for graph in subgraphs(node)]
    return space


def _mentions(proto: GraphProto | FunctionProto) -> Iterator[str]:
    """Every place where a name is written, subgraphs aside."""
    yield from (*entry_names(proto.input), *entry_names(proto.output))
    if isinstance(proto, GraphProto):
        yield from (tensor.name for tensor in proto.initializer)
        yield from (tensor.values.name for tensor in proto.sparse_initializer)
    for node in proto.node:
        yield from filter(None, (*node.input, *node.output))


def _replace(names: Any, space: Space, new: Callable[[Space, str], str]) -> None:
    for index, name in enumerate(names):
        names[index] = new(space, name)
