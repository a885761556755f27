"""From a traced function to the families of rescalings that leave it unchanged."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr

from ._generators import ScalingFamily, find_families
from ._interpreter import find_symmetries
from ._tracked_array import Leaf
from .rules_contraction import CONTRACTION_RULES
from .rules_control_flow import CONTROL_FLOW_RULES
from .rules_elementwise import ELEMENTWISE_RULES
from .rules_shape import SHAPE_RULES

RULES = ELEMENTWISE_RULES | SHAPE_RULES | CONTRACTION_RULES | CONTROL_FLOW_RULES


class Rescalings(NamedTuple):
    """What a function's structure shows.

    - `families`: of rescalings that leave the function unchanged.
    - `leaves`: the arrays that their blocks refer to: the parameters, or the slices that
        loops take them apart into.
    - `opaque`: names of operations that hide parameters from the analysis.
    - `has_small_constants`: whether x + ε was met.
    """

    families: list[ScalingFamily]
    leaves: list[Leaf]
    opaque: set[str]
    has_small_constants: bool


def find_rescalings(
    closed: ClosedJaxpr,
    leaves: Sequence[Leaf],
    *,
    ignores_small_constants: bool = False,
) -> Rescalings:
    """The rescalings of `leaves`, the first inputs of a traced function."""
    interpreter = find_symmetries(
        closed, leaves, RULES, ignores_small_constants=ignores_small_constants
    )
    parts = [part for leaf in leaves for part in leaf.parts()]
    return Rescalings(
        find_families(parts, interpreter.equations),
        parts,
        interpreter.opaque,
        interpreter.met_small_constants,
    )
