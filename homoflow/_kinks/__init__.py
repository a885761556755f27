"""The exact flow of networks with kinks, sliding included."""

from ._derivative import integrate as integrate
from ._filippov import Filippov as Filippov
from ._log import EventKind as EventKind, Log as Log
from ._loop import Solution as Solution
from ._system import (
    System as System,
    as_system as as_system,
    kinked_function as kinked_function,
)
from .averaging._midpoint import KinkShare as KinkShare, evaluations as evaluations
