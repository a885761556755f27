"""Rescalings of a model's parameters that leave what it computes unchanged."""

from ._generators import (
    OrbitBlock as OrbitBlock,
    ScalingFamily as ScalingFamily,
)
from ._rescalings import (
    Rescalings as Rescalings,
    find_rescalings as find_rescalings,
)
from ._tracked_array import Leaf as Leaf
