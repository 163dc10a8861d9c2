"""Runs of channels that move together: atoms that are split where an axis is cut, and joined where two axes meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Atom:
    """Neighbouring channels. One that was joined or split stands for others: its `leaves`.

    Attributes:
        size: Number of channels.
        pinned: Why they must stay in their order; empty where nothing speaks against another.
    """

    size: int
    pinned: str = ""
    _same: Atom | None = field(default=None, repr=False)
    _parts: tuple[Atom, ...] = field(default=(), repr=False)

    def leaves(self) -> list[Atom]:
        """The atoms that this one stands for, in order."""
        root = self
        while root._same is not None:
            root = root._same
        if root is not self:
            self._same = root  # later look-ups are short
        if not root._parts:
            return [root]
        return [leaf for part in root._parts for leaf in part.leaves()]

    def split(self, at: int) -> None:
        """Cut a leaf behind its first ``at`` channels."""
        self._parts = Atom(at, self.pinned), Atom(self.size - at, self.pinned)

    def absorb(self, other: Atom) -> None:
        """Let another leaf of the same size move with this one."""
        self.pinned = self.pinned or other.pinned
        other._same = self


@dataclass(frozen=True, eq=False)
class Piece:
    """Part of an axis: each channel of the atom takes ``run`` neighbouring entries."""

    atom: Atom
    run: int = 1


Pieces = Sequence[Piece]


def resolve(pieces: Iterable[Piece]) -> list[Piece]:
    """The same part of an axis in terms of leaves."""
    return [Piece(leaf, piece.run) for piece in pieces for leaf in piece.atom.leaves()]


def length(pieces: Iterable[Piece]) -> int:
    """Entries of the axis that the pieces take."""
    return sum(piece.atom.size * piece.run for piece in pieces)


def pin(pieces: Iterable[Piece], reason: str) -> None:
    """Leave these channels in their order; the first reason stays."""
    for piece in resolve(pieces):
        piece.atom.pinned = piece.atom.pinned or reason


def join(left: Pieces, right: Pieces) -> bool:
    """Let the channels of two axes move together, entry by entry; False if their entries do not match."""
    if length(left) != length(right):
        return False
    ours, theirs = deque(left), deque(right)
    while ours:
        one, other = _head(ours), _head(theirs)
        if one.run != other.run:
            return False
        if one.atom.size > other.atom.size:
            one.atom.split(other.atom.size)
        elif one.atom.size < other.atom.size:
            other.atom.split(one.atom.size)
        else:
            if one.atom is not other.atom:
                one.atom.absorb(other.atom)
            ours.popleft()
            theirs.popleft()
    return True


def cut(pieces: Pieces, start: int, stop: int) -> list[Piece] | None:
    """The entries ``start..stop`` of an axis; None if a bound falls inside the run of a channel."""
    behind = _behind(pieces, start)
    if behind is None:
        return None
    rest = _behind(behind, stop - start)
    if rest is None:
        return None
    behind = resolve(behind)
    return behind[: len(behind) - len(rest)]


def _behind(pieces: Pieces, entries: int) -> list[Piece] | None:
    """What is left of an axis without its first entries."""
    rest = deque(pieces)
    while entries > 0 and rest:
        head = _head(rest)
        size = head.atom.size * head.run
        if size > entries:
            if entries % head.run:
                return None
            head.atom.split(entries // head.run)
        else:
            entries -= size
            rest.popleft()
    return resolve(rest)


def _head(pieces: deque[Piece]) -> Piece:
    """The first piece, which is made a leaf in its place."""
    first = pieces.popleft()
    pieces.extendleft(reversed(resolve([first])))
    return pieces[0]
