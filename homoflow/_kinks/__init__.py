"""The exact flow of networks with kinks, sliding included."""

from ._from_problem import (
    as_system as as_system,
    kinked_function as kinked_function,
    num_pairs as num_pairs,
)
from ._system import System as System
from .averaging._midpoint import (
    AveragedMidpoint as AveragedMidpoint,
    count_gradients as count_gradients,
)
from .filippov._event_log import Log as Log
from .filippov._forward_sensitivity import integrate as integrate
from .filippov._loop import find_sides as find_sides
from .filippov._progress import Solution as Solution
