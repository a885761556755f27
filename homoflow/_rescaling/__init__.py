"""The orbits of a model's rescalings: all networks that compute the same function."""

from ._balance import balance as balance
from ._generating_laws import generating_laws as generating_laws
from ._projection import Orbit as Orbit, Rescaling as Rescaling
