"""Rescalings of a model's parameters that leave what it computes unchanged."""

from ._generators import Family as Family, Portion as Portion, families
from ._interpreter import symmetries
from ._tracked_array import Leaf as Leaf
from .rules_contraction import LINEAR
from .rules_control_flow import CONTROL
from .rules_elementwise import ELEMENTWISE
from .rules_shape import SHAPE

RULES = ELEMENTWISE | SHAPE | LINEAR | CONTROL


def rescalings(closed, leaves, *, ignores_small_constants=False):
    """The families of rescalings of `leaves`, the first inputs of a traced function.

    **Returns:** the families, the arrays that their portions refer to (the leaves, or
    the slices that loops take them apart into), the names of operations that hide
    parameters from the analysis, and whether it met small constants.
    """
    walk = symmetries(
        closed, leaves, RULES, ignores_small_constants=ignores_small_constants
    )
    arrays = [part for leaf in leaves for part in leaf.parts()]
    found = families(arrays, walk.equations)
    return found, arrays, walk.opaque, walk.met_small_constants
