"""Rescalings of a model's parameters that leave what it computes unchanged."""

from ._control import CONTROL
from ._elementwise import ELEMENTWISE
from ._linear import LINEAR
from ._shape import SHAPE

RULES = ELEMENTWISE | SHAPE | LINEAR | CONTROL
