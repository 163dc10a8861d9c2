"""What layers of one model have in common, so that it is stored once: the trees of prefix codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from vqonnx.form import Blocks, Coded, Form, Product
from vqonnx.prefix import common_trees


def share_trees(forms: Sequence[Form]) -> list[Form]:
    """The forms with one set of trees for all prefix codes, grown from all of them together.

    Codebooks are laid over each other with their words nearest to zero at one place, so that codes of like values meet.
    """
    coded = [part for form in forms for part in parts_of(form) if part.coding is not None]
    if not coded:
        return list(forms)
    middles = [int(np.argmin(np.abs(part.codebooks.astype(np.float64)).sum(axis=3))) for part in coded]
    offsets = {id(part): max(middles) - middle for part, middle in zip(coded, middles, strict=True)}
    trees = common_trees(
        (part.codes[0].astype(np.int64) + offsets[id(part)], part.coding.classes)
        for part in coded
        if part.coding is not None
    )

    def shared(form: Form) -> Form:
        if isinstance(form, Coded) and form.coding is not None:
            return replace(form, coding=replace(form.coding, trees=trees, offset=offsets[id(form)]))
        if isinstance(form, Product):
            return replace(form, left=shared(form.left), right=shared(form.right))
        if isinstance(form, Blocks):
            return replace(form, parts=tuple(shared(part) for part in form.parts))
        return form

    return [shared(form) for form in forms]


def parts_of(form: Form) -> Iterator[Coded]:
    """Every part of a form that is codes and codebooks."""
    if isinstance(form, Coded):
        yield form
    elif isinstance(form, Product):
        yield from parts_of(form.left)
        yield from parts_of(form.right)
    elif isinstance(form, Blocks):
        for part in form.parts:
            yield from parts_of(part)
