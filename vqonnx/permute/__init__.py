"""Free permutations: channels of a model may be put in another order if all that touches them is changed with them.

The outputs stay what they are, and weights may become easier to code (Martinez et al. 2021, arXiv 2010.15703).
"""

from vqonnx.permute.apply import apply
from vqonnx.permute.groups import Group, Groups, Part, Pinned, find_groups
from vqonnx.permute.search import Blocks, Permuted, best_permutations, permutations, readers_of
from vqonnx.permute.use import permute, prove

__all__ = [
    "Blocks",
    "Group",
    "Groups",
    "Part",
    "Permuted",
    "Pinned",
    "apply",
    "best_permutations",
    "find_groups",
    "permutations",
    "permute",
    "prove",
    "readers_of",
]
