"""Rescalings of a model's parameters that leave what it computes unchanged."""

from ._control import CONTROL
from ._elementwise import ELEMENTWISE
from ._generators import Family as Family, Portion as Portion, families
from ._linear import LINEAR
from ._shape import SHAPE
from ._tracked import Leaf as Leaf
from ._walk import symmetries

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
