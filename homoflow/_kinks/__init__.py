"""The exact flow of networks with kinks, sliding included."""

from ._derivative import integrate as integrate
from ._filippov import Filippov as Filippov
from ._loop import Solution as Solution
from ._system import as_system as as_system, kinked_function as kinked_function
