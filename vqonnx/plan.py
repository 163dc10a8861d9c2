"""Which layers are compressed, by which method: the user's patterns, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vqonnx.errors import OptionError
from vqonnx.graph import LINEAR, Site, Skipped
from vqonnx.menu import Plan
from vqonnx.method import Method

_SEEDS = 2**31  # each layer adds to the seed, and scikit-learn takes less than 2**32


@dataclass(frozen=True)
class Override:
    """A method for the layers whose weight or node name matches a pattern; None leaves them alone."""

    pattern: str
    method: Method | None


def check_numbers(*, seed: int, batch: int, jobs: int) -> None:
    """Refuse numbers that no run can use.

    Raises:
        OptionError: One is out of range.
    """
    if not 0 <= seed < _SEEDS:
        raise OptionError(f"seed is {seed}; choose 0 to {_SEEDS - 1}")
    for name, number in (("batch", batch), ("jobs", jobs)):
        if number < 1:
            raise OptionError(f"{name} is {number}; choose 1 or more")


def make_plan(
    sites: Sequence[Site],
    method: Method,
    include: Sequence[str],
    exclude: Sequence[str],
    op_types: Sequence[str],
    overrides: Sequence[Override],
) -> tuple[Plan, list[Skipped]]:
    """The method of each site, by the user's patterns. A pattern that matches nothing is an error."""
    unknown = sorted(set(op_types) - set(LINEAR))
    if unknown:
        raise OptionError(f"operator '{unknown[0]}' is not compressed; choose from {', '.join(LINEAR)}")
    for pattern in (*include, *exclude, *(override.pattern for override in overrides)):
        if sites and not any(_matches(site, pattern) for site in sites):
            names = ", ".join(site.name for site in sites[:5])
            raise OptionError(f"pattern '{pattern}' matches none of the {len(sites)} layers ({names} ...)")
    plan: Plan = []
    skipped = []
    for site in sites:
        chosen = next((o.method for o in overrides if _matches(site, o.pattern)), method)
        if site.depthwise and chosen is not None and not chosen.depthwise:
            skipped.append(Skipped(site.name, f"depthwise convolution ({site.group} groups of one channel)"))
        elif site.op_type not in op_types:
            skipped.append(Skipped(site.name, f"{site.op_type} is not among the operators asked for"))
        elif include and not any(_matches(site, pattern) for pattern in include):
            skipped.append(Skipped(site.name, "not included"))
        elif any(_matches(site, pattern) for pattern in exclude):
            skipped.append(Skipped(site.name, "excluded"))
        elif chosen is None:
            skipped.append(Skipped(site.name, "left alone by the configuration"))
        else:
            plan.append((site, chosen))
    return plan, skipped


def _matches(site: Site, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (site.name, *(use.node.name for use in site.uses)) if name)
