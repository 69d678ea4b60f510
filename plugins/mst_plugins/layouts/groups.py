"""How many weights share a scale: the most that every layer's width allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mst.errors import PlanError
from mst.model.facts import LinearShape

GROUP_SIZES = (128, 64, 32)
# A 32-bit word holds eight 4-bit codes; zero points are packed across the outputs.
_OUT_MULTIPLE = 8


@dataclass(frozen=True)
class GroupSize:
    """The group size that was chosen, and what stood against larger ones.

    Attributes:
        group_size: weights that share a scale.
        forbidden: larger size to the widths that it does not divide, each with a layer of it.
    """

    group_size: int
    forbidden: dict[int, dict[int, str]]


def choose_group_size(
    linears: Iterable[LinearShape], sizes: Iterable[int] = GROUP_SIZES
) -> GroupSize:
    """Return the first of `sizes` that divides the inputs of every layer.

    Raises:
        PlanError: none does, or a layer's outputs can't be packed; names the layers.
    """
    layers = tuple(linears)
    for each in layers:
        if each.out_features % _OUT_MULTIPLE:
            raise PlanError(
                f"{each.name} has {each.out_features} outputs, which packed layouts can't hold:"
                f" they take multiples of {_OUT_MULTIPLE}. Export with --format merged."
            )
    widths = {each.in_features: each.name for each in reversed(layers)}
    forbidden: dict[int, dict[int, str]] = {}
    for size in sizes:
        against = {width: name for width, name in sorted(widths.items()) if width % size}
        if not against:
            return GroupSize(size, forbidden)
        forbidden[size] = against
    named = ", ".join(f"{width} ({name})" for width, name in against.items())
    raise PlanError(
        f"no group size of {', '.join(map(str, forbidden))} divides every layer's width:"
        f" {size} does not divide {named}. Export with --format merged."
    )
