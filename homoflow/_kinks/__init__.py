"""The exact flow of networks with kinks, sliding included."""

from ._system import (
    System as System,
    as_system as as_system,
    kinked_function as kinked_function,
)
from .averaging._midpoint import KinkShare as KinkShare, evaluations as evaluations
from .filippov._event_log import Log as Log
from .filippov._forward_sensitivity import integrate as integrate
from .filippov._loop import Solution as Solution
