"""What layers of one model have in common, so that it is stored once: the trees and the codebook of prefix codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from vqonnx.form import Blocks, Coded, Form, Product
from vqonnx.prefix import common_trees


def share_trees(forms: Sequence[Form]) -> list[Form]:
    """The forms with one set of trees for all prefix codes, grown from all of them together.

    Codebooks that are parts of the longest one, as whole numbers are, become that one.
    """
    coded = [part for form in forms for part in parts_of(form) if part.coding is not None]
    if not coded:
        return list(forms)
    longest = max(coded, key=lambda part: part.words)
    assert longest.coding is not None
    offset = longest.coding.offset
    trees = common_trees(
        (part.codes[0].astype(np.int64) - part.coding.offset, part.coding.classes)
        for part in coded
        if part.coding is not None
    )

    def shared(form: Form) -> Form:
        if isinstance(form, Coded) and form.coding is not None:
            coding = replace(form.coding, trees=trees)
            first = offset - coding.offset
            words = longest.codebooks[:, :, max(first, 0) : first + form.words]
            if first < 0 or not np.array_equal(words, form.codebooks):
                return replace(form, coding=coding)
            codes = (form.codes + np.uint8(first)).astype(np.uint8)
            return replace(form, codes=codes, codebooks=longest.codebooks, coding=replace(coding, offset=offset))
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
